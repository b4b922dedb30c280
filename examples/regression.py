"""Real outcomes, with the noise inferred beside the weights.

Run it by ``python -m examples.regression``.
"""

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

NOISE, NUM_DATA = 0.3, 512


def rated(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """A rating in place of the label: the share of kind words, with noise."""
    result = []
    for batch in batches:
        kind = (batch["input_ids"] < toy.UNKIND.start).float().mean(1)
        noise = NOISE * torch.randn(len(kind))
        result.append({**batch, "labels": 4 * (kind - 0.5) + noise})
    return result


pyro.set_rng_seed(0)
train, test = rated(toy.reviews(NUM_DATA, seed=1)), rated(toy.reviews(256, seed=2))

lora = pl.lift(toy.network(num_labels=1), prior=pl.priors.normal(scale=1.0))
model = pl.models.regression(lora, NUM_DATA)  # its noise is the site "noise"

guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
for _ in range(15):
    for batch in train:
        svi.step(**batch)
posterior = guide.laplace_approximation(train).optimize_prior()

print(f"noise: {float(posterior.mode()['noise']):.2f}, in truth {NOISE}")
prediction = pl.predict(posterior, test)
for name, value in prediction.metrics().items():
    print(f"{name:20} {value:.3f}")
low, high = prediction.quantile(0.05), prediction.quantile(0.95)
for i in range(3):
    print(
        f"between {low[i]:5.2f} and {high[i]:5.2f} with probability .9; "
        f"it was {prediction.labels[i]:5.2f}"
    )
