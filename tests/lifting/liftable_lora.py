"""LoRA of every kind of layer, and in its variants."""

from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.lifting.liftable_row import (
    EXPERTS,
    Row,
    attention_lora,
    bert,
    gpt2,
    llama,
    lora,
    started,
    tiny,
)

# Convolutions and attention outside of transformers.


class Convolutions(nn.Module):
    """Convolutions over one, two and three dims, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.conv1d = nn.Conv1d(4, 4, 2)
        self.conv3d = nn.Conv3d(4, 3, (1, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.grouped(self.conv2d(images).relu()).tanh()  # (B, 4, 4, 4)
        x = self.conv1d(x.flatten(2)).tanh()  # (B, 4, 15)
        return self.conv3d(x[:, :, None, :, None])[:, :, 0, :, 0]


def images() -> dict[str, Tensor]:
    return {"images": torch.randn(3, 2, 6, 6, dtype=torch.float64)}


class SelfAttention(nn.Module):
    """PyTorch's own attention layer between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.attention(h, h, h, need_weights=False)[0]


def sequences() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 6, 5, dtype=torch.float64)}


# Adapters that share a network.


def two_adapters(active: str) -> nn.Module:
    network: Any = attention_lora(llama())
    network.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    network.set_adapter(active)
    return started(network)


def for_inference() -> nn.Module:
    return attention_lora(llama()).requires_grad_(False)


def with_config(name: str, field: str, *, r: int = 3, **settings: Any) -> nn.Module:
    """LoRA with a configuration inside of its own, which older peft doesn't have."""
    config_class = getattr(import_module("peft.tuners.lora.config"), name)
    return attention_lora(llama(), r=r, **{field: config_class(**settings)})


def mixture_of_experts() -> nn.Module:
    return tiny(MixtralConfig, num_local_experts=3, num_key_value_heads=1, **EXPERTS)


TIED = "several layers share a parameter"
LORA_LAYERS = [
    Row(
        group="LoRA, by layer",
        name="nn.Linear",
        build=lambda: attention_lora(llama()),
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by layer",
        name="a rank and an alpha for each module",
        build=lambda: attention_lora(
            llama(),
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 5},
        ),
        sites="lora: A, B",
        note="different shapes under one name become stacks of their own",
    ),
    Row(
        group="LoRA, by layer",
        name="nn.Embedding",
        build=lambda: lora(llama(), "embed_tokens", "q_proj"),
        sites="lora: A, B",
        note="A is (R, vocabulary), as PEFT has it",
    ),
    Row(
        group="LoRA, by layer",
        name="Conv1D of GPT-2",
        build=lambda: lora(gpt2(), "c_attn", "c_proj", fan_in_fan_out=True),
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by layer",
        name="nn.Conv1d, Conv2d, Conv3d",
        build=lambda: lora(Convolutions(), "conv1d", "conv2d", "conv3d"),
        inputs=images,
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by layer",
        name="nn.Conv2d in groups",
        build=lambda: lora(Convolutions(), "grouped", r=4),
        inputs=images,
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by layer",
        name="nn.MultiheadAttention",
        build=lambda: lora(SelfAttention(), "attention"),
        inputs=sequences,
        refused="changes the base weights at every call",
        note="PEFT merges it into the base weight at every call: adapt nn.Linear",
    ),
    Row(
        group="LoRA, by layer",
        name="experts (target_parameters)",
        build=lambda: lora(
            mixture_of_experts(),
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
        sites="lora: A, B",
        one_by_one="tokens are routed, so that the experts see no batch",
    ),
    Row(
        group="LoRA, by layer",
        name="new tokens (trainable_token_indices)",
        build=lambda: attention_lora(
            llama(AutoModelForCausalLM, tie_word_embeddings=True),
            trainable_token_indices=[1, 2, 3],
        ),
        sites="lora: A, B; trainable_tokens: delta",
        one_by_one=TIED,
    ),
    Row(
        group="LoRA, by layer",
        name="repeated layers (layer_replication)",
        build=lambda: attention_lora(llama(), layer_replication=[(0, 2), (1, 2)]),
        sites="lora: A, B",
    ),
]

LORA_VARIANTS = [
    Row(
        group="LoRA, by variant",
        name="rsLoRA",
        build=lambda: attention_lora(llama(), use_rslora=True),
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by variant",
        name="lora_bias",
        build=lambda: lora(bert(), "query", "value", lora_bias=True),
        sites="lora: A, B, bias",
    ),
    Row(
        group="LoRA, by variant",
        name="DoRA",
        build=lambda: attention_lora(llama(), use_dora=True),
        sites="lora: A, B, magnitude",
    ),
    Row(
        group="LoRA, by variant",
        name="DoRA of an embedding",
        build=lambda: lora(llama(), "embed_tokens", use_dora=True),
        sites="lora: A, B, magnitude",
    ),
    Row(
        group="LoRA, by variant",
        name="DoRA of a convolution",
        build=lambda: lora(Convolutions(), "conv1d", "conv2d", use_dora=True),
        inputs=images,
        sites="lora: A, B, magnitude",
    ),
    Row(
        group="LoRA, by variant",
        name="KaSA",
        build=lambda: with_config("KasaConfig", "kasa_config"),
        sites="lora: A, B, diag",
        needs="peft.tuners.lora.config.KasaConfig",
        note="the truncated base weight stays frozen",
    ),
    Row(
        group="LoRA, by variant",
        name="MiCA",
        build=lambda: attention_lora(llama(), init_lora_weights="mica"),
        sites="lora: A",
        needs="peft.tuners.lora.variants.MiCALinearVariant",
        note="its B is frozen",
    ),
    Row(
        group="LoRA, by variant",
        name="BD-LoRA",
        build=lambda: with_config(
            "BdLoraConfig",
            "use_bdlora",
            r=4,
            target_modules_bd_a=["q_proj", "v_proj"],
            nblocks=2,
        ),
        sites="lora: A, B",
        needs="peft.tuners.lora.config.BdLoraConfig",
    ),
    Row(
        group="LoRA, by variant",
        name="VeLoRA",
        build=lambda: with_config("VeloraConfig", "velora_config", num_groups=4),
        sites="lora: A, B",
        needs="peft.tuners.lora.config.VeloraConfig",
    ),
    Row(
        group="LoRA, by variant",
        name="MonteCLoRA",
        build=lambda: with_config("MontecloraConfig", "monteclora_config"),
        sites="lora: A, B, expert_weights_prior, std_prior",
        note="its own sampling happens in training mode only",
        needs="peft.tuners.lora.config.MontecloraConfig",
    ),
    Row(
        group="LoRA, by variant",
        name="aLoRA",
        build=lambda: attention_lora(
            llama(AutoModelForCausalLM),
            alora_invocation_tokens=[3, 4],
            task_type="CAUSAL_LM",
        ),
        inputs=lambda: {"input_ids": torch.tensor([[5, 3, 4, 8, 9], [3, 4, 7, 6, 5]])},
        sites="lora: A, B",
    ),
    Row(
        group="LoRA, by variant",
        name="several adapters, one lifted",
        build=lambda: two_adapters("other"),
        lift={"adapter": "other"},
        sites="lora: A, B",
        note="the one named by `adapter=`, which must be active",
    ),
    Row(
        group="LoRA, by variant",
        name="an adapter loaded for inference",
        build=for_inference,
        sites="lora: A, B",
        note="lifted although its parameters are frozen",
    ),
]

ROWS = [*LORA_LAYERS, *LORA_VARIANTS]
