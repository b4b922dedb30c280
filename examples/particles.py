"""SVGD: particles that repel each other, and a Laplace approximation at each.

Run it by ``python -m examples.particles``.
"""

import pyro
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

NUM_PARTICLES = 5

pyro.set_rng_seed(0)
train, test = toy.reviews(128, seed=1), toy.reviews(256, seed=2)

lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
model = pl.models.classification(lora, num_data=128)

# Particles that start as fresh adapters, and repel each other in what they predict.
svgd = pl.SVGD(
    model,
    pl.kernels.RBF(space="function"),
    Adam({"lr": 1e-2}),
    NUM_PARTICLES,
    init_loc_fn=lora.init_to_fresh(),
)
svgd.run(train, num_epochs=25)
particles = svgd.posterior()

# A Gaussian around each: a pass over the data for each particle, no training.
components = []
for index in range(NUM_PARTICLES):
    weights = {site: value[index] for site, value in particles.particles.items()}
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(weights))
    components.append(guide.laplace_approximation(train).optimize_prior())
mixture = pl.MixturePosterior(components)

print("           accuracy    nll    ece")
for name, prediction in {
    "particles": pl.predict(particles, test),
    "mixture": pl.predict(mixture, test),
}.items():
    m = prediction.metrics()
    print(f"{name:10} {m['accuracy']:8.3f} {m['nll']:6.3f} {m['ece']:6.3f}")
distinct = pl.effective_num_predictions(model, particles.particles, test)
print(f"{NUM_PARTICLES} particles predict as {distinct:.2f} different ones would")
