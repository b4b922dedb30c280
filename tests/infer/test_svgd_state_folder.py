"""SVGD's training state in a folder: resumed is uninterrupted, damage is refused."""

import copy
import json
import operator
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.optim
import pytest
import torch
from pyro.optim import SGD, Adam, PyroOptim
from torch.utils.data import DataLoader

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.ground import tensor_folder
from pyro_lora.infer.svgd import training_state
from tests import networks
from tests.infer.engines import OPTIMIZERS, assert_same, engine, regression_batches
from tests.infer.targets import bert, hierarchical_regression


def multi_step() -> PyroOptim:
    settings = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True},
        "milestones": [1, 3, 3],
    }
    return pyro.optim.MultiStepLR(settings)


def one_cycle() -> PyroOptim:
    settings = {
        "optimizer": torch.optim.SGD,
        "optim_args": {"lr": 0.1, "momentum": 0.9},
        "max_lr": 0.02,
        "total_steps": 9,
    }
    return pyro.optim.OneCycleLR(settings)


OPTIMIZERS_AND_SCHEDULES = {
    **OPTIMIZERS,
    "MultiStepLR": multi_step,
    "OneCycleLR": one_cycle,
}


@pytest.mark.grid
@pytest.mark.parametrize("name", list(OPTIMIZERS_AND_SCHEDULES))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.few(4)
def test_resumed_is_uninterrupted(name: str, fresh: bool, tmp_path: Path) -> None:
    target, optim = hierarchical_regression(3), OPTIMIZERS_AND_SCHEDULES[name]
    batches = regression_batches()
    whole = engine(target, optim())
    whole.run(batches, num_epochs=5, progress_bar=False)
    first = engine(target, optim())
    first.run(batches, num_epochs=2, progress_bar=False)
    first.save(tmp_path)
    second = engine(target, optim())
    if not fresh:
        second.run(batches, num_epochs=1, progress_bar=False)
    second.load(tmp_path)
    assert_same(second.get_named_particles(), first.get_named_particles())
    second.run(batches, num_epochs=3, progress_bar=False)
    assert_same(second.get_named_particles(), whole.get_named_particles())
    assert second.diagnostics == whole.diagnostics


def test_schedules_go_on(tmp_path: Path) -> None:
    seen: list[float] = []

    def temperature(fraction: float) -> float:
        seen.append(fraction)
        return 1 + fraction

    target, batches = hierarchical_regression(3), regression_batches()

    def particles_of(*runs: int, total: int | None = None) -> Any:
        for i, num_epochs in enumerate(runs):
            svgd = engine(target, OPTIMIZERS["Adam"](), temperature=temperature)
            if i > 0:
                svgd.load(tmp_path)
            svgd.run(
                batches, num_epochs=num_epochs, total_epochs=total, progress_bar=False
            )
            svgd.save(tmp_path)
        return svgd.get_named_particles()

    whole, fractions = particles_of(5), [*seen]
    assert fractions[0] == 0
    assert fractions[-1] == 1
    seen.clear()
    assert_same(particles_of(2, 1, 2, total=5), whole)
    assert seen == fractions


def test_epochs_beyond_the_total_are_refused() -> None:
    svgd = engine(hierarchical_regression(3), OPTIMIZERS["Adam"]())
    svgd.run(regression_batches(), num_epochs=2, progress_bar=False)
    before = svgd.get_named_particles()
    with pytest.raises(ValueError, match=r"total_epochs is 4; 2 are done, and .*=3"):
        svgd.run(regression_batches(), num_epochs=3, total_epochs=4)
    assert_same(svgd.get_named_particles(), before)


def test_dropout_and_shuffled_batches_go_on(tmp_path: Path) -> None:
    network = networks.bert(dropout=0.3).train()
    rows = networks.batch(6, 5)
    data = [{name: x[i] for name, x in rows.items()} for i in range(6)]
    loader: Any = DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def svgd() -> pl.SVGD:
        lora = pl.lift(copy.deepcopy(network))  # as in another process
        return pl.SVGD(
            pl.models.classification(lora, 6),
            kernels.RBF(space="site"),
            Adam({"lr": 0.01}),
            3,
            init_loc_fn=lora.init_to_adapter(jitter=0.1),
        )

    whole = svgd()
    whole.run(loader, num_epochs=2, progress_bar=False)
    whole.save(tmp_path)
    expected_noise = (random.random(), np.random.rand())
    whole.run(loader, num_epochs=2, progress_bar=False)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = svgd()
    resumed.load(tmp_path)
    assert (random.random(), np.random.rand()) == expected_noise
    resumed.run(loader, num_epochs=2, progress_bar=False)
    assert_same(resumed.get_named_particles(), whole.get_named_particles())


