"""The main job on a second device, beside the same on the CPU; a process of its own."""

import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import pyro_lora as pl
from tests.devices import other
from tests.distributed import spread
from tests.networks import batch, bert, classifier, llama

Batch = dict[str, Tensor]
NUM_DATA = 10
EXACT: Any = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}


def texts(device: str) -> list[Batch]:
    """Two batches, there."""
    batches = [batch(5, 6, num_labels=3) for _ in range(2)]
    return [{name: x.to(device) for name, x in one.items()} for one in batches]


def there(weights: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Weights, which have to be there already."""
    for site, x in weights.items():
        assert x.device.type == device, site
    return weights


def posterior(device: str, structure: Any) -> tuple[pl.LaplacePosterior, list[Batch]]:
    """Laplace's approximation where SVI has come to."""
    lora = pl.lift(bert(3, num_layers=1).to(device))
    batches, model = texts(device), classifier(lora, NUM_DATA)
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    for one in batches:
        svi.step(**one)
    return guide.laplace_approximation(batches), batches


def laplace(structure: Any, device: str, folder: Path) -> Any:
    """A fit, its prior tuned, predictions of both kinds."""
    fitted, batches = posterior(device, structure)
    if structure == pl.structures.Exact():
        fitted = fitted.refine()
    tuned = fitted.optimize_prior()
    linear = pl.predict(tuned, batches)
    there(tuned.sample(2), device)
    found = {
        "mode": there(tuned.mode(), device),
        "variance": there(tuned.variance(), device),
        "evidence": tuned.log_evidence().detach(),
        "probs": linear.probs,
        "metrics": linear.metrics(),
        "temperature": pl.fit_temperature(linear),
    }
    if not isinstance(structure, pl.structures.KFAC | pl.structures.EKFAC):
        # KFAC's draws hang on a sum's last digit, where eigenvalues are equal.
        drawn = pl.predict(tuned, batches, method="sample", num_samples=3)
        found |= {"sampled": drawn.probs, "draws": tuned.sample(2)}
    return found


def after_a_fit(device: str, folder: Path) -> Any:
    """What is done with a posterior."""
    fitted, batches = posterior(device, pl.structures.Diagonal())
    lora = fitted.networks[0]
    pl.save(fitted, folder / "saved")
    loaded = pl.load(folder / "saved", lora, model=fitted.model)
    looked = pl.diagnose(fitted, batches, num_samples=25, num_directions=1)
    tree = pl.to_datatree(fitted, batches, num_samples=3)
    by_nll = fitted.optimize_prior(objective="nll", batches=batches)
    narrow = fitted.for_sampling(batches, num_samples=2)
    mixture = pl.MixturePosterior([fitted, by_nll])
    return {
        "loaded": there(loaded.mode(), device),
        "drawn": there(loaded.sample(2), device),
        "lines": looked.gaussian.log_joint,
        "k_hat": looked.gaussian.k_hat,
        "log likelihood": torch.as_tensor(tree["log_likelihood"]["y"].values),
        "tuned": by_nll.prior_precision,
        "scale": narrow.scale,
        "mixture": pl.predict(mixture, batches).probs,
    }


def svgd(space: Any, device: str, folder: Path) -> Any:
    """SVGD, saved and gone on with, and predictions by its particles."""
    lora = pl.lift(llama(3).to(device))
    batches, model = texts(device), classifier(lora, NUM_DATA)
    made = pl.SVGD(
        model,
        pl.kernels.RBF(space=space),
        Adam({"lr": 1e-3}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    made.run(batches, num_epochs=1, progress_bar=False)
    made.save(folder / "run")
    made.load(folder / "run")
    made.step(**batches[0])
    particles = made.posterior()
    pl.save(particles, folder / "saved")
    loaded = pl.load(folder / "saved", lora, model=model)
    prediction = pl.predict(loaded, batches, keep_draws=True)
    return {
        "particles": there(made.get_named_particles(), device),
        "diagnostics": made.diagnostics,
        "loaded": there(loaded.sample(3), device),
        "probs": prediction.probs,
        "metrics": prediction.metrics(),
        "chosen": pl.acquire(prediction, 2, method="batch_bald").indices,
    }


def more(device: str, folder: Path) -> Any:
    """Methods without a fit, what is said of particles, and text."""
    lora = pl.lift(bert(3, num_layers=1).to(device))
    batches, model = texts(device), classifier(lora, NUM_DATA)
    noisy = pl.methods.tfb(model, batches, num_samples=2)
    weights = lora.weights()
    apart = {s: x + 0.1 * torch.randn(3, *x.shape).to(x) for s, x in weights.items()}
    stein = pl.kernelized_stein_discrepancy(model, apart, batches, num_bootstrap=5)
    writer = pl.lift(llama(None).to(device))
    two = pl.ensemble(writer, [writer.weights()] * 2)
    text = pl.generate(two, batches[0]["input_ids"][:, :3], max_new_tokens=3)
    return {
        "noisy": there(noisy.sample(2), device),
        "discrepancy": [stein.u_statistic, stein.v_statistic, stein.p_value],
        "effective": pl.effective_num_predictions(model, apart, batches),
        "text": [text.sequences, text.total_entropy, text.log_probs],
    }


def two_devices(device: str, folder: Path) -> Any:
    """A network whose last layer, and the adapter there, is on another device.

    As ``device_map`` does it: inputs are moved there, outputs back.
    """
    network = bert(3)
    last = network.base_model.model.bert.encoder.layer[1].to(device)
    moving = AlignDevicesHook(torch.device(device), io_same_device=True)
    add_hook_to_module(last, moving)
    lora = pl.lift(network)
    batches, model = texts("cpu"), classifier(lora, NUM_DATA)
    start = lora.init_to_adapter(jitter=0.1)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    fitted = guide.laplace_approximation(batches).optimize_prior()
    made = pl.SVGD(
        model,
        pl.kernels.RBF(space="function"),
        Adam({"lr": 1e-3}),
        3,
        init_loc_fn=start,
    )
    made.run(batches, num_epochs=1, progress_bar=False)
    pl.save(fitted, folder / "saved")
    loaded = pl.load(folder / "saved", lora, model=model)
    return {
        "variance": fitted.variance(),
        "evidence": fitted.log_evidence().detach(),
        "probs": pl.predict(loaded, batches).probs,
        "particles": made.get_named_particles(),
        "drawn": pl.predict(made.posterior(), batches).probs,
        "table": spread.done(network, folder),
    }


def mixing(device: str, folder: Path) -> Any:
    """What the device itself is: it refuses the CPU's tensors, but for numbers."""
    x = torch.arange(3.0, device=device)
    if device != "cpu":
        for operation in (torch.add, torch.dot, torch.maximum, torch.Tensor.add_):
            with pytest.raises(other.MixedError, match="is given tensors of the CPU"):
                operation(x, torch.ones(3))
        with pytest.raises((TypeError, RuntimeError), match=r"numpy"):
            x.numpy()
    view = x[1:]
    view *= torch.tensor(3.0)
    return {"x": x, "view": there({"x": view}, device), "values": x.tolist()}


STRUCTURES = {
    "KFAC": pl.structures.KFAC(),
    "thin KFAC": pl.structures.KFAC(rank=2),
    "EKFAC": pl.structures.EKFAC(),
    "Diagonal": pl.structures.Diagonal(),
    "Dense": pl.structures.Dense(),
    "Exact": pl.structures.Exact(),
}
SPACES = ("joint", "site", "delta", "function")
JOBS: dict[str, Callable[[str, Path], Any]] = {
    "mixing": mixing,
    **{name: partial(laplace, x) for name, x in STRUCTURES.items()},
    "after a fit": after_a_fit,
    **{f"SVGD, {space}": partial(svgd, space) for space in SPACES},
    "more": more,
    "two devices": two_devices,
}


def run(job: Callable[[str, Path], Any], device: str) -> Any:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with tempfile.TemporaryDirectory() as folder:
        found = job(device, Path(folder))
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, found)


def main(names: list[str]) -> dict[str, str]:
    """What is wrong with each job, nothing where it's the same on both devices."""
    warnings.simplefilter("ignore")
    registered = other.register()
    wrong = {}
    for name in names:
        job, wrong[name] = JOBS[name], ""
        expected = run(job, "cpu")
        try:
            assert_close(run(job, "other"), expected, **EXACT)
        except Exception:
            wrong[name] = traceback.format_exc()
    del registered  # it had to live until here
    return wrong


def write(_: int, file: Path, names: list[str]) -> None:
    """The same in a file, from a process that ends with it."""
    torch.set_num_threads(1)
    file.write_text(json.dumps(main(names)))
