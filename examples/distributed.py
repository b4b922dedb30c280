"""Several processes: a fit, predictions and SVGD, shared out over all of them.

Run it by ``torchrun --nproc-per-node 2 -m examples.distributed``, or by
``accelerate launch --cpu --num_processes 2 -m examples.distributed``; by ``python -m
examples.distributed`` it gives the same numbers in one process.
"""

import os

import pyro
import torch
import torch.distributed as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

torch.set_num_threads(1)
if "RANK" in os.environ:  # as a launcher says
    dist.init_process_group("gloo")  # "nccl" on GPUs

pyro.set_rng_seed(0)  # so that all start at the same weights
train, test = toy.reviews(128, seed=1), toy.reviews(250, seed=2)
lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
model = pl.models.classification(lora, num_data=128)

# Particles are shared out: each process runs two of four, on the same batches.
svgd = pl.SVGD(
    model,
    pl.kernels.RBF(space="function"),
    Adam({"lr": 1e-2}),
    num_particles=4,
    init_loc_fn=lora.init_to_adapter(jitter="auto"),
)
svgd.run(train, num_epochs=5)

# A mode by stock Pyro, the same in each process; or one that DDP has trained.
guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
for _ in range(40):
    for batch in train:
        svi.step(**batch)

# The rest shares the data: each process is given its own batches.
posterior = guide.laplace_approximation(pl.share(train)).optimize_prior()
bayes = pl.predict(posterior, pl.share(test))
particles = pl.predict(svgd.posterior(), pl.share(test))

# Every process has all of the result.
if not dist.is_initialized() or dist.get_rank() == 0:
    print(f"log evidence {posterior.log_evidence():.3f}")
    for name, prediction in {"SVGD": particles, "Laplace": bayes}.items():
        m = prediction.metrics()
        print(f"{name:8} of {len(prediction)} reviews: nll {m['nll']:.4f}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