def test_function_space_goes_on(tmp_path: Path) -> None:
    target = bert(3)
    settings: dict[str, Any] = {"kernel": kernels.RBF(space="function"), "repulsion": 2}
    whole = engine(target, Adam({"lr": 0.01}), **settings)
    for _ in range(2):
        whole.step(**target.batch)
    whole.save(tmp_path)
    for _ in range(2):
        whole.step(**target.batch)
    resumed = engine(target, Adam({"lr": 0.01}), **settings)
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.step(**target.batch)
    assert_same(resumed.get_named_particles(), whole.get_named_particles())


def test_saving_again_replaces_and_pickles_nothing(tmp_path: Path) -> None:
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    for _ in range(2):
        svgd.step(**target.batch)
        svgd.save(tmp_path)
        tensors, manifest = sorted(tmp_path.iterdir())
        assert tensors.suffix == ".safetensors"
        assert manifest.name == "manifest.json"
    resumed = engine(target, Adam({"lr": 0.05}))
    resumed.load(tmp_path)
    assert len(resumed.diagnostics["loss"]) == 2


@pytest.fixture
def saved(tmp_path: Path) -> tuple[pl.SVGD, Path]:
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    svgd.step(**target.batch)
    svgd.save(tmp_path)
    svgd.step(**target.batch)
    return svgd, tmp_path


def assert_refused(svgd: pl.SVGD, folder: Path, message: str) -> None:
    """Loading raises, and the engine and the generators are as before."""
    before, generator = svgd.state_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        svgd.load(folder)
    after = svgd.state_dict()
    assert_same(after["particles"], before["particles"])
    assert str(after["optim"]) == str(before["optim"])
    assert torch.equal(torch.get_rng_state(), generator)


def test_damaged_states_are_refused(saved: tuple[pl.SVGD, Path]) -> None:
    svgd, folder = saved
    (tensors,) = folder.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    assert_refused(svgd, folder, r"safetensors was altered.*Save the state again")
    os.truncate(tensors, len(content) // 2)
    assert_refused(svgd, folder, r"bytes, expected \d+: it was truncated")
    tensors.unlink()
    assert_refused(svgd, folder, r"safetensors doesn't exist")
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    fields = json.loads(text)
    manifest.write_text(text.replace('"lr"', '"rl"'))
    assert_refused(svgd, folder, r"manifest\.json was altered")
    fields["version"] = 3
    fields["manifest_sha256"] = tensor_folder.manifest_digest(fields)
    manifest.write_text(json.dumps(fields))
    assert_refused(svgd, folder, "has version 3; this pyro_lora reads up to 2")
    manifest.write_text(text[:100])
    assert_refused(svgd, folder, r"manifest\.json is truncated, or no manifest")
    assert_refused(svgd, folder / "nowhere", r"manifest\.json doesn't exist")


def test_foreign_states_are_refused(
    saved: tuple[pl.SVGD, Path], tmp_path: Path
) -> None:
    svgd, folder = saved
    pl.save(svgd.posterior(), tmp_path / "posterior")
    assert_refused(
        svgd, tmp_path / "posterior", "format 'pyro_lora posterior', expected"
    )
    with pytest.raises(ValueError, match="Use another folder"):
        svgd.save(tmp_path / "posterior")
    more = hierarchical_regression(4)
    assert_refused(
        engine_after_a_step(more, Adam({"lr": 0.1})), folder, "num_particles=4"
    )
    same = hierarchical_regression(3)
    assert_refused(engine_after_a_step(same, SGD({"lr": 0.1})), folder, "Adam.*SGD")


def engine_after_a_step(target: Any, optim: PyroOptim) -> pl.SVGD:
    svgd = engine(target, optim)
    svgd.step(**target.batch)
    return svgd


def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    network = networks.bert()
    batch = networks.batch()

    def engine_on(network: Any) -> pl.SVGD:
        lora = pl.lift(network)
        return pl.SVGD(
            pl.models.classification(lora, 5),
            pl.kernels.RBF(),
            Adam({"lr": 0.01}),
            2,
            init_loc_fn=lora.init_to_adapter(jitter="auto"),
        )

    svgd = engine_on(network)
    svgd.step(**batch)
    svgd.save(tmp_path)
    same, other = copy.deepcopy(network), copy.deepcopy(network)
    other.base_model.model.bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)
    engine = engine_on(same)
    engine.load(tmp_path)
    engine.step(**batch)
    late = engine_on(other)
    late.load(tmp_path)  # which network that is, the first step will tell
    for _ in range(2):
        with pytest.raises(ValueError, match="so this is another network"):
            late.step(**batch)
    stepped = engine_on(copy.deepcopy(other))
    stepped.step(**batch)
    assert_refused(stepped, tmp_path, r"manifest\.json: The state: frozen tensor")


