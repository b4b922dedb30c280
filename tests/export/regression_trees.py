"""Trees of linear regression by several kinds of posterior, exact or nearly so."""

from functools import cache

import pyro
import xarray
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam, ClippedAdam

import pyro_lora as pl
from tests.infer.linear_regression import LinearRegression, linear_regression

Trees = dict[str, xarray.DataTree]


@cache
def regression_trees() -> tuple[LinearRegression, Trees]:
    """By Laplace, SVGD and an autoguide, once for all files that look at them.

    Under a prior so narrow that no datum pulls too hard for importance sampling.
    """
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    task = linear_regression(prior_sd=0.1)
    laplace = task.laplace(structure=pl.structures.Dense())
    svgd = pl.SVGD(
        task.model,
        pl.kernels.RBF(),
        Adam({"lr": 0.01}),
        80,
        init_loc_fn=task.lora.init_to_adapter(jitter=0.1),
    )
    svgd.run([task.whole], num_epochs=200, progress_bar=False)
    guide = autoguide.AutoNormal(task.model, init_loc_fn=task.lora.init_to_adapter())
    optim = ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 400)})
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(task.model, guide, optim, loss)
    for _ in range(400):
        svi.step(**task.whole)
    model, batches = task.model, task.batches
    trees = {
        "Laplace": pl.to_datatree(laplace, num_samples=1000, batches=batches),
        "SVGD": pl.to_datatree(svgd.posterior(), batches=batches),
        "AutoNormal": pl.to_datatree(
            guide, num_samples=1000, model=model, batches=batches
        ),
    }
    return task, trees
