r"""Fisher information of the observed sites, as scalars whose gradients are its root.

With c_m a scalar function of the network's outputs, :math:`\sum_m \nabla c_m \nabla
c_m^T = F`, so that M backward passes give a datum's Fisher information in any weights.
A Bernoulli's p = .5, say, has the Fisher information 1/4 in its logit f, and c = f / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lora.curvature.observations import Observations, Observed, observe
from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.synchronisation import scalar
from pyro_lora.likelihood.data_plate import DataPlate, data_plate
from pyro_lora.likelihood.likelihoods import check_draws, draws, known
from pyro_lora.likelihood.likelihoods import of as likelihood_of
from pyro_lora.likelihood.outcomes import (
    SingleOutcomes,
    is_given,
    single_outcomes,
    values_in_range,
)

Site = dict[str, Any]


@dataclass(frozen=True)
class FisherTerms:
    r"""Scalars c_m for each datum with :math:`\sum_m \nabla c_m \nabla c_m^T = F`.

    Attributes:
        terms: c, (..., M), differentiable, ... the batch shape of the site.
        coordinates: (..., M), with :math:`\nabla \log p(y) = \sum_m \alpha_m \nabla
            c_m`, or None where the terms don't span the score.
        scores: Whether terms are log likelihoods, which add up over the independent
            outcomes of a datum; roots stand side by side.
        observed: Where terms are not a root, but what the likelihood is a function of:
            that function.
    """

    terms: Tensor
    coordinates: Tensor | None
    scores: bool = False
    observed: Observed | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> FisherTerms:
        """The function's values at terms and coordinates."""
        alpha = self.coordinates
        return replace(
            self,
            terms=function(self.terms),
            coordinates=None if alpha is None else function(alpha),
        )

    def where(self, mask: Tensor | bool) -> FisherTerms:
        """Zero where a mask, which broadcasts to the batch shape, is off."""
        on = torch.as_tensor(mask, device=self.terms.device).bool()[..., None]
        return self.map(lambda x: x.where(on, torch.zeros_like(x)))


TermsFunction = Callable[[Any, Tensor], FisherTerms]


def exact_terms(fn: Any, value: Tensor) -> FisherTerms:
    """Fisher terms in closed form: C - 1 for C classes, one for a scalar.

    Args:
        fn: The observed site's distribution; event dims added by ``.to_event`` give
            terms of their own.
        value: The observed value.

    Returns:
        Terms and coordinates, (..., M) with ... the batch shape of ``fn``.

    Raises:
        TypeError: If the distribution has no exact Fisher information here.
        ValueError: If there are more classes than anyone has backward passes for.
    """
    single = single_outcomes(fn)
    fisher = likelihood_of(single.fn).root(value)
    # c = eta R with R held constant, so that its gradients in w are J^T R.
    terms = (fisher.parameter[..., None] * fisher.root).sum(-2)
    each = FisherTerms(terms, fisher.coordinates)
    if single.is_masked:
        each = each.where(single.unmasked)
    return each.map(lambda x: x.flatten(-1 - single.event_dims))


def mc_terms(fn: Any, value: Tensor, num_samples: int = 1) -> FisherTerms:
    r"""Fisher terms :math:`\log p(y_m) / \sqrt{M}` by sampled labels, any likelihood.

    Args:
        fn: The observed site's distribution.
        value: The observed value, of which only so much counts as says what there was
            to observe: which outcomes are missing, and of how many trials counts are.
        num_samples: M, the number of labels drawn for each datum. A datum's outcomes
            (event dims, such as tokens) are drawn together: M terms for all of them.

    Returns:
        Terms (..., M), no coordinates.

    Raises:
        TypeError: If the labels that can be drawn don't follow the density.
    """
    single = single_outcomes(fn)
    likelihood = known(single.fn)
    if likelihood is None:
        check_draws(single.fn)
    if likelihood is None or likelihood.log_prob_of_draws is None:
        of_draws = single.fn.log_prob(draws(single.fn, num_samples))
    else:
        # Counts, for example, have the number of trials that the given ones have.
        of_draws = likelihood.log_prob_of_draws(value, num_samples)
    log_prob = _of_data(single, value, at_least_float32(of_draws).movedim(0, -1))
    # F = E[s s^T], of which M draws are the mean: each has a root of s / sqrt(M).
    return FisherTerms(log_prob / num_samples**0.5, None, scores=True)