def test_a_state_is_not_taken_while_the_adapter_is_merged(tmp_path: Path) -> None:
    target = bert(4)
    svgd = engine_after_a_step(target, Adam({"lr": 0.1}))
    network = target.model.lora.network
    network.merge_adapter()
    with pytest.raises(ValueError, match=r"merged .*unmerge_adapter\(\)"):
        svgd.save(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    with pytest.raises(ValueError, match=r"merged .*unmerge_adapter\(\)"):
        svgd.state_dict()
    network.unmerge_adapter()
    svgd.save(tmp_path / "state")


def signed_anew(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["state"])
    manifest["manifest_sha256"] = tensor_folder.manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def field(state: Any, *path: Any) -> list[Any]:
    """The pair of a name and a value in the state as a manifest has it."""
    for i, name in enumerate(path):
        items = state["items"] if isinstance(state, dict) else state
        pair = next(x for x in items if not isinstance(name, str) or x[0] == name)
        if i + 1 == len(path):
            return pair  # type: ignore[no-any-return]
        state = pair[1] if isinstance(pair, list) else pair
    raise AssertionError(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("num_epochs",), -1, r"Expected `int` >= 0 - at `\$\.num_epochs`"),
        (("diagnostics",), None, r"Expected `object`, got `null`"),
        (("optim", "w", "kind"), "SGD", "The state is that of SGD"),
        (("random", "python"), [3], "a random generator's state is none"),
        (("optim", "w", "optimizer", "param_groups", 0, "lr"), -1, r"\.lr is -1"),
        (("optim", "w", "optimizer", "param_groups", 0, "maximize"), True, "maximize"),
        (("optim", "w", "optimizer", "param_groups", 0, "eps"), 0, r"\.eps is 0"),
    ],
)
def test_fields_of_another_form_are_named(
    path: Any, value: Any, message: str, saved: tuple[pl.SVGD, Path]
) -> None:
    svgd, folder = saved
    signed_anew(folder, lambda state: operator.setitem(field(state, *path), 1, value))
    assert_refused(svgd, folder, rf"manifest\.json: .*{message}")


def test_what_no_file_holds_is_refused(tmp_path: Path) -> None:
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    with pytest.raises(ValueError, match="no state before the first step"):
        svgd.save(tmp_path / "x")
    svgd.step(**target.batch)
    (inner, *_) = svgd._optim.optim_objs.values()
    inner.param_groups[0]["schedule"] = print
    with pytest.raises(ValueError, match=r"a builtin_function_or_method at 'optim/"):
        svgd.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_device_that_is_not_there(
    saved: tuple[pl.SVGD, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    svgd, folder = saved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"on cuda.*by device='cpu'"):
        svgd.load(folder, device="cuda")


def test_counters_stay_counters(saved: tuple[pl.SVGD, Path]) -> None:
    target = hierarchical_regression(3)
    svgd = engine_after_a_step(target, multi_step())
    _, folder = saved
    svgd.save(folder)
    svgd.load(folder)
    (scheduler, *_) = svgd._optim.optim_objs.values()
    assert scheduler.milestones == Counter({1: 1, 3: 2})
    assert isinstance(scheduler.milestones, Counter)


def test_generators_of_devices_that_are_not_here_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    restored: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda _, device: restored.append(device)
    )
    here = torch.get_rng_state()
    state = {
        "torch": here,
        "cuda": {"cuda": here, "cuda:0": here, "cuda:1": here},
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    training_state.restore_generators(state)
    assert restored == ["cuda", "cuda:0"]
