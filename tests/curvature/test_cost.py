"""What a fit and a linearised prediction cost: passes, and the largest tensor."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian
from pyro_lora.curvature.kronecker_normal import KroneckerNormal
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import laplace, split
from tests.networks import batch, bert, inputs, llama

pytestmark = pytest.mark.untrained


class Passes:
    """Counts forward and backward passes of a network."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    @contextmanager
    def counting(self, network: torch.nn.Module) -> Iterator[None]:
        grad = torch.autograd.grad

        def counted(*args: Any, **kwargs: Any) -> Any:
            caller = inspect.stack()[1].filename
            # The prior's derivatives don't go through the network.
            self.backward += not caller.endswith("prior_moments.py")
            return grad(*args, **kwargs)

        def seen(*args: Any) -> None:
            self.forward += 1

        handle = network.register_forward_hook(seen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "grad", counted)
            yield
        handle.remove()


@pytest.mark.parametrize("num_labels", [2, 3, 5])
@pytest.mark.few(2)
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
    assert passes.backward == 3 * (num_labels - 1)


def test_ekfac_takes_two_passes() -> None:
    network = bert(3)
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    laplace(lora, texts, 3)
    passes = Passes()
    with passes.counting(network):
        laplace(lora, texts, 3, structure=pl.structures.EKFAC())
    guide_set_up = 2  # a look at the labels, and Pyro's prototype
    assert passes.forward == 2 * 3 + guide_set_up
    assert passes.backward == 2 * 3 * 2


@pytest.mark.parametrize("num_labels", [2, 3, 5])
@pytest.mark.few(2)
def test_a_linearised_batch_takes_one_forward_pass(num_labels: int) -> None:
    network = bert(num_labels)
    lora, texts = pl.lift(network), batch(7, num_labels=num_labels)
    posterior = laplace(lora, texts)
    passes = Passes()
    with passes.counting(network):
        posterior.linearized(texts)
    assert (passes.forward, passes.backward) == (1, num_labels - 1)


class Work(TorchDispatchMode):
    """Counts operations, and the elements that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.numel += sum(
            x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)
        )
        return result


@pytest.mark.grid
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("num_labels", [2, 4])
def test_the_passes_of_a_linearised_batch_do_not_grow_with_it(
    num_labels: int, joint: bool
) -> None:
    network = bert(num_labels)
    lora, texts = pl.lift(network), batch(32, num_labels=num_labels)
    posterior = laplace(lora, texts)
    work = {}
    for size in (1, 2, 32):
        few = {name: value[:size] for name, value in texts.items()}
        passes = Passes()
        with passes.counting(network), Work() as work[size]:
            posterior.linearized(few, joint=joint)
        assert (passes.forward, passes.backward) == (1, num_labels - 1)
    assert work[32].calls <= work[2].calls
    if not joint:  # twice the data, at most twice the elements: no work is redundant
        assert work[32].numel <= 16 * work[2].numel


def test_a_token_takes_the_passes_of_a_datum() -> None:
    network = bert(3)
    lora, texts = pl.lift(network), inputs(batch(4))

    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        with pyro.plate("data", 4, subsample=logits):
            fn = dist.Categorical(logits=torch.stack([logits, 2 * logits], 1))
            return pyro.sample("y", fn.to_event(1), obs=labels)

    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    labels = torch.zeros(4, 2, dtype=torch.long)
    posterior = guide.laplace_approximation([{**texts, "labels": labels}])
    for tokens, number in (("last", 1), ("each", 2)):
        passes = Passes()
        with passes.counting(network):
            posterior.linearized(texts, tokens=tokens)
        assert (passes.forward, passes.backward) == (1, number * 2)


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


@pytest.mark.parametrize("size", [(4, 40), (40, 4), (40, 40)])
def test_draws_read_an_eigenbasis_once_for_all(size: tuple[int, int]) -> None:
    rows, columns = (torch.linalg.qr(torch.randn(2, n, n)).Q for n in size)
    q = KroneckerNormal(torch.zeros(2, *size), torch.ones(2, *size), rows, columns)
    with LargestTensor() as largest:
        draws = q.rsample(torch.Size([3, 5]))
    # And not (3, 5, 2, n, n), a basis for each draw.
    assert largest.numel <= max(draws.numel(), rows.numel(), columns.numel())


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


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize(
    "structure",
    [
        pl.structures.KFAC(),
        pytest.param(pl.structures.KFAC(reduce=True), marks=pytest.mark.slow),
        pl.structures.EKFAC(),
        pl.structures.Diagonal(),
    ],
)
@pytest.mark.few(2)
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
        laplace(lora, batch(4, 5, num_labels=3), structure=pl.structures.Dense())
    assert largest.numel >= size**2


class Decompositions(TorchDispatchMode):
    """Widths of the matrices that are diagonalised; types of all that is decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._linalg_eigh.default:
            self.widths.append(args[0].shape[-1])
        if any(
            name in str(func)
            for name in ("linalg_eigh", "linalg_svd", "linalg_qr", "linalg_cholesky")
        ):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "structure",
    [
        pl.structures.KFAC(),
        pl.structures.KFAC(reduce=True),
        pl.structures.EKFAC(),
        pl.structures.Dense(),
        pl.structures.KFAC(rank=2),
        pl.structures.KFAC(reduce=True, rank=2),
    ],
)
@pytest.mark.few(3)
def test_decompositions_are_in_float64_and_after_the_pass(structure: Structure) -> None:
    lora = pl.lift(bert(3, dtype=torch.float32))
    texts = batch(6, 5, num_labels=3)
    laplace(lora, texts, structure=structure)  # makes the sketches' test matrices
    with Decompositions() as one_batch:
        laplace(lora, texts, structure=structure)
    with Decompositions() as six:
        laplace(lora, texts, 1, structure=structure)
    assert set(one_batch.dtypes) == {torch.float64}
    assert len(six.dtypes) == len(one_batch.dtypes)


