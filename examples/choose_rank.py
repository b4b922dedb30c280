"""Which rank, without held-out labels: each one's evidence and leave-one-out.

The linearised network has both exactly, from the fit's rows. Beside them stands the
loss on reviews that no fit has seen, which they only stand for: the network was
linearised at weights that had seen the labels, so that leave-one-out in particular is
too low, and what counts is the order. Run it by ``python -m examples.choose_rank``.
"""

import pyro
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

NUM_DATA, RANKS = 96, (1, 2, 4, 8)
train, test = toy.reviews(NUM_DATA, seed=1), toy.reviews(256, seed=2)


def fit(rank: int) -> pl.LaplacePosterior:
    """A new adapter, trained and refined."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    lora = pl.lift(toy.network(rank=rank), prior=pl.priors.normal(scale=1.0))
    model = pl.models.classification(lora, num_data=NUM_DATA)
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.Exact()
    )
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(20):
        for batch in train:
            svi.step(**batch)
    return guide.laplace_approximation(train).refine().optimize_prior()


# Losses in nats a datum: the less, the better.
evidence, left_out, unseen = {}, {}, {}
print("rank  evidence  leave-one-out  unseen reviews")
for rank in RANKS:
    posterior = fit(rank)
    evidence[rank] = -float(posterior.log_evidence()) / NUM_DATA
    left_out[rank] = -float(posterior.leave_one_out().mean())
    unseen[rank] = pl.predict(posterior, test).metrics()["nll"]
    row = (evidence[rank], left_out[rank], unseen[rank])
    print(f"{rank:4}  {row[0]:8.3f}  {row[1]:13.3f}  {row[2]:14.3f}")
choices = {
    "the evidence": min(RANKS, key=lambda rank: evidence[rank]),
    "leave-one-out": min(RANKS, key=lambda rank: left_out[rank]),
}
for name, rank in choices.items():
    print(f"{name} chooses rank {rank}: {unseen[rank]:.3f} on unseen reviews")
