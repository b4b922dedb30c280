"""LoRA by how it starts, and by the number format of the network under it."""

from functools import partial
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from torch import nn

from tests.lifting.liftable_row import (
    Row,
    adapted,
    attention_lora,
    bert,
    llama,
    started,
    texts,
    trained_only,
)

# Initialisations from the base weights, or from data.


def eva() -> nn.Module:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    network = get_peft_model(llama(), config)
    initialize_lora_eva_weights(network, [texts()] * 3, show_progress_bar=False)
    return started(network)


def corda() -> nn.Module:
    from peft.tuners.lora.corda import preprocess_corda  # imports attr

    network = llama().eval()
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )

    @torch.no_grad()
    def calibrate() -> None:
        for _ in range(4):  # its hooks want one text at a time
            network(input_ids=torch.randint(1, 50, (1, 6)))

    preprocess_corda(network, config, run_model=calibrate)
    return adapted(network, config)


def lora_ga() -> nn.Module:
    from peft.tuners.lora.config import LoraGAConfig  # peft 0.17 has neither
    from peft.tuners.lora.loraga import preprocess_loraga

    network = llama()
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def train_step() -> None:
        network(**texts()).last_hidden_state.square().sum().backward()

    preprocess_loraga(network, config, train_step)
    return adapted(network, config)


@torch.no_grad()
def loftq() -> nn.Module:
    """LoftQ by its algorithm: PEFT's own function quantises on a GPU only."""
    network = get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    )
    for path, base in list(network.named_modules()):
        if not path.endswith("_proj.base_layer"):
            continue
        layer: Any = network.get_submodule(path.removesuffix(".base_layer"))
        weight, step = base.weight.clone(), base.weight.abs().max() / 7
        rest = torch.zeros_like(weight)
        for _ in range(2):  # alternate: round what is left, factorise what is lost
            base.weight.copy_(((weight - rest) / step).round() * step)  # 4 bits
            left, values, right = torch.linalg.svd(weight - base.weight)
            root = values[:3].sqrt()
            layer.lora_B["default"].weight.copy_(left[:, :3] * root)
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:3])
            rest = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return network.double().eval()


def half(dtype: torch.dtype, *, adapter: torch.dtype) -> nn.Module:
    network = adapted(
        llama(dtype=dtype), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), dtype
    )
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    return network


RESIDUAL = "the residual base weight stays frozen"
INITIALISATIONS = [
    Row(
        group="LoRA, by initialisation",
        name=name,
        build=build,
        sites="lora: A, B",
        note=note,
        needs=needs,
    )
    for name, build, note, needs in [
        (
            "PiSSA",
            lambda: attention_lora(llama(), init_lora_weights="pissa"),
            RESIDUAL,
            "",
        ),
        (
            "OLoRA",
            lambda: attention_lora(llama(), init_lora_weights="olora"),
            RESIDUAL,
            "",
        ),
        ("EVA", eva, "", ""),
        ("CorDA", corda, RESIDUAL, "attr"),
        ("LoRA-GA", lora_ga, RESIDUAL, "peft.tuners.lora.loraga"),
        ("LoftQ", loftq, "the quantised base weight stays frozen", ""),
        (
            "orthogonal",
            lambda: attention_lora(llama(), r=4, init_lora_weights="orthogonal"),
            "",
            "",
        ),
    ]
]

# As shares of the largest output, and of the largest gradient.
ROUNDING = {
    dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)
}
FLOAT32_SITES = "float32 sites; compared to 8 units of rounding"
NUMBER_FORMATS = [
    *(
        Row(
            group="Number formats of the frozen base",
            name=f"{name} base, {adapter} adapter",
            build=partial(half, dtype, adapter=getattr(torch, adapter)),
            sites="lora: A, B",
            tolerance=ROUNDING[dtype],
            note=FLOAT32_SITES,
        )
        for name, dtype in [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
        for adapter in ("float32", name)
    ),
    Row(
        group="Number formats of the frozen base",
        name="bfloat16 base, bfloat16 biases and LayerNorm",
        build=lambda: trained_only(bert(), "bias", "LayerNorm").bfloat16(),
        sites="base: bias, weight",
        tolerance=ROUNDING[torch.bfloat16],
        note=FLOAT32_SITES,
    ),
]
ROWS = [*INITIALISATIONS, *NUMBER_FORMATS]
