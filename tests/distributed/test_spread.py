"""The page's table of a base over several devices is what its cases give."""

from functools import cache, partial
from pathlib import Path

from tests.devices import test_other
from tests.distributed import launch, spread
from tests.distributed.spread import OF_RANKS, OFFLOADED, SAME, TWO_DEVICES, Form

PAGE = Path(__file__).parents[2] / "docs" / "large.md"


def test_the_pages_table(tmp_path: Path) -> None:
    @cache
    def whole(*same: object) -> spread.Cells:
        build, num_data, chunk_size = same
        plain = Form(
            name="",
            spread=lambda network, _: network,
            build=build,
            num_data=num_data,
            chunk_size=chunk_size,
        )
        own = tmp_path / f"{num_data} {chunk_size}"
        return launch.run(partial(spread.cells, plain), own)

    def row(form: Form, found: list[spread.Cells]) -> dict[str, str]:
        key = (form.build, form.num_data, form.chunk_size)
        return spread.filled(partial(whole, *key), found)

    two = launch.spawned(2, [*spread.JOBS], tmp_path / "two")
    for of_rank in two:
        assert "rank 1 runs it with another" in str(of_rank["another order"])
    rows = {x.name: row(x, [of_rank[x.name] for of_rank in two]) for x in OF_RANKS}
    # An old version of PyTorch has no second device; the others see to that row.
    if not test_other.pytestmark.args[0]:
        assert test_other.wrong([test_other.TABLE], tmp_path) == {}
    rows[TWO_DEVICES] = dict.fromkeys(spread.COLUMNS, SAME)
    for i, form in enumerate(OFFLOADED):
        job = partial(spread.cells, form)
        rows[form.name] = row(form, [launch.run(job, tmp_path / f"{i}")])
    table = spread.markdown(rows)
    assert table in PAGE.read_text("utf-8"), f"docs/large.md should have\n\n{table}"
