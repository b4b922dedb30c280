"""Architectures of transformers, each with LoRA on a tiny one of them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CLIPConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from tests.lifting.liftable_row import (
    EXPERTS,
    NO_DROPOUT,
    TINY,
    Row,
    bert,
    gpt2,
    llama,
    lora,
    roberta,
    texts,
    tiny,
)
from tests.networks import batch, inputs, t5


def deberta() -> nn.Module:
    return tiny(
        DebertaV2Config,
        AutoModelForSequenceClassification,
        **NO_DROPOUT,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    )


def encoder_decoder_texts() -> dict[str, Tensor]:
    return {**texts(), "decoder_input_ids": torch.randint(1, 50, (3, 4))}


def vit() -> nn.Module:
    config = {**TINY, **NO_DROPOUT, "image_size": 8, "patch_size": 4, "num_labels": 3}
    for text_only in ("vocab_size", "max_position_embeddings", "pad_token_id"):
        del config[text_only]
    network = AutoModelForImageClassification.from_config(ViTConfig(**config))
    return lora(network, "query", "value", "projection", modules_to_save=["classifier"])


def clip() -> nn.Module:
    shared = {**TINY, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**shared, "bos_token_id": 1, "eos_token_id": 49},
        vision_config={**shared, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return lora(AutoModel.from_config(config), "q_proj", "v_proj")


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}


def left_padded() -> dict[str, Tensor]:
    return inputs(batch(3, 6, padding="left"))


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
HALF_HEADS = {"num_key_value_heads": 1, "head_dim": 8}


def attention(name: str, implementation: str) -> nn.Module:
    builders: dict[str, Any] = {"BERT": bert, "Llama": llama}
    targets = {"BERT": ("query", "value"), "Llama": ("q_proj", "v_proj")}[name]
    network = lora(builders[name](attn_implementation=implementation), *targets)
    # transformers' eager attention gives NaN for a padded first token in float64.
    return network.float()


ROWS = [
    Row(
        group="Architectures",
        name="BERT",
        build=lambda: lora(bert(), "query", "key", "value", "dense"),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="RoBERTa",
        build=lambda: lora(roberta(), "query", "value"),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="MiniLM",
        build=lambda: lora(
            bert(
                hidden_size=24,
                num_hidden_layers=3,
                num_attention_heads=12,
                intermediate_size=96,
            ),
            "query",
            "value",
        ),
        sites="lora: A, B",
        note="a BERT with 12 narrow heads",
    ),
    Row(
        group="Architectures",
        name="DeBERTa-v2",
        build=lambda: lora(deberta(), "query_proj", "value_proj"),
        sites="lora: A, B",
        one_by_one="its projections also see relative positions, without a batch",
    ),
    Row(
        group="Architectures",
        name="DeBERTa-v2, values only",
        build=lambda: lora(deberta(), "value_proj"),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="Llama",
        build=lambda: lora(llama(AutoModelForCausalLM), *QKVO, "up_proj", "down_proj"),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="Qwen3",
        build=lambda: lora(tiny(Qwen3Config, **HALF_HEADS), *QKVO),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="Gemma",
        build=lambda: lora(tiny(GemmaConfig, **HALF_HEADS), *QKVO),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="Gemma 3",
        build=lambda: lora(
            tiny(Gemma3TextConfig, **HALF_HEADS, sliding_window=4), *QKVO
        ),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="GPT-2",
        build=lambda: lora(gpt2(AutoModelForCausalLM), "c_attn", fan_in_fan_out=True),
        sites="lora: A, B",
    ),
    Row(
        group="Architectures",
        name="Mixtral",
        build=lambda: lora(
            tiny(MixtralConfig, num_local_experts=3, num_key_value_heads=1, **EXPERTS),
            *QKVO,
        ),
        sites="lora: A, B",
        note="a mixture of experts, adapted in its attention",
    ),
    Row(
        group="Architectures",
        name="Qwen3-MoE",
        build=lambda: lora(
            tiny(
                Qwen3MoeConfig,
                **HALF_HEADS,
                **EXPERTS,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=8,
            ),
            *QKVO,
        ),
        sites="lora: A, B",
        note="a mixture of experts, adapted in its attention",
    ),
    Row(
        group="Architectures",
        name="T5",
        build=lambda: lora(t5(decoder_start_token_id=0), "q", "v"),
        inputs=encoder_decoder_texts,
        sites="lora: A, B",
        note="encoder and decoder",
    ),
    Row(
        group="Architectures",
        name="CLIP",
        build=clip,
        inputs=lambda: {**pixels(), "input_ids": torch.randint(2, 49, (3, 6))},
        sites="lora: A, B",
        one_by_one="it compares all images and texts of a batch",
    ),
    Row(
        group="Architectures",
        name="ViT",
        build=vit,
        inputs=pixels,
        sites="lora: A, B; head: bias, weight",
        note="its patch embedding, a convolution, too",
    ),
    *(
        Row(
            group="Architectures",
            name=f"{name}, {implementation} attention, {padding}-padded",
            build=lambda n=name, i=implementation: attention(n, i),
            inputs=left_padded if padding == "left" else texts,
            sites="lora: A, B",
            tolerance=1e-5,
            note="in float32",
        )
        for name in ("BERT", "Llama")
        for implementation in ("sdpa", "eager")
        for padding in ("left", "right")
    ),
]
