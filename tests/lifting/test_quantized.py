"""Adapters on a frozen base that is quantised, from 8 bits down to 1."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)

import pyro_lora as pl
from tests.networks import (
    batch,
    classifier,
    inputs,
    llama,
    particles,
    randomize_adapter,
    without_peft,
)

# Blocks of 4-bit weights have at least 64 inputs in bitsandbytes.
HIDDEN_SIZE = 64
TARGETS = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Quantize = Callable[[Path, torch.device, torch.dtype], nn.Module]


def bitsandbytes(settings: dict[str, Any]) -> Quantize:
    def load(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
        pytest.importorskip("bitsandbytes")
        return load_quantized(path, device, dtype, BitsAndBytesConfig(**settings))

    return load


def torchao(bits: int) -> Quantize:
    def load(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
        pytest.importorskip("torchao")
        quantization = importlib.import_module("torchao.quantization")
        primitives = importlib.import_module("torchao.quantization.quant_primitives")
        settings = quantization.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=quantization.PerGroup(16),
            # Symmetric around 0, one bit leaves only 0.
            mapping_type=primitives.MappingType.ASYMMETRIC,
        )
        config = TorchAoConfig(quant_type=settings)
        return load_quantized(path, device, dtype, config)

    return load


def hqq(bits: int) -> Quantize:
    def load(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
        pytest.importorskip("hqq")
        quantize = importlib.import_module("hqq.core.quantize")
        network = load_quantized(path, device, dtype, None)
        for name, layer in list(network.named_modules()):
            parent, _, attribute = name.rpartition(".")
            if attribute in LINEAR:
                settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=16)
                quantized = quantize.HQQLinear(
                    layer, settings, compute_dtype=dtype, device=str(device)
                )
                setattr(network.get_submodule(parent), attribute, quantized)
        return network

    return load


def load_quantized(
    path: Path, device: torch.device, dtype: torch.dtype, config: Any
) -> nn.Module:
    network = AutoModelForSequenceClassification.from_pretrained(
        path, quantization_config=config, dtype=dtype, device_map={"": device}
    )
    assert isinstance(network, nn.Module)
    return network


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZERS = {
    "bitsandbytes nf4": bitsandbytes(NF4),
    "bitsandbytes nf4 twice": bitsandbytes({**NF4, "bnb_4bit_use_double_quant": True}),
    "bitsandbytes fp4": bitsandbytes({**NF4, "bnb_4bit_quant_type": "fp4"}),
    **{f"hqq {bits}": hqq(bits) for bits in (8, 4, 3, 2, 1)},
    **{f"torchao {bits}": torchao(bits) for bits in (8, 4, 3, 2, 1)},
}
# Threshold 0: otherwise, which columns of a layer's input stay unrounded depends on all
# texts of a batch, and so on all particles.
INT8 = "bitsandbytes int8"
QUANTIZERS[INT8] = bitsandbytes({"load_in_8bit": True, "llm_int8_threshold": 0.0})


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, *([0] if request.param == "cuda" else []))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network = without_peft(llama(hidden_size=HIDDEN_SIZE, dtype=torch.float32))
    network.save_pretrained(tmp_path)
    return tmp_path


def adapted(network: nn.Module) -> PeftModel:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="SEQ_CLS")
    peft_model = get_peft_model(network, config)
    randomize_adapter(peft_model)
    return peft_model.eval()


def base_layers(peft_model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    for path, module in peft_model.named_modules():
        if path.removesuffix(".base_layer").rpartition(".")[2] in LINEAR:
            if not hasattr(module, "base_layer"):
                yield path, module


def base_bits(peft_model: PeftModel) -> dict[str, Tensor]:
    """Whatever a base layer stores: packed integers, scales, zero points."""
    bits = {}
    for path, layer in base_layers(peft_model):
        for name, value in layer.state_dict().items():
            bits.update(plain_tensors(f"{path}.{name}", value))
    return bits


def plain_tensors(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict):
        parts = value
    elif hasattr(value, "tensor_data_names"):  # torchao's tensors of tensors
        parts = {part: getattr(value, part) for part in value.tensor_data_names}
    else:
        return {name: value.detach().clone()} if isinstance(value, Tensor) else {}
    found: dict[str, Tensor] = {}
    for part, inner in parts.items():
        found.update(plain_tensors(f"{name}.{part}", inner))
    return found


def on(device: torch.device, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in texts.items()}


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [(q, torch.float32) for q in QUANTIZERS]
    + [(q, torch.bfloat16) for q in (INT8, "bitsandbytes nf4", "hqq 3", "torchao 2")],
    ids=str,
)
@pytest.mark.few(12)
def test_lifted_on_a_quantized_base(
    quantizer: str, dtype: torch.dtype, checkpoint: Path, device: torch.device
) -> None:
    peft_model = adapted(QUANTIZERS[quantizer](checkpoint, device, dtype))
    before = base_bits(peft_model)
    assert len(before) >= 2 * 2 * len(LINEAR), "integers and scales of every layer"
    lora = pl.lift(peft_model)
    texts = on(device, inputs(batch()))
    expected = peft_model(**texts).logits.detach()
    # Measured on a CPU: 0. But a value may be rounded the other way, elsewhere.
    exact = dtype == torch.float32 and device.type == "cpu" and quantizer != INT8
    tolerance = 1e-5 if exact else 0.05

    assert {value.dtype for value in lora.weights().values()} == {torch.float32}
    with torch.no_grad(), lora.bind(lora.weights()) as net:
        assert_close(net(**texts).logits, expected, rtol=0, atol=tolerance)

    weights = {k: v.requires_grad_() for k, v in particles(lora, 3).items()}
    with lora.bind(weights) as net:
        folded = net(**texts).logits  # (S, B, C)
    gradients = torch.autograd.grad(folded.square().sum(), list(weights.values()))
    assert folded.std(0).max() > 0.5, "the particles differ by far more than that"
    parameters = dict(peft_model.named_parameters())
    for particle in range(3):
        lora.load({site: value[particle].detach() for site, value in weights.items()})
        alone = peft_model(**texts).logits
        assert_close(folded[particle], alone, rtol=0, atol=tolerance)
        loss = alone.square().sum()
        for gradient, names in zip(gradients, lora.sites.values(), strict=True):
            members = [parameters[name].requires_grad_() for name in names]
            parts = torch.autograd.grad(loss, members, retain_graph=True)
            found = torch.stack(parts).float()  # a head is in the base's dtype
            scale = found.abs().max().item()
            assert scale > 0, "the gradient reaches the adapter"
            assert_close(gradient[particle], found, rtol=0, atol=tolerance * scale)

    after = base_bits(peft_model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("quantizer", ["bitsandbytes nf4", "hqq 2", "torchao 1"])
def test_laplace_is_that_of_the_dequantized_network(
    quantizer: str, checkpoint: Path, device: torch.device
) -> None:
    peft_model = adapted(QUANTIZERS[quantizer](checkpoint, device, torch.float32))
    dequantized = adapted(load_quantized(checkpoint, device, torch.float32, None))
    networks = [pl.lift(peft_model), pl.lift(dequantized)]
    set_peft_model_state_dict(dequantized, get_peft_model_state_dict(peft_model))
    layers = dict(base_layers(dequantized))
    for path, layer in base_layers(peft_model):
        identity = torch.eye(layer.in_features, device=device)
        with torch.no_grad():
            layers[path].weight.copy_(layer(identity).T)
    texts = on(device, batch(16))
    found, expected = [laplace(lora, texts) for lora in networks]
    for site, variance in expected.variance().items():
        assert_close(found.variance()[site], variance, rtol=1e-3, atol=0)
    assert_close(found.log_evidence(), expected.log_evidence(), rtol=1e-4, atol=0)


def laplace(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> pl.LaplacePosterior:
    guide = pl.AutoLaplace(
        classifier(lora, num_data=16), init_loc_fn=lora.init_to_adapter()
    )
    with pytest.warns(UserWarning, match="aren't a mode"):
        return guide.laplace_approximation([texts])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("quantizer", [INT8, "bitsandbytes nf4"])
def test_after_prepare_model_for_kbit_training(
    quantizer: str, checkpoint: Path, device: torch.device
) -> None:
    network = QUANTIZERS[quantizer](checkpoint, device, torch.float32)
    peft_model = adapted(prepare_model_for_kbit_training(network)).train()
    lora = pl.lift(peft_model)
    texts = on(device, inputs(batch()))
    weights = {k: v.requires_grad_() for k, v in particles(lora, 2).items()}
    # It switches gradient checkpointing on, without context_fn.
    with (
        lora.bind(weights) as net,
        pytest.raises(ValueError, match=r'"context_fn": lora\.context_fn'),
    ):
        net(**texts)
    settings = {"use_reentrant": False, "context_fn": lora.context_fn}
    gradients = []
    for checkpointed in (True, False):
        if checkpointed:
            peft_model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=settings
            )
        else:
            peft_model.gradient_checkpointing_disable()
        with lora.bind(weights) as net:
            loss = net(**texts).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, list(weights.values())))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# On a CPU that multiplies in bf16, bitsandbytes packs 4-bit weights in place at their
# first call in evaluation mode; what it computes with packed weights has no gradient.


def nf4(checkpoint: Path) -> PeftModel:
    return adapted(
        QUANTIZERS["bitsandbytes nf4"](checkpoint, torch.device("cpu"), torch.float32)
    )


def test_a_4_bit_base_keeps_its_gradients_after_predictions(checkpoint: Path) -> None:
    peft_model = nf4(checkpoint)
    before = base_bits(peft_model)
    lora = pl.lift(peft_model)
    texts = inputs(batch())
    weights = {k: v.requires_grad_() for k, v in particles(lora, 2).items()}
    gradients = []
    for _ in range(2):
        with lora.bind(weights) as net:
            loss = net(**texts).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, list(weights.values())))
        with torch.no_grad(), lora.bind(weights) as net:
            net(**texts)
    assert_close(gradients[1], gradients[0])
    after = base_bits(peft_model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_4_bit_base_packed_for_inference_is_refused(checkpoint: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU doesn't multiply in bf16")
    peft_model = nf4(checkpoint)
    texts = inputs(batch())
    with torch.no_grad():
        expected = peft_model(**texts).logits
    with pytest.raises(ValueError, match=r"has packed .* Load the network again"):
        pl.lift(peft_model)
    with torch.no_grad():
        assert torch.equal(peft_model(**texts).logits, expected)
