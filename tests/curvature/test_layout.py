"""Rows in any order, of any number: each datum's terms are with its own rows.

A batch is grouped right if it gives what batches of one datum give, where there is
nothing to group; and the dense Fisher that of Jacobians datum by datum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora.curvature.fisher import empirical_terms, exact_terms
from pyro_lora.curvature.fit import FisherFit
from pyro_lora.curvature.layout import Call, Run, find_layouts
from tests.curvature.gauss_newton import (
    assert_same,
    brute_force,
    fisher,
    fit,
    flatten,
    laplace,
    unflatten,
)
from tests.curvature.test_padding import STRUCTURES
from tests.lifting.liftable_architectures import deberta
from tests.networks import adapted, batch

pytestmark = pytest.mark.untrained

NUM_DATA, LENGTH, WIDTH = 7, 4, 3
Batch = dict[str, Tensor]


def tokens(num_rows: int, length: int = LENGTH) -> Tensor:
    return torch.randn(num_rows, length, WIDTH, dtype=torch.float64)


class Layers(nn.Module):
    """Two layers on (..., X), with the mean over tokens of each row between them."""

    def __init__(self, tokens_dim: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 5)
        self.second = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)
        self.tokens_dim = tokens_dim

    def mixed(self, x: Tensor) -> Tensor:
        """Tokens of a row see each other, as by attention."""
        h = self.first(x).tanh()
        h = h + h.mean(self.tokens_dim, keepdim=True)
        out: Tensor = self.second(h).tanh()
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mixed(x).mean(self.tokens_dim))
        return out


class TimeMajor(Layers):
    """(T, B, X) inside, and outside, too."""

    def __init__(self) -> None:
        super().__init__(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mixed(x))
        return out


class Routed(Layers):
    """Each token goes to its two best of three experts, with those of other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def mixed(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h + h.mean(1, keepdim=True)
        flat = h.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros(len(flat), 4, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            at, row = torch.where(chosen.mT == i)
            y = expert(flat[row]).tanh() * weights[row, at, None]
            out = out.index_add(0, row, y)
        return out.reshape(*h.shape[:2], 4)


class RoutedRows(Layers):
    """The same of whole rows, whose inputs have no tokens."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, 0]).tanh()
        order = h[:, 0].argsort()
        out: Tensor = self.head(self.second(h[order]).tanh()[order.argsort()])
        return out


class Flat(Layers):
    """Rows and tokens are one dim inside, as in OPT's layers."""

    def mixed(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(0, 1)).tanh()
        out: Tensor = self.second(h).tanh().reshape(*x.shape[:2], 4)
        return out


Logits = Callable[[Any, Batch], Tensor]


def plain(net: Any, batch: Batch) -> Tensor:
    out: Tensor = net(batch["x"])
    return out


def time_major(net: Any, batch: Batch) -> Tensor:
    out: Tensor = net(batch["x"].transpose(0, 1)).mean(0)
    return out


def pairs(net: Any, batch: Batch) -> Tensor:
    r = net(torch.cat([batch["x"], batch["z"]]))
    out: Tensor = r[: len(r) // 2] - r[len(r) // 2 :]
    return out


def neighbours(net: Any, batch: Batch) -> Tensor:
    both = torch.stack([batch["x"], batch["z"]], 1)
    r = net(both.flatten(0, 1)).unflatten(0, (-1, 2))
    out: Tensor = r[:, 0] - r[:, 1]
    return out


def by_length(net: Any, batch: Batch) -> Tensor:
    order = batch["x"][:, 0, 0].argsort()
    out: Tensor = net(batch["x"][order])[order.argsort()]
    return out


def several_texts(net: Any, batch: Batch) -> Tensor:
    """A datum has one text to three, by its own values."""
    number = 1 + (batch["x"][:, 0, 0] > 0).long() + (batch["x"][:, 1, 1] > 0).long()
    both = torch.stack([batch["x"], batch["z"], batch["x"] * batch["z"]], 1)
    there = torch.arange(3) < number[:, None]
    of_datum = torch.arange(len(number)).repeat_interleave(number)
    r = net(both[there])
    return torch.zeros(len(number), 2, dtype=r.dtype).index_add(0, of_datum, r)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Logits]] = {
    "plain": (Layers, plain),
    "time-major": (TimeMajor, time_major),
    "pairs, joined": (Layers, pairs),
    "pairs, joined, time-major": (
        TimeMajor,
        lambda net, b: pairs(lambda x: net(x.transpose(0, 1)).mean(0), b),
    ),
    "pairs as neighbours": (Layers, neighbours),
    "sorted": (Layers, by_length),
    "sorted inside": (RoutedRows, plain),
    "routed": (Routed, plain),
    "routed pairs": (Routed, pairs),
    "flat": (Flat, plain),
    "several texts": (Layers, several_texts),
}


class Case:
    def __init__(self, name: str) -> None:
        build, logits = NETWORKS[name]
        self.lora = pl.lift(build().double().eval())
        self.logits = logits
        self.data = {
            "x": tokens(NUM_DATA),
            "z": tokens(NUM_DATA),
            "labels": torch.arange(NUM_DATA) % 2,
        }

    def model(self, labels: Tensor | None = None, **batch: Tensor) -> None:
        logits = self.logits(self.lora(), batch)
        likelihood = dist.Categorical(logits=logits).mask(batch.get("mask", True))
        with pyro.plate("data", len(self.data["labels"]), subsample=logits):
            pyro.sample("y", likelihood, obs=labels)

    def batches(self, *sizes: int) -> list[Batch]:
        parts = {name: x.split(list(sizes)) for name, x in self.data.items()}
        return [
            dict(zip(parts, values, strict=True))
            for values in zip(*parts.values(), strict=True)
        ]

    def fit(self, *sizes: int, **options: Any) -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            self.model, init_loc_fn=self.lora.init_to_adapter(), **options
        )
        return guide.laplace_approximation(self.batches(*sizes))

    def jacobian(self) -> Tensor:
        """Datum by datum, (N, C, D)."""
        weights = self.lora.weights()

        def of_datum(flat: Tensor, batch: Batch) -> Tensor:
            with self.lora.bind(unflatten(flat, weights)) as net:
                return self.logits(net, batch)[0]

        return torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda flat, one=one: of_datum(flat, one), flatten(weights)
                )
                for one in self.batches(*[1] * NUM_DATA)
            ]
        )


