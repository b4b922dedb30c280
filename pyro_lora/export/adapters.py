"""Draws of a posterior as ordinary PEFT adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.tensor_folder import put
from pyro_lora.ground.unfinished import aside
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import uncompiled
from pyro_lora.likelihood.batch import Batch
from pyro_lora.posteriors.dropout import has_dropout
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    kind_of,
    only_gaussian,
)
from pyro_lora.posteriors.prior import with_scaled_sites
from pyro_lora.posteriors.served import is_linearized, served

_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def adapter_card(
    metadata: Path,
    title: str,
    meaning: str,
    base: Any,
    config: Any,
    tensors: Sequence[str],
) -> ModelCard:
    """A card with PEFT's metadata and a text of our own.

    Args:
        metadata: The README.md that PEFT wrote.
        title: Whose draw it is, from :func:`title`.
        meaning: What it has to do with the posterior's prediction, from
            :func:`meaning`.
        base: The network under the adapter.
        config: The adapter's configuration.
        tensors: Names of the adapter's tensors, as saved.

    Returns:
        The card, in the hub's form.
    """
    card = ModelCard.load(metadata)
    name = config.base_model_name_or_path or None
    card.data["base_model"] = name
    tags = {tag for tag in card.data.get("tags") or () if not tag.endswith(":")}
    card.data["tags"] = sorted(tags | {"pyro_lora"})
    kind = type(base)
    classes = ""
    if config.task_type in _CLASSIFIERS:
        classes = f", num_labels={base.config.num_labels}"
    load = f'{kind.__name__}.from_pretrained("{name or "the base model"}"{classes})'
    origin = f"from transformers import {kind.__name__}"
    if kind.__module__.split(".")[0] != "transformers":
        origin, load = f"from {kind.__module__} import {kind.__name__}", "..."
    card.text = f"""
# {title}

A weight set of a PEFT adapter, written by pyro_lora. {meaning}

```python
from peft import PeftModel
{origin}

base = {load}
network = PeftModel.from_pretrained(base, "this folder").eval()
```

{_contents(config, tensors)}
"""
    return card


def meaning(posterior: Posterior) -> str:
    """What a draw has to do with what the posterior predicts.

    Args:
        posterior: What it was drawn from.

    Returns:
        Lines of text.
    """
    if is_linearized(posterior):
        return (
            "The Gaussian that it was drawn from\ndescribes the network linearised at "
            "a mode. In the network itself such a weight set, and the\nmean of the "
            "probabilities under several, may predict at chance: evaluate it before "
            "use. Draws\nof a posterior over the last layer, particles, or the mode "
            "itself predict as they should."
        )
    return (
        "What the posterior predicts is the\nmean of the probabilities under several "
        "such weight sets, not what one of them says."
    )


def title(posterior: Posterior, index: int, num_samples: int) -> str:
    """What a draw is.

    Args:
        posterior: What it was drawn from.
        index: Its place among the draws.
        num_samples: S.

    Returns:
        One line.
    """
    place = f"{index + 1} of {num_samples}"
    num = posterior.num_samples
    if num == 1:
        return "The one weight set of a point estimate"
    if num is not None:
        return (
            f"Particle {place}"
            if num == num_samples
            else f"Draw {place} from {num} particles"
        )
    if only_gaussian(posterior) is not None:
        return f"Draw {place} from a Laplace approximation of the posterior"
    num_gaussians = len(posterior.gaussians())
    if num_gaussians > 1:
        return f"Draw {place} from a mixture of {num_gaussians} posteriors"
    return f"Draw {place} from a {kind_of(posterior)}"


def _contents(config: Any, tensors: Sequence[str]) -> str:
    others = [
        name
        for name in tensors
        if not name.endswith(("lora_A.weight", "lora_B.weight"))
    ]
    if not others:
        return (
            f"It holds LoRA's two matrices for each layer, of rank {config.r}, and "
            "nothing else: servers of\nmany adapters on one network (vLLM, LoRAX) take "
            "the folder as it is."
        )
    return (
        "It holds more than LoRA's two matrices for each layer, which servers of many "
        f"adapters on\none network may refuse: {', '.join(f'`{n}`' for n in others)}."
    )


_CARD = "README.md"


@leaving_no_trace
def export_adapters(
    posterior: Posterior | Guide,
    path: str | os.PathLike[str],
    num_samples: int,
    *,
    batches: Iterable[Batch] | None = None,
) -> None:
    """Write draws as adapters ``draw_000``, ``draw_001``, ... that PEFT can load.

    Each is a folder for ``PeftModel.from_pretrained(base_model, folder)``, for a server
    of LoRA adapters, or for the hub, with a model card that says how to load it. The
    mean of the probabilities that the adapters give is the prediction of particles, and
    of a Gaussian over one layer (``AutoLaplace(sites="last_layer")``). A Gaussian over
    several layers describes the linearised network; adapters drawn from it may predict
    at chance. With ``batches`` it is made narrow on them before, as by its
    ``for_sampling``; without there is a warning, and the card says so. For one
    adapter: ``export_adapters(ensemble(lora, [posterior.origin()]), path, 1)``, the
    mode, or of a refined posterior the weights that it is linearised at.

    All are written aside, onto the disk, and the whole folder is then renamed: after
    ``kill -9``, too, it holds every draw or none. The network's own adapter stays what
    it was.

    Args:
        posterior: A posterior of one PEFT model, or an autoguide that has run.
        path: The folder to hold them, which must be new or empty.
        num_samples: Number of draws; that of the particles writes each one, in order.
        batches: Rows with labels, of a Gaussian over several layers or a mixture with
            one; others are written as they are.

    Raises:
        ValueError: If the posterior is ``mc_dropout``'s, the folder holds draws already
            or anything else, or can't be replaced (a mount, the current folder), the
            lifted network isn't one PEFT model or its adapter is merged into the base,
            a lifted parameter isn't part of what PEFT saves, or ``num_samples`` isn't
            positive.
        OSError: If the disk is full, say; there is no draw then.

    Warns:
        UserWarning: If the posterior is a Gaussian over several layers, or a mixture
            with one, and there are no batches.
    """
    folder = Path(path).resolve()  # not a link to it
    check_count("num_samples", num_samples)
    posterior = as_posterior(posterior)
    lora, network, adapter = one_adapter(posterior, "export_adapters")
    _check_replaceable(folder)
    posterior = served(posterior, batches, "export_adapters")
    # Under a prior that isn't centred, draws are of a site's noise, not of the site.
    draws = with_scaled_sites(posterior.prior, (lora,), posterior.sample(num_samples))
    before = lora.weights()
    with aside(folder.parent) as unfinished:
        whole = unfinished / "whole"
        whole.mkdir()
        if folder.is_dir():
            whole.chmod(folder.stat().st_mode)
        # PEFT writes what is in the network, so each draw is put there, for that long.
        with undone(partial(lora.load, before)):
            for index in range(num_samples):
                lora.load({site: draws[site][index] for site in lora.sites})
                what = title(posterior, index, num_samples)
                draw = write_adapter(
                    network, adapter, unfinished / str(index), what, meaning(posterior)
                )
                draw.rename(whole / f"draw_{index:03d}")
        try:
            put(whole, folder)
        except OSError:
            _check_replaceable(folder)  # another was faster
            raise


def _check_replaceable(folder: Path) -> None:
    """Check that a folder can be renamed into this place.

    Raises:
        ValueError: If it can't.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name a new folder.")
    if next(folder.glob("draw_*"), None) is not None:
        raise ValueError(
            f"{folder} holds draws already. Delete them, or name another folder."
        )
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        reason = "holds something else"
    elif folder == Path.cwd():
        reason = "is the current folder"
    elif folder.is_mount():
        reason = "is a mount"
    else:
        return
    raise ValueError(
        f"{folder} {reason}, so it can't be replaced by a folder that holds every draw "
        f"or none. Name a new one, such as {folder / 'draws'}."
    )


