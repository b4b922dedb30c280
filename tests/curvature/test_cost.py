"""What a fit and a linearised prediction cost: passes, and the largest tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import laplace, split
from tests.networks import batch, bert

pytestmark = pytest.mark.filterwarnings("ignore:The weights aren't a mode")


class Passes:
    """Counts forward passes of a network and backward passes of anything."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    @contextmanager
    def counting(self, network: torch.nn.Module) -> Iterator[None]:
        grad = torch.autograd.grad

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.backward += 1
            return grad(*args, **kwargs)

        def seen(*args: Any) -> None:
            self.forward += 1

        handle = network.register_forward_hook(seen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "grad", counted)
            yield
        handle.remove()


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_a_fit_takes_one_backward_pass_less_than_there_are_classes(
    num_labels: int,
) -> None:
    network = bert(num_labels)
    lora, texts = pl.lift(network), batch(7, num_labels=num_labels)
    guide = pl.AutoLaplace(
        pl.models.classification(lora, 7), init_loc_fn=lora.init_to_adapter()
    )
    guide.laplace_approximation(split(texts, 3))  # the first time sets the guide up
    passes = Passes()
    with passes.counting(network):
        guide.laplace_approximation(split(texts, 3))
    assert passes.forward == 3
    assert passes.backward == 3 * (num_labels - 1) + 1  # and the prior's gradient


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_a_linearised_batch_takes_one_forward_pass(num_labels: int) -> None:
    network = bert(num_labels)
    lora, texts = pl.lift(network), batch(7, num_labels=num_labels)
    posterior = laplace(lora, texts)
    passes = Passes()
    with passes.counting(network):
        posterior.linearized(texts)
    assert (passes.forward, passes.backward) == (1, num_labels - 1)


def test_tuning_on_held_out_data_takes_one_pass() -> None:
    network = bert(3)
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    posterior = laplace(lora, texts)
    passes = Passes()
    with passes.counting(network):
        posterior.optimize_prior(objective="nll", batches=split(texts, 4))
    assert (passes.forward, passes.backward) == (2, 2 * 2)


def test_the_evidence_needs_no_pass() -> None:
    network = bert(3)
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    posterior = laplace(lora, texts)
    passes = Passes()
    with passes.counting(network):
        posterior.optimize_prior(per="layer").log_evidence()
    assert passes.forward == 0


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("structure", [pl.kfac_expand, pl.kfac_reduce, pl.diagonal])
def test_nothing_is_as_large_as_a_block_of_the_precision(
    structure: Structure,
) -> None:
    rank, width = 8, 128
    lora = pl.lift(bert(3, hidden_size=width, r=rank, lora_alpha=rank))
    texts = batch(4, 5, num_labels=3)
    with LargestTensor() as largest:
        posterior = laplace(lora, texts, 2, structure=structure)
        posterior.log_prob(posterior.sample(2))
        posterior.variance()
        posterior.linearized(texts)
        posterior.optimize_prior(per="layer").log_evidence()
        posterior.optimize_prior(objective="nll", batches=split(texts, 2))
        posterior()
    # The largest is an embedding's or a layer's share of the prior precisions' grid.
    assert 0 < largest.numel < (rank * width) ** 2 / 4


def test_dense_forms_the_whole_matrix() -> None:
    # The counter does see what is large.
    lora = pl.lift(bert(3, num_layers=1))
    size = sum(value.numel() for value in lora.weights().values())
    with LargestTensor() as largest:
        laplace(lora, batch(4, 5, num_labels=3), structure=pl.dense)
    assert largest.numel >= size**2
