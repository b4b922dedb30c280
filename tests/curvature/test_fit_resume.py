"""A fit that is interrupted resumes from its checkpoint, bit for bit."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature import data_sums
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import split
from tests.curvature.own_structures import LayerDense, OwnFactors
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained

STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.KFAC(rank=3),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
    pl.structures.Exact(),
    pl.structures.Exact(num_inducing=4),
    LayerDense(),
    OwnFactors(),
]
Batch = dict[str, Tensor]


class PowerCutError(Exception):
    pass


class Interrupted:
    """Batches whose reading fails once, after so many over all passes."""

    def __init__(self, batches: list[Batch], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[Batch]:
        for one in self.batches:
            if self.left == 0:
                raise PowerCutError
            self.left -= 1
            yield one


def guide_of(lora: pl.LiftedNetwork, **options: Any) -> pl.AutoLaplace:
    model = pl.models.classification(lora, 7)
    return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)


def assert_identical(a: pl.LaplacePosterior, b: pl.LaplacePosterior) -> None:
    assert torch.equal(a.log_evidence(), b.log_evidence())
    assert torch.equal(a.log_likelihood, b.log_likelihood)
    for site, value in a.variance().items():
        assert torch.equal(b.variance()[site], value), site


# A Monte-Carlo fit has a generator more: by layers in two passes, and jointly.
@pytest.mark.parametrize(
    ("structure", "fisher"),
    [
        *((structure, "exact") for structure in STRUCTURES),
        pytest.param(pl.structures.EKFAC(), "mc", marks=pytest.mark.slow),
        (pl.structures.Exact(), "mc"),
    ],
    ids=repr,
)
@pytest.mark.few(4)
def test_a_resumed_fit_is_the_uninterrupted_one(
    structure: Structure, fisher: str, tmp_path: Path
) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 2)
    guide = guide_of(lora, structure=structure, fisher=fisher)
    guide.laplace_approximation(batches)  # sets the guide up
    torch.manual_seed(5)
    expected = guide.laplace_approximation(batches)
    # Every other place; slow tests kill a fit at any moment.
    for after in range(1, 4 * structure.num_passes, 2):
        torch.manual_seed(5)
        with pytest.raises(PowerCutError):
            guide.laplace_approximation(
                Interrupted(batches, after), checkpoint=tmp_path / "fit"
            )
        torch.manual_seed(6)  # a process of its own would start elsewhere, too
        assert sorted((tmp_path / "fit").glob("*/manifest.json"))
        # What another process finds: another guide around the same network.
        again = guide_of(lora, structure=structure, fisher=fisher)
        posterior = again.laplace_approximation(batches, checkpoint=tmp_path / "fit")
        assert_identical(posterior, expected)
        assert not list((tmp_path / "fit").iterdir())


def test_rows_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sums, "_REST", 0)  # a write after each batch
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 2)
    guide = guide_of(lora, structure=pl.structures.Exact())
    expected = guide.laplace_approximation(batches).refine()
    with pytest.raises(PowerCutError):
        guide.laplace_approximation(Interrupted(batches, 2), checkpoint=tmp_path)
    written = {x: x.stat().st_mtime_ns for x in tmp_path.glob("fisher/rows-*/*.json")}
    assert {x.parent.name for x in written} == {"rows-0", "rows-1"}
    with pytest.raises(PowerCutError):
        guide.laplace_approximation(Interrupted(batches, 3), checkpoint=tmp_path)
    assert {x.name for x in tmp_path.glob("fisher/rows-*")} == {
        "rows-0",
        "rows-1",
        "rows-2",
    }
    assert all(x.stat().st_mtime_ns == then for x, then in written.items())
    # A crash between the rows and the state that names them leaves rows behind.
    (tmp_path / "fisher" / "rows-2").rename(tmp_path / "fisher" / "rows-3")
    (tmp_path / "fisher" / "rows-1").rename(tmp_path / "rows-1")
    with pytest.raises(ValueError, match=r"rows-1.*start anew"):
        guide.laplace_approximation(batches, checkpoint=tmp_path)
    (tmp_path / "rows-1").rename(tmp_path / "fisher" / "rows-1")
    (tmp_path / "fisher" / "rows-3").rename(tmp_path / "fisher" / "rows-2")
    posterior = guide.laplace_approximation(batches, checkpoint=tmp_path).refine()
    assert_identical(posterior, expected)
    assert torch.equal(posterior.leave_one_out(), expected.leave_one_out())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Exact()], ids=repr
)
def test_batches_done_may_come_between_others(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that several processes did, each a stretch of the data."""
    monkeypatch.setattr(data_sums, "_REST", 0)
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 2)
    guide = guide_of(lora, structure=structure)
    expected = guide.laplace_approximation(batches).log_evidence()
    first, *rest = batches
    for order in itertools.permutations(rest):
        with pytest.raises(PowerCutError):
            guide.laplace_approximation(
                Interrupted([first, *order], 2), checkpoint=tmp_path
            )
        found = guide.laplace_approximation(batches, checkpoint=tmp_path)
        torch.testing.assert_close(found.log_evidence(), expected, atol=0, rtol=1e-10)


