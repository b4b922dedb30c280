"""Posteriors that come back the same, and files that are refused."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyro
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pyro_lora as pl
from pyro_lora.ground import tensor_folder
from pyro_lora.posteriors.posterior import fit_arguments
from tests import networks
from tests.predict import models

Kind = Callable[[pl.LiftedNetwork, Any, list[dict[str, Tensor]]], Any]


def tuned_laplace(lora: Any, model: Any, batches: Any) -> pl.LaplacePosterior:
    return models.laplace(lora, model, batches).optimize_prior(per="layer")


def diagonal_laplace(lora: Any, model: Any, batches: Any) -> pl.LaplacePosterior:
    return models.laplace(lora, model, batches, pl.structures.Diagonal())


def dense_laplace(lora: Any, model: Any, batches: Any) -> pl.LaplacePosterior:
    return models.laplace(lora, model, batches, pl.structures.Dense())


def some_particles(lora: Any, model: Any, batches: Any) -> pl.ParticlePosterior:
    return models.particles(lora, model)


def mixture(lora: Any, model: Any, batches: Any) -> pl.MixturePosterior:
    laplace = models.laplace(lora, model, batches)
    inner = pl.MixturePosterior([laplace, laplace.with_prior_precision(30.0)], [1, 2])
    return pl.MixturePosterior([inner, dense_laplace(lora, model, batches)], [0.7, 0.3])


KINDS = [tuned_laplace, diagonal_laplace, dense_laplace, some_particles, mixture]


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def assert_same_draws(one: Any, other: Any) -> None:
    pyro.set_rng_seed(4)
    expected = one.sample(5)
    pyro.set_rng_seed(4)
    found = other.sample(5)
    assert list(found) == list(expected)
    for site, value in expected.items():
        assert torch.equal(found[site], value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_comes_back_the_same(kind: Kind, tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = kind(lora, model, batches)
    pl.save(posterior, tmp_path / "new" / "folder")
    state = torch.get_rng_state()
    again = pl.load(tmp_path / "new" / "folder", lora, model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(posterior)
    assert again.obs_site == "y"
    assert fit_arguments(again) == fit_arguments(posterior)
    if isinstance(posterior, pl.LaplacePosterior):
        assert fit_arguments(again) == batches[0].keys()
        assert again.num_data == sum(len(batch["labels"]) for batch in batches)
    assert again.networks == (lora,)
    assert_same_draws(posterior, again)
    if kind is some_particles:
        return
    draws = posterior.sample(3)
    assert torch.equal(again.log_prob(draws), posterior.log_prob(draws))
    found = pl.predict(again, batches, model=model, method="linearized")
    expected = pl.predict(posterior, batches, model=model, method="linearized")
    assert torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("kind", [tuned_laplace, diagonal_laplace, dense_laplace])
def test_a_laplace_posterior_can_be_worked_on(kind: Kind, tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = kind(lora, model, models.two_batches())
    pl.save(posterior, tmp_path)
    again = pl.load(tmp_path, lora)
    assert again.log_evidence() == posterior.log_evidence()
    for site, tau in posterior.prior_precision.items():
        assert torch.equal(again.prior_precision[site], tau)
    found = again.optimize_prior().log_evidence()
    assert found == pytest.approx(float(posterior.optimize_prior().log_evidence()))
    draws = posterior.sample(2)
    priors = [
        pl.to_datatree(p, num_samples=200)["prior"]["head.classifier.weight"].values
        for p in (posterior, again)
    ]
    assert priors[1].std() == pytest.approx(priors[0].std(), rel=0.1)
    assert set(draws) == set(again.prior(lora))


def test_the_network_may_have_another_prior(tmp_path: Path) -> None:
    lora, model = models.classifier(prior=0.5)
    pl.save(models.laplace(lora, model, models.two_batches()), tmp_path)
    network = copy.deepcopy(lora.network)
    other = pl.lift(network, prior=pl.priors.normal(scale=9.0))
    drawn = pl.load(tmp_path, other).prior(other)["head.classifier.weight"]
    assert drawn.std() < 1


def test_without_a_model_what_needs_one_says_so(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    pl.save(models.laplace(lora, model, batches), tmp_path)
    posterior = pl.load(tmp_path, lora)
    assert posterior.model is None
    with pytest.raises(ValueError, match=r"load\(path, lora, model=model\)"):
        posterior.linearized(batches[0])
    sampled = pl.predict(posterior, batches, model=model, num_samples=2)
    assert len(sampled.probs) == 10


def test_repeated_values_are_stored_once(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(
        lora, model, models.two_batches(), pl.structures.Diagonal()
    )
    pl.save(posterior, tmp_path)
    weights = sum(x.numel() for x in lora.weights().values())
    # The mode and the diagonal; prior mean and precision are one number a site. And
    # 32 values of each frozen tensor.
    frozen = 4 * 32 * sum(not x.requires_grad for x in lora.network.parameters())
    assert tensor_file(tmp_path).stat().st_size < 8 * weights * 2 + frozen + 8_000


def test_saving_again_replaces_the_old_file(tmp_path: Path) -> None:
    lora, model = models.classifier()
    (tmp_path / "notes.txt").write_text("mine")
    pl.save(models.particles(lora, model), tmp_path)
    first = tensor_file(tmp_path)
    second = models.particles(lora, model, num=5)
    pl.save(second, tmp_path)
    assert tensor_file(tmp_path) != first
    assert_same_draws(second, pl.load(tmp_path, lora))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"notes.txt", "manifest.json", tensor_file(tmp_path).name}
    pl.save(second, tmp_path)
    assert_same_draws(second, pl.load(tmp_path, lora))


@pytest.mark.parametrize("step", ["save_file", "first rename", "second rename"])
def test_a_crash_leaves_the_old_checkpoint(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, model = models.classifier()
    old = models.particles(lora, model)
    pl.save(old, tmp_path)
    renames = []

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    def rename(source: Any, target: Any) -> None:
        renames.append(target)
        if step == ("first rename" if len(renames) == 1 else "second rename"):
            raise KeyboardInterrupt
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(tensor_folder, "save_file", crash)
        patch.setattr(os, "replace", rename)
        with pytest.raises(KeyboardInterrupt):
            pl.save(models.particles(lora, model, num=4), tmp_path)
    assert_same_draws(old, pl.load(tmp_path, lora))
    if step == "save_file":
        assert len(list(tmp_path.iterdir())) == 2
    pl.save(old, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # what the crash left is gone


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    lora, model = models.classifier()
    pl.save(models.particles(lora, model), tmp_path)
    (tmp_path / "ordinary").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.fixture
def saved(tmp_path: Path) -> tuple[pl.LiftedNetwork, Path]:
    lora, model = models.classifier()
    pl.save(models.particles(lora, model), tmp_path)
    return lora, tmp_path


def assert_refused(saved: tuple[pl.LiftedNetwork, Path], message: str) -> None:
    lora, folder = saved
    with pytest.raises(ValueError, match=message):
        pl.load(folder, lora)


def edit_manifest(folder: Path, *, sign: bool, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    if sign:
        manifest["manifest_sha256"] = tensor_folder.manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_truncated_tensor_file_is_refused(saved: Any) -> None:
    file = tensor_file(saved[1])
    os.truncate(file, file.stat().st_size - 1)
    assert_refused(saved, rf"{file.name} has \d+ bytes, expected \d+: it was truncated")


def test_an_altered_tensor_file_is_refused(saved: Any) -> None:
    file = tensor_file(saved[1])
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert_refused(saved, f"{file.name} was altered")


def test_a_missing_tensor_file_is_refused(saved: Any) -> None:
    file = tensor_file(saved[1])
    file.unlink()
    assert_refused(saved, f"{file.name} doesn't exist")


def test_a_truncated_manifest_is_refused(saved: Any) -> None:
    file = saved[1] / "manifest.json"
    os.truncate(file, file.stat().st_size // 2)
    assert_refused(saved, r"manifest\.json is truncated, or no manifest")


def test_an_altered_manifest_is_refused(saved: Any) -> None:
    edit_manifest(saved[1], sign=False, expanded={"x": [1]})
    assert_refused(saved, r"manifest\.json was altered")


def test_a_newer_version_is_refused(saved: Any) -> None:
    edit_manifest(saved[1], sign=True, version=3)
    assert_refused(saved, r"manifest\.json has version 3; this pyro_lora reads up to 2")


def test_the_first_version_is_read(saved: Any) -> None:
    lora, folder = saved
    expected = pl.load(folder, lora)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["networks"]  # which it didn't have
    manifest["version"] = 1
    manifest["manifest_sha256"] = tensor_folder.manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_same_draws(expected, pl.load(folder, lora))


@pytest.mark.parametrize("text", ['{"format": "other"}', "[1]", "{}", "\xff"])
def test_a_foreign_manifest_is_refused(saved: Any, text: str) -> None:
    (saved[1] / "manifest.json").write_text(text, "latin-1")
    assert_refused(
        saved, r"manifest\.json (has the format 'other'|is truncated, or no)"
    )
    lora, model = models.classifier()
    with pytest.raises(ValueError, match="Use another folder"):
        pl.save(models.particles(lora, model), saved[1])
    assert (saved[1] / "manifest.json").read_text("latin-1") == text


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    lora, _ = models.classifier()
    assert_refused((lora, tmp_path), r"manifest\.json doesn't exist.*no checkpoint")
    assert_refused((lora, tmp_path / "nowhere"), "doesn't exist")


def test_an_unknown_kind_is_refused(saved: Any) -> None:
    edit_manifest(saved[1], sign=True, posterior={"kind": "flow"})
    assert_refused(saved, r"manifest\.json: Invalid value 'flow' - at `\$\.posterior")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posterior": 3}, r"Expected `object`, got `int` - at `\$\.posterior`"),
        ({"sites": {"x": [-1]}}, r"Expected `int` >= 0 - at `\$\.sites\[...\]\[0\]`"),
        ({"more": 1}, "contains unknown field `more`"),
        (
            {"tensors": {"file": "../x", "bytes": 1, "sha256": ""}},
            "is no name of a file",
        ),
        ({"expanded": {"networks/0": [2**40, 2, 3]}}, "can't be repeated"),
        ({"expanded": {"x": [1]}}, "expanded has tensors that aren't there"),
    ],
)
def test_fields_of_another_form_are_named(
    saved: Any, changes: dict[str, Any], message: str
) -> None:
    edit_manifest(saved[1], sign=True, **changes)
    assert_refused(saved, rf"manifest\.json: .*{message}|{message}")


def test_a_manifest_that_is_too_deep_is_refused(saved: Any) -> None:
    for depth in (200, 100_000):
        text = '{"format": "pyro_lora posterior", "x": ' + "[" * depth + "]" * depth
        (saved[1] / "manifest.json").write_text(text + "}")
        assert_refused(saved, r"manifest\.json is truncated, or no manifest")


@torch.no_grad()
def test_another_base_of_the_same_shapes_is_refused(saved: Any) -> None:
    lora, folder = saved
    network = copy.deepcopy(lora.network)
    network.base_model.model.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
    assert_refused(
        (pl.lift(network), folder),
        r"manifest\.json: the posterior: frozen tensor '.*layer\.1\.output\.dense"
        r"\.weight' has .* there, .* here, so this is another network",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3}, r"head\.classifier\.weight' .*shape \[1, 3, 16\].*2, 16"),
        ({"r": 4}, r"query\.A' .*\[2, 4, 16\], the saved posterior has \[2, 3, 16\]"),
        ({"target_modules": ["query"]}, r"value\.A' holds .*nothing in this network"),
        ({"target_modules": ["key"]}, r"key\.A' .*no such site"),
        ({"lora_alpha": 12}, r"scaling 2\.0 in the saved posterior, and 4\.0"),
        ({"num_layers": 3, "layers_to_transform": [0, 2]}, r"layer\.1.*layer\.2"),
    ],
)
def test_another_network_is_refused(
    saved: Any, settings: dict[str, Any], message: str
) -> None:
    other = pl.lift(networks.bert(**settings))
    assert_refused((other, saved[1]), message)


def test_the_adapters_name_does_not_matter(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    pl.save(posterior, tmp_path)
    network = copy.deepcopy(lora.network)
    network.add_adapter("other", network.peft_config["default"])
    network.set_adapter("other")
    renamed = pl.lift(network)
    assert_same_draws(posterior, pl.load(tmp_path, renamed))


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "DoRA": ("LoraConfig", {"use_dora": True, "target_modules": ["q_proj"]}),
    "IA3": (
        "IA3Config",
        {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    ),
    "LoHa": ("LoHaConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "VeRA": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "OFT": (
        "OFTConfig",
        {"r": 2, "oft_block_size": 0, "target_modules": ["q_proj"]},
    ),
    "trainable tokens": (
        "TrainableTokensConfig",
        {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    ),
    "a prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}


def by_method(method: str, name: str, is_compiled: bool) -> pl.LiftedNetwork:
    """A network that is the same whatever its adapter is called, compiled or not."""
    kind, settings = METHODS[method]
    torch.manual_seed(1)
    base = networks.without_peft(networks.llama(None))
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    network = peft.get_peft_model(base, config, adapter_name=name).double().eval()
    if not is_compiled:
        return pl.lift(network)
    return pl.lift(torch.compile(network, backend="eager"))


@pytest.mark.parametrize("method", list(METHODS))
def test_neither_name_nor_compilation_matters(method: str, tmp_path: Path) -> None:
    forms = [("default", False), ("other", False), ("0", True)]
    for i, form in enumerate(forms):
        there = by_method(method, *form)
        folder = tmp_path / str(i)
        posterior = pl.ensemble(there, [there.weights()])
        pl.save(posterior, folder)
        for other in forms:
            assert_same_draws(posterior, pl.load(folder, by_method(method, *other)))


def test_other_trained_tokens_are_another_network(tmp_path: Path) -> None:
    lora = pl.lift(networks.bert(trainable_token_indices=[1, 2]))
    pl.save(pl.ensemble(lora, [lora.weights()]), tmp_path)
    network = networks.without_peft(copy.deepcopy(lora.network))
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        trainable_token_indices=[1, 3],
    )
    other = pl.lift(peft.get_peft_model(network, config).double().eval())
    assert_refused((other, tmp_path), r"trainable_token_indices is \[1, 2\] there")


def test_nothing_is_written_or_read_while_the_adapter_is_merged(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    pl.save(posterior, tmp_path / "before")
    lora.network.merge_adapter()
    with pytest.raises(ValueError, match=r"merged .*unmerge_adapter\(\)"):
        pl.save(posterior, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert_refused((lora, tmp_path / "before"), r"merged .*unmerge_adapter\(\)")
    for write in (
        lambda folder: pl.export_adapters(posterior, folder, 1),
        posterior.save_pretrained,
    ):
        with pytest.raises(ValueError, match=r"merged .*unmerge_adapter\(\)"):
            write(tmp_path / "adapters")
        assert not (tmp_path / "adapters").exists()
    lora.network.unmerge_adapter()
    assert_same_draws(posterior, pl.load(tmp_path / "before", lora))


def test_what_is_no_posterior_of_ours_is_refused(tmp_path: Path) -> None:
    lora, _ = models.classifier()
    with pytest.raises(ValueError, match="can't store a function"):
        pl.save(models.guide_over(lora.weights()), tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_two_networks_in_one_model(tmp_path: Path) -> None:
    loras = tuple(pl.lift(networks.bert(), name=name) for name in ("one", "two"))
    weights = models.jittered(loras[0], 3) | models.jittered(loras[1], 3)
    posterior = pl.ParticlePosterior(weights, loras, None, "y")
    pl.save(posterior, tmp_path)
    again = pl.load(tmp_path, loras)
    assert again.networks == loras
    assert_same_draws(posterior, again)
    assert_refused((loras[0], tmp_path), "nothing in this network")


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ([], ValueError, "found none"),
        (["x"], TypeError, "a lifted network"),
        (torch.nn.Linear(1, 1), TypeError, "isn't lifted"),
    ],
)
def test_load_wants_lifted_networks(
    saved: tuple[pl.LiftedNetwork, Path],
    lora: Any,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        pl.load(saved[1], lora)