def _of_data(single: SingleOutcomes, value: Tensor, log_prob: Tensor) -> Tensor:
    """Log likelihoods of all outcomes of a datum, (..., M), from those of single ones.

    What doesn't count is 0, but still a function of the network's outputs.
    """
    counts = single.unmasked.to(log_prob.device) & is_given(single.fn, value)
    each = log_prob.where(counts[..., None], torch.zeros_like(log_prob))
    if single.event_dims == 0:
        return each
    # The outcomes of a datum are drawn together: one score for all of them.
    return each.flatten(-1 - single.event_dims, -2).sum(-2)


def empirical_terms(fn: Any, value: Tensor) -> FisherTerms:
    r"""The "empirical Fisher", :math:`\nabla \log p(y) \nabla \log p(y)^T`.

    Args:
        fn: The observed site's distribution.
        value: The given labels.

    Returns:
        Terms (..., 1) and coordinates, all one.
    """
    single = single_outcomes(fn)
    given, likelihood = value, known(single.fn)
    if likelihood is not None and likelihood.given is not None:
        missing = ~is_given(single.fn, value)
        event = (1,) * len(single.fn.event_shape)
        missing = missing.reshape(missing.shape + event)
        # Any outcome will do, since it's masked, but NaN would be in the gradient.
        given = draws(single.fn, 1)[0].where(missing, value)
    log_prob = _of_data(single, value, single.fn.log_prob(given)[..., None])
    ones = torch.ones_like(log_prob).detach()
    return FisherTerms(log_prob, ones, scores=True)


def likelihood_terms(
    sites: Sequence[Site], fisher_terms: TermsFunction
) -> tuple[FisherTerms, Tensor]:
    r"""Fisher terms and log likelihood, scaled and masked as by the user.

    The outcomes of a datum are independent given its parameters, so the Fisher
    information is the sum of theirs. Exact terms stand side by side; scores
    (:attr:`FisherTerms.scores`) add up to that of the datum, so that several sites,
    plates or tokens cost no further backward pass.

    Args:
        sites: The observed sites, nodes of a trace.
        fisher_terms: A function of a site's distribution and value.

    Returns:
        Terms and coordinates (M, B), and the log likelihood of the batch, a scalar in
        nats, both without the plates' subsampling scale.

    Raises:
        ValueError: If the sites' data differ in number, or can't be told from the
            outcomes of one datum.
    """
    by_site, log_probs = [], []
    for site in sites:
        _check_plates(site)
        terms, log_prob = _of_site(site, data_plate(site), fisher_terms)
        by_site.append(terms)  # each (M, B)
        log_probs.append(log_prob.double().sum())
    check_same_data(sites)
    log_likelihood = torch.stack(log_probs).sum()
    if len(by_site) == 1:
        return by_site[0], log_likelihood
    if any(f.scores for f in by_site):
        # One coordinate can't span the sum, in which each score has a scale of its own.
        total = torch.stack([f.terms for f in by_site]).sum(0)
        return FisherTerms(total, None), log_likelihood
    alphas = [f.coordinates for f in by_site if f.coordinates is not None]
    coordinates = torch.cat(alphas) if len(alphas) == len(by_site) else None
    # F = R R^T + S S^T = [R S] [R S]^T
    terms_of_all = torch.cat([f.terms for f in by_site])
    return FisherTerms(terms_of_all, coordinates), log_likelihood