def test_batches_done_are_not_computed_again(tmp_path: Path) -> None:
    network = bert(3)
    lora, batches = pl.lift(network), split(batch(7, num_labels=3), 1)
    guide = guide_of(lora)
    expected = guide.laplace_approximation(batches)
    seen: list[int] = []
    network.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(PowerCutError):
        guide.laplace_approximation(Interrupted(batches, 6), checkpoint=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "fisher"
    assert len(seen) == 6
    seen.clear()
    posterior = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert len(seen) < 7 + 1  # one of those done again, for the prior
    assert_identical(posterior, expected)


def test_all_batches_done_is_a_state_to_resume_from(tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 7)
    guide = guide_of(lora)
    expected = guide.laplace_approximation(batches)

    class EndsBadly(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            yield from batches
            raise PowerCutError

    with pytest.raises(PowerCutError):
        guide.laplace_approximation(EndsBadly(), checkpoint=tmp_path)
    posterior = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert_identical(posterior, expected)


def test_a_broken_batch_leaves_the_sums_so_far(tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 3)
    guide = guide_of(lora)
    expected = guide.laplace_approximation(batches)
    broken = [batches[0], {**batches[1], "labels": batches[1]["labels"] + 9}]
    with pytest.raises(ValueError, match="Batch 1"):
        guide.laplace_approximation(broken, checkpoint=tmp_path)
    posterior = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert_identical(posterior, expected)


def interrupted(guide: pl.AutoLaplace, batches: list[Batch], path: Path) -> Path:
    with pytest.raises(PowerCutError):
        guide.laplace_approximation(Interrupted(batches, 2), checkpoint=path)
    return path / "fisher"


def test_other_batches_are_refused(tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 1)
    guide = guide_of(lora)
    guide.laplace_approximation(batches)
    interrupted(guide, batches, tmp_path)
    for others in (batches[::-1], split(batch(7, num_labels=3), 1), batches[:0]):
        with pytest.raises(ValueError, match=r"same order \(shuffle=False\)"):
            guide.laplace_approximation(others, checkpoint=tmp_path)
    guide.laplace_approximation(batches, checkpoint=tmp_path)


@pytest.mark.parametrize("difference", ["mode", "structure", "fisher"])
def test_another_fits_checkpoint_is_refused(difference: str, tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 1)
    guide = guide_of(lora)
    guide.laplace_approximation(batches)
    interrupted(guide, batches, tmp_path)
    options: dict[str, Any] = {
        "structure": {"structure": pl.structures.KFAC(rank=2)},
        "fisher": {"fisher": "mc", "num_fisher_samples": 2},
    }.get(difference, {})
    if difference == "mode":
        lora.load({s: x + 0.1 for s, x in lora.weights().items()})
    with pytest.raises(ValueError, match="another mode, structure, Fisher"):
        guide_of(lora, **options).laplace_approximation(batches, checkpoint=tmp_path)


def classifier_of(lora: pl.LiftedNetwork, scale: float = 1.0, **more: Any) -> Any:
    """A model with settings in its closure, a default and its bytecode."""
    shift = more.get("shift", torch.zeros(3, dtype=torch.float64))
    likelihood = more.get("likelihood", lambda logits: dist.Categorical(logits=logits))

    def model(
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Any = None,
        power: float = 1.0,
    ) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", 7, subsample=input_ids):
            with poutine.scale(scale=power):
                fn = likelihood(scale * logits + shift)
                pyro.sample("y", fn, obs=torch.as_tensor(labels))

    if "default" in more:
        model.__defaults__ = (None, more["default"])
    return poutine.scale(model, scale=more.get("outside", 1.0))


@pytest.mark.parametrize(
    "other",
    [
        {"scale": 2.0},
        {"shift": torch.ones(3, dtype=torch.float64)},
        {"likelihood": lambda logits: dist.Categorical(logits=2 * logits)},
        {"likelihood": lambda logits: dist.Categorical(probs=logits.softmax(-1))},
        {"default": 2.0},
        {"outside": 2.0},
    ],
)
def test_another_model_of_the_same_name_is_refused(
    other: dict[str, Any], tmp_path: Path
) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 1)

    def guide(**settings: Any) -> pl.AutoLaplace:
        model = classifier_of(lora, **settings)
        return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())

    interrupted(guide(), batches, tmp_path)
    with pytest.raises(ValueError, match=r"of another mode.*network or model"):
        guide(**other).laplace_approximation(batches, checkpoint=tmp_path)
    guide().laplace_approximation(batches, checkpoint=tmp_path)


