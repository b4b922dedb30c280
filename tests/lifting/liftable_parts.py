"""Which part of a network is trained: adapters made by hand, biases, layers, heads."""

from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, inject_adapter_in_model
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
    adapted,
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


class OwnHead(nn.Module):
    """An encoder of a user's, or several, under a head of their own."""

    def __init__(self, *encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(16 * len(encoders), 3)

    def forward(self, **texts: Tensor) -> Tensor:
        states = [x(**texts).last_hidden_state[:, 0] for x in self.encoders]
        return self.head(torch.cat(states, -1))


def inside(number: int = 1) -> nn.Module:
    """A head on PEFT models."""
    encoders = [lora(bert(), "query", "value") for _ in range(number)]
    return started(OwnHead(*encoders))


def injected() -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"])
    return started(OwnHead(inject_adapter_in_model(config, bert())))


def prompted() -> nn.Module:
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    return started(OwnHead(adapted(llama(), config)))


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

OWN = [
    Row(
        group="PEFT inside of a module of one's own",
        name=name,
        build=build,
        sites=sites,
        one_by_one=one_by_one,
        note=note,
    )
    for name, build, sites, one_by_one, note in [
        (
            "a head on a PeftModel",
            inside,
            "lora: A, B; base: bias, weight",
            "",
            "`export_adapters` needs a PeftModel around all",
        ),
        (
            "a head on two PeftModels",
            lambda: inside(2),
            "lora: A, B; base: bias, weight",
            "",
            "adapters of the same name",
        ),
        (
            "a head on a backbone with inject_adapter_in_model",
            injected,
            "lora: A, B; base: bias, weight",
            "",
            "",
        ),
        (
            "a head on prefix tuning",
            prompted,
            "prompt: weight; base: bias, weight",
            "PEFT puts the prompt before the inputs of its part",
            "",
        ),
    ]
]

ROWS = [*PARTS, *HEADS, *OWN]
