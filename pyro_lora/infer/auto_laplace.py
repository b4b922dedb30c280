"""AutoLaplace: MAP guide first, Gaussian around the mode afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lora.curvature.fisher import (
    TermsFunction,
    empirical_terms,
    exact_terms,
    mc_terms,
)
from pyro_lora.curvature.fit import FisherFit, FisherPasses
from pyro_lora.curvature.latent_block import LatentBlock, fit_latents, small_latents
from pyro_lora.curvature.structures import KFAC, Structure
from pyro_lora.ground.interrupts import hooked, leaving_no_trace
from pyro_lora.ground.ranks import SAME_START, Ranks, all_ranks, ranks_of, sharing_data
from pyro_lora.ground.settings import (
    check_count,
    check_function,
    check_gradients,
    check_kind,
    check_path,
    check_positive,
    check_word,
)
from pyro_lora.ground.summary import brief, html, text
from pyro_lora.ground.warning import warn
from pyro_lora.infer.svgd.kernels import NoRepulsion
from pyro_lora.infer.svgd.svgd import SVGD
from pyro_lora.infer.svgd.training_state import check_optimizer
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.lifting.fingerprint import check_same_networks
from pyro_lora.lifting.initialization import check_start
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    FAILURES,
    READ_ONCE,
    Batch,
    check_batches,
    explaining,
    first_batch,
)
from pyro_lora.likelihood.data_plate import GivenRows
from pyro_lora.likelihood.model_trace import (
    Model,
    check_model,
    evaluating,
    evaluating_model,
    lifted_networks,
    observed_sites,
    trace_at,
    trace_batch,
    without_gaps,
)
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.prior import (
    fixing,
    networks_prior,
    scaled,
    under_prior,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
            ``Diagonal()``, ``Dense()``, ``Exact()`` (the dual, N (C - 1) dimensions, in
            which the mode can be refined), or your own; for wide networks
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

    posterior_by: ClassVar[str] = "laplace_approximation(batches)"

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
        super().__init__(without_gaps(model), init_loc_fn=init_loc_fn)
        self._mark = object()  # of this guide's parameters in the store
        self._is_in_store = False
        self._user_model = (model,)
        self._structure = structure
        self._fisher = fisher
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
        # The store holds these very tensors, which tell by whom they were put there.
        for parameter in self.parameters():
            _OWNERS[parameter] = self._mark
        return values

    def __repr__(self) -> str:
        # That of a torch module lists the modules inside of it, one for each name.
        return text("AutoLaplace", self._facts())

    def _repr_html_(self) -> str:
        return html("AutoLaplace", self._facts())

    def _facts(self) -> dict[str, str]:
        (model,) = self._user_model
        facts = {
            "structure": brief(self._structure),
            "fisher": brief(self._fisher),
            "obs_site": brief(self._obs_site),
            "sites": "all" if self._sites is None else brief(self._sites),
            "model": brief(model),
        }
        if self.prototype_trace is None:
            facts["mode"] = f"not set up, starts at {brief(self.init_loc_fn)}"
        return facts

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # By SVI's first step, which knows nothing of arguments: they are named here.
        called = self.model if not args else partial(self.model, *args)
        with explaining(kwargs, called, partial(_nodes_so_far, called, kwargs)):
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
    @sharing_data
    def laplace_approximation(
        self,
        batches: Iterable[Batch],
        *,
        progress_bar: bool | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        max_memory_gb: float | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LaplacePosterior:
        """Fit the Gaussian at the guide's present mode, in a pass over the data or two.

        Nothing is trained; dropout is off during the pass and restored after it. Away
        from a mode it warns, with the gradient's norm. Small
        latent sites outside of the network, such as an observation noise, get a dense
        block of their own, in a pass before it; covariances with the weights are
        ignored (see :class:`~pyro_lora.curvature.latent_block.LatentBlock`).

        Args:
            batches: Re-iterable of mappings of model keyword arguments, labels
                included, that cover all data exactly once.
            progress_bar: Show one; None: on a terminal or in a notebook.
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
            mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data; None: all
                ranks do, where ``torch.distributed`` is initialised, each with batches
                of its own (:func:`~pyro_lora.share`), which together cover the data.

        Returns:
            The posterior, which is a guide.

        Raises:
            TypeError: If ``fisher="exact"`` has no closed form for the likelihood.
            ValueError: If there are no batches or no labels, values are NaN, the
                batches (of all ranks together) don't cover the plate's number of data,
                the ranks are at different weights, other latent sites set
                the weights' prior, are in a plate or not continuous, the checkpoint
                is of another fit or other batches, or ``max_memory_gb`` isn't positive.

        Warns:
            UserWarning: If the weights aren't a mode of the log joint; the prior has
                correlations between weights, such as a previous posterior's, of whose
                precision only the diagonal counts; or the model observes other sites
                than those of ``obs_site``.
        """
        check_gradients()
        if max_memory_gb is not None:
            check_positive("max_memory_gb", max_memory_gb)
        check_path("checkpoint", checkpoint)
        ranks = ranks_of(mesh, "data")
        first, trace = None, self.prototype_trace
        # After SVI a site that is a function of others isn't in the prototype.
        if trace is None or not lifted_networks(trace):
            first, trace = self._look(batches, ranks)
        networks = _networks_in(trace)
        with trunk_once(networks, is_read_again=True):
            if first is not None:  # takes the initial values, as SVI's first step would
                with evaluating(networks):
                    self._setup_prototype(**first)
            # Read outside of a Pyro context: calling the guide would look the values up
            # in the global param store, where another guide's may stand under the same
            # names.
            others = small_latents(self.prototype_trace, networks)
            lifted = [site for lora in networks for site in lora.sites]
            values = {
                site: attrgetter(site)(self).detach().clone()
                for site in [*lifted, *others]
            }
            _check_mode(values)
            ranks.check_same(values, "the weights", SAME_START)
            check_same_networks(networks, ranks)
            (model,) = self._user_model
            passes = FisherPasses(
                model=model,
                networks=networks,
                values=values,
                sites=chosen_sites(self._sites, model, values, networks, batches),
                structure=self._structure,
                fisher_terms=self._fisher_terms,
                obs_site=self._obs_site,
                progress_bar=progress_bar,
                checkpoint=checkpoint,
                max_memory_gb=max_memory_gb,
                ranks=ranks,
            )
            return _fit(passes, batches)

    @leaving_no_trace
    def refit(
        self,
        posterior: LaplacePosterior,
        batches: Iterable[Batch],
        optim: PyroOptim,
        *,
        num_epochs: int = 1,
        progress_bar: bool | None = None,
        max_memory_gb: float | None = None,
    ) -> LaplacePosterior:
        """Train a posterior's mode on, under its prior, and fit the Gaussian there.

        With :meth:`LaplacePosterior.optimize_prior` between them, this is online
        Laplace (Immer et al. 2021, https://arxiv.org/abs/2104.04975): the mode belongs
        to the prior that the data have chosen::

            for _ in range(3):
                posterior = guide.refit(posterior, batches, optim).optimize_prior()

        Args:
            posterior: Made by this guide, or loaded; it may have any prior. Of a
                refined one the training starts at its ``origin()``.
            batches: All training data, as for :meth:`laplace_approximation`.
            optim: A ``pyro.optim`` optimizer.
            num_epochs: MAP epochs from there, dropout off, before the pass that fits.
            progress_bar: Show one; None: on a terminal or in a notebook.
            max_memory_gb: As for :meth:`laplace_approximation`.

        Returns:
            A new posterior under the same prior; guide, network and param store are as
            before.

        Raises:
            TypeError: If an argument is of a wrong kind.
            ValueError: If the posterior has sites that are fixed, or the batches can be
                read once only, or several ranks train.
        """
        if all_ranks().size > 1:
            raise ValueError(
                "refit trains in one process. Of several ranks, train the mode by SVI "
                "or SVGD, with gradients of all data, and fit by laplace_approximation."
            )
        expected = "a LaplacePosterior, such as laplace_approximation gives"
        check_kind("posterior", posterior, LaplacePosterior, expected)
        check_optimizer(optim)
        check_count("num_epochs", num_epochs)
        if max_memory_gb is not None:
            check_positive("max_memory_gb", max_memory_gb)
        check_batches(batches)
        if iter(batches) is batches:
            raise ValueError(READ_ONCE.format("a refit takes several passes"))
        if posterior.fixed:
            raise ValueError(
                "A refit trains every site, but this posterior is over some of them, "
                f"and {sorted(posterior.fixed)} are fixed. Fit without sites=."
            )
        mode, networks = posterior.origin(), posterior.networks
        (own_model,) = self._user_model
        # The posterior's prior, which tuning may have changed: the model has its own.
        model = under_prior(own_model, posterior.prior, networks, mode)
        trained = SVGD(  # one particle without repulsion is MAP
            model,
            NoRepulsion(),
            optim,
            1,
            init_loc_fn=lambda site: mode[site["name"]].clone(),
        )
        with evaluating(networks), GivenRows():  # or the fit would refuse them later
            trained.run(batches, num_epochs=num_epochs, progress_bar=progress_bar)
        passes = FisherPasses(
            model=model,
            networks=networks,
            values={site: x[0] for site, x in trained.get_named_particles().items()},
            sites=[site for lora in networks for site in lora.sites],
            structure=self._structure,
            fisher_terms=self._fisher_terms,
            obs_site=self._obs_site,
            progress_bar=progress_bar,
            max_memory_gb=max_memory_gb,
        )
        fitted = _fit(passes, batches)
        return replace(fitted, model=own_model, prior=posterior.prior)

    def __getstate__(self) -> dict[str, Any]:
        # AutoGuide's takes the model away, from the guide itself, too.
        model = self._model
        state: dict[str, Any] = super().__getstate__()
        self._model = model
        return {**state, "_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        (model,) = self._user_model
        self._model = (InitMessenger(self.init_loc_fn)(without_gaps(model)),)
        self._mark, self._is_in_store = object(), False  # as yet, of a copy

    def _look(self, batches: Iterable[Batch], ranks: Ranks) -> tuple[Batch, Any]:
        """The first batch, and the model's trace on it, before there are any values.

        Args:
            batches: Of which the first is used.
            ranks: Who shares the data.

        Raises:
            ValueError: If the guide can't take initial values from it.
        """
        first = first_batch(batches, "the first one sets the guide up", ranks)
        # AutoDelta would take a missing label for a parameter, so look first.
        with evaluating_model():
            trace = trace_batch(self.model, {}, first, 0)
        networks = _networks_in(trace)
        observed_sites(trace, self._obs_site)
        small_latents(trace, networks)
        return first, trace


def _nodes_so_far(model: Model, batch: Batch) -> Mapping[str, Any]:
    """Those of the trace of a model that fails."""
    handler: Any = poutine.trace(model)
    with suppress(*FAILURES):
        handler.get_trace(**batch)
    nodes: Mapping[str, Any] = handler.msngr.trace.nodes
    return nodes


def _fit(passes: FisherPasses, batches: Iterable[Batch]) -> LaplacePosterior:
    model, networks, held = passes.model, passes.networks, passes.held
    lifted = {s: passes.values[s] for lora in networks for s in lora.sites}
    latents = {site: x for site, x in held.items() if site not in lifted}
    fixed = {site: x for site, x in held.items() if site in lifted}
    check_batches(batches)
    if latents and iter(batches) is batches:
        raise ValueError(READ_ONCE.format(f"{list(latents)} take a pass of their own"))
    with evaluating(networks), trunk_once(networks, is_read_again=True):
        block = LatentBlock()
        if latents:
            block = fit_latents(
                model, lifted, latents, batches, passes.obs_site, passes.ranks
            )
        fit = passes.fit(batches)
    _warn_if_not_stationary(fit, block)
    return LaplacePosterior(
        fit.gaussian,
        fit.prior_mean,
        fit.log_likelihood,
        fit.log_prior,
        fixing(scaled(networks_prior(networks), fit.prior_scales), fixed),
        tuple(networks),
        model,
        fit.obs_sites[0] if len(fit.obs_sites) == 1 else None,
        latents=block,
        fixed=fixed,
        fit_arguments=fit.arguments,
        num_data=fit.num_data,
        obs_sites=fit.obs_sites,
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


def _warn_if_not_stationary(fit: FisherFit, latents: LatentBlock) -> None:
    # At a mode a Newton step gains nothing; from here it would gain g' P^-1 g / 2.
    newton = float(fit.gaussian.newton_decrement(fit.gradient))
    newton += latents.newton_decrement()
    effective = float(fit.gaussian.effective_parameters()) + len(latents.gradient)
    if newton > effective:
        norm = float(sum(g.square().sum() for g in fit.gradient.values())) ** 0.5
        largest = max(fit.gradient, key=lambda s: float(fit.gradient[s].norm()))
        refine = (
            "; or fit with structure=structures.Exact() and call refine() on the "
            "posterior (there this warning is expected)"
        )
        remedies = refine if fit.has_exact_fisher else ""  # which refine() works on
        warn(
            "The weights aren't a mode of the log joint: its gradient has norm "
            f"{norm:.3g}, most of it at site {largest!r}, and g' P^-1 g = {newton:.3g} "
            f"exceeds the effective number of parameters, {effective:.3g}. "
            f"Train on under the same prior and data{remedies}."
        )


def chosen_sites(
    sites: Collection[str] | None,
    model: Model,
    values: Mapping[str, Tensor],
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
) -> Collection[str]:
    """The sites that ``AutoLaplace(sites=)`` stands for.

    Args:
        sites: Names, ``"last_layer"`` (which takes one forward pass), or None for all.
        model: A Pyro model.
        values: Latent site -> the mode.
        networks: The lifted networks in the model.
        batches: Mappings of model keyword arguments.

    Returns:
        Names of lifted sites.

    Raises:
        ValueError: If a name isn't that of a lifted site, or the last layer shares its
            sites with others.
    """
    lifted = [site for lora in networks for site in lora.sites]
    if sites is None:
        return lifted
    if sites == "last_layer":
        batch = first_batch(batches, "the first one tells which layer is the last")
        return _last_layer(model, values, networks, batch)
    names = {sites} if isinstance(sites, str) else set(sites)
    if not names <= set(lifted):
        raise ValueError(
            f"sites: {sorted(names - set(lifted))} aren't lifted. Lifted are {lifted}; "
            "or say 'last_layer'."
        )
    return names


def _last_layer(
    model: Model,
    values: Mapping[str, Tensor],
    networks: Sequence[LiftedNetwork],
    batch: Batch,
) -> list[str]:
    calls: list[torch.nn.Module] = []
    members = [p for lora in networks for ps in lora.parameters.values() for p in ps]
    holders = {p.locations[0][0] for p in members}

    def hook(module: torch.nn.Module, *_: object) -> None:
        calls.append(module)

    # Which is the last is known from a run: the order of registration may be another.
    with torch.no_grad(), evaluating(networks), hooked(dict.fromkeys(holders, hook)):
        trace_at(model, values, batch)
    last = [p for p in members if calls and p.locations[0][0] is calls[-1]]
    last_sites = [p.site for p in last]
    if not last or any(p.site in last_sites and p not in last for p in members):
        names = [p.name for p in last]
        raise ValueError(
            f"sites='last_layer': the lifted layer that is called last holds {names}, "
            f"and its sites {last_sites} hold others, too. Lift a head "
            "(modules_to_save), or name sites."
        )
    return last_sites