@torch.no_grad()
def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    network, batches = bert(3), split(batch(7, num_labels=3), 1)
    other = copy.deepcopy(network)
    other.base_model.model.bert.encoder.layer[0].output.dense.weight.mul_(1.01)
    interrupted(guide_of(pl.lift(network)), batches, tmp_path)
    with pytest.raises(ValueError, match=r"of another mode.*network or model"):
        guide_of(pl.lift(other)).laplace_approximation(batches, checkpoint=tmp_path)


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy, tuple])
def test_labels_count_in_whatever_form(form: Any, tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 1)
    given = [{**one, "labels": form(one["labels"])} for one in batches]
    others = [{**one, "labels": form((one["labels"] + 1) % 3)} for one in batches]
    guide = pl.AutoLaplace(classifier_of(lora), init_loc_fn=lora.init_to_adapter())
    interrupted(guide, given, tmp_path)
    with pytest.raises(ValueError, match=r"same order \(shuffle=False\)"):
        guide.laplace_approximation(others, checkpoint=tmp_path)
    guide.laplace_approximation(given, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated tensors", r"\d+ bytes, expected \d+: it was truncated"),
        ("altered tensors", r"was altered: its sha256"),
        ("no tensors", r"doesn't exist. Copy the whole folder"),
        ("truncated manifest", r"manifest\.json is truncated, or no manifest"),
        ("a posterior's", r"has the format 'pyro_lora posterior', expected 'pyro_lora"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: str, message: str, tmp_path: Path
) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 1)
    guide = guide_of(lora)
    posterior = guide.laplace_approximation(batches)
    folder = interrupted(guide, batches, tmp_path)
    (tensors,) = folder.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    if damage == "truncated tensors":
        tensors.write_bytes(content[:-9])
    elif damage == "altered tensors":
        content[-9] ^= 1
        tensors.write_bytes(content)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "truncated manifest":
        manifest = folder / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:99])
    else:
        pl.save(posterior, tmp_path / "other")
        (tmp_path / "other").rename(folder.parent / "there")
        (folder / "manifest.json").unlink()
        (folder.parent / "there" / "manifest.json").rename(folder / "manifest.json")
    with pytest.raises(ValueError, match=rf"{message}.*delete .*fisher to start anew"):
        guide.laplace_approximation(batches, checkpoint=tmp_path)
