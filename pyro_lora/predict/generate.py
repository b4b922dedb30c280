"""Posterior -> text, with what the draws think of every token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import progress
from pyro_lora.ground.settings import (
    check_count,
    check_function,
    check_kind,
    check_number,
    check_positive,
    check_word,
)
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.positions import counted, first_position, takes
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.model_trace import evaluating
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import Posterior, as_posterior
from pyro_lora.posteriors.served import served
from pyro_lora.predict.draws import network_of
from pyro_lora.predict.sequence_scores import (
    causal_network,
    check_logits,
    check_vocabulary,
    checked_mask,
    log_mean_exp,
    lora_draws,
    lora_mode,
    next_token_log_probs,
)

Mode = Literal["average", "draws", "mode"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Generation(FieldsShown):
    r"""Texts, and what S draws of the weights think of every new token.

    Lead dims are (B,), or (S, B) with a text from each draw. T is the length of the
    prompts, T' that of what was added. Entropies are those of the next token's
    distribution over the vocabulary, in nats, 0 after the end of a text.

    Attributes:
        sequences: Prompts and new tokens, (..., T + T'), padded after the end.
        prompt_length: T.
        total_entropy: :math:`H(\frac1S \sum_s p_s)`, (..., T').
        aleatoric_entropy: :math:`\frac1S \sum_s H(p_s)`, (..., T').
        log_probs: Log-probability of the tokens under the averaged model, 0 after the
            end, (..., T').
        finished: Whether the text came to its end, (...).
    """

    sequences: Tensor
    prompt_length: int
    total_entropy: Tensor
    aleatoric_entropy: Tensor
    log_probs: Tensor
    finished: Tensor

    @property
    def new_tokens(self) -> Tensor:
        """What was added to the prompts, (..., T')."""
        return self.sequences[..., self.prompt_length :]

    @property
    def epistemic_entropy(self) -> Tensor:
        """Total minus aleatoric, (..., T'): the draws' disagreement, nats."""
        return (self.total_entropy - self.aleatoric_entropy).clamp(min=0)


@leaving_no_trace
@torch.no_grad()
def generate(
    posterior: Posterior | Guide,
    input_ids: Tensor,
    num_samples: int | None = None,
    *,
    lora: LiftedNetwork | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    mode: Mode = "average",
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    batches: Iterable[Batch] | None = None,
    progress_bar: bool | None = None,
) -> Generation:
    r"""Continue prompts under S draws of the weights at once, with a key-value cache.

    Three answers. ``"average"``: one text, each token from the average of the draws'
    next-token distributions, :math:`\frac1S \sum_s p_s(y_t | y_{<t}, x)`.
    ``"draws"``: a text from each draw. ``"mode"``: the text of the posterior's mode
    (of an autoguide its median, of a refined Gaussian its ``origin()``). In each case
    the entropies and log-probabilities are those of the S draws given the text, without
    temperature, top-k or processors.

    The network's own ``generate`` does the work, so that with one draw the tokens are
    those of PEFT's. Processors, also those of the network's generation config, act on
    each draw's logits; temperature, top-k and top-p on the average. Beam search is
    refused: its beams are ranked by one network's scores. Layers below the first
    adapted one run once for all draws, and keep one cache, over the prompts and for as
    long as the draws' tokens are the same; above, memory grows with S B. The split of
    the entropy is that of Malinin & Gales (2021), https://arxiv.org/abs/2002.07650, for
    the token-wise case.

    Args:
        posterior: A posterior, or any Pyro guide, over the weights of a causal language
            model of transformers.
        input_ids: Prompts, (B, T), padded on the left.
        num_samples: Draws S; None is every particle once, or 8 where there are none.
        lora: The lifted language model; None is the posterior's own.
        attention_mask: 0 for padding, (B, T); None: there is none.
        max_new_tokens: T' at most.
        mode: Which answer.
        do_sample: Draw the tokens, instead of taking the most likely ones.
        temperature: Divides the log-probabilities that are sampled from.
        top_k: Sample from the k most likely tokens only.
        top_p: Sample from the most likely tokens of this total probability only.
        logits_processor: Further ones of transformers, for the logits (rows, V).
        eos_token_id: Tokens that end a text; None: the generation config's.
        pad_token_id: Fills up after the end; None: the generation config's, else the
            first that ends a text.
        generator: Randomness of the tokens; None: torch's global state. The draws of
            the weights are always by the global state.
        batches: Rows with labels, on which a Gaussian over several layers, or a mixture
            with one, is made narrow, as by its ``for_sampling``; draws of the whole
            width are about the linearised network. For several calls do it once, there.
        progress_bar: Show one, of the new tokens; None: on a terminal or in a notebook.

    Returns:
        Texts, entropies, log-probabilities.

    Raises:
        ValueError: If the network is no causal language model or its generation config
            asks for beams or another search, padding isn't on the left, an argument is
            out of range, the posterior doesn't fit or has no mode, the network can't
            take several draws in one batch with ``"average"``, or its logits are NaN or
            infinite.

    Warns:
        UserWarning: If it is such a Gaussian, and there are no batches.
    """
    mask = checked_mask(input_ids, attention_mask)
    texts = {"input_ids": input_ids, "attention_mask": mask}
    posterior = as_posterior(posterior, arguments=texts)
    lora = network_of(posterior, lora, "generate")
    network = causal_network(lora)
    check_word("mode", mode, get_args(Mode))
    check_count("max_new_tokens", max_new_tokens)
    if generator is not None:
        check_kind("generator", generator, torch.Generator, "a torch.Generator")
    expected = "a list of transformers' LogitsProcessor"
    check_kind("logits_processor", logits_processor, Sequence, expected)
    for processor in logits_processor:
        check_function("Each logits_processor", processor, expected)
    for name, off, what in _OTHER_SEARCHES:
        value = getattr(network.generation_config, name, None)
        if value and value != off:
            raise ValueError(
                f"The network's generation_config has {name}={value!r}, which asks for "
                f"{what}. Set generation_config.{name} = {off}."
            )
    size = check_vocabulary(network, input_ids)
    ends = [] if eos_token_id is None else [eos_token_id]
    for token in eos_token_id if isinstance(eos_token_id, Sequence) else ends:
        _check_token("eos_token_id", token, size)
    if pad_token_id is not None:
        _check_token("pad_token_id", pad_token_id, size)
    eos, pad = _special_tokens(network.generation_config, eos_token_id, pad_token_id)
    _check_padding(input_ids, mask, attention_mask is None, pad)
    warpers = _warpers(do_sample, temperature, top_k, top_p)
    posterior = served(posterior, batches, "generate")
    draws = lora_draws(lora, posterior, num_samples)
    weights = lora_mode(lora, posterior) if mode == "mode" else draws
    averaged = len(next(iter(weights.values()))) if mode == "average" else 1
    bar = progress(
        title="Generate", unit="token", total=max_new_tokens, shown=progress_bar
    )
    choice = _NextToken(averaged, len(input_ids), warpers, do_sample, generator, bar)
    # transformers counts from 0 in every network.
    counts = takes(network, "position_ids") and first_position(network) > 0
    starts = {"position_ids": counted(network, mask)} if counts else {}
    with bar, evaluating((lora,)), lora.bind(weights) as net:
        sequences = net.generate(
            input_ids,
            attention_mask=mask,
            **starts,
            logits_processor=LogitsProcessorList([*logits_processor, choice]),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos or None,
            pad_token_id=pad,
            # The processor has drawn already, and the config's own settings are off.
            do_sample=False,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            return_dict_in_generate=False,
        )  # (S, B, T + T'), one block in mode "mode"
    written = sequences if mode == "draws" else sequences[:1]  # copies are the same
    each = (written, *_scored(lora, draws, written, mask, eos))
    written, total, aleatoric, log_probs, finished = (
        values if mode == "draws" else values[0] for values in each
    )
    return Generation(
        sequences=written,
        prompt_length=input_ids.shape[1],
        total_entropy=total,
        aleatoric_entropy=aleatoric,
        log_probs=log_probs,
        finished=finished,
    )


# What a generation config can ask for beside one text, token by token: the setting, its
# value where it's off, and what isn't defined for an average of several networks.
_OTHER_SEARCHES = (
    ("num_beams", 1, "beam search, which ranks whole texts by one network's scores"),
    ("num_return_sequences", 1, "several texts of each prompt; repeat the prompts"),
    ("penalty_alpha", None, "contrastive search, by one network's hidden states"),
    ("prompt_lookup_num_tokens", None, "guesses of tokens, which one network tests"),
    ("stop_strings", None, "ends in words; give tokens instead, as eos_token_id"),
)


class _NextToken(LogitsProcessor):
    """Chooses the next token: every other one's score becomes -inf.

    Args:
        num_draws: Draws that are averaged, whose rows (S B, V) come draw by draw.
        batch_size: B.
        warpers: Temperature, top-k, top-p.
        do_sample: Whether to draw.
        generator: Randomness.
        bar: Counts the tokens.
    """

    def __init__(
        self,
        num_draws: int,
        batch_size: int,
        warpers: LogitsProcessorList,
        do_sample: bool,
        generator: torch.Generator | None,
        bar: Any,
    ) -> None:
        self.num_draws = num_draws
        self.batch_size = batch_size
        self.warpers = warpers
        self.do_sample = do_sample
        self.generator = generator
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        # With one draw at a time, rows are B or, folded, S B texts of their own.
        num_rows, remainder = divmod(len(scores), self.num_draws)
        if self.num_draws > 1 and (remainder or num_rows != self.batch_size):
            raise ValueError(
                f"The average needs {self.num_draws} draws in one batch, which this "
                "network can't take (the log says why). Use mode='draws' or 'mode'."
            )
        check_logits(scores.unflatten(0, (-1, self.batch_size)))
        # log (1/S) Σ_s p_s(y_t | y_<t): what is chosen is the same for all draws, whose
        # caches stay those of one text.
        if self.num_draws > 1:
            by_draw = scores.log_softmax(-1).unflatten(0, (self.num_draws, num_rows))
            averaged = log_mean_exp(by_draw)  # (B, V)
        else:
            averaged = scores
        ids: Any = input_ids[:num_rows]
        averaged = self.warpers(ids, averaged)
        if self.do_sample:
            probs = averaged.softmax(-1)
            token = torch.multinomial(probs, 1, generator=self.generator)
        else:
            token = averaged.argmax(-1, keepdim=True)
        chosen = torch.full_like(averaged, -torch.inf).scatter(-1, token, 0)
        return chosen.repeat(self.num_draws, 1)


def _scored(
    lora: LiftedNetwork,
    draws: Mapping[str, Tensor],
    texts: Tensor,
    prompt_mask: Tensor,
    eos: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n texts of each prompt, (n, B, T + T'), what the draws think.

    Total and aleatoric entropy, log-probability, (n, B, T'), and finished, (n, B).
    """
    new = texts[..., prompt_mask.shape[1] :]  # (n, B, T')
    ends = torch.isin(new, new.new_tensor(eos))
    # No end before the token: of (5, 3, E, 0, 0) the first three are alive.
    alive = ends.cumsum(-1) - ends.long() == 0
    prompt_masks = prompt_mask.expand(len(texts), *prompt_mask.shape)
    masks = torch.cat([prompt_masks, alive.to(prompt_mask)], -1)
    scores: list[list[tuple[Tensor, ...]]] = [[] for _ in texts]
    for text, rows, each in next_token_log_probs(lora, draws, texts, masks, alive):
        averaged = log_mean_exp(each)  # (b, T', V)
        scores[text].append(
            (
                torch.special.entr(averaged.exp()).sum(-1),
                torch.special.entr(each.exp()).sum(-1).mean(0),
                averaged.gather(-1, new[text, rows, :, None])[..., 0],
            )
        )
    by_text = [[torch.cat(x) for x in zip(*parts, strict=True)] for parts in scores]
    total, aleatoric, log_probs = (
        torch.stack(x).where(alive, 0) for x in zip(*by_text, strict=True)
    )
    return total, aleatoric, log_probs, ends.any(-1)


def _warpers(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float | None
) -> LogitsProcessorList:
    """Those of transformers, in its order, which check their arguments.

    Raises:
        ValueError: If they would have nothing to act on.
    """
    check_positive("temperature", temperature)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p, 0, 1)
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    if warpers and not do_sample:
        raise ValueError(
            "temperature, top_k and top_p change nothing but samples. Pass "
            "do_sample=True, or leave them out."
        )
    return warpers


def _check_token(name: str, token: object, size: int) -> None:
    check_count(name, token, 0)
    if int(token) >= size:  # type: ignore[call-overload]
        raise ValueError(
            f"{name} {token} is outside of the network's vocabulary of {size}."
        )


def _special_tokens(
    config: object, eos: int | Sequence[int] | None, pad: int | None
) -> tuple[list[int], int | None]:
    """The tokens that end a text, and the one that comes after it."""
    eos = config.eos_token_id if eos is None else eos  # type: ignore[attr-defined]
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = config.pad_token_id if pad is None else pad  # type: ignore[attr-defined]
    if pad is None and ends:
        pad = ends[0]
    return ends, pad


def _check_padding(ids: Tensor, mask: Tensor, no_mask: bool, pad: int | None) -> None:
    if no_mask and len(ids) > 1 and pad is not None and (ids[:, 0] == pad).any():
        raise ValueError(
            f"A prompt starts with {pad}, the padding token. Pass attention_mask, 0 "
            "where there is padding."
        )
    if not mask[:, -1].all():
        raise ValueError(
            "A prompt ends in padding, which its continuation would follow. Pad on the "
            "left: tokenizer.padding_side = 'left'."
        )
