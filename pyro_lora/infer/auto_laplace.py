"""AutoLaplace: MAP guide first, Gaussian around the mode afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lora.curvature.fisher import empirical_terms, exact_terms, mc_terms
from pyro_lora.curvature.fit import FisherFit, fit_fisher
from pyro_lora.curvature.latent_block import LatentBlock, fit_latents, small_latents
from pyro_lora.curvature.likelihood_terms import TermsFunction
from pyro_lora.curvature.structures import KFAC, Structure
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import (
    check_count,
    check_function,
    check_kind,
    check_path,
    check_positive,
    check_word,
)
from pyro_lora.ground.warning import warn
from pyro_lora.infer.site_subset import chosen_sites
from pyro_lora.lifting.initialization import check_start
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import check_batches
from pyro_lora.likelihood.batches import READ_ONCE, first_batch, trace_batch
from pyro_lora.likelihood.model_trace import (
    Batch,
    Model,
    check_model,
    evaluating,
    evaluating_model,
    lifted_networks,
    observed_sites,
)
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.prior_parameters import fixing, present_prior

# Which guide has put a parameter into Pyro's store.
_OWNERS: Any = WeakTensorKeyDictionary()


class AutoLaplace(AutoDelta):
    """MAP guide whose :meth:`laplace_approximation` is a posterior.

    Train it by SVI like ``AutoDelta``, or start from an adapter that is trained
    already and skip SVI. As with every Pyro guide, SVI keeps the parameters in the
    global param store, by the guide's name. Another ``AutoLaplace`` starts where its
    own ``init_loc_fn`` says, whatever an earlier one has left there, and takes its
    place; the earlier one keeps its values for :meth:`laplace_approximation`, but says
    that its place is taken if SVI goes on with it. What no guide of this process put
    there (``pyro.get_param_store().load``) is gone on from by SVI.

    Args:
        model: A Pyro model that calls a lifted network.
        init_loc_fn: Where to start, for example ``lora.init_to_adapter()``.
        structure: The form of the Fisher information: ``structures.KFAC()``,
            ``KFAC(reduce=True)``, ``EKFAC()`` (two passes over the data),
            ``Diagonal()``, ``Dense()``, or your own; for wide networks
            ``KFAC(rank=64)``.
        fisher: ``"exact"``: closed form, C - 1 backward passes for C classes.
            ``"mc"``: labels sampled from the model, any likelihood.
            ``"empirical"``: the given labels.
        num_fisher_samples: Labels for each datum with ``fisher="mc"``.
        obs_site: The likelihood's site, or a tuple of several that have the same data
            and whose Fisher information adds up; None is the only observed one.
        sites: The lifted sites that the posterior is over, the others fixed at the
            mode, as names or ``"last_layer"``: those of the lifted layer that is called
            last, such as a classifier's head. None is all of them.

    Raises:
        ValueError: If ``fisher`` or ``num_fisher_samples`` is something else, or there
            are no ``sites``.
    """

    def __init__(
        self,
        model: Model,
        *,
        init_loc_fn: Callable[[dict[str, Any]], Tensor],
        structure: Structure = KFAC(),
        fisher: Literal["exact", "mc", "empirical"] = "exact",
        num_fisher_samples: int = 1,
        obs_site: str | tuple[str, ...] | None = None,
        sites: Collection[str] | Literal["last_layer"] | None = None,
    ) -> None:
        check_model(model)
        check_function("init_loc_fn", init_loc_fn, "such as lora.init_to_adapter()")
        check_kind("structure", structure, Structure, "such as structures.KFAC()")
        check_count("num_fisher_samples", num_fisher_samples)
        terms: dict[str, TermsFunction] = {
            "exact": exact_terms,
            "mc": partial(mc_terms, num_samples=num_fisher_samples),
            "empirical": empirical_terms,
        }
        check_word("fisher", fisher, terms)
        if not isinstance(obs_site, str | None):
            check_kind("obs_site", obs_site, Sequence, "a name, or several")
        if sites is not None and not isinstance(sites, Collection):
            raise TypeError(f"sites must be names, or 'last_layer', found {sites!r}.")
        if sites is not None and not sites:
            raise ValueError("sites is empty. Name some, or leave it out for all.")
        super().__init__(_without_gaps(model), init_loc_fn=init_loc_fn)
        self._mark = object()  # of this guide's parameters in the store
        self._is_in_store = False
        self._user_model = (model,)
        self._structure = structure
        self._fisher_terms = terms[fisher]
        self._obs_site = obs_site
        self._sites = sites

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The guide's sample statements.

        Args:
            args: The model's.
            kwargs: The model's.

        Raises:
            ValueError: If another guide has taken this one's place in the param store,
                or ``init_to`` has values of a site that the model doesn't sample.
        """
        self._take_place_in_store()
        values = super().forward(*args, **kwargs)
        for parameter in self.parameters():
            _OWNERS[parameter] = self._mark
        return values

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        try:
            check_start(
                self.init_loc_fn,
                {s: node["value"] for s, node in trace.iter_stochastic_nodes()},
            )
        except BaseException:  # Ctrl-C, too: nothing is checked yet
            self.prototype_trace = None
            raise

    def _take_place_in_store(self) -> None:
        """Remove what other guides have put under this one's name.

        Raises:
            ValueError: If they have done so since this guide put its own there.
        """
        store = pyro.get_param_store()
        others = [
            name
            for name, parameter in store.named_parameters()
            if name.startswith(f"{self._pyro_name}.")
            and _OWNERS.get(parameter, self._mark) is not self._mark
        ]
        if others and self._is_in_store:
            raise ValueError(
                f"{others[0]!r} in Pyro's param store is another AutoLaplace's, made "
                "after this one, whose values SVI would train. Go on with that guide; "
                "or, to train several side by side, set "
                "pyro.settings.set(module_local_params=True) before you make them."
            )
        for name in others:
            del store[name]
        self._is_in_store = True

    @leaving_no_trace
    def laplace_approximation(
        self,
        batches: Iterable[Batch],
        *,
        progress_bar: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        max_memory_gb: float | None = None,
    ) -> LaplacePosterior:
        """Fit the Gaussian at the guide's present mode, in one pass over the data.

        Nothing is trained; dropout is off during the pass and restored after it. Away
        from a mode it warns, with the gradient's norm. Small
        latent sites outside of the network, such as an observation noise, get a dense
        block of their own, in a pass before it; covariances with the weights are
        ignored (see :class:`~pyro_lora.curvature.latent_block.LatentBlock`).

        Args:
            batches: Re-iterable of mappings of model keyword arguments, labels
                included, that cover all data exactly once.
            progress_bar: Show one.
            checkpoint: A folder. After an interruption, the same call with the same
                mode, batches and order resumes from the last batch written there, and
                gives the same posterior bit for bit, labels drawn by ``fisher="mc"``
                included (the random generator is set to where it was). Writing takes
                5 % of the time at most; what was written is deleted at the end.
            max_memory_gb: Limit, in GB, on the gradients of the layers' outputs that
                are kept at a time: without one, those of every backward pass of a
                batch. Beyond it they are computed in chunks of backward passes, then of
                sites, and twice over, with the same result. What can't be divided may
                exceed it: one backward pass of the layers that share an input, or of
                all layers with ``Dense``.
                Smaller batches lower what the network itself takes.

        Returns:
            The posterior, which is a guide.

        Raises:
            TypeError: If ``fisher="exact"`` has no closed form for the likelihood.
            ValueError: If there are no batches or no labels, values are NaN, the
                batches don't cover the plate's number of data, other latent sites set
                the weights' prior, are in a plate or not continuous, the checkpoint
                is of another fit or other batches, or ``max_memory_gb`` isn't positive.
        """
        if max_memory_gb is not None:
            check_positive("max_memory_gb", max_memory_gb)
        check_path("checkpoint", checkpoint)
        # After SVI a site that is a function of others isn't in the prototype.
        if self.prototype_trace is None or not lifted_networks(self.prototype_trace):
            self._start(batches)
        networks = _networks_in(self.prototype_trace)
        # Read outside of a Pyro context: calling the guide would look the values up in
        # the global param store, where another guide's may stand under the same names.
        others = small_latents(self.prototype_trace, networks)
        lifted = [site for lora in networks for site in lora.sites]
        values = {
            site: attrgetter(site)(self).detach().clone() for site in [*lifted, *others]
        }
        _check_mode(values)
        (model,) = self._user_model
        fit = partial(
            _fit,
            networks=networks,
            sites=chosen_sites(self._sites, model, values, networks, batches),
            structure=self._structure,
            fisher_terms=self._fisher_terms,
            obs_site=self._obs_site,
            progress_bar=progress_bar,
            max_memory_gb=max_memory_gb,
        )
        posterior = fit(model, values, batches, checkpoint=checkpoint)
        return replace(posterior, refit=fit)

    def __getstate__(self) -> dict[str, Any]:
        # AutoGuide's takes the model away, from the guide itself, too.
        model = self._model
        state: dict[str, Any] = super().__getstate__()
        self._model = model
        return {**state, "_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        (model,) = self._user_model
        self._model = (InitMessenger(self.init_loc_fn)(_without_gaps(model)),)
        self._mark, self._is_in_store = object(), False  # as yet, of a copy

    def _start(self, batches: Iterable[Batch]) -> None:
        """Take the initial values, as the first step of SVI would.

        Raises:
            ValueError: If there is nothing to take them from.
        """
        first = first_batch(batches, "the first one sets the guide up")
        # AutoDelta would take a missing label for a parameter, so look first.
        with evaluating_model():
            trace = trace_batch(self.model, {}, first, 0)
        networks = _networks_in(trace)
        observed_sites(trace, self._obs_site)
        small_latents(trace, networks)
        with evaluating(networks):
            self._setup_prototype(**first)


def _without_gaps(model: Model) -> Model:
    """The model without the gaps of an ``obs_mask``.

    AutoDelta would take them for parameters.
    """
    found: Model = poutine.block(model, hide_fn=_may_be_missing_outcome)
    return found


def _may_be_missing_outcome(site: Any) -> bool:
    name: str = site["name"]
    return site["type"] == "sample" and name.endswith("_unobserved")


def _fit(
    model: Model,
    values: dict[str, Tensor],
    batches: Iterable[Batch],
    *,
    networks: tuple[LiftedNetwork, ...],
    sites: Container[str],
    structure: Structure,
    fisher_terms: TermsFunction,
    obs_site: str | Sequence[str] | None,
    progress_bar: bool,
    max_memory_gb: float | None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LaplacePosterior:
    lifted = {site: values[site] for lora in networks for site in lora.sites}
    latents = {site: x for site, x in values.items() if site not in lifted}
    mode = {site: x for site, x in lifted.items() if site in sites}
    fixed = {site: x for site, x in lifted.items() if site not in sites}
    check_batches(batches)
    if latents and iter(batches) is batches:
        raise ValueError(READ_ONCE.format(f"{list(latents)} take a pass of their own"))
    with evaluating(networks):
        block = None
        if latents:
            block = fit_latents(model, lifted, latents, batches, obs_site)
        fit = fit_fisher(
            model,
            mode,
            networks,
            batches,
            structure=structure,
            fisher_terms=fisher_terms,
            obs_site=obs_site,
            latents={**latents, **fixed},
            progress_bar=progress_bar,
            checkpoint=checkpoint,
            max_memory_gb=max_memory_gb,
        )
    _warn_if_not_stationary(fit, block)
    return LaplacePosterior(
        fit.gaussian,
        fit.prior_mean,
        fit.log_likelihood,
        fit.log_prior,
        fixing(present_prior(networks), fixed),
        networks,
        model,
        fit.obs_site,
        block,
        fixed=fixed,
    )


def _networks_in(trace: Any) -> tuple[LiftedNetwork, ...]:
    networks = lifted_networks(trace)
    if not networks:
        raise ValueError(
            "The model has no lifted network. Call lora() inside the model, with "
            "lora = pyro_lora.lift(peft_model)."
        )
    return networks


def _check_mode(mode: dict[str, Tensor]) -> None:
    for site, value in mode.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"Site {site!r}: the mode has NaN or infinite values. Restart the "
                "training from finite weights, with a smaller learning rate."
            )


def _warn_if_not_stationary(fit: FisherFit, block: LatentBlock | None) -> None:
    # At a mode a Newton step gains nothing; from here it would gain g' P^-1 g / 2.
    newton = float(fit.gaussian.newton_decrement(fit.gradient))
    effective = float(fit.gaussian.effective_parameters())
    if block is not None:
        newton += block.newton_decrement()
        effective += len(block.gradient)
    if newton > effective:
        norm = float(sum(g.square().sum() for g in fit.gradient.values())) ** 0.5
        largest = max(fit.gradient, key=lambda s: float(fit.gradient[s].norm()))
        warn(
            "The weights aren't a mode of the log joint: its gradient has norm "
            f"{norm:.3g}, most of it at site {largest!r}, and g' P^-1 g = {newton:.3g} "
            f"exceeds the effective number of parameters, {effective:.3g}. Train "
            "longer, or check that the training used the same prior and data."
        )
