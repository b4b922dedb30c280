"""Several processes give what one gives, on every rank; and fail together."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import pyro_lora as pl
from pyro_lora.ground.ranks import ALONE
from tests.distributed import jobs, launch, spread

# What differs in kind, by three ranks, of which one has more batches; the rest by two.
OF_THREE = [
    *("KFAC", "thin KFAC", "EKFAC", "decompositions", "Exact", "latent noise"),
    *("predict", "diagnose", "rows of a log joint"),
    *("joint", "function in chunks", "shares, function"),
]
RESUMED = [*jobs.RESUMED, "resume SVGD"]


def off(one: launch.Found, ranks: list[launch.Found], names: list[str]) -> Any:
    """What differs from one process: name and rank -> what, and by how much."""
    found = {}
    for name in names:
        assert not isinstance(one[name], Exception), one[name]
        for rank, other in enumerate(ranks):
            if isinstance(other[name], Exception):
                found[name, rank] = {"error": repr(other[name])}
                continue
            gaps = spread.differences(one[name], other[name])
            wrong = {path: gap for path, gap in gaps.items() if not gap < spread.EXACT}
            if wrong:
                found[name, rank] = wrong
    return found


def without_calls(found: launch.Found) -> launch.Found:
    """How often each rank runs the network isn't what one process does."""
    return {
        name: {k: x for k, x in value.items() if k != "calls"}
        if isinstance(value, dict)
        else value
        for name, value in found.items()
    }


def test_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    refused = list(jobs.REFUSED)
    same = [name for name in jobs.SAME if name not in OF_THREE]
    one = launch.alone([*jobs.SAME, *RESUMED], tmp_path / "one")
    two = launch.spawned(
        2, [*same, *refused, *jobs.INTERRUPTED, "save SVGD"], tmp_path / "two"
    )
    assert off(one, two, same) == {}
    for name, (_, message) in jobs.REFUSED.items():
        errors = [repr(of_rank[name]) for of_rank in two]
        assert len({*errors}) == 1, errors
        assert re.search(message, str(two[0][name])), errors[0]
    for name in jobs.INTERRUPTED:
        assert [repr(x[name]) for x in two] == ["PowerCutError('after 2 batches')"] * 2
    # What two have left, one goes on from, and three.
    for name in ("again", "three"):
        for folder in ("fits", "svgd"):
            shutil.copytree(tmp_path / "two" / folder, tmp_path / name / folder)
    again = launch.alone(RESUMED, tmp_path / "again")
    three = launch.spawned(3, [*OF_THREE, *RESUMED], tmp_path / "three")
    plain = without_calls(one)
    assert off(plain, [without_calls(again)], RESUMED) == {}
    assert off(plain, [without_calls(x) for x in three], OF_THREE + RESUMED) == {}
    # Of 7 batches some were done: each rank runs twice to start, and then the others.
    for found in ([again], three):
        assert sum(len(x["resumed KFAC"]["calls"]) - 2 for x in found) < 7


@pytest.mark.slow
def test_two_pairs_give_what_one_process_gives(tmp_path: Path) -> None:
    # Each shares the data with the other, particles and draws in itself.
    dims = ["two dims", "draws", "weight sets of a log joint"]
    one = launch.alone(dims, tmp_path / "one")
    four = launch.spawned(4, dims, tmp_path / "four")
    assert off(one, four, dims) == {}


def test_a_share_is_of_whatever_has_a_length() -> None:
    for of in ([1, 2, 3], (1, 2, 3), range(1, 4)):
        share = pl.share(of)
        assert (len(share), list(share), share[-1]) == (3, [1, 2, 3], 3)
    with pytest.raises(TypeError, match="share takes what has a length, found a gen"):
        pl.share(x for x in [1])


@pytest.mark.parametrize("number", [0, 1, 5, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_contiguous_even_and_whole(
    number: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = []
    for rank in range(size):
        monkeypatch.setattr(type(ALONE), "size", size)
        monkeypatch.setattr(type(ALONE), "rank", rank)
        owned.append(ALONE.owned(number))
    assert [row for rows in owned for row in rows] == list(range(number))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
