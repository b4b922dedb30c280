"""Posteriors over tiny language models, and their texts computed the long way."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.predict.models import jittered

NUM_TEXTS = 6


def language_model(lora: pl.LiftedNetwork) -> Callable[..., None]:
    """The likelihood of every token but the first and the padding."""

    def model(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> None:
        logits = lora()(input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_TEXTS, subsample=input_ids):
            tokens = dist.Categorical(logits=logits[..., :-1, :])
            seen = tokens.mask(attention_mask[:, 1:].bool()).to_event(1)
            pyro.sample("y", seen, obs=input_ids[:, 1:])

    return model


def texts() -> dict[str, Tensor]:
    return networks.inputs(networks.batch(NUM_TEXTS, 6))


def prompts(batch_size: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Of different lengths, padded on the left."""
    return networks.inputs(networks.batch(batch_size, length, padding="left"))


def particles(lora: pl.LiftedNetwork, num: int = 3, scale: float = 0.7) -> Any:
    return pl.ParticlePosterior(jittered(lora, num, scale), (lora,), None, None)


def adapters(lora: pl.LiftedNetwork, weights: Mapping[str, Tensor]) -> list[Any]:
    """A PEFT model for each of the weight sets, without anything bound."""
    networks = []
    for index in range(len(next(iter(weights.values())))):
        alone = copy.deepcopy(lora)
        alone.load({site: value[index] for site, value in weights.items()})
        networks.append(alone.network.eval())
    return networks


@torch.no_grad()
def next_log_probs(network: Any, tokens: Tensor) -> Tensor:
    """Of the token after one text without padding, (V,)."""
    return network(input_ids=tokens[None]).logits[0, -1].log_softmax(-1)


def step_by_step(
    each: list[Any], tokens: Tensor, continuation: Tensor
) -> dict[str, Tensor]:
    """What the draws say of a continuation, token by token, draw by draw, no cache."""
    found: dict[str, list[Tensor]] = {"total": [], "aleatoric": [], "log_prob": []}
    for token in continuation:
        log_probs = [next_log_probs(network, tokens) for network in each]
        mean = sum(x.exp() for x in log_probs) / len(each)
        entropies = [-(x.exp() * x).sum() for x in log_probs]
        found["total"].append(-(mean * mean.log()).sum())
        found["aleatoric"].append(sum(entropies) / len(each))
        found["log_prob"].append(mean.log()[token])
        tokens = torch.cat([tokens, token[None]])
    return {name: torch.stack(values) for name, values in found.items()}


def averaged_text(each: list[Any], tokens: Tensor, num_new: int, end: int) -> Tensor:
    """The most likely tokens under the average, up to the one that ends the text."""
    new: list[Tensor] = []
    while len(new) < num_new and (not new or int(new[-1]) != end):
        log_probs = [next_log_probs(network, tokens) for network in each]
        mean = sum(x.exp() for x in log_probs) / len(each)
        new.append(mean.argmax())
        tokens = torch.cat([tokens, new[-1][None]])
    return torch.stack(new)
