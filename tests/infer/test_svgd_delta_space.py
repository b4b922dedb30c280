"""SVGD where LoRA's weights count as the updates B A, against double loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.infer.svgd import weight_space
from pyro_lora.infer.svgd.delta_space import spread, squared_distances
from tests import networks
from tests.infer import double_loop
from tests.infer.double_loop import Point
from tests.infer.targets import (
    NUM_DATA,
    Target,
    bert,
    hierarchical_bert,
)
from tests.infer.test_svgd_step import assert_equal, direction
from tests.lifting.test_low_rank import pruned_adalora
from tests.networks import llama, particles

SCALING = 2.0  # alpha / r = 6 / 3


def dense_distance(x: Point, y: Point) -> Tensor:
    """With every layer's update as the full matrix that it is."""
    total = torch.zeros((), dtype=torch.float64)
    for site in x:
        path, _, role = site.rpartition(".")
        if site.startswith("lora.") and role == "A":
            continue  # comes with B
        if site.startswith("lora."):
            a, b = (SCALING * p[site] @ p[f"{path}.A"] for p in (x, y))
        else:
            a, b = x[site], y[site]
        total = total + (a - b).square().sum()
    return total


def dense_kernel(
    at: list[Point], profile: Callable[[Tensor], Tensor], bandwidth: float | None
) -> dict[str, double_loop.PairKernel]:
    if bandwidth is None:
        pairs = [
            dense_distance(at[i], at[j]).item()
            for i in range(len(at))
            for j in range(i + 1, len(at))
        ]
        twice_square = double_loop.median_bandwidth(pairs, len(at))
    else:
        twice_square = 2 * bandwidth**2
    return dict.fromkeys(
        at[0], lambda x, y: profile(dense_distance(x, y) / twice_square)
    )


PROFILES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "RBF": (kernels.RBF, lambda d: (-d).exp()),
    "IMQ": (kernels.IMQ, lambda d: (1 + d) ** -0.5),
    "Mixture": (
        kernels.Mixture,
        lambda d: ((-4 * d).exp() + (-d).exp() + (-d / 4).exp()) / 3,
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("make", [bert, hierarchical_bert])
@pytest.mark.parametrize("bandwidth", [None, 8.0])
@pytest.mark.parametrize("name", list(PROFILES))
def test_stein(
    make: Callable[[int], Target], bandwidth: float | None, name: str
) -> None:
    target = make(4)
    kernel, profile = PROFILES[name]
    phi, _ = direction(target, kernel(space="delta", bandwidth=bandwidth))
    at = double_loop.points(target.particles)
    by_site = dense_kernel(at, profile, bandwidth)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site))


@pytest.mark.parametrize("name", list(PROFILES))
def test_repulsive(name: str) -> None:
    target = bert(4)
    kernel, profile = PROFILES[name]
    phi, _ = direction(
        target, kernel(space="delta"), transport="repulsive", repulsion=3.0
    )
    at = double_loop.points(target.particles)
    by_site = dense_kernel(at, profile, None)
    expected = double_loop.repulsive(at, target.log_joint, by_site, 1.0, 3.0)
    assert_equal(phi, expected)


def test_chunks_change_nothing() -> None:
    target = bert(4)
    kernel = kernels.RBF(space="delta")
    whole, _ = direction(target, kernel)
    assert_equal(direction(target, kernel, chunk_size=2)[0], whole)


def test_turning_the_factors_is_no_distance() -> None:
    lora = pl.lift(llama())
    weights = particles(lora, 3)
    turned = dict(weights)
    for site, a in weights.items():
        if site.endswith(".A"):
            turn = torch.linalg.qr(torch.randn(3, 3, dtype=a.dtype)).Q
            turned[site] = turn @ a
            turned[f"{site[:-1]}B"] = weights[f"{site[:-1]}B"] @ turn.mT
    distances = squared_distances((lora,), weights)
    assert_close(squared_distances((lora,), turned), distances, rtol=1e-10, atol=1e-10)
    both = {s: torch.stack([weights[s][0], turned[s][0]]) for s in weights}
    assert squared_distances((lora,), both)[0, 1] < 1e-10 * distances[0, 1]


