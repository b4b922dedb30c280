"""Every tensor is made on a device that somebody named.

While the default device is ``meta``, a tensor that is made without one has no values,
and meets others on the CPU: nothing goes on from there unnoticed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD  # Adam's number of steps is on the default device
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import batch, bert, classifier, llama

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:Averaged over draws"),
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]

STRUCTURES = {
    "KFAC": pl.structures.KFAC(),
    "reduce": pl.structures.KFAC(reduce=True),
    "rank": pl.structures.KFAC(rank=2),
    "EKFAC": pl.structures.EKFAC(),
    "Diagonal": pl.structures.Diagonal(),
    "Dense": pl.structures.Dense(),
    "Exact": pl.structures.Exact(),
}


@contextmanager
def default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before)


def texts(num_labels: int = 2) -> list[dict[str, Tensor]]:
    return [batch(5, 6, num_labels=num_labels) for _ in range(2)]


def assert_same_there(job: Callable[[], dict[str, Any]]) -> None:
    """The job gives the same where tensors without a device would have no values."""
    pyro.set_rng_seed(0)
    expected = job()
    with default_device("meta"):
        pyro.set_rng_seed(0)
        found = job()
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def numbers(posterior: pl.LaplacePosterior) -> dict[str, Any]:
    return {
        "mode": posterior.mode(),
        "evidence": posterior.log_evidence().detach(),
        "draws": posterior.sample(2),
        "variance": posterior.variance(),
    }


@pytest.mark.parametrize(
    ("structure", "num_labels"), [("KFAC", 2), *((x, 3) for x in STRUCTURES)]
)
@pytest.mark.few(4)
def test_laplace(structure: str, num_labels: int, tmp_path: Path) -> None:
    lora = pl.lift(bert(num_labels, num_layers=1))
    batches = texts(num_labels)
    model = classifier(lora, 10)

    def job() -> dict[str, Any]:
        guide = pl.AutoLaplace(
            model,
            init_loc_fn=lora.init_to_adapter(),
            structure=STRUCTURES[structure],
        )
        posterior = guide.laplace_approximation(batches)
        tuned = posterior.optimize_prior()
        if structure == "Exact":
            tuned = posterior.refine().optimize_prior(objective="loo")
        prediction = pl.predict(tuned, batches)
        sampled = pl.predict(tuned, batches, method="sample", num_samples=3)
        joint = tuned.linearized(batches[0], joint=True)
        pl.save(tuned, tmp_path / "saved")
        loaded = pl.load(tmp_path / "saved", lora, model=model)
        return {
            "laplace": numbers(posterior),
            "tuned": numbers(tuned),
            "loaded": loaded.mode(),
            "probs": [prediction.probs, sampled.probs, prediction[:3].probs],
            "metrics": prediction.metrics(),
            "joint": joint.covariance_matrix.detach(),
            "scale": tuned.for_sampling(batches, num_samples=2).scale,
            "tree": pl.to_datatree(tuned, batches, num_samples=2)["sample_stats"][
                "lp"
            ].values.tolist(),
            "temperature": pl.fit_temperature(prediction),
        }

    assert_same_there(job)


@pytest.mark.parametrize("space", ["joint", "delta", "function"])
def test_svgd(space: Any, tmp_path: Path) -> None:
    lora = pl.lift(llama())
    batches = texts()

    def job() -> dict[str, Any]:
        svgd = pl.SVGD(
            classifier(lora, 10),
            pl.kernels.RBF(space=space),
            SGD({"lr": 1e-3}),
            3,
            init_loc_fn=lora.init_to_adapter(jitter=0.1),
        )
        svgd.run(batches, num_epochs=2)
        svgd.save(tmp_path / "run")
        svgd.load(tmp_path / "run")
        svgd.step(**batches[0])
        prediction = pl.predict(svgd.posterior(), batches, keep_draws=True)
        return {
            "particles": svgd.get_named_particles(),
            "diagnostics": svgd.diagnostics,
            "probs": prediction.probs,
            "metrics": prediction.metrics(),
            "chosen": pl.acquire(prediction, 2, method="batch_bald").indices,
        }

    assert_same_there(job)


LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "Bernoulli": lambda f: dist.Bernoulli(logits=f[..., 0]),
    "Normal": lambda f: dist.Normal(f[..., 0], 0.5),
    "StudentT": lambda f: dist.StudentT(4.0, f[..., 0], 0.5),
    "Poisson": lambda f: dist.Poisson(f[..., 0].exp()),
    "masked": lambda f: dist.Normal(f[..., 0], 0.5).mask(True),
    "outputs": lambda f: dist.Normal(f, 0.5).to_event(1),
}


@pytest.mark.parametrize(
    ("likelihood", "fisher"),
    [
        *((x, "exact") for x in LIKELIHOODS),
        ("Bernoulli", "mc"),
        ("Normal", "empirical"),
    ],
)
@pytest.mark.few(4)
def test_likelihoods(likelihood: str, fisher: Any) -> None:
    lora = pl.lift(bert(num_layers=1))
    batches = texts()
    for x in batches:
        x["labels"] = x["labels"].double()
        if likelihood == "outputs":
            x["labels"] = torch.stack([x["labels"], -x["labels"]], -1)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        f = lora()(**inputs).logits
        with pyro.plate("data", 10, subsample=f):
            fn = LIKELIHOODS[likelihood](f)
            return pyro.sample("y", fn, obs=labels)

    def job() -> dict[str, Any]:
        guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), fisher=fisher)
        posterior = guide.laplace_approximation(batches)
        prediction = pl.predict(posterior, batches)
        return {
            **numbers(posterior),
            "metrics": prediction.metrics(),
            "table": {k: x.tolist() for k, x in prediction.columns().items()},
        }

    assert_same_there(job)


def test_only_generators_of_the_weights_devices_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # By default fork_rng takes all GPUs of the machine, and warns of several.
    asked: list[Any] = []

    def fork_rng(devices: Any = None) -> Any:
        asked.append(devices)
        return kept(devices)

    kept = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    lora, batches = pl.lift(bert(num_layers=1)), texts()
    model = classifier(lora, 10)
    start = torch.get_rng_state()
    pl.save(pl.ensemble(lora, [lora.weights()], model=model), tmp_path / "particles")
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    pl.save(guide.laplace_approximation(batches), tmp_path / "laplace")
    assert torch.equal(torch.get_rng_state(), start)
    unlabelled = [{**x, "labels": None} for x in batches]
    pl.methods.tfb(model, unlabelled, num_samples=2)
    assert len(asked) >= 4
    assert asked == [[]] * len(asked)
