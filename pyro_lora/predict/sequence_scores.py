r"""How likely given texts are under the draws of a posterior.

A text's log probability under one draw is a sum over its tokens, log p_s(y | x) =
:math:`\sum_t \log p_s(y_t | y_{<t}, x)`; over S draws it is averaged in one of two
ways. Of two tokens and two draws that give them (.9, .1) and (.1, .9), the means are

    by_sequence   (.9 · .1 + .1 · .9) / 2 = .09
    by_token      (.9 + .1) / 2 · (.1 + .9) / 2 = .25

since the second lets another draw explain each token.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from transformers import PreTrainedModel

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.synchronisation import require
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.positions import counted
from pyro_lora.lifting.text_trunk import holds_rows
from pyro_lora.likelihood.model_trace import IGNORED, evaluating, trace_at
from pyro_lora.posteriors.dropout import check_no_dropout
from pyro_lora.posteriors.guide_posterior import Guide, GuidePosterior
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    kind_of,
    only_gaussian,
)
from pyro_lora.predict.draws import draw_weights, network_of

DEFAULT_NUM_SAMPLES = 8  # all of them go through the network at once
# Log probabilities (S, B, T, V) held at once: 256 MiB in float32.
MAX_LOG_PROBS = 2**26


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SequenceLogProb(FieldsShown):
    r"""Log-probabilities of B continuations y given their prompts x, in nats.

    The two averages over draws differ, and neither bounds the other.

    Attributes:
        by_sequence: :math:`\log \frac1S \sum_s \prod_t p_s(y_t | y_{<t}, x)`, (B,):
            one draw is responsible for the whole text, as the posterior predictive
            distribution says. Texts that come from different draws, as with
            ``generate(mode="draws")``, follow this one.
        by_token: :math:`\sum_t \log \frac1S \sum_s p_s(y_t | y_{<t}, x)`, (B,): the
            draws are averaged anew at each token, whichever of them explained the
            text so far. The texts of ``generate(mode="average")`` follow this one.
        draws: :math:`\log p_s(y | x)` under each draw, (S, B).
        num_tokens: Tokens of each continuation, (B,), to divide by.
    """

    by_sequence: Tensor
    by_token: Tensor
    draws: Tensor
    num_tokens: Tensor


@leaving_no_trace
@torch.no_grad()
def sequence_log_prob(
    posterior: Posterior | Guide,
    input_ids: Tensor,
    labels: Tensor,
    *,
    lora: LiftedNetwork | None = None,
    attention_mask: Tensor | None = None,
    num_samples: int | None = None,
) -> SequenceLogProb:
    r"""Log-probability of given continuations, averaged over a posterior.

    Answers to be compared (multiple choice, reranking) are one row each, prompt and
    answer together. Dropout is off and nothing is trained.

    Args:
        posterior: A posterior, or any Pyro guide, over the weights of a causal language
            model of transformers.
        input_ids: Prompts with their continuations, (B, T), padded on either side.
        labels: ``input_ids`` where a token is part of the continuation, -100 where it
            isn't, (B, T). The first token has nothing before it and can't be scored.
        lora: The lifted language model; None is the posterior's own.
        attention_mask: 0 for padding, (B, T); None: there is none.
        num_samples: Draws S; None is every particle once, or 8 where there are none.

    Returns:
        Both averages and each draw's, in nats, sums over the tokens.

    Raises:
        ValueError: If the network is no causal language model, shapes differ, labels
            aren't the input's own tokens, or a continuation is empty, padded inside,
            or starts at the first token; or if logits are NaN or infinite.
    """
    mask = checked_mask(input_ids, attention_mask)
    texts = {"input_ids": input_ids, "attention_mask": mask}
    posterior = as_posterior(posterior, arguments=texts)
    lora = network_of(posterior, lora, "sequence_log_prob")
    network = causal_network(lora)
    check_vocabulary(network, input_ids)
    check_kind("labels", labels, Tensor, "a tensor (B, T)")
    scored = labels != IGNORED
    _check_labels(input_ids, labels, scored, mask)
    weights = lora_draws(lora, posterior, num_samples)
    # From the first place that any row scores on: the rest is prompt, without logits.
    num_new = input_ids.shape[1] - int(scored.any(0).nonzero()[0])
    tokens, scored = input_ids[:, -num_new:], scored[:, -num_new:]
    by_draw, by_token = [], []
    for _, rows, log_probs in next_token_log_probs(
        lora, weights, input_ids[None], mask[None], scored[None]
    ):
        index = tokens[rows].expand(len(log_probs), -1, -1)[..., None]
        chosen = log_probs.gather(-1, index)[..., 0]  # (S, b, T')
        chosen = chosen.where(scored[rows], 0)
        by_draw.append(chosen.sum(-1))
        by_token.append(log_mean_exp(chosen).sum(-1))
    draws = torch.cat(by_draw, 1)  # (S, B)
    return SequenceLogProb(
        by_sequence=log_mean_exp(draws),
        by_token=torch.cat(by_token),
        draws=draws,
        num_tokens=scored.sum(-1),
    )


def _check_labels(ids: Tensor, labels: Tensor, scored: Tensor, mask: Tensor) -> None:
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected that of input_ids, "
            f"{tuple(ids.shape)}."
        )
    # A text's first token has only padding before it.
    first = mask.bool() & (mask.cumsum(-1) == 1)
    for wrong, what in (
        (scored & (labels != ids), "differ from input_ids (don't shift them)"),
        (scored & ~mask.bool(), "score padding"),
        (scored & first, "score a text's first token, which nothing comes before"),
        (~scored.any(-1, keepdim=True), "score no token"),
    ):
        if wrong.any():
            row = int(wrong.any(-1).nonzero()[0])
            raise ValueError(
                f"Row {row}: the labels {what}. Give input_ids where a token belongs "
                f"to the continuation, and {IGNORED} elsewhere."
            )


def causal_network(lora: LiftedNetwork) -> PreTrainedModel:
    """The causal language model of transformers that is lifted.

    Raises:
        ValueError: If there is none.
    """
    check_lora(lora)
    networks = (m for m in lora.network.modules() if isinstance(m, PreTrainedModel))
    network = next(networks, None)
    if network is None or network.get_output_embeddings() is None:
        kind = type(lora.network if network is None else network).__name__
        raise ValueError(
            f"Found a {kind}; expected a causal language model of transformers, "
            "AutoModelForCausalLM, perhaps inside a PeftModel."
        )
    if network.config.is_encoder_decoder:
        raise ValueError(
            f"{type(network).__name__} is an encoder-decoder network, whose text isn't "
            "a continuation of its input. Use a causal language model; or "
            "`with lora.bind(weights) as net: net.generate(...)`, each draw's own text."
        )
    return network


def checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask, (B, T), of ones where none is given.

    Raises:
        ValueError: If shapes are wrong or a row is nothing but padding.
    """
    check_kind("input_ids", input_ids, Tensor, "a tensor (B, T)")
    if input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)} and dtype "
            f"{input_ids.dtype}; expected integers, (B, T)."
        )
    if attention_mask is None:
        return torch.ones_like(input_ids)
    check_kind("attention_mask", attention_mask, Tensor, "a tensor (B, T)")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that "
            f"of input_ids, {tuple(input_ids.shape)}."
        )
    if not attention_mask.any(-1).all():
        raise ValueError("attention_mask: a row is nothing but padding. Leave it out.")
    return attention_mask.to(input_ids.dtype)


