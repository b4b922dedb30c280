"""Network and prior -> lifted network: where the two meet."""

from __future__ import annotations

import re

from torch import nn

from pyro_lora.ground.settings import check_name
from pyro_lora.ground.warning import warn
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.prior import Prior, check_prior
from pyro_lora.priors.independent import normal

# Between a large head, 1000 classes of 2048 features, and the smallest of pretrained
# encoders, a BERT of two layers (4.4 million). An adapter may have more: it's not
# counted, since PEFT has frozen the rest.
_WHOLE_NETWORK = 4_000_000


def lift(
    model: nn.Module,
    *,
    prior: Prior | None = None,
    adapter: str | None = None,
    name: str | None = None,
) -> LiftedNetwork:
    """Turn the adapter weights of a network into Pyro random variables.

    Whatever is trainable is lifted, with any PEFT method or without PEFT. Weights of
    one role and shape are stacked over the layers into one site: LoRA's are
    ``lora.<path>.A`` of event shape (L, R, I) and ``lora.<path>.B`` of (L, O, R);
    those of other adapters start with the adapter's name (``ia3.<path>.l``), heads in
    ``modules_to_save`` are ``head.<path>.weight`` (L, O, I) and ``.bias`` (L, O), other
    trainable parameters ``base.<path>...``; L is 1 where there is one layer. The
    network itself computes as before whenever nothing is bound.

    Lifting a network again, as a notebook's cell does that is run again, gives it anew.
    What was lifted before is stale then, and says so when it is called, bound or
    loaded; so do models that call it, and posteriors with such a model. The posteriors
    themselves are as good as before with a model that calls the new one.

    Args:
        model: A ``peft.PeftModel``, or any module with trainable parameters, PEFT
            models inside of it included.
        prior: A function of the lifted network that samples every site; None is
            ``priors.normal(scale=1.0)``.
        adapter: The adapter to lift; None is the active one.
        name: Put into the site names after ``lora.``, ``head.``, ``base.``, to tell
            apart two lifted networks in one Pyro model.

    Returns:
        The lifted network; call it inside a Pyro model.

    Raises:
        TypeError: If ``model`` isn't a module, or another argument of a wrong kind.
        ValueError: If there is nothing to lift, the adapter is unknown, merged or
            inactive, a trainable parameter can't be lifted, or a value is NaN or
            infinite.
        RuntimeError: Inside of a ``with lora.bind(...)`` block of the same network.

    Warns:
        UserWarning: If there are as many trainable weights outside of adapters and
            heads, four million, as a whole encoder has: it may have no adapter yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"lift takes a torch.nn.Module, a PeftModel for one, but found a "
            f"{type(model).__name__}. Pass the network itself."
        )
    check_prior("prior", prior)
    check_name("adapter", adapter)
    check_name("name", name)
    if name is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise ValueError(
            f"name must be letters, digits and dots, as it is put into the names of "
            f"sites, found {name!r}."
        )
    lora = LiftedNetwork(
        model, normal(scale=1.0) if prior is None else prior, adapter, name
    )
    _warn_if_whole(lora)
    return lora


def _warn_if_whole(lora: LiftedNetwork) -> None:
    """Warn of a network that nobody has put an adapter on, or frozen."""
    outside = {s: x.numel() for s, x in lora.zeros().items() if s.startswith("base.")}
    number = sum(outside.values())
    if number < _WHOLE_NETWORK:
        return
    largest = max(outside, key=outside.__getitem__)
    warn(
        f"lift found {number:,} trainable weights outside of adapters and heads, as "
        f"many as a whole network has, most of them in {largest!r}, and made all of "
        "them random variables. If you meant fewer, freeze the others before: "
        "peft.get_peft_model(network, config) freezes all but an adapter, and "
        "network.requires_grad_(False) all but what you turn on again."
    )
