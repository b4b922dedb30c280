"""Bytes in use, and operations on tensors without values."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyro_lora.ground.memory import (
    FusedAttention,
    MemoryInUse,
    WithoutValues,
    address,
    constant,
)
from pyro_lora.ground.synchronisation import (
    answers_kept,
    ask,
    gathered,
    require,
    without_reading,
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_shares_a_place_counts_once_and_until_all_of_it_is_gone(
    device: str,
) -> None:
    with MemoryInUse() as memory:
        x = torch.zeros(10, device=device)
        y = x[2:]
        z = x + 1
        assert memory.now == memory.most == 80
        del x
        assert memory.now == 80
        del y, z
        assert memory.now == 0
    assert memory.most == 80


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_keeps_is_in_use(device: str) -> None:
    with MemoryInUse() as memory:
        x = torch.zeros(5, device=device, requires_grad=True)
        loss = x.exp().exp().sum()  # both exponentials are kept
        assert memory.now == 4 * (5 + 5 + 5 + 1)
        (gradient,) = torch.autograd.grad(loss, x)
        del loss
        assert memory.now == 4 * (5 + 5)
    del gradient


def test_addresses_are_those_of_pointers() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    tensors = [x, x[0], x[1], x.T, x.detach(), x.clone()]
    for a in tensors:
        for b in tensors:
            assert (address(a) == address(b)) == (a.data_ptr() == b.data_ptr())


@pytest.mark.parametrize(
    "run",
    [
        lambda x: (x @ x.T).exp() + x[:, :1],
        lambda x: torch.linalg.eigh(x @ x.T)[1],
        lambda x: x.reshape(2, 2, 6) @ x.T,  # a view of a product, not said to be one
        lambda x: x.view(2, -1).softmax(-1).view_as(x),
        lambda x: torch.stack([x, x]).sort(-1).values,
        lambda x: (x > 0).nonzero_static(size=3),
    ],
)
def test_without_values_as_much_is_in_use(run: object) -> None:
    assert callable(run)
    sizes = []
    for device, modes in (("cpu", []), ("meta", [WithoutValues()])):
        x = torch.ones(4, 6, device=device)
        with MemoryInUse() as memory:
            for _ in range(2):  # the second time nothing is run
                for mode in modes:
                    mode.__enter__()
                try:
                    result = run(x)
                finally:
                    for mode in modes:
                        mode.__exit__(None, None, None)
            sizes.append((memory.now, memory.most, result.shape))
            del result
    assert sizes[0] == sizes[1]


def test_a_mask_isnt_all_true_and_what_else_is_read_is() -> None:
    with without_reading(), WithoutValues() as shapes:
        mask = torch.ones(2, 3, dtype=torch.long, device="meta")
        other = torch.ones(2, 3, device="meta")
        shapes.mask(mask)
        assert not bool(mask.bool().all())
        assert not bool(mask.sum() == mask.numel())
        assert bool((other > 0).all())
        assert torch.equal(other, other)


def test_attention_keeps_no_weights_of_pairs() -> None:
    num_tokens, sizes = 64, []
    for device in ("cpu", "meta"):
        shape = (1, 2, num_tokens, 4)
        q = torch.zeros(shape, device=device, requires_grad=True)
        mask = torch.ones(1, 1, num_tokens, num_tokens, device=device) > 0
        with MemoryInUse() as memory, WithoutValues(), FusedAttention():
            for kwargs in ({"is_causal": True}, {"attn_mask": mask}):
                output = scaled_dot_product_attention(q, q, q, **kwargs)  # type: ignore[arg-type]
                sizes.append((device, memory.now))
                del output
    on_cpu, without = sizes[:2], sizes[2:]
    assert [size for _, size in on_cpu] == [size for _, size in without]
    assert sizes[0][1] < 4 * 2 * num_tokens**2


def test_constants_are_kept_if_they_have_values() -> None:
    made = []

    @constant
    def zeros(size: int) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size)

    with without_reading():
        zeros(2)
        zeros(2)
    assert made == [2, 2]
    assert zeros(2) is zeros(2)
    assert made == [2, 2, 2]


def test_answers_are_the_usual_ones_or_those_of_another_run() -> None:
    def asked(x: torch.Tensor) -> list[float]:
        with gathered():
            first, second = ask(x.sum(), usual=7), ask((x == 0).any(), usual=False)
            require((x > 1).all(), lambda: ValueError("too small"))
            return [first.value, second.value]

    x = torch.full((3,), 2.0)
    with answers_kept() as answers:
        assert asked(x) == [6, 0]
    with without_reading():
        assert asked(x.to("meta")) == [7, False]
    with without_reading(answers):
        assert asked(x.to("meta")) == [6, 0]
        assert asked(x.to("meta")) == [7, False]  # there are no more
    with pytest.raises(ValueError, match="too small"):
        asked(torch.zeros(3))
