"""Laplace: train an adapter, put a Gaussian around it, predict with its doubts.

Run it by ``python -m examples.laplace``.
"""

import pyro
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

pyro.set_rng_seed(0)
train, test = toy.reviews(128, seed=1), toy.reviews(256, seed=2)
elsewhere = toy.reviews(256, seed=3, unseen=True)

lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
model = pl.models.classification(lora, num_data=128)
guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())

# The mode, by stock Pyro. An adapter that is trained already needs no loop.
svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
for _ in range(40):
    for batch in train:
        svi.step(**batch)

# One pass over the data; then the scale of the prior, by the evidence, at no cost.
posterior = guide.laplace_approximation(train)
tuned = posterior.optimize_prior()
print(f"log evidence {posterior.log_evidence():.1f}, tuned {tuned.log_evidence():.1f}")

point = pl.predict(pl.ensemble(lora, [tuned.mode()]), test, model=model)
bayes = pl.predict(tuned, test)
unseen = pl.predict(tuned, elsewhere)

print("         accuracy    nll    ece")
for name, prediction in {"mode": point, "Laplace": bayes}.items():
    m = prediction.metrics()
    print(f"{name:8} {m['accuracy']:8.3f} {m['nll']:6.3f} {m['ece']:6.3f}")
for name, prediction in {"known": bayes, "unseen": unseen}.items():
    doubt = prediction.epistemic_entropy.mean()
    print(f"epistemic entropy of reviews of {name} words: {doubt:.3f} nats")