def check_vocabulary(network: PreTrainedModel, input_ids: Tensor) -> int:
    """Check that the network knows all tokens.

    Args:
        network: A network of transformers.
        input_ids: The tokens.

    Returns:
        The size of its vocabulary.

    Raises:
        ValueError: If it doesn't.
    """
    table: Any = network.get_input_embeddings()
    size: int = table.weight.shape[0]
    wrong = input_ids[(input_ids < 0) | (input_ids >= size)]
    if wrong.numel():
        raise ValueError(
            f"input_ids: token {int(wrong[0])} is outside of the network's vocabulary "
            f"of {size}, 0 to {size - 1}. Use the network's own tokenizer."
        )
    return size


def lora_draws(
    lora: LiftedNetwork, posterior: Posterior, num_samples: int | None
) -> Weights:
    """Draws of the network's sites, site -> (S, ...).

    Raises:
        ValueError: If the posterior doesn't sample what the prior of ``lora`` does, or
            is that of MC dropout.
    """
    check_no_dropout(posterior, "generate and sequence_log_prob")
    draws = draw_weights(posterior, num_samples, DEFAULT_NUM_SAMPLES)
    return site_values(lora, draws)


@torch.no_grad()
def lora_mode(lora: LiftedNetwork, posterior: Posterior) -> Weights:
    """The posterior's mode, or a stock autoguide's median, site -> (1, ...).

    Of a refined Gaussian, whose mode is the linearised network's, where it started.

    Raises:
        ValueError: If the posterior has neither.
    """
    gaussian = only_gaussian(posterior)
    values: Weights | None = None
    if gaussian is not None:
        values = gaussian.origin()
    elif isinstance(posterior, GuidePosterior):
        values = posterior.median()
    elif hasattr(posterior, "mode"):
        with suppress(ValueError):  # of particles and mixtures, which say so
            values = posterior.mode()
    if values is None:
        raise ValueError(
            f"There is no mode: a {kind_of(posterior)} has neither a mode nor a "
            "median. Use mode='average' or mode='draws'."
        )
    return site_values(lora, {site: value[None] for site, value in values.items()})


