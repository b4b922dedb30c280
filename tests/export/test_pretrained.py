"""A posterior beside its adapter's files, from a folder and from the hub's API."""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

import pyro_lora as pl
from tests import words
from tests.export.hub_stub import Hub, serving

pytestmark = pytest.mark.untrained
NAMES = {0: "no", 1: "perhaps", 2: "yes"}


def batches(labels: Any = words.LABELS) -> list[dict[str, Tensor]]:
    return list(pl.text_batches(words.tokenizer(), words.TEXTS, labels, batch_size=5))


def network(folder: Path) -> Any:
    base = words.saved_base(folder / "base", num_labels=3)
    base.config.id2label = NAMES
    return words.adapted(base, num_steps=5)


def laplace(lora: pl.LiftedNetwork) -> Any:
    model = pl.models.classification(lora, len(words.TEXTS))
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    return guide.laplace_approximation(batches()).optimize_prior()


def refined(lora: pl.LiftedNetwork) -> Any:
    """Its mode is that of the linearised network, far from the trained weights."""
    model = pl.models.classification(lora, len(words.TEXTS))
    start, exact = lora.init_to_adapter(), pl.structures.Exact()
    guide = pl.AutoLaplace(model, init_loc_fn=start, structure=exact)
    posterior = guide.laplace_approximation(batches()).refine(around="prior")
    moved = [(x - posterior.mode()[s]).abs().max() for s, x in lora.weights().items()]
    assert max(moved) > 0.1
    return posterior


def particles(lora: pl.LiftedNetwork) -> Any:
    model = pl.models.classification(lora, len(words.TEXTS))
    each = [
        {s: x + 0.1 * torch.randn_like(x) for s, x in lora.weights().items()}
        for _ in range(3)
    ]
    stacked = {s: torch.stack([w[s] for w in each]) for s in each[0]}
    return pl.ParticlePosterior(stacked, (lora,), model, "y")


def mixture(lora: pl.LiftedNetwork) -> Any:
    one = laplace(lora)
    return pl.MixturePosterior([one, one.with_prior_precision(9.0)], [0.3, 0.7])


def scaled(lora: pl.LiftedNetwork) -> Any:
    return laplace(lora).for_sampling(batches())


def swag(lora: pl.LiftedNetwork) -> Any:
    model = pl.models.classification(lora, len(words.TEXTS))
    iterates = [
        {s: x + 0.1 * torch.randn_like(x) for s, x in lora.weights().items()}
        for _ in range(3)
    ]
    return pl.methods.swag(lora, iterates, model=model)


KINDS = [laplace, refined, particles, mixture, scaled, swag]


def point(posterior: Any) -> dict[str, Tensor]:
    """What the adapter should be."""
    if isinstance(posterior, pl.ParticlePosterior):
        return {s: x[0] for s, x in posterior.particles.items()}
    if isinstance(posterior, pl.MixturePosterior):
        return posterior.components[1].mode()
    if isinstance(posterior, pl.LaplacePosterior):  # as it was when it was lifted
        return posterior.networks[0].weights()
    return posterior.mode()


