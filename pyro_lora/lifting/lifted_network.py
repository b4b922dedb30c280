"""A PEFT network whose trainable weights are Pyro sample sites."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any, Literal, TypeGuard

import pyro
import torch
from peft.tuners.adalora import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.ranks import Ranks
from pyro_lora.ground.settings import check_function, check_kind
from pyro_lora.ground.summary import Summarised, brief, weights_facts
from pyro_lora.ground.synchronisation import require
from pyro_lora.ground.weights import check_weights
from pyro_lora.lifting import initialization
from pyro_lora.lifting.binding import Host, undo_interrupted
from pyro_lora.lifting.bound_network import BoundNetwork
from pyro_lora.lifting.prior import Prior
from pyro_lora.lifting.sites import (
    LiftedParameter,
    adapter_configs,
    adapter_modules,
    adapter_name,
    check_in_use,
    check_network,
    check_unmerged,
    config_at,
    keep_bitsandbytes_differentiable,
    lifted_parameters,
    others_in_use,
)
from pyro_lora.lifting.slots import Location, as_slot
from pyro_lora.lifting.split_layers import ranks_on
from pyro_lora.lifting.trunk import Trunk, find_trunk

# The lifted networks that are in use, to tell those whose parameters are lifted anew.
_IN_USE: weakref.WeakSet[LiftedNetwork] = weakref.WeakSet()

LORA_IN_PLATE = (
    "lora() is called inside the plate {!r}, as if each datum had weights of its own. "
    "Call lora() before the plate."
)


class LiftedNetwork(Summarised):
    """A network with its lifted sites, made by :func:`lift`.

    Attributes:
        network: The original network.
        adapter: The name of the adapter that is lifted, None without PEFT.
        sites: Site name -> parameter names as in ``network.named_parameters()``,
            in layer order.
        parameters: Site name -> its parameters and where they are, in layer order.
        initial_weights: Site name -> the values at the time of lifting, (L, ...).
    """

    def __init__(
        self, model: nn.Module, prior: Prior, adapter: str | None, name: str | None
    ) -> None:
        undo_interrupted(model)
        check_network(model)
        self.adapter = adapter_name(model, adapter)
        self._adapter_modules = adapter_modules(model, self.adapter)
        self._others = others_in_use(self._adapter_modules, self.adapter)
        check_in_use(self._adapter_modules, self.adapter, self._others)
        self.network = model
        self._prior = prior
        by_site: dict[str, list[LiftedParameter]] = {}
        for p in lifted_parameters(model, self.adapter, name):
            by_site.setdefault(p.site, []).append(p)
        self.parameters = {site: tuple(ps) for site, ps in by_site.items()}
        self.sites: dict[str, tuple[str, ...]] = {
            site: tuple(p.name for p in ps) for site, ps in self.parameters.items()
        }
        members = [p for ps in self.parameters.values() for p in ps]
        before = _lifted_before(members)  # raises before anything is changed
        _check_finite(members)
        owners = {p.owner for p in members if p.owner is not None}
        self._host = Host(model, self.parameters, find_trunk(model, owners))
        keep_bitsandbytes_differentiable(model)
        if self._host.has_slots:
            for owner in {*owners, *_vocabulary_layer(model)}:
                as_slot(owner)
        self._masks = _rank_masks(model, self.adapter, self.parameters)
        self.initial_weights = self.weights()
        for lora, name in before.items():
            lora._host.lifted_anew = name
            _IN_USE.discard(lora)
        _IN_USE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, deep or unpickled, has a network of its own, with slots of its own.
        vars(self).update(state)
        self._host.bindings.are_of(self.network)
        _IN_USE.add(self)

    def _facts(self) -> dict[str, str]:
        # Of the sites as they were lifted: the network may have changed since.
        facts = weights_facts(self.initial_weights)
        total = sum(p.numel() for p in self.network.parameters())
        facts["weights"] += f" of the network's {total:,}"
        facts = {"network": type(self.network).__name__, **facts}
        if self.adapter is not None:
            facts["adapter"] = repr(self.adapter)
        if self._host.lifted_anew is not None:
            facts["stale"] = f"{self._host.lifted_anew} has been lifted again"
        return facts | {"prior": brief(self._prior)}

    @property
    def prior(self) -> Prior:
        """The function that samples the sites."""
        return self._prior

    def with_prior(self, prior: Prior) -> LiftedNetwork:
        """The same network under another prior, in models that call what this returns.

        Both are views of one network: what is bound to it or loaded into it by the one,
        the other has, too, and lifting the network again makes both stale. A posterior
        keeps the prior of the view that its model called.

        Args:
            prior: A function of the lifted network that samples every site.

        Returns:
            Another view; this one keeps its prior.

        Raises:
            TypeError: If the prior can't be called.
        """
        check_function("prior", prior, "a prior, such as priors.normal(scale=1.0)")
        view = copy.copy(self)  # which shares all but the prior
        view._prior = prior
        return view

    def __call__(self) -> BoundNetwork:
        """Sample the sites by the prior and return the network bound to the values.

        Every site carries ``infer={"lora": (self,)}``.

        Raises:
            TypeError: If the prior doesn't return its values by site.
            ValueError: Inside the data's plate; if the prior misses a site, or gives a
                wrong shape, dtype or device or (checked where Pyro validates
                distributions) a NaN or infinite value; or if the adapter is merged or
                inactive.
            RuntimeError: If the network has been lifted again.
        """
        self._check_current()
        _check_plates()
        with poutine.infer_config(config_fn=self._infer):
            weights = self._prior(self)
        if not isinstance(weights, Mapping):
            raise TypeError(
                "A prior returns its samples by site, {site: value for site in "
                f"lora.sites}}, but this one returned {type(weights).__name__}."
            )
        network = self._bound_network(weights)
        # Looking at values waits for a GPU: only where Pyro itself looks at them.
        if pyro.settings.get("validate_distributions_pyro"):
            self._check_values(weights)
        return network

    @contextmanager
    def bind(self, weights: Mapping[str, Tensor]) -> Iterator[BoundNetwork]:
        """Bind weights without sampling, for the duration of a ``with`` block.

        Args:
            weights: Site -> value; any leading particle dims that broadcast.

        Yields:
            The bound network. The original network, too, uses the weights inside the
            block (where they have no particle dims).

        Raises:
            ValueError: If a site is missing or unknown, a value has a wrong shape,
                dtype or device or is NaN or infinite, or the adapter is merged or
                inactive.
            RuntimeError: Inside another ``bind`` of the same network, or if it has been
                lifted again.
        """
        network = self._bound_network(weights)
        self._check_values(weights)
        with network.bound_for_block():
            yield network

    def _infer(self, site: Any) -> Any:
        # Sites may be functions of other latents of the prior, which alone are random.
        return {"lora" if site["name"] in self.sites else "prior_of": (self,)}

    def _check_current(self) -> None:
        name = self._host.lifted_anew
        if name is not None:
            raise RuntimeError(
                f"This lifted network is stale: {name!r} has been lifted again. Use "
                "what the later pyro_lora.lift returned, in models made with it; for "
                "another prior use its with_prior instead of lifting again."
            )

    def _bound_network(self, weights: Mapping[str, Tensor]) -> BoundNetwork:
        self._check_current()
        self._check_shapes(weights)
        self._host.check_in_place()
        check_in_use(self._adapter_modules, self.adapter, self._others)
        return BoundNetwork(self._host, self._masked(weights))

    def _masked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {
            site: weights[site] * mask.to(weights[site])
            for site, mask in self._masks.items()
        }
        return {**weights, **kept}

    @cached_property
    def _locations(self) -> frozenset[Location]:
        members = [p for ps in self.parameters.values() for p in ps]
        return frozenset(location for p in members for location in p.locations)

    def _holds(self, p: LiftedParameter) -> bool:
        return not self._locations.isdisjoint(p.locations)

    def _own(self, site: str) -> list[nn.Parameter]:
        return [self._host.bindings.parameter(p) for p in self.parameters[site]]

    @leaving_no_trace
    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The adapter's present values, stacked as sites, copied.

        Values in half precision come as float32, as sites are. Those of a network on
        several devices come on the first one's, all of them.

        Raises:
            ValueError: If the adapter is merged into the base weights.
        """
        self.check_unmerged()
        return {
            site: torch.stack(
                [p.to(zeros.device, zeros.dtype) for p in self._own(site)]
            )
            for site, zeros in self.zeros().items()
        }

    def zeros(self) -> dict[str, Tensor]:
        """Zeros of every site's shape, dtype and device, without memory of their own.

        What a prior needs: ``dist.Normal(zeros, 1 + zeros).to_event(zeros.ndim)``.
        """
        result = {}
        # One device for all sites, where inputs go in and outputs mostly come back.
        present = (p.device for p in self.network.parameters() if not p.is_meta)
        device = next(present, torch.device("meta"))
        for site, members in self.parameters.items():
            first = self._own(site)[0]
            half = first.dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if half else first.dtype
            zero = torch.zeros((), dtype=dtype, device=device)  # strides of 0
            result[site] = zero.expand(len(members), *first.shape)
        return result

    @leaving_no_trace
    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write one weight set (no particle dims) into the adapter.

        Raises:
            ValueError: As :meth:`bind`, or if there are particle dims; the adapter is
                then unchanged. It may be inactive.
            RuntimeError: If the network has been lifted again.
        """
        self._check_current()
        self._host.check_in_place()
        self.check_unmerged()
        self._check_shapes(weights)
        self._check_values(weights)
        for site, zeros in self.zeros().items():
            if weights[site].shape != zeros.shape:
                raise ValueError(
                    f"Site {site!r}: load takes one weight set of shape "
                    f"{tuple(zeros.shape)}, found {tuple(weights[site].shape)}. "
                    "Pick one particle or draw first."
                )
        masked = self._masked(weights)
        new = [
            pair
            for site in masked
            for pair in zip(self._own(site), masked[site], strict=True)
        ]
        before = [(parameter, parameter.clone()) for parameter, _ in new]
        is_whole = False

        @torch.no_grad()  # an interrupt may have ended the caller's
        def put_back() -> None:
            for parameter, value in () if is_whole else before:
                parameter.copy_(value)

        with undone(put_back):
            for parameter, value in new:
                parameter.copy_(value)
            is_whole = True

    def check_unmerged(self) -> None:
        """Check that the base weights are without the adapter's updates.

        Raises:
            ValueError: If the adapter is merged into them.
        """
        check_unmerged(self._adapter_modules)

    def init_to_adapter(
        self, jitter: float | Literal["auto"] = 0.0
    ) -> initialization.InitFn:
        r"""``init_loc_fn``: the adapter's present values.

        Args:
            jitter: Standard deviation of normal noise on every weight. ``"auto"`` is
                the least at which networks in half precision tell particles apart,
                :math:`\epsilon = 2^{-7}`: B's is :math:`\epsilon / (s \|A\|_F)`, a
                change :math:`s E A x` of the outputs with standard deviation
                :math:`\epsilon` for inputs of variance one, also where B is 0 and all
                updates B A coincide; :math:`\epsilon` times the root mean square of
                other weights, and :math:`\epsilon / \sqrt I` where these are 0.

        Raises:
            ValueError: If it is neither.
        """
        return initialization.init_to_adapter(self, jitter)

    def init_to(self, weights: Mapping[str, Tensor]) -> initialization.InitFn:
        """``init_loc_fn``: given weights, with a leading (K,) one set a particle.

        Guides that start at one weight set, ``AutoLaplace`` too, refuse several.

        Args:
            weights: Site -> value on its support, as ``get_named_particles()``,
                ``sample`` and ``mode()`` give them. Latent sites outside of the network
                count, too, such as an observation noise; those that aren't given start
                at their median. ``SVGD`` and ``AutoLaplace`` refuse what the model
                doesn't sample.

        Raises:
            ValueError: If a lifted site is missing, has a wrong shape, there are values
                that are NaN or infinite, or not all sites have the same (K,).
        """
        return initialization.init_to(self, weights)

    def init_to_fresh(self) -> initialization.InitFn:
        """``init_loc_fn``: PEFT's random init and the head's, anew at each call.

        One call for each particle gives the starting points of a deep ensemble. The
        base's own parameters, where they are lifted, start as they are: if there is
        nothing else, tell particles apart by ``init_to_adapter(jitter="auto")``.
        """
        return initialization.init_to_fresh(self)

    @property
    def context_fn(self) -> Callable[[], tuple[AbstractContextManager[Any], ...]]:
        """Contexts that make gradient checkpointing recompute with the bound weights.

        Pass it in ``gradient_checkpointing_kwargs={"use_reentrant": False,
        "context_fn": lora.context_fn}``.
        """
        return self._host.context_fn

    @property
    def is_bound(self) -> bool:
        """Whether weights are bound to the network at the moment."""
        return bool(self._host.bindings.active)

    @property
    def input_names(self) -> frozenset[str]:
        """What the network's forward is known to take, besides labels."""
        return self._host.argument_names - {"labels"}

    @property
    def trunk(self) -> Trunk:
        """The layers below the first adapted one, the same for all particles."""
        return self._host.trunk

    @property
    def ranks(self) -> Ranks:
        """The processes over which its layers are split: this one, if they aren't."""
        return ranks_on(self._host.mesh)

    @property
    def layouts(self) -> dict[tuple[Any, ...], Any]:
        """What is known of the rows that its layers get, by the form of a call."""
        return self._host.layouts

    def delta_weight_factors(
        self, weights: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Factors of every layer's update :math:`\Delta W = s B A`.

        Convolutions' matrices are flattened over the kernel. For AdaLoRA, E is in the
        first factor; for DoRA, it is the update before the columns are normalised.

        Args:
            weights: Site -> value, any leading dims.

        Returns:
            Module path -> (s B, A), of shapes (..., O, R) and (..., R, I); the LoRA
            scaling s is in the first.
        """
        self._check_shapes(weights)
        weights = self._masked(weights)
        values = {
            # The dim of the layers is left of the parameter's own.
            p.locations[0]: weights[site].select(-1 - p.parameter.ndim, i)
            for site, members in self.parameters.items()
            for i, p in enumerate(members)
        }
        factors = {}
        for path, layer in self._adapter_modules.items():
            if _has_one_update(layer):
                b, a = _update_factors(layer, self.adapter, values)
                factors[path] = _scaling(layer, self.adapter) * b, a
        return factors

    def stacked_weight_factors(
        self, weights: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The same as :meth:`delta_weight_factors`, of a site's layers together.

        Args:
            weights: Site -> value, any leading dims.

        Returns:
            (s B, A), of shapes (..., L, O, R) and (..., L, R, I), without the leading
            dims where a factor isn't lifted.
        """
        weights = self._masked(weights)
        places = {
            p.locations[0]: (site, i)
            for site, members in self.parameters.items()
            for i, p in enumerate(members)
        }
        # Layers are alike that have their factors in the same sites.
        alike: dict[tuple[Any, ...], list[LoraLayer]] = {}
        for layer in self._adapter_modules.values():
            if _has_one_update(layer):
                at = _factor_locations(layer, self.adapter)
                sites = [places[x][0] if x in places else _own(x).shape for x in at]
                alike.setdefault((type(layer), *sites), []).append(layer)
        stacked = []
        for layers in alike.values():
            first, values = layers[0], dict[Location, Tensor]()
            by_layer = [_factor_locations(x, self.adapter) for x in layers]
            for each in zip(*by_layer, strict=True):
                if each[0] in places:
                    site, rows = places[each[0]][0], [places[x][1] for x in each]
                    value = _layers(weights[site], rows, _own(each[0]).ndim)
                else:
                    value = torch.stack([_own(x).detach() for x in each])
                values[each[0]] = value
            b, a = _update_factors(first, self.adapter, values)
            scalings = [_scaling(layer, self.adapter) for layer in layers]
            stacked.append((_scaled(b, scalings), a))
        return stacked

    def num_experts(self, path: str) -> int | None:
        """How many experts' matrices a layer stacks; None: it isn't one of experts."""
        layer = self.network.get_submodule(path)
        return layer.num_experts if isinstance(layer, ParamWrapper) else None

    @property
    def factor_sites(self) -> frozenset[str]:
        """The sites that :meth:`delta_weight_factors` is made of."""
        locations = {
            location
            for layer in self._adapter_modules.values()
            if _has_one_update(layer)
            for location in _factor_locations(layer, self.adapter)
        }
        return frozenset(
            site
            for site, members in self.parameters.items()
            if all(p.locations[0] in locations for p in members)
        )

    def _check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        check_weights(weights)
        zeros = self.zeros()
        if weights.keys() != zeros.keys():
            missing = sorted(zeros.keys() - weights.keys())
            unknown = sorted(weights.keys() - zeros.keys())
            raise ValueError(
                f"Weights don't match the lifted sites: missing {missing}, unknown "
                f"{unknown}. The sites are the keys of lora.sites."
            )
        for site, zero in zeros.items():
            shape = weights[site].shape
            if shape[max(len(shape) - zero.ndim, 0) :] != zero.shape:
                raise ValueError(
                    f"Site {site!r}: expected shape (..., "
                    f"{', '.join(map(str, zero.shape))}), found {tuple(shape)}. "
                    "Particle dims go on the left, event dims are those of "
                    "lora.weights()."
                )
            for what in ("dtype", "device"):
                expected, given = getattr(zero, what), getattr(weights[site], what)
                if given != expected:
                    raise ValueError(
                        f"Site {site!r}: expected {what} {expected}, found {given}. "
                        "Move the weights by .to(...) first."
                    )

    def _check_values(self, weights: Mapping[str, Tensor]) -> None:
        if torch.compiler.is_compiling():  # it would break the graph, and compile anew
            return
        # The largest of them is NaN where one is, so that one number tells.
        sizes = [
            torch.linalg.vector_norm(x.detach(), math.inf) for x in weights.values()
        ]
        finite = torch.stack([x.to(sizes[0]) for x in sizes]).isfinite()
        require(finite.all(), partial(_not_finite, [*weights], finite))


def _not_finite(sites: Sequence[str], finite: Tensor) -> ValueError:
    site = sites[finite.tolist().index(False)]
    return ValueError(
        f"Site {site!r}: the weights have NaN or infinite values; every "
        "value must be finite. Check the run that made them."
    )


def check_lora(lora: object) -> None:
    """Check that something is a lifted network.

    Args:
        lora: It.

    Raises:
        TypeError: If it isn't.
    """
    expected = "a lifted network, lora = lift(peft_model)"
    check_kind("lora", lora, LiftedNetwork, expected)


def _check_plates() -> None:
    """Check that no plate of a minibatch is open, whose data would each be sampled for.

    Raises:
        ValueError: If one is. A plate of particles, which isn't subsampled, may be.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, SubsampleMessenger):
            if handler.subsample_size != handler.size:
                raise ValueError(LORA_IN_PLATE.format(handler.name))


def _check_finite(parameters: Iterable[LiftedParameter]) -> None:
    for p in parameters:
        if not torch.isfinite(p.parameter).all():
            raise ValueError(
                f"Site {p.site!r}: parameter {p.name!r} has NaN or infinite values. "
                "Restore or re-initialise the adapter before lifting."
            )


def _vocabulary_layer(model: nn.Module) -> list[nn.Module]:
    """A language model's last layer, whose product a slot has in one piece."""
    base = getattr(model, "get_base_model", lambda: model)()
    layer = getattr(base, "get_output_embeddings", lambda: None)()
    return [layer] if type(layer) is nn.Linear else []


def _lifted_before(
    parameters: Iterable[LiftedParameter],
) -> dict[LiftedNetwork, str]:
    """The lifted networks that hold some of these parameters, with the name of one.

    Raises:
        RuntimeError: If weights are bound to one of them.
    """
    before = {}
    for p in parameters:
        for lora in _IN_USE:
            if lora not in before and lora._holds(p):
                if lora._host.bindings.active:
                    raise RuntimeError(
                        f"Weights are bound to parameter {p.name!r} at the moment. "
                        "Leave the `with lora.bind(...)` block before lifting again."
                    )
                before[lora] = p.name
    return before


def _has_one_update(layer: object) -> TypeGuard[LoraLayer]:
    """Whether an adapter's layer adds one product s B A to one weight matrix."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return False
    base: Any = layer.get_base_layer()
    return getattr(base, "groups", 1) == 1  # grouped convolutions add one a group


def _update_factors(
    layer: LoraLayer, adapter: str | None, values: Mapping[Location, Tensor]
) -> tuple[Tensor, Tensor]:
    """The factors B (..., O, R) and A (..., R, I) of a layer's update, but for s.

    Args:
        layer: A layer of the adapter.
        adapter: The adapter's name.
        values: Of the lifted parameters, with any leading dims; the layer's own are
            taken where there is none.
    """
    assert adapter is not None
    if isinstance(layer, Embedding):
        a = _value(layer.lora_embedding_A, adapter, values)
        b = _value(layer.lora_embedding_B, adapter, values)
    else:
        a = _value(layer.lora_A, adapter, values)
        b = _value(layer.lora_B, adapter, values)
    if isinstance(layer, AdaLoraLayer):
        b = b * _value(layer.lora_E, adapter, values).mT  # E (..., R, 1)
    return b, a


def _scaling(layer: LoraLayer, adapter: str | None) -> float | Tensor:
    """What a layer's update is scaled by, s."""
    assert adapter is not None
    scaling: Any = layer.scaling[adapter]
    if isinstance(layer, AdaLoraLayer):
        return scaling / (layer.ranknum[adapter].detach() + 1e-5)  # as PEFT does
    return scaling


def _scaled(b: Tensor, scalings: Sequence[Any]) -> Tensor:
    """Factors (..., L, O, R) times those of each layer."""
    if all(isinstance(s, float | int) and s == scalings[0] for s in scalings):
        return scalings[0] * b
    # Filled where they are needed: a copy from the CPU would be waited for.
    each = [b.new_ones((), dtype=torch.float64) * s for s in scalings]
    return torch.stack(each).reshape(-1, 1, 1) * b


def _layers(values: Tensor, rows: Sequence[int], ndim: int) -> Tensor:
    """Some layers of a site's (..., L, ...), whose parameters have so many dims."""
    dim = -1 - ndim
    if list(rows) == list(range(values.shape[dim])):
        return values
    return torch.stack([values.select(dim, i) for i in rows], dim)


def _factor_locations(layer: LoraLayer, adapter: str | None) -> list[Location]:
    """Where the parameters are that :func:`_update_factors` takes."""
    assert adapter is not None
    names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    holders: list[Any] = [getattr(layer, name, {}) for name in names]
    return [_location(holder, adapter) for holder in holders if adapter in holder]


def _location(holder: nn.Module, adapter: str) -> Location:
    if isinstance(holder, nn.ModuleDict):
        return holder[adapter], "weight"
    return holder, adapter


def _own(location: Location) -> nn.Parameter:
    """The parameter that is there."""
    own = location[0]._parameters[location[1]]
    assert own is not None
    return own


def _value(
    holder: nn.Module, adapter: str, values: Mapping[Location, Tensor]
) -> Tensor:
    """A matrix from ``lora_A`` and the like: a dict of layers or of parameters."""
    location = _location(holder, adapter)
    own = _own(location)
    value = values.get(location, own.detach())
    # A convolution's kernel dims join the inputs, as in PEFT's product of the two.
    return value.flatten(1 - own.ndim) if own.ndim > 2 else value


def _rank_masks(
    model: nn.Module,
    adapter: str | None,
    parameters: Mapping[str, tuple[LiftedParameter, ...]],
) -> dict[str, Tensor]:
    """The ranks that AdaLoRA's budget has kept; pruned ones stay zero.

    Args:
        model: The network.
        adapter: The adapter that is lifted.
        parameters: Site -> its parameters, in layer order.

    Returns:
        Site ``lora.<path>.E`` -> (L, R, 1), 1 where a rank is kept and 0 where it was
        pruned; only the sites where ranks were pruned.
    """
    parts = adapter_configs(model)
    if not any(isinstance(x.get(adapter), AdaLoraConfig) for x in parts.values()):
        return {}
    masks = {}
    for site, members in parameters.items():
        layers = []
        for p in members:
            mask = torch.ones_like(p.parameter).detach()
            pattern = _kept_ranks(*config_at(parts, adapter, p.name), adapter)
            if len(pattern) == len(mask):  # a loaded adapter has lost the others
                mask = mask * mask.new_tensor(pattern)[:, None]
            layers.append(mask)
        if not torch.stack(layers).all():
            masks[site] = torch.stack(layers)
    return masks


def _kept_ranks(config: Any, name: str, adapter: str | None) -> Sequence[bool]:
    """Which ranks of a parameter AdaLoRA has kept; empty where that isn't said."""
    if not isinstance(config, AdaLoraConfig):
        return ()
    own = name.removeprefix("base_model.model.").removesuffix(f".{adapter}")
    patterns: Any = config.rank_pattern or {}
    # PEFT names them as in the base model, once saved without the adapter's name.
    return patterns.get(own, patterns.get(f"{own}.{adapter}", ()))
