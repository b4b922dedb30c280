r"""BLoB: variational inference over one factor of each layer, points for the rest.

.. math:: q(A_{lri}) = N(m_{lri}, s_{lri}^2), \quad \text{ELBO} = E_q[\log p(y | A, B)]
    - KL(q(A) \| p(A)) + \log p(B)

(Wang et al. 2024, https://arxiv.org/abs/2406.11675). With B a point, the update
:math:`\Delta W = s B A` has half as many numbers to be uncertain of, and isn't widened
by the product of two noises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyro_lora.ground.settings import check_function, check_kind, check_positive
from pyro_lora.lifting.sites import without_shape
from pyro_lora.likelihood.model_trace import Model, check_model
from pyro_lora.posteriors.prior import latent_nodes


def blob(
    model: Model,
    *,
    init_loc_fn: Callable[[dict[str, Any]], Tensor],
    init_scale: float = 0.01,
    sites: str = "*.A",
) -> AutoGuideList:
    """A stock guide for SVI: normals on some sites, points on all others.

    It is Pyro's ``AutoNormal`` and ``AutoDelta`` in an ``AutoGuideList``, and goes into
    ``SVI``, ``predict`` and all else as any guide; :func:`mean_field` makes a value of
    it. Points count with their prior's density, as in MAP. As with every stock guide,
    SVI goes on from what another one has left in the param store under the same names:
    ``pyro.clear_param_store()`` before the next.

    A batch shares one draw of the weights, so gradients vary more than with flipout,
    where each datum has a draw of its own. Several draws a step,
    ``Trace_ELBO(num_particles=4, max_plate_nesting=1, vectorize_particles=True)``,
    go through the network at once.

    Args:
        model: A Pyro model that calls a lifted network.
        init_loc_fn: Where means and points start, such as ``lora.init_to_adapter()``.
        init_scale: Standard deviations at first. With those of the order of the
            weights' own, training starts from noise.
        sites: Which are normal, a pattern of ``fnmatch`` for their names, the shapes
            left out that layers of several ranks have in theirs.

    Returns:
        The guide.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If ``init_scale`` isn't positive; and from the guide's first call,
            if no latent site of the model has such a name.
    """
    check_model(model)
    check_function("init_loc_fn", init_loc_fn, "such as lora.init_to_adapter()")
    check_positive("init_scale", init_scale)
    check_kind("sites", sites, str, "a pattern of names, such as '*.A'")
    guide = AutoGuideList(InitMessenger(init_loc_fn)(model))
    normal, point = _Part(model, sites, True), _Part(model, sites, False)
    scale = float(init_scale)
    guide.append(AutoNormal(normal, init_loc_fn=init_loc_fn, init_scale=scale))
    guide.append(AutoDelta(point, init_loc_fn=init_loc_fn))
    return guide


@dataclass(frozen=True)
class _Part:
    """A model of which a guide sees the latent sites that match a pattern, or others.

    Attributes:
        model: A Pyro model.
        pattern: Of names.
        matches: Whether those that match are seen.
    """

    model: Model
    pattern: str
    matches: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = poutine.trace(poutine.block(self.model, hide_fn=self._hides))
        trace: Any = seen.get_trace(*args, **kwargs)
        if self.matches and not latent_nodes(trace):
            raise ValueError(
                f"blob: no latent site of the model matches sites={self.pattern!r}, so "
                "that nothing would be random. LoRA's are '*.A' and '*.B'; lora.sites "
                "has all names."
            )
        return trace.nodes["_RETURN"]["value"]

    def _hides(self, site: Any) -> bool:
        if site["type"] != "sample" or site["is_observed"]:
            return False
        name = site["name"]
        matches = any(fnmatchcase(x, self.pattern) for x in (name, without_shape(name)))
        return matches is not self.matches
