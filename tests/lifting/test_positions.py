"""Where tokens stand: a text says the same alone, and padded on either side."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
)

import pyro_lora as pl
from tests.networks import PAD, VOCABULARY, batch

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": PAD,
}
CHOICES = [3, 5, 7]


def larger(network: nn.Module) -> nn.Module:
    """With weights by which positions matter."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4 if p.ndim == 2 else 1)
    return network.double()


def with_lora(network: nn.Module, *names: str) -> Any:
    config = LoraConfig(target_modules=[*names], init_lora_weights=False)
    return get_peft_model(larger(network), config).double().eval()


def llama() -> Any:
    return with_lora(LlamaForCausalLM(LlamaConfig(**SIZES)), "q_proj")


def roberta() -> Any:
    config = RobertaConfig(**SIZES, is_decoder=True, max_position_embeddings=40)
    return with_lora(RobertaForCausalLM(config), "query")


def prefix() -> Any:
    network = larger(LlamaForCausalLM(LlamaConfig(**SIZES)))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(network, config).double().eval()  # type: ignore[arg-type]


def alone(network: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Log-probabilities (T, V) of each row's own tokens, without padding."""
    with torch.no_grad():
        rows = [row[kept > 0][None] for row, kept in zip(ids, mask, strict=True)]
        each = [network(input_ids=row).logits[0].log_softmax(-1) for row in rows]
    return [x[-row.shape[1] :] for x, row in zip(each, rows, strict=True)]


@pytest.mark.filterwarnings("ignore:The particles run one at a time")
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("make", [llama, roberta, prefix])
def test_a_text_says_the_same_alone(
    make: Callable[[], Any], padding: Literal["left", "right"]
) -> None:
    torch.manual_seed(0)
    network = make()
    texts = batch(4, 6, padding=padding)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    expected = alone(network, ids, mask)
    lora = pl.lift(network)
    model = pl.models.multiple_choice(lora, 4, CHOICES)
    posterior = pl.ensemble(lora, [lora.weights()], model=model)
    own = torch.stack([x[-1, CHOICES].softmax(-1) for x in expected])
    assert_close(pl.predict(posterior, [texts]).probs, own, rtol=0, atol=1e-6)
    is_first = (mask > 0) & (mask.cumsum(1) == 1)
    labels = ids.where((mask > 0) & ~is_first, torch.tensor(-100))
    found = pl.sequence_log_prob(posterior, ids, labels, attention_mask=mask)
    scores = [
        x[:-1].gather(-1, row[kept > 0][1:, None]).sum()
        for x, row, kept in zip(expected, ids, mask, strict=True)
    ]
    assert_close(found.by_sequence, torch.stack(scores), rtol=0, atol=1e-5)


def test_what_is_written_after_padding_is_what_is_written_alone() -> None:
    torch.manual_seed(0)
    network = roberta()
    texts = batch(3, 6, padding="left")
    ids, mask = texts["input_ids"], texts["attention_mask"]
    expected = []
    for row, kept in zip(ids, mask, strict=True):
        text = row[kept > 0]
        for _ in range(3):
            with torch.no_grad():
                last = network(input_ids=text[None]).logits[0, -1]
            text = torch.cat([text, last.argmax()[None]])
        expected.append(text[-3:])
    lora = pl.lift(network)
    posterior = pl.ensemble(lora, [lora.weights()])
    written = pl.generate(
        posterior, ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None
    )
    assert torch.equal(written.sequences[:, -3:], torch.stack(expected))


def test_images_have_the_positions_that_the_network_gives_them() -> None:
    torch.manual_seed(0)
    text = {
        **{k: x for k, x in SIZES.items() if k != "pad_token_id"},
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    text["rope_parameters"]["rope_theta"] = 10_000.0
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    vision |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    start, image, end = 10, 11, 12
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        vision_start_token_id=start,
        video_token_id=13,
    )
    network = with_lora(Qwen2VLForConditionalGeneration(config), "q_proj")
    ids = torch.tensor([[start, *[image] * 8, end, 5, 6, 7]])
    texts = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4).double(),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
        "mm_token_type_ids": (ids == image).int(),
    }
    with torch.no_grad():
        own = network(**texts).logits[:, -1, CHOICES].softmax(-1)
    lora = pl.lift(network)
    model = pl.models.multiple_choice(lora, 1, CHOICES)
    found = pl.predict(pl.ensemble(lora, [lora.weights()], model=model), [texts])
    assert_close(found.probs, own, rtol=0, atol=1e-6)