@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.KFAC(reduce=True)]
)
@pytest.mark.few(1)
def test_query_and_value_share_the_factor_of_their_input(
    structure: Structure, tmp_path: Path
) -> None:
    width = 20
    # Without dropout of its own for each, both get the same tensor.
    lora = pl.lift(bert(3, num_layers=3, hidden_size=width, r=2))
    texts = batch(6, 5, num_labels=3)

    class OfEachLayer(pl.structures.LayerStructure):
        def input_factor(self, a: Tensor, counts: Any) -> Any:
            factor, count = structure.input_factor(a, counts)
            return factor.clone(), count  # a factor of its own

        def gradient_factor(self, inputs: Any, g: Tensor, counts: Any) -> Tensor:
            return structure.gradient_factor(inputs, g, counts)

        def combine(self, inputs: Any, gradients: Tensor) -> Any:
            factors = structure.combine(inputs, gradients)
            return replace(factors, a=factors.a.clone())

    with Decompositions() as shared:
        posterior = laplace(lora, texts, 2, structure=structure)
    with Decompositions() as separate:
        other = laplace(lora, texts, 2, structure=OfEachLayer())
    # The inputs of A and the outputs of B of query and value, and the head's input. In
    # the last layer the first token alone has a query that counts.
    assert separate.widths.count(width) == 3 * 4 + 1
    assert shared.widths.count(width) == 3 * 4 + 1 - 2
    for site, value in other.variance().items():
        torch.testing.assert_close(posterior.variance()[site], value)
    torch.testing.assert_close(posterior.log_evidence(), other.log_evidence())

    class EndsBadly(list[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from split(texts, 2)
            raise KeyboardInterrupt

    guide = pl.AutoLaplace(
        pl.models.classification(lora, 6),
        init_loc_fn=lora.init_to_adapter(),
        structure=structure,
    )
    with pytest.raises(KeyboardInterrupt):
        guide.laplace_approximation(EndsBadly(), checkpoint=tmp_path)
    with Decompositions() as resumed:
        guide.laplace_approximation(split(texts, 2), checkpoint=tmp_path)
    assert resumed.widths == shared.widths


def test_sites_with_the_same_inputs_have_one_basis() -> None:
    # The same tokens count for the two, in every layer, also in the last.
    lora = pl.lift(llama(3, target_modules=["gate_proj", "up_proj"]))
    posterior = laplace(lora, batch(5, num_labels=3), 3)
    assert isinstance(posterior.gaussian, BlockGaussian)
    bases = {
        basis.data_ptr(): basis
        for site, block in posterior.gaussian.blocks.items()
        for basis in (block.rows, block.columns)
        if site.startswith("lora.") and basis is not None
    }
    widths = sorted(basis.shape[-1] for basis in bases.values())
    # Of inputs (16 wide) and outputs (32) and between (3), of both but for the inputs.
    assert widths == [3, 3, 3, 3, 16, 32, 32]
