"""A fit that is interrupted resumes from its checkpoint, bit for bit."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import split
from tests.networks import batch, bert

pytestmark = pytest.mark.filterwarnings("ignore:The weights aren't a mode")

STRUCTURES = [
    pl.kfac_expand,
    pl.kfac_reduce,
    partial(pl.kfac_expand, rank=3),
    pl.ekfac,
    pl.diagonal,
    pl.dense,
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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_a_resumed_fit_is_the_uninterrupted_one(
    structure: Structure, fisher: str, tmp_path: Path
) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 2)
    guide = guide_of(lora, structure=structure, fisher=fisher)
    guide.laplace_approximation(batches)  # sets the guide up
    torch.manual_seed(5)
    expected = guide.laplace_approximation(batches)
    num_passes = 2 if structure is pl.ekfac else 1
    for after in range(1, 4 * num_passes):
        torch.manual_seed(5)
        with pytest.raises(PowerCutError):
            guide.laplace_approximation(
                Interrupted(batches, after), checkpoint=tmp_path / "fit"
            )
        torch.manual_seed(6)  # a process of its own would start elsewhere, too
        assert sorted((tmp_path / "fit").glob("*/manifest.json"))
        # What another process finds: another guide around the same network.
        again = guide_of(lora, structure=structure, fisher=fisher)
        found = again.laplace_approximation(batches, checkpoint=tmp_path / "fit")
        assert_identical(found, expected)
        assert not list((tmp_path / "fit").iterdir())


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
    found = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert len(seen) < 7 + 1  # one of those done again, for the prior
    assert_identical(found, expected)


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
    found = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert_identical(found, expected)


def test_a_broken_batch_leaves_the_sums_so_far(tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(7, num_labels=3), 3)
    guide = guide_of(lora)
    expected = guide.laplace_approximation(batches)
    broken = [batches[0], {**batches[1], "labels": batches[1]["labels"] + 9}]
    with pytest.raises(ValueError, match="batch 1"):
        guide.laplace_approximation(broken, checkpoint=tmp_path)
    found = guide.laplace_approximation(batches, checkpoint=tmp_path)
    assert_identical(found, expected)


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
        "structure": {"structure": partial(pl.kfac_expand, rank=2)},
        "fisher": {"fisher": "mc", "num_fisher_samples": 2},
    }.get(difference, {})
    if difference == "mode":
        lora.load({s: x + 0.1 for s, x in lora.weights().items()})
    with pytest.raises(ValueError, match="another mode, structure, Fisher"):
        guide_of(lora, **options).laplace_approximation(batches, checkpoint=tmp_path)


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
