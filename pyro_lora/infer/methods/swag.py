r"""SWAG: the Gaussian of the weights that an optimiser went through.

.. math:: N\left(\bar w, \tfrac12 \mathrm{diag}(v) + \tfrac{1}{2 (K - 1)} D D^T\right)

with :math:`\bar w` and v the mean and the variances of all iterates, and D the last K
of them less the mean (Maddox et al. 2019, https://arxiv.org/abs/1902.02476; there the
deviations are from the mean up to each iterate).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_lora.ground.settings import check_count
from pyro_lora.ground.weights import Weights, check_weights
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior

_LEAST = 1e-15  # of a standard deviation: a weight that didn't move has a density, too


def swag(
    lora: LiftedNetwork,
    iterates: Iterable[Mapping[str, Tensor]],
    *,
    rank: int = 20,
    model: Model | None = None,
    obs_site: str | None = None,
) -> GaussianPosterior:
    """The Gaussian with the mean of iterates, and half of their two covariances.

    Iterates are taken after training has converged, at a constant learning rate, once
    an epoch or more often. They are read once, and K of them kept::

        def iterates():
            for _ in range(20):
                train_one_epoch(peft_model)
                yield lora.weights()


        posterior = pl.methods.swag(lora, iterates(), model=model)

    Args:
        lora: The lifted network.
        iterates: Weight sets, as of ``lora.weights()``, at least two.
        rank: K, at least two: the last iterates that say how weights vary together.
        model: The Pyro model, where something needs it.
        obs_site: The likelihood's site, None for the only one.

    Returns:
        The posterior.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If there are fewer than two iterates, one has other sites or shapes
            than the network or isn't finite, or ``rank`` is less than two.
    """
    check_lora(lora)
    check_count("rank", rank, 2)
    shapes = {site: x.shape for site, x in lora.zeros().items()}
    last: deque[Weights] = deque(maxlen=rank)
    number = 0
    mean: Weights = {}
    squares: Weights = {}  # sums of squared distances from it
    for index, given in enumerate(iterates):
        check_weights(given, f"Iterate {index}")
        found = {site: x.shape for site, x in given.items()}
        if found != shapes:
            wrong = sorted(s for s in shapes | found if shapes.get(s) != found.get(s))
            raise ValueError(
                f"Iterate {index} differs from the network in {wrong}: expected weight "
                "sets as of lora.weights(), without leading dims."
            )
        # The network may be trained on: what it holds now is copied. Not under no_grad,
        # in which the training that the iterates come from would run, too.
        iterate = {site: x.detach().clone() for site, x in given.items()}
        last.append(iterate)
        number += 1
        for site, x in iterate.items():  # Welford's sums don't cancel
            wide = x.double()
            before = mean.get(site, torch.zeros_like(wide))
            mean[site] = before + (wide - before) / number
            change = (wide - before) * (wide - mean[site])
            squares[site] = squares.get(site, 0 * wide) + change
    if number < 2:
        raise ValueError(f"swag needs two iterates at least, found {number}.")
    for site, x in squares.items():
        if not x.isfinite().all():
            raise ValueError(
                f"Site {site!r}: an iterate is NaN or infinite. Train at a lower "
                "learning rate, or give iterates from before."
            )
    weight = (2 * (len(last) - 1)) ** -0.5
    loc, scale, deviations = {}, {}, {}
    for site, center in mean.items():
        like = last[0][site]
        loc[site] = center.to(like)
        sd = (squares[site] / (2 * number)).sqrt()
        scale[site] = sd.clamp_min(_LEAST).to(like)
        stack = torch.stack([iterate[site] for iterate in last])
        deviations[site] = (weight * (stack.double() - center)).to(like)
    return GaussianPosterior(
        loc, scale, (lora,), model, obs_site, deviations=deviations
    )