@pytest.mark.parametrize("layer", ["embedding", "convolution"])
def test_updates_of_other_layers(layer: str) -> None:
    network = nn.ModuleDict(
        {"embedding": nn.Embedding(6, 5), "convolution": nn.Conv2d(2, 3, 2)}
    )
    network.forward = lambda: None  # type: ignore[assignment]
    peft_model = get_peft_model(network, LoraConfig(r=2, target_modules=[layer]))  # type: ignore[arg-type]
    lora = pl.lift(peft_model.double())
    weights = particles(lora, 3)
    sq_dists = squared_distances((lora,), weights)
    deltas, module = [], peft_model.base_model.model[layer]
    for i in range(3):
        lora.load({site: value[i] for site, value in weights.items()})
        deltas.append(module.get_delta_weight("default").detach().clone().flatten())
    expected = torch.cdist(torch.stack(deltas), torch.stack(deltas)).square()
    assert_close(sq_dists, expected, rtol=1e-8, atol=1e-8)


def frozen_first_factors() -> PeftModel:
    network = networks.bert()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return network


@pytest.mark.parametrize("block", [None, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.bert(num_layers=3),
        lambda: llama(alpha_pattern={r".*layers\.1\.self_attn\.q_proj": 11}),
        lambda: llama(rank_pattern={r".*layers\.1\.self_attn\.q_proj": 2}),
        pruned_adalora,
        frozen_first_factors,
    ],
    ids=["bert", "alpha", "rank", "adalora", "frozen A"],
)
def test_layers_together_are_as_far_apart_as_one_by_one(
    make: Any, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:  # of layers that are worked on at once
        monkeypatch.setattr(weight_space, "BLOCK", block)
    lora = pl.lift(make())
    weights = particles(lora, 4)
    products = [
        b @ a.expand(4, *a.shape[-2:])
        for b, a in lora.delta_weight_factors(weights).values()
    ]
    others = [x for s, x in weights.items() if s not in lora.factor_sites]
    flat = torch.cat([x.flatten(1) for x in (*products, *others)], 1)  # (K, D)
    sq_dists = (flat[:, None] - flat).square().sum(-1)
    found = squared_distances((lora,), weights)
    assert_close(found, sq_dists, rtol=1e-12, atol=1e-12 * float(sq_dists.max()))
    expected = (flat - flat.mean(0)).square().sum(1).mean().sqrt()
    assert_close(spread((lora,), weights), expected, rtol=1e-12, atol=0)


class Operations(TorchDispatchMode):
    """How many are done."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_more_layers_take_no_more_operations() -> None:
    numbers = []
    for num_layers in (2, 6):
        lora = pl.lift(networks.bert(num_layers=num_layers))
        with Operations() as operations:
            spread((lora,), particles(lora, 3))
        numbers.append(operations.number)
    assert numbers[0] == numbers[1]


def test_a_frozen_factor_is_one_for_all_particles() -> None:
    lora = pl.lift(frozen_first_factors())
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space="delta"),
        SGD({"lr": 1e-4}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**networks.batch(NUM_DATA))
    assert svgd.diagnostics["delta_spread"][0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_particles_of_a_fresh_adapter_are_apart(dtype: torch.dtype) -> None:
    # PEFT starts with B = 0, where all updates coincide: the automatic jitter makes
    # distances that the median can scale, so that particles repel from the first step.
    network = networks.bert(dtype=torch.float32)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    lora = pl.lift(network.to(dtype))
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space="delta"),
        SGD({"lr": 0.0}),
        8,
        init_loc_fn=lora.init_to_adapter(jitter="auto"),
    )
    svgd.step(**networks.batch())
    particles = svgd.get_named_particles()
    distances = squared_distances((lora,), particles)
    off = distances[~torch.eye(8, dtype=torch.bool)]
    assert off.min() > 0.2 * off.max()
    assert off.median() > 1e4 * kernels.MIN_SQUARED_BANDWIDTH
    assert 0.01 < svgd.diagnostics["mean_kernel"][0] < 0.5
    with lora.bind(particles) as net:
        logits = net(**networks.inputs(networks.batch())).logits
    assert len(logits.flatten(1).unique(dim=0)) == 8