def linear_terms(sites: Sequence[Site]) -> tuple[FisherTerms, Tensor]:
    """What the likelihood is a function of, in place of a root of its Fisher.

    Terms are the contrasts z of the network's outputs, coordinates the gradient of the
    log likelihood in them; ``observed`` is that likelihood at any z.

    Args:
        sites: The observed sites, nodes of a trace.

    Returns:
        Terms and coordinates (M, B), and the log likelihood of the batch, as of
        :func:`likelihood_terms`.

    Raises:
        ValueError: If the sites' data differ in number, or can't be told from the
            outcomes of one datum.
    """
    terms, scores, log_probs = [], [], []
    observed: list[tuple[Observations, Tensor]] = []
    offset = 0
    for site in sites:
        _check_plates(site)
        plate = data_plate(site)
        values, of_site, order = observe(site, plate)
        log_prob = site["fn"].log_prob(values_in_range(site))
        counted = scale_and_mask(log_prob, plate.scale, plate.mask)
        log_probs.append(counted.double().sum())
        score = torch.zeros_like(values).detach().flatten()
        own = of_site.at(of_site.at_fit).score.flatten()
        scores.append(score.index_put((order,), own.to(score)))
        terms.append(values)
        observed.append((of_site, order + offset))
        offset += values.numel()
    check_same_data(sites)
    everything = torch.cat(terms)
    coordinates = torch.cat(scores).reshape(everything.shape)
    total = torch.stack(log_probs).sum()
    return FisherTerms(
        everything, coordinates, observed=Observed(tuple(observed))
    ), total


def check_same_data(sites: Sequence[Site]) -> None:
    """Check that all sites are of the same data.

    Args:
        sites: The observed sites, nodes of a trace.

    Raises:
        ValueError: If their plates differ in size.
    """
    plates = {site["name"]: data_plate(site) for site in sites}
    sizes = {name: (plate.size, plate.full_size) for name, plate in plates.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The observed sites have different data: (in the batch, in all) are "
            f"{sizes}. Put them into one plate, missing outcomes masked, or name one "
            "by obs_site=."
        )


def _of_site(
    site: Site, plate: DataPlate, fisher_terms: TermsFunction
) -> tuple[FisherTerms, Tensor]:
    """Terms (M, B) and log likelihood of one site."""
    fn, value = site["fn"], values_in_range(site)
    log_prob = scale_and_mask(fn.log_prob(value), plate.scale, plate.mask)  # no N / B
    fisher = fisher_terms(fn, value)
    if plate.mask is not None:
        fisher = fisher.where(plate.mask)
    # A scaled Fisher information has a root scaled by the scale's square root.
    scale = scalar(plate.scale, log_prob.double())
    root = scale.sqrt()[..., None]
    num_terms = fisher.terms.shape[-1]
    fisher = fisher.map(lambda x: plate.data_last(x * root.to(x), fn.batch_shape))
    if fisher.scores and len(fisher.terms) > num_terms:  # other plates than the data's
        size = fisher.terms.shape[-1]
        total = fisher.terms.reshape(-1, num_terms, size).sum(0)
        fisher = replace(fisher, terms=total, coordinates=None)
    return fisher, log_prob


def several_plates(site: Site) -> list[str]:
    """Names of the plates of a site, if it is in several with more than one entry."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1]
    return [f.name for f in frames] if len(frames) > 1 else []


def wrong_plate(site: Site) -> str:
    """What to say where the subsampled plate isn't that of the network's inputs."""
    return (
        f"Site {site['name']!r} is in the plates {several_plates(site)}, of which "
        f"{data_plate(site).name!r} is subsampled, and so would be the data's, but its "
        "entries have the same inputs of the network: another plate is the data's. "
        "Declare the others as event dims, by .to_event(...) on the distribution."
    )


def _check_plates(site: Site) -> None:
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1]
    if len(frames) > 1 and all(f.full_size in (None, f.size) for f in frames):
        raise ValueError(
            f"Site {site['name']!r} is in the plates {several_plates(site)}, none "
            "of them subsampled, so the data's can't be told from the others. Declare "
            "the others as event dims, by .to_event(...) on the distribution."
        )
