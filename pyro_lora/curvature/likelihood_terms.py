"""Fisher terms and log likelihood of all observed sites, datum by datum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lora.curvature.fisher import FisherTerms
from pyro_lora.likelihood.data_plate import DataPlate, data_plate
from pyro_lora.likelihood.outcomes import values_to_score

TermsFunction = Callable[[Any, Tensor], FisherTerms]
Site = dict[str, Any]


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
    found, log_probs = [], []
    for site in sites:
        _check_plates(site)
        terms, log_prob = _of_site(site, data_plate(site), fisher_terms)
        found.append(terms)
        log_probs.append(log_prob.double().sum())
    check_same_data(sites)
    log_likelihood = torch.stack(log_probs).sum()
    if len(found) == 1:
        return found[0], log_likelihood
    if any(part.scores for part in found):
        # One coordinate can't span the sum, in which each score has a scale of its own.
        total = torch.stack([part.terms for part in found]).sum(0)
        return FisherTerms(total, None), log_likelihood
    alphas = [part.coordinates for part in found if part.coordinates is not None]
    coordinates = torch.cat(alphas) if len(alphas) == len(found) else None
    terms_of_all = torch.cat([part.terms for part in found])
    return FisherTerms(terms_of_all, coordinates), log_likelihood


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
    fn, value = site["fn"], values_to_score(site)
    log_prob = scale_and_mask(fn.log_prob(value), plate.scale, plate.mask)
    found = fisher_terms(fn, value)
    if plate.mask is not None:
        found = found.where(plate.mask)
    # A scaled Fisher information has a root scaled by the scale's square root.
    scale = torch.as_tensor(plate.scale, dtype=torch.float64, device=log_prob.device)
    root = scale.sqrt()[..., None]
    num_terms = found.terms.shape[-1]
    found = found.map(lambda x: plate.data_last(x * root.to(x), fn.batch_shape))
    if found.scores and len(found.terms) > num_terms:  # other plates than the data's
        size = found.terms.shape[-1]
        total = found.terms.reshape(-1, num_terms, size).sum(0)
        found = replace(found, terms=total, coordinates=None)
    return found, log_prob


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