def summary(posterior: pl.LaplacePosterior) -> Tensor:
    return torch.cat(
        [
            posterior.log_evidence()[None],
            posterior.log_likelihood[None],
            posterior.gaussian.effective_parameters()[None],
            flatten(posterior.variance()),
        ]
    )


# Whose tokens are whose is found before any structure; these two tell data apart, the
# first also by how many tokens count.
@pytest.mark.grid
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(reduce=True), pl.structures.Dense()]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_what_its_data_are_one_by_one(name: str, structure: Any) -> None:
    case = Case(name)
    expected = summary(case.fit(*[1] * NUM_DATA, structure=structure))
    # First with nothing known of the network, then with what was found.
    for sizes in ((4, 3), (7,), (2, 5)):
        found = summary(case.fit(*sizes, structure=structure))
        assert_same(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.grid
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("terms", [exact_terms, empirical_terms])
@pytest.mark.few(6)
def test_the_fisher_information_is_that_of_jacobians(name: str, terms: Any) -> None:
    case = Case(name)
    j = case.jacobian()
    with torch.no_grad(), case.lora.bind(case.lora.weights()) as net:
        p = case.logits(net, case.data).softmax(-1)
    if terms is exact_terms:
        root = (p[:, 0] * p[:, 1]).sqrt()[:, None] * (j[:, 0] - j[:, 1])
    else:
        one_hot = torch.eye(2).double()[case.data["labels"]]
        root = torch.einsum("nc,ncd->nd", one_hot - p, j)
    for sizes in ((7,), (4, 3)):
        fitted: FisherFit = fit(case.lora, case.model, case.batches(*sizes), terms)
        assert_same(fisher(fitted), root.mT @ root, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.few(6)
def test_linearised_logits_are_of_their_own_datum(name: str) -> None:
    case = Case(name)
    posterior = case.fit(4, 3, structure=pl.structures.Dense())
    j = case.jacobian()
    j = j - j.mean(1, keepdim=True)
    matrix = posterior.gaussian.fisher  # type: ignore[attr-defined]
    covariance = torch.linalg.inv(matrix + torch.eye(len(matrix)).double())
    expected = torch.einsum("ncd,de,mfe->ncmf", j, covariance, j)
    batch = {name: x for name, x in case.data.items() if name != "labels"}
    for _ in range(2):
        joint = posterior.linearized(batch, joint=True).covariance_matrix
        assert_same(joint, expected, rtol=1e-9, atol=1e-10)
        own = posterior.linearized(batch).covariance_matrix
        assert_same(own, torch.stack([expected[n, :, n] for n in range(NUM_DATA)]))


@pytest.mark.grid
@pytest.mark.parametrize("name", ["time-major", "pairs, joined", "sorted", "routed"])
@pytest.mark.parametrize("seen", [[0], [0, 1, 2, 4]])
@pytest.mark.few(2)
def test_data_that_say_nothing_own_nothing(name: str, seen: list[int]) -> None:
    case = Case(name)
    mask = torch.zeros(NUM_DATA).index_fill(0, torch.tensor(seen).long(), 1).bool()
    # What was learnt of some does no harm to others.
    for case.data["mask"] in (mask, torch.ones(NUM_DATA).bool(), mask):
        expected = summary(case.fit(*[1] * NUM_DATA))
        assert_same(summary(case.fit(4, 3)), expected)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["pairs, joined", "several texts", "routed"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_chunks_are_laid_out_alike(name: str, structure: Any) -> None:
    case = Case(name)
    guide = pl.AutoLaplace(
        case.model, init_loc_fn=case.lora.init_to_adapter(), structure=structure
    )
    posterior = guide.laplace_approximation(case.batches(4, 3), max_memory_gb=1e-7)
    assert_same(summary(posterior), summary(case.fit(4, 3, structure=structure)))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_owners_are_found(data: st.DataObject) -> None:
    """Whoever owns a position, and however many data there are."""
    num_data = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    owners = data.draw(
        st.lists(st.integers(-1, num_data - 1), min_size=1, max_size=20).map(
            torch.tensor
        )
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(len(owners), 3, generator=generator).to(dtype).requires_grad_()
    scales = torch.logspace(-6, 6, num_data).to(dtype)
    terms = torch.stack(
        [
            (f(x.float()).sum(-1) * (owners == b)).sum() * scales[b].float()
            for f in (torch.sin, torch.exp)
            for b in range(num_data)
        ]
    ).reshape(2, num_data)
    call = Call("p", "site", x.detach(), x, (0, 0))
    (layout,) = find_layouts([Run(calls=[call])], terms).values()
    number = torch.arange(1.0, len(owners) + 1)[:, None]
    by_datum = layout.gradients(number)[..., 0]  # (B, T)
    assert by_datum.shape[0] == num_data
    for b, row in enumerate(by_datum):
        own = row[row != 0]
        if num_data > 1:
            own = own[(owners[own.long() - 1] != -1)]
        expected = number[:, 0][owners == b] if num_data > 1 else number[:, 0]
        torch.testing.assert_close(own.sort().values, expected)


def test_what_half_precision_rounds_is_nobody_s() -> None:
    x = torch.randn(6, 3).half().requires_grad_()
    scale = torch.tensor([1e-3, 1e-3, 1e-3, 4e-7, 2e-7, 1e-7])[:, None]
    terms = (scale * x.float()).sum(-1).reshape(2, 3).sum(0)[None]  # rows 3.. are dust
    call = Call("p", "site", x.detach(), x, (0, 0))
    (layout,) = find_layouts([Run(calls=[call])], terms).values()
    rows = layout.gradients(torch.arange(1.0, 7)[:, None])[..., 0]
    assert rows[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("several", [1, 3])
def test_positions_of_several_data_are_refused(several: int) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    terms = x.sin().sum(-1)[None] + 1e-6 * x[:several].exp().sum()
    call = Call("net.layer.weight", "net.site", x.detach(), x, (0, 0))
    with pytest.raises(ValueError, match=r"'net.site'.*\(4, 3\).*one datum each"):
        find_layouts([Run(calls=[call])], terms)


def shares(kind: str, pairs: Tensor, num_data: int) -> Tensor:
    """Of each datum in each of some groups, (groups, B)."""
    first, second = torch.eye(num_data)[pairs].unbind(1)
    return {
        "equal": first + second,
        "opposite": first - second,
        "doubled": first + 2 * second,
        "less one": first - 2 * second,
        "small": first + 0.05 * second,
        "all up to one": torch.ones(num_data, num_data).tril()[1:],
        "from the mean": torch.eye(num_data) - 1 / num_data,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "equal",
        "opposite",
        "doubled",
        "less one",
        "small",
        "all up to one",
        "from the mean",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_data", [2, 32, 45])
@pytest.mark.grid
def test_shared_positions_belong_to_nobody(
    num_data: int, dtype: torch.dtype, kind: str
) -> None:
    """Whoever shares them, in whatever shares: they are seen to be several data's."""
    share = shares(kind, torch.combinations(torch.arange(num_data)), num_data)
    x = torch.randn(len(share), 3).to(dtype).requires_grad_()
    wide = x.double() if dtype == torch.float64 else x.float()
    terms = (wide.sin().sum(-1) @ share.to(wide))[None]
    call = Call("p", "site", x.detach(), x, (0, 0))
    number = len(share)
    with pytest.raises(ValueError, match=f"at {number} of its {number} positions"):
        find_layouts([Run(calls=[call])], terms)


def test_raters_of_one_text_need_a_row_each() -> None:
    case = Case("plain")
    pair = torch.arange(NUM_DATA).repeat_interleave(2)

    def shared(x: Tensor, labels: Tensor) -> None:
        logits = case.lora()(x).repeat_interleave(2, 0)
        with pyro.plate("data", 2 * NUM_DATA, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batch = {"x": case.data["x"], "labels": case.data["labels"][pair]}
    with pytest.raises(ValueError, match=r"several data.*a row of its own"):
        fit(case.lora, shared, [batch])


@pytest.mark.parametrize("name", ["plain", "time-major", "pairs, joined", "routed"])
def test_values_that_are_nan_are_named(name: str) -> None:
    case = Case(name)

    def model(labels: Tensor, **batch: Tensor) -> None:
        logits = case.logits(case.lora(), batch)
        # A slope of infinity times 0, at a finite value.
        rows = torch.where(labels == 2)[0]
        logits = logits.index_add(0, rows, (0 * logits[rows]).abs().sqrt())
        with pyro.plate("data", NUM_DATA, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels % 2)

    fit(case.lora, model, case.batches(4, 3))
    case.data["labels"] = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    with pytest.raises(ValueError, match=r"Batch 1: the gradient of site 'base"):
        fit(case.lora, model, case.batches(4, 3))


class Backward:
    """Counts the backward passes that reach a layer."""

    def __init__(self, layer: Any) -> None:
        self.number = 0
        layer.register_forward_hook(self._called)

    def _called(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._counted)

    def _counted(self, gradient: Tensor) -> None:
        self.number += 1

    def during(self, function: Callable[[], Any]) -> int:
        before = self.number
        function()
        return self.number - before


@pytest.mark.parametrize(
    "name",
    ["plain", "time-major", "pairs, joined", "pairs as neighbours", "several texts"],
)
def test_a_network_is_looked_at_once(name: str) -> None:
    case = Case(name)
    backward = Backward(case.lora.network.first)
    # The gradients of all terms as they are, times powers of two and over them.
    assert backward.during(lambda: case.fit(3, 4)) == 2 + 3
    assert backward.during(lambda: case.fit(2, 2, 3)) == 3
    case.data |= {"x": tokens(NUM_DATA, 6), "z": tokens(NUM_DATA, 6)}
    posterior = case.fit(4, 3)
    assert backward.during(lambda: case.fit(4, 3)) == 2
    assert backward.during(lambda: posterior.linearized(case.batches(3, 4)[0])) == 1


@pytest.mark.parametrize("num_data", [33, 1030])
def test_many_data_take_a_few_passes_more(num_data: int) -> None:
    case = Case("plain")
    case.data = {"x": tokens(num_data), "labels": torch.arange(num_data) % 2}
    backward = Backward(case.lora.network.first)
    found = []

    def look() -> None:
        found.append(fit(case.lora, case.model, [case.data]))

    plain_and_powers = 5 if num_data <= 32**2 else 7
    assert backward.during(look) == 1 + plain_and_powers
    assert backward.during(look) == 1
    assert_same(fisher(found[0]), fisher(found[1]))


@pytest.mark.parametrize(
    ("name", "layer"), [("sorted inside", "first"), ("routed", "gate")]
)
def test_what_may_change_is_looked_at_in_each_batch(name: str, layer: str) -> None:
    case = Case(name)
    backward = Backward(getattr(case.lora.network, layer))
    for _ in range(2):
        assert backward.during(lambda: case.fit(4, 3)) == 4 * 2


def in_place(y: Tensor, at: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for row, i in enumerate(at.tolist()):
        out[row] = y[i]
    return out


def ordering(y: Tensor, at: Tensor) -> Tensor:
    """The matrix that puts rows in that order."""
    return torch.eye(len(y)).to(y)[at]


PUT_BACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by places": lambda y, at: y[at].mean(1),
    "stacked": lambda y, at: torch.stack([y[i] for i in at.tolist()]).mean(1),
    "joined": lambda y, at: torch.cat([y[i : i + 1] for i in at.tolist()]).mean(1),
    "written": lambda y, at: in_place(y, at).mean(1),
    "by a matrix": lambda y, at: ordering(y, at) @ y.mean(1),
    "by a batch of matrices": lambda y, at: torch.einsum(
        "rs,std->rd", ordering(y, at), y
    ),
    "by a matrix for each token": lambda y, at: (
        ordering(y, at).expand(6, -1, -1) @ y.transpose(0, 1)[[0, 1] * 3]
    ).mean(0),
    "by a matrix on the right": lambda y, at: (
        (y.movedim(0, -1) @ ordering(y, at).mT).movedim(-1, 0).mean(1)
    ),
    "by a sum of products": lambda y, at: (
        (ordering(y, at)[:, :, None, None] * y).sum(1).mean(1)
    ),
    "by the largest": lambda y, at: (
        y.where(ordering(y, at)[:, :, None, None] > 0, -torch.inf).amax(1).mean(1)
    ),
    "gathered": lambda y, at: y.gather(0, at[:, None, None].expand_as(y)).mean(1),
    "as embeddings": lambda y, at: nn.functional.embedding(at, y.mean(1)),
    "convolved": lambda y, at: nn.functional.conv1d(
        y.mean(1)[None], ordering(y, at)[:, :, None]
    )[0],
    "if need be": lambda y, at: (y if (at.diff() > 0).all() else y[at]).mean(1),
    "with their last token": lambda y, at: y[at, torch.full_like(at, -1)],
}


class SortedInside(Layers):
    def __init__(self, put_back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.put_back = put_back

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort()
        out: Tensor = self.head(self.put_back(self.mixed(x[order]), order.argsort()))
        return out


@pytest.mark.parametrize("way", PUT_BACK)
@pytest.mark.few(6)
def test_an_order_that_was_none_in_one_batch_is_one_in_another(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(SortedInside, PUT_BACK[way])
    monkeypatch.setitem(NETWORKS, "sorted and put back", (build, plain))
    case = Case("sorted and put back")
    case.data["x"][:, 0, 0] = torch.tensor([1, 2, 3, 3, 1, 2, 5])
    expected = summary(case.fit(*[1] * NUM_DATA))
    for _ in range(2):
        assert_same(summary(case.fit(3, 3, 1)), expected)


class Packed(Layers):
    """Tokens of all rows after one another, as many of each as its first says."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0, 0].long()
        packed = x[torch.arange(x.shape[1]) < lengths[:, None]]
        out: Tensor = self.head(self.pool(self.first(packed).tanh(), lengths))
        return out


def pooled_by_a_matrix(h: Tensor, lengths: Tensor) -> Tensor:
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return (torch.arange(len(lengths))[:, None] == row).to(h) @ h


def pooled_by_sums_of_products(h: Tensor, lengths: Tensor) -> Tensor:
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    of_row = (torch.arange(len(lengths))[:, None] == row).to(h)
    return (of_row[:, :, None] * h).sum(1)


POOLS = {
    "cut": lambda h, n: torch.stack([x.sum(0) for x in h.split(n.tolist())]),
    "by a matrix": pooled_by_a_matrix,
    "by sums of products": pooled_by_sums_of_products,
    "added": lambda h, n: h.new_zeros(len(n), h.shape[1]).index_add(
        0, torch.arange(len(n)).repeat_interleave(n), h
    ),
}


class TwoLayers(Packed):
    """Its second layer is left out."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(pool)
        self.head = nn.Linear(5, 2)
        del self.second


@pytest.mark.parametrize("pool", POOLS)
def test_rows_that_were_of_one_length_are_of_several(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(TwoLayers, POOLS[pool])
    monkeypatch.setitem(NETWORKS, "packed", (build, plain))
    case = Case("packed")
    case.data["x"][:, 0, 0] = torch.tensor([2, 2, 2, 1, 3, 2, 4])
    expected = summary(case.fit(*[1] * NUM_DATA))
    for _ in range(2):
        assert_same(summary(case.fit(3, 3, 1)), expected)


@pytest.mark.parametrize(
    "add_up",
    [
        lambda same, h: (same[:, :, None] * h.mean(1)).sum(1),
        lambda same, h: same @ h.mean(1),
        lambda same, h: (h.mean(1).mT @ same).mT,
    ],
)
def test_a_network_that_mixes_the_data_of_a_later_batch_is_refused(
    add_up: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfGroups(Layers):
        def forward(self, x: Tensor) -> Tensor:
            group = x[:, 0, 0]
            same = (group[:, None] == group).to(x)
            out: Tensor = self.head(add_up(same, self.second(self.first(x).tanh())))
            return out

    monkeypatch.setitem(NETWORKS, "of groups", (OfGroups, plain))
    case = Case("of groups")
    case.data["x"][:, 0, 0] = torch.tensor([1, 2, 3, 4, 4, 5, 6])
    with pytest.raises(ValueError, match=r"gradients of several data add up"):
        case.fit(3, 4)


def test_a_network_that_mixes_the_data_of_a_batch_is_refused() -> None:
    class Mixing(Layers):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out: Tensor = self.head(self.second(h - 0.1 * h.mean(0)).mean(1))
            return out

    NETWORKS["mixing"] = (Mixing, plain)
    case = Case("mixing")
    with pytest.raises(ValueError, match=r"first.*shape \(4, 4, 3\)"):
        case.fit(4, 3)


def test_a_projection_of_texts_and_of_positions_that_they_share() -> None:
    """DeBERTa's with share_att_key=True: exact one by one, and else said to be so."""
    network = adapted(deberta().double(), target_modules=["query_proj", "value_proj"])
    lora, texts = pl.lift(network), batch(3, 5, num_labels=2)
    expected = brute_force(lora, texts, 1.0).fisher
    gaussian = laplace(lora, texts, 1, structure=pl.structures.Dense()).gaussian
    assert_same(gaussian.fisher, expected)  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"query_proj.*\(1, .*share_att_key.*one datum"
    ):
        laplace(lora, texts, 3, structure=pl.structures.Dense())
