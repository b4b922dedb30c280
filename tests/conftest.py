import os

# Nothing in the tests may wait for a model hub. Set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import defaultdict
from collections.abc import Iterator, Sequence

import pyro
import pytest
import torch

# Tiny networks: on two busy cores, threads that wait for each other make a step up to
# a hundred times slower than one thread does.
torch.set_num_threads(1)


class CleanPyro:
    """A plugin, since a fixture of this folder wouldn't reach pyro_lora's doctests."""

    @pytest.fixture(autouse=True)
    def clean_pyro(self) -> Iterator[None]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pyro.enable_validation(True)  # importing torch.compile's parts turns it off
        yield
        pyro.clear_param_store()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CleanPyro())


NOT_A_MODE = pytest.mark.filterwarnings("ignore:The weights aren't a mode")


# Before slow tests are left out.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    grids, lists = defaultdict(list), defaultdict(list)
    for item in items:
        if item.get_closest_marker("untrained"):
            item.add_marker(NOT_A_MODE)
        if item.get_closest_marker("slow"):
            continue
        for marker, tests in (("grid", grids), ("few", lists)):
            if item.get_closest_marker(marker):
                tests[item.nodeid.partition("[")[0]].append(item)
    for cells in grids.values():
        for cell in beside_a_cover(cells):
            cell.add_marker(pytest.mark.slow)
    for cells in lists.values():
        (number,) = cells[0].get_closest_marker("few").args  # type: ignore[union-attr]
        kept = {i * len(cells) // number for i in range(number)}
        for index, cell in enumerate(cells):
            if index not in kept:
                cell.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def beside_a_cover(cells: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The cells of a grid beside some that have each value of each parameter."""
    # The same object in each cell that has it.
    values = {
        cell: {(name, id(value)) for name, value in cell.callspec.params.items()}  # type: ignore[attr-defined]
        for cell in cells
    }
    seen: set[tuple[str, int]] = set()
    rest = list(cells)
    # Those first that bring the most.
    for number in range(max(map(len, values.values())), 0, -1):
        for cell in tuple(rest):
            if len(values[cell] - seen) >= number:
                seen |= values[cell]
                rest.remove(cell)
    return rest
