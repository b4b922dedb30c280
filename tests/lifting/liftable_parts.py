"""Which part of a network is trained: adapters made by hand, biases, layers, heads."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests.lifting.liftable_row import (
    Row,
    bert,
    llama,
    lora,
    roberta,
    started,
    trained_only,
)
from tests.networks import batch, inputs


class Bottleneck(nn.Module):
    """An adapter of Houlsby et al.: down, a nonlinearity, up, and the input again."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def with_bottlenecks(*sublayers: str) -> nn.Module:
    network = bert().requires_grad_(False)
    for path, module in list(network.named_modules()):
        if path.endswith(sublayers):
            dense: Any = module.dense
            module.dense = nn.Sequential(dense, Bottleneck(16, 4))
    return started(network)


def choices() -> dict[str, Tensor]:
    """Three questions with two choices each: (B, choices, T)."""
    return {name: value.view(3, 2, -1) for name, value in inputs(batch(6, 5)).items()}


PARTS = [
    Row(
        group="Parts of a network",
        name=name,
        build=build,
        sites=sites,
        one_by_one="embeddings and decoder share a parameter" if "tied" in note else "",
        note=note,
    )
    for name, build, sites, note in [
        (
            "bottleneck adapters (Houlsby)",
            lambda: with_bottlenecks("attention.output", "0.output", "1.output"),
            "base: bias, weight",
            "any inserted MLP",
        ),
        (
            "bottleneck adapters (Pfeiffer)",
            lambda: with_bottlenecks("0.output", "1.output"),
            "base: bias, weight",
            "any inserted MLP",
        ),
        (
            'LoRA with bias="lora_only"',
            lambda: lora(bert(), "query", "value", bias="lora_only"),
            "lora: A, B; base: bias",
            "",
        ),
        (
            'LoRA with bias="all"',
            lambda: lora(bert(), "query", "value", bias="all"),
            "lora: A, B; base: bias",
            "also those of LayerNorm",
        ),
        ("BitFit", lambda: trained_only(bert(), "bias"), "base: bias", ""),
        (
            "the last layer and the head",
            lambda: trained_only(
                bert(AutoModelForSequenceClassification), "layer.1.", "classifier"
            ),
            "base: bias, weight",
            "",
        ),
        (
            "the last MLP",
            lambda: trained_only(
                bert(), "layer.1.intermediate", "layer.1.output.dense"
            ),
            "base: bias, weight",
            "",
        ),
        (
            "all weights of a classifier",
            lambda: trained_only(bert(AutoModelForSequenceClassification), ""),
            "base: bias, weight",
            "embeddings and LayerNorm, too",
        ),
        (
            "all weights of an encoder",
            lambda: trained_only(bert(AutoModelForMaskedLM), ""),
            "base: bias, weight",
            "embeddings tied to the decoder, LayerNorm",
        ),
        (
            "all weights of a decoder",
            lambda: trained_only(
                llama(AutoModelForCausalLM, tie_word_embeddings=True), ""
            ),
            "base: weight",
            "embeddings tied to the decoder, RMSNorm",
        ),
    ]
]
HEADS = [
    Row(
        group="Heads (modules_to_save)",
        name="sequence classification",
        build=lambda: lora(
            bert(AutoModelForSequenceClassification, num_labels=3),
            "query",
            "value",
            task_type="SEQ_CLS",
        ),
        sites="lora: A, B; head: bias, weight",
    ),
    Row(
        group="Heads (modules_to_save)",
        name="token classification",
        build=lambda: lora(
            bert(AutoModelForTokenClassification, num_labels=3),
            "query",
            "value",
            task_type="TOKEN_CLS",
        ),
        sites="lora: A, B; head: bias, weight",
    ),
    Row(
        group="Heads (modules_to_save)",
        name="multiple choice",
        build=lambda: lora(
            bert(AutoModelForMultipleChoice),
            "query",
            "value",
            modules_to_save=["classifier"],
        ),
        inputs=choices,
        sites="lora: A, B; head: bias, weight",
        note="inputs (B, choices, T)",
    ),
    Row(
        group="Heads (modules_to_save)",
        name="language model, with its embeddings",
        build=lambda: lora(
            llama(AutoModelForCausalLM),
            "q_proj",
            "v_proj",
            modules_to_save=["embed_tokens", "lm_head"],
        ),
        sites="lora: A, B; head: weight",
    ),
    Row(
        group="Heads (modules_to_save)",
        name="a head of two layers",
        build=lambda: lora(
            roberta(AutoModelForSequenceClassification),
            "query",
            "value",
            task_type="SEQ_CLS",
        ),
        sites="lora: A, B; head: bias, weight",
    ),
]

ROWS = [*PARTS, *HEADS]