def site_values(lora: LiftedNetwork, draws: Mapping[str, Tensor]) -> Weights:
    """What the sites of ``lora`` are at draws of the latent variables, (S, ...).

    Raises:
        ValueError: If a latent variable isn't among the draws.
    """
    if lora.sites.keys() <= draws.keys():
        return {site: draws[site] for site in lora.sites}
    # Under a prior that isn't centred, the sites are functions of the latents.
    num_draws = len(next(iter(draws.values())))
    each = [
        _sites_at(lora, {s: x[index] for s, x in draws.items()})
        for index in range(num_draws)
    ]
    return {site: torch.stack([values[site] for values in each]) for site in lora.sites}


def _sites_at(lora: LiftedNetwork, latents: Weights) -> Mapping[str, Tensor]:
    trace = trace_at(lambda: lora.prior(lora), latents, {})
    for name, site in trace.nodes.items():
        latent = site["type"] == "sample" and not site["is_observed"]
        if latent and name not in latents and not site_is_subsample(site):
            raise ValueError(
                f"Site {name!r} isn't among those that the posterior samples, "
                f"{sorted(latents)}. Pass the lifted network that it was made for."
            )
    values: Mapping[str, Tensor] = trace.nodes["_RETURN"]["value"]
    return values


def next_token_log_probs(
    lora: LiftedNetwork,
    weights: Mapping[str, Tensor],
    texts: Tensor,
    masks: Tensor,
    scored: Tensor,
) -> Iterator[tuple[int, slice, Tensor]]:
    """Log-probabilities that each draw gives, at the last T' positions.

    Several texts of one prompt each, which goes through the network once for all.

    Args:
        lora: A lifted causal language model.
        weights: Site -> (S, ...).
        texts: n texts of each of B prompts, (n, B, T).
        masks: 0 for padding, (n, B, T).
        scored: Of the last T' tokens, each predicted from those before it, whether it
            counts, (n, B, T').

    Yields:
        Which text, rows, and their log-probabilities (S, b, T', V), float32 or wider.

    Raises:
        ValueError: If those of a token that counts are no numbers.
    """
    network = causal_network(lora)
    taken = inspect.signature(network.forward).parameters
    num_texts, batch_size, length = texts.shape
    num_draws, num_new = len(next(iter(weights.values()))), scored.shape[-1]
    vocabulary = network.get_output_embeddings().weight.shape[0]
    step = max(1, MAX_LOG_PROBS // (num_draws * num_new * vocabulary))
    positions = counted(lora.network, masks)

    def inputs(text: int, rows: slice, places: slice, kept: int) -> dict[str, Any]:
        named = {
            "input_ids": texts[text, rows, places],
            "attention_mask": masks[text, rows, : places.stop],
            "position_ids": positions[text, rows, places],
            "logits_to_keep": kept,
        }
        return {name: value for name, value in named.items() if name in taken}

    with evaluating((lora,)), lora.bind(weights) as net:
        for place in range(0, batch_size, step):
            rows, first = slice(place, place + step), 0
            cache: dict[str, Any] = {}
            before = length - num_new - 1  # all but the last token of a prompt
            if num_texts > 1 and before > 0:
                output = net(**inputs(0, rows, slice(0, before), 1), use_cache=True)
                num_rows = num_draws * len(texts[0, rows])
                cache = {k: x for k, x in output.items() if holds_rows(x, num_rows)}
                first = before if cache else 0
            kept = min(num_new + 1, length)
            for text in range(num_texts):
                logits = net(
                    **inputs(text, rows, slice(first, length), kept),
                    use_cache=bool(cache),
                    **copy.deepcopy(cache),
                ).logits
                # Those at place t are of token t + 1.
                logits = logits[..., -num_new - 1 : -1, :]
                check_logits(logits, scored[text, rows], place)
                yield text, rows, at_least_float32(logits).log_softmax(-1)


def check_logits(logits: Tensor, scored: Tensor | None = None, first: int = 0) -> None:
    """Check that logits give probabilities: one question for all of them.

    Args:
        logits: Of S draws of b rows, (S, b, ..., V).
        scored: Those that count, (b, ...); None: all.
        first: The number of the first row.

    Raises:
        ValueError: If they don't, naming a row and, of several, a draw.
    """
    holds = logits.amax(-1).isfinite()  # else their softmax is NaN
    if scored is not None:
        holds = holds | ~scored

    def error() -> ValueError:
        draw, row = (~holds).nonzero()[0, :2].tolist()
        of_draw = f" under draw {draw} of the weights" if len(holds) > 1 else ""
        return ValueError(
            f"Row {first + row}: the network's logits are NaN or infinite{of_draw}. "
            "If rows that are padded have this under any weights, the network doesn't "
            "take padding there: give rows of one length, or one at a time. Else a "
            "draw may be too far out: take a narrower posterior, or a wider dtype."
        )

    require(holds.all(), error)


def log_mean_exp(x: Tensor) -> Tensor:
    """Log of the mean over the first dim."""
    return x.logsumexp(0) - math.log(x.shape[0])