@pytest.mark.parametrize("kind", KINDS)
def test_back_from_a_folder(kind: Any, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    posterior = kind(lora)
    before = lora.weights()
    folder = tmp_path / "saved"
    posterior.save_pretrained(folder, metadata={"made by": "me"})
    assert all(torch.equal(x, before[s]) for s, x in lora.weights().items())
    again = pl.from_pretrained(folder)
    pyro.set_rng_seed(1)
    expected = pl.predict(posterior, batches())
    pyro.set_rng_seed(1)
    found = pl.predict(again, batches())
    assert_close(found.probs, expected.probs, rtol=0, atol=1e-6)
    assert found.class_names == expected.class_names == ("no", "perhaps", "yes")
    assert type(again) is type(posterior)
    assert again.model.num_data == len(words.TEXTS)  # type: ignore[union-attr]
    assert pl.load_metadata(folder / "posterior")["made by"] == "me"
    assert not any(folder.glob("*.tmp"))
    base = words.saved_base(
        tmp_path / "base", num_labels=3
    )  # whose classes no one named
    own = pl.from_pretrained(folder, network=base)
    assert pl.predict(own, batches()).class_names == ("no", "perhaps", "yes")
    base = words.saved_base(tmp_path / "base", num_labels=3)
    base.config.id2label = {0: "a", 1: "b", 2: "c"}
    own = pl.from_pretrained(folder, network=base)
    assert pl.predict(own, batches()).class_names == ("a", "b", "c")


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_the_adapter(kind: Any, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    posterior = kind(lora)
    posterior.save_pretrained(tmp_path / "saved")
    (batch,) = pl.text_batches(words.tokenizer(), words.TEXTS)
    with lora.bind(point(posterior)) as net, torch.no_grad():
        expected = net(**batch).logits
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", num_labels=3
    )
    with torch.no_grad():
        assert_close(plain(**batch).logits, expected)
    card = (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert 'pl.from_pretrained("this folder")' in card
    assert "base_model:" in card


def test_saved_again_it_is_the_new_one(tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    folder = tmp_path / "saved"
    words.saved_adapter(folder, lora.network)  # what a Trainer left
    particles(lora).save_pretrained(folder)
    second = laplace(lora)
    second.save_pretrained(folder)
    again: Any = pl.from_pretrained(folder)
    assert again.log_evidence() == pytest.approx(float(second.log_evidence()))
    assert (folder / "tokenizer.json").is_file()
    assert len(list((folder / "posterior").iterdir())) == 2


def test_a_network_and_a_model_of_ones_own(tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))

    def own(net: pl.LiftedNetwork) -> Any:
        def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
            logits = net()(**inputs).logits
            with pyro.plate("data", len(words.TEXTS), subsample=inputs["input_ids"]):
                pyro.sample("y", dist.Categorical(logits=2 * logits), obs=labels)

        return model

    guide = pl.AutoLaplace(own(lora), init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(batches())
    folder = tmp_path / "saved"
    posterior.save_pretrained(folder)
    expected = pl.predict(posterior, batches()).probs
    assert pl.from_pretrained(folder).model is None
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    for given in (None, base, PeftModel.from_pretrained(base, str(folder))):
        with warnings.catch_warnings():
            # The base is wrapped twice here.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            again = pl.from_pretrained(folder, network=given, model=own)
        assert_close(pl.predict(again, batches()).probs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        lambda lora: pl.models.regression(lora, 5, 0.3),
        lambda lora: pl.models.regression(lora, 5),
        lambda lora: pl.models.multiple_choice(lora, 5, [3, 4]),
        lambda lora: pl.models.answer_likelihood(lora, 5, per_token=True),
        lambda lora: pl.models.language_model(lora, np.int64(5)),  # type: ignore[arg-type]
        lambda lora: pl.models.preference(lora, 5),
        lambda lora: pl.models.multi_label(lora, 5),
        lambda lora: pl.models.token_classification(lora, 5),
    ],
)
def test_ready_models_come_back(model: Any, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    expected = model(lora)
    posterior = pl.ensemble(lora, [lora.weights()])
    posterior = type(posterior)(posterior.particles, (lora,), expected, "y")
    posterior.save_pretrained(tmp_path / "saved")
    again = pl.from_pretrained(tmp_path / "saved")
    assert type(again.model) is type(expected)
    settings = {n: x for n, x in vars(again.model).items() if n != "lora"}
    assert settings == {n: x for n, x in vars(expected).items() if n != "lora"}


def test_a_head_of_other_classes_than_the_base_s(tmp_path: Path) -> None:
    words.saved_base(tmp_path / "base", num_labels=2)
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    posterior = laplace(pl.lift(words.adapted(base, num_steps=5)))
    posterior.save_pretrained(tmp_path / "saved")
    # Nothing is said of a new head: the adapter brings a trained one.
    said = StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        level = transformers_logging.get_verbosity()
        again = pl.from_pretrained(tmp_path / "saved")
        assert transformers_logging.get_verbosity() == level
    finally:
        logger.removeHandler(handler)
    assert "MISMATCH" not in said.getvalue()
    expected = pl.predict(posterior, batches()).probs
    assert_close(pl.predict(again, batches()).probs, expected, rtol=0, atol=1e-6)


def test_a_model_within_another_isn_t_a_ready_one(tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    advantages = pl.models.preference(lora, 5).advantages
    stacked = {s: x[None] for s, x in lora.weights().items()}
    posterior = pl.ParticlePosterior(stacked, (lora,), advantages, "y")
    posterior.save_pretrained(tmp_path / "saved")
    assert pl.from_pretrained(tmp_path / "saved").model is None


@pytest.mark.parametrize("own", [False, True])
def test_a_prior_that_starts_from_the_adapter(own: bool, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    factors = lora.weights() if own else None
    prior = pl.priors.subspace(0.3, factors=factors)
    lora = lora.with_prior(prior)
    latents = {
        f"prior.subspace.{site}": torch.full((3, *x.shape[:2]), 1.5)
        for site, x in lora.weights().items()
        if site.endswith(".A")
    }
    model = pl.models.classification(lora, len(words.TEXTS))
    posterior = pl.ParticlePosterior(latents, (lora,), model, "y")
    expected = pl.predict(posterior, batches()).probs
    folder = tmp_path / "saved"
    if not own:
        with pytest.raises(ValueError, match=r"saved adapter has others.*factors="):
            posterior.save_pretrained(folder)
        assert not folder.exists()
        return
    posterior.save_pretrained(folder)
    again = pl.from_pretrained(folder, prior=prior)
    assert_close(pl.predict(again, batches()).probs, expected, rtol=0, atol=1e-6)


def test_errors_name_the_folder_and_the_remedy(tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    posterior = laplace(lora)
    with pytest.raises(ValueError, match="'pretrained', which is what"):
        posterior.save_pretrained(tmp_path / "a", metadata={"pretrained": "x"})
    assert not (tmp_path / "a").exists()
    folder = tmp_path / "saved"
    posterior.save_pretrained(folder)
    shutil.copytree(folder / "posterior", tmp_path / "bare" / "posterior")
    pl.save(posterior, tmp_path / "bare" / "posterior")
    with pytest.raises(ValueError, match="doesn't say of which network"):
        pl.from_pretrained(tmp_path / "bare")
    shutil.copytree(folder, tmp_path / "nameless")
    config = tmp_path / "nameless" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": ""}
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"don't say which network.*network="):
        pl.from_pretrained(tmp_path / "nameless")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"saved: its base network .*give it as network="):
        pl.from_pretrained(folder)
    (tmp_path / "base").mkdir()  # as one of a GGUF file alone: nothing says what it is
    (tmp_path / "base" / "base.Q4_1.gguf").touch()
    with pytest.raises(ValueError, match=r"saved: its base .*give it as network="):
        pl.from_pretrained(folder)
    shutil.rmtree(folder / "posterior")
    with pytest.raises(ValueError, match=r"holds no folder 'posterior'"):
        pl.from_pretrained(folder)
    other = pl.lift(words.adapted(words.base()), name="b")
    stacked = {s: x[None] for n in (lora, other) for s, x in n.weights().items()}
    both = pl.ParticlePosterior(stacked, (lora, other), None, None)
    with pytest.raises(ValueError, match="2 lifted networks; expected one"):
        both.save_pretrained(tmp_path / "both")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as running:
        for name, value in {
            "ENDPOINT": running.url,
            "HF_HUB_OFFLINE": False,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield running


def test_to_the_hub_and_back(hub: Hub, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    posterior = laplace(lora)
    with pytest.warns(UserWarning, match="a folder, so nobody else can load it"):
        url = posterior.push_to_hub("me/my-posterior", private=True, token="secret")
    assert url.startswith(f"{hub.url}/me/my-posterior/commit/")
    assert hub.private == {"me/my-posterior"}
    assert hub.tokens == {"Bearer secret"}
    assert hub.commits["me/my-posterior"] == ["Upload a pyro_lora posterior"]
    again = pl.from_pretrained("me/my-posterior")
    expected = pl.predict(posterior, batches()).probs
    assert_close(pl.predict(again, batches()).probs, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The adapter's base network is")
def test_another_one_takes_its_place(hub: Hub, tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    particles(lora).push_to_hub("me/it", token="secret")
    hub.repos["me/it"]["tokenizer.json"] = b"{}"  # somebody's own
    first = {n for n in hub.repos["me/it"] if n.endswith(".safetensors")}
    second = laplace(lora)
    second.push_to_hub("me/it", token="secret", commit_message="By Laplace")
    assert hub.commits["me/it"][-1] == "By Laplace"
    tensors = {n for n in hub.repos["me/it"] if n.endswith(".safetensors")}
    assert len(first) == len(tensors) == 2
    assert len(first & tensors) == 1  # the adapter's
    assert "tokenizer.json" in hub.repos["me/it"]
    again: Any = pl.from_pretrained("me/it")
    assert again.log_evidence() == pytest.approx(float(second.log_evidence()))


def test_what_is_not_on_the_hub(hub: Hub) -> None:
    with pytest.raises(OSError, match="me/nothing"):
        pl.from_pretrained("me/nothing")


@pytest.mark.filterwarnings("ignore:The adapter's base network is")
def test_a_hub_that_cannot_be_reached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = particles(pl.lift(network(tmp_path)))
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    with pytest.raises(OSError, match=r"can't be reached.*save_pretrained") as caught:
        posterior.push_to_hub("me/my-posterior", token="secret")
    assert caught.value.__cause__ is not None
    here = r"'me/my-posterior': the hub can't be reached.*name a folder that posterior"
    with pytest.raises(OSError, match=here):
        pl.from_pretrained("me/my-posterior")


@pytest.mark.filterwarnings("ignore:The adapter's base network is")
def test_offline_mode_is_said_with_what_can_be_done(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    posterior = particles(pl.lift(network(tmp_path)))
    start = r"'me/it': the hub can't be reached.*HF_HUB_OFFLINE.*"
    with pytest.raises(OSError, match=start + "save_pretrained writes the same folder"):
        posterior.push_to_hub("me/it", token="secret")
    with pytest.raises(OSError, match=start + r"there is none at '/.*/me/it'"):
        pl.from_pretrained("me/it")
    with pytest.raises(ValueError, match=r"'/no/such/folder' is no folder, nor can"):
        pl.from_pretrained("/no/such/folder")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    lora = pl.lift(network(tmp_path))
    posterior = pl.ensemble(lora, [lora.weights()])
    file = tmp_path / "file"
    file.write_text("mine")
    for path, message in ((file, "is a file"), (file / "sub", "a file")):
        for write in (
            posterior.save_pretrained,
            lambda p: pl.save(posterior, p),
            lambda p: pl.export_adapters(posterior, p, 1),
        ):
            with pytest.raises(ValueError, match=rf"file.*{message}\. Name a"):
                write(path)
    assert file.read_text() == "mine"