def write_adapter(
    network: PeftModel, adapter: str, folder: Path, what: str, meaning: str
) -> Path:
    """Write an adapter as it is in the network, with a card.

    Args:
        network: The PEFT model.
        adapter: Its adapter.
        folder: Where to.
        what: The card's title.
        meaning: What the adapter has to do with the posterior.

    Returns:
        The folder that holds it, which is in the one given, or that itself.
    """
    network.save_pretrained(
        str(folder),
        selected_adapters=[adapter],
        save_embedding_layers=False,  # never lifted; "auto" asks the hub
    )
    # PEFT puts adapters of other names into a folder of that name, but for the card.
    draw = folder if adapter == "default" else folder / adapter
    card = adapter_card(
        folder / _CARD,
        what,
        meaning,
        network.get_base_model(),
        network.peft_config[adapter],
        list(_saved(network, adapter)),
    )
    card.save(draw / _CARD)
    for file in draw.iterdir():
        file.chmod(draw.stat().st_mode & 0o666)  # safetensors' are the owner's alone
    return draw


def one_adapter(
    posterior: Posterior, caller: str
) -> tuple[LiftedNetwork, PeftModel, str]:
    """The one adapter that a posterior is of: lifted, its network, and its name.

    Args:
        posterior: Any.
        caller: Who wants to write it, for the error.

    Raises:
        ValueError: If there isn't one, it's merged into the base, or PEFT wouldn't save
            all that is lifted.
    """
    if has_dropout(posterior) or not posterior.networks:
        raise ValueError(
            f"{caller} can't write a {kind_of(posterior)}; expected a posterior "
            "over the weights of a network that it knows. Draw from a Pyro guide "
            "yourself, and export pyro_lora.ensemble(lora, draws)."
        )
    if len(posterior.networks) != 1:
        raise ValueError(
            f"The posterior has {len(posterior.networks)} lifted networks; expected "
            "one, since an adapter belongs to one network."
        )
    (lora,) = posterior.networks
    lora.check_unmerged()
    network = uncompiled(lora.network)
    if not isinstance(network, PeftModel):
        raise ValueError(
            f"The lifted network is a {type(network).__name__}; expected a PeftModel, "
            "which saves all that is lifted. Wrap the whole network by "
            "peft.get_peft_model before lifting, with modules_to_save for what is "
            "trained beside the adapter; or store the posterior by save."
        )
    assert lora.adapter is not None  # a PeftModel has one
    _check_saved_by_peft(lora, network, lora.adapter)
    return lora, network, lora.adapter


def _saved(network: PeftModel, adapter: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        network, adapter_name=adapter, save_embedding_layers=False
    )
    return tensors


def _check_saved_by_peft(lora: LiftedNetwork, network: PeftModel, adapter: str) -> None:
    if network.peft_config[adapter].is_prompt_learning:
        return  # saved as the prompt that comes of it
    # What PEFT saves are the parameters themselves, under shorter names.
    saved = {value.data_ptr() for value in _saved(network, adapter).values()}
    for site, members in lora.parameters.items():
        for p in members:
            if p.parameter.data_ptr() not in saved:
                raise ValueError(
                    f"Site {site!r}: PEFT doesn't save the parameter {p.name!r} with "
                    "the adapter. Freeze it, or name its module in modules_to_save "
                    "(for a bias: bias='lora_only' or 'all') of the LoraConfig."
                )
