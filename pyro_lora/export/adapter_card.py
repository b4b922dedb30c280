"""The model card beside a written adapter: whose draw it is, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pyro_lora.export.posterior_state import Posterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior

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


def is_linearized(posterior: Posterior) -> bool:
    """Whether a posterior, or a part of it, describes a network that is linearised.

    A Gaussian over one layer is the same either way: the network is linear in that
    layer's weights, up to what comes after it.

    Args:
        posterior: The posterior.
    """
    if isinstance(posterior, MixturePosterior):
        return any(is_linearized(component) for component in posterior.components)
    if isinstance(posterior, ParticlePosterior):
        return False
    layers = {
        p.locations[0][0]
        for lora in posterior.loras
        for site, members in lora.parameters.items()
        for p in members
        if site in posterior.gaussian.loc
    }
    return len(layers) > 1


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
    if isinstance(posterior, ParticlePosterior):
        num = posterior.num_particles
        if num == 1:
            return "The one weight set of a point estimate"
        if num == num_samples:
            return f"Particle {place}"
        return f"Draw {place} from {num} particles"
    if isinstance(posterior, MixturePosterior):
        return f"Draw {place} from a mixture of {len(posterior.components)} posteriors"
    return f"Draw {place} from a Laplace approximation of the posterior"


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
