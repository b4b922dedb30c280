import os

# Nothing in the tests may wait for a model hub. Set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("untrained"):
            item.add_marker(NOT_A_MODE)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
