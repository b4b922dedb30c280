"""Every kind of folder that is read back, small, with all numbers that it holds."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora.posteriors.scaled_posterior import ScaledPosterior

N = 6
Numbers = dict[str, Any]
Load = Callable[[Path], Numbers]


class InvalidError(Exception):
    """What was loaded is no posterior."""


@dataclass(frozen=True)
class Kind:
    """A folder that can be written, and what reading it gives.

    Attributes:
        write: Write it, intact.
        load: Read it; raises InvalidError where what was read isn't valid.
        state: What must be as before when reading raises ValueError.
        restore: Called after what was read changed that.
    """

    write: Callable[[Path], None]
    load: Load
    state: Callable[[], Numbers] = dict
    restore: Callable[[], None] = lambda: None


def network() -> Any:
    torch.manual_seed(3)
    layers = OrderedDict(first=nn.Linear(3, 4), act=nn.Tanh(), last=nn.Linear(4, 2))
    peft_model = get_peft_model(
        nn.Sequential(layers).double(),
        LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"]),
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft_model.eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, 3, generator=generator).double()
    labels = torch.randint(2, (N,), generator=generator)
    return [{"x": x[i : i + 2], "labels": labels[i : i + 2]} for i in range(0, N, 2)]


class Setting:
    """A lifted network and a model of it, with latents beside it or without."""

    def __init__(self, prior: Any = None, latents: bool = False) -> None:
        self.lora = pl.lift(network(), prior=prior)
        self.latents = latents

    def model(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.lora()(x)
        if self.latents:
            one = x.new_ones(2)
            width = pyro.sample("width", dist.LogNormal(0 * one[0], 0.3))
            shift = pyro.sample("shift", dist.Normal(0 * one, 0.5).to_event(1))
            shares = pyro.sample("shares", dist.Dirichlet(5 * one))
            slope = pyro.sample("slope", dist.Uniform(0 * one, 3 * one).to_event(1))
            logits = logits * width * slope + shift + shares
        with pyro.plate("data", N, subsample=x):
            drawn: Tensor = pyro.sample(
                "y", dist.Categorical(logits=logits), obs=labels
            )
        return drawn

    def laplace(self, **options: Any) -> pl.LaplacePosterior:
        one = torch.ones(2).double()
        at = {"width": one[0], "shift": 0 * one, "shares": one / 2, "slope": one}
        init = init_to_value(values={**self.lora.weights(), **at})
        guide = pl.AutoLaplace(self.model, init_loc_fn=init, **options)
        return guide.laplace_approximation(batches())

    def particles(self, num: int = 3) -> pl.ParticlePosterior:
        values = {
            site: x + 0.1 * torch.randn(num, *x.shape).double()
            for site, x in self.lora.weights().items()
        }
        return pl.ParticlePosterior(values, (self.lora,), self.model, "y")


def check(ok: Any, what: str) -> None:
    if not ok:
        raise InvalidError(what)


def numbers_of(posterior: Any, lora: pl.LiftedNetwork) -> Numbers:
    """All that a posterior says, after a check that it can be one."""
    found: Numbers = {"obs_site": posterior.obs_site}
    shapes = {site: x.shape for site, x in lora.weights().items()}
    for name in ("mean", "variance"):
        for site, x in getattr(posterior, name)().items():
            check(x.isfinite().all(), f"{name} of {site} isn't finite")
            check(x.shape == shapes.get(site, x.shape), f"{name} of {site}: shape")
            found[f"{name}/{site}"] = x
            check(name == "mean" or (x >= 0).all(), f"negative variance of {site}")
    draws = posterior.sample(2)
    check(draws.keys() >= shapes.keys(), "sites are missing")
    for site, x in draws.items():
        check(x.isfinite().all(), f"draws of {site} aren't finite")
    if isinstance(posterior, pl.ParticlePosterior):
        check(0 < posterior.num_particles < 10**6, "number of particles")
        return found | posterior.particles
    if isinstance(posterior, pl.MixturePosterior):
        check(torch.isclose(posterior.weights.sum(), torch.ones(()).double()), "sum")
        check((posterior.weights >= 0).all(), "negative weights")
        found["weights"] = posterior.weights
        for i, component in enumerate(posterior.components):
            inner = numbers_of(component, lora)
            found |= {f"{i}/{name}": x for name, x in inner.items()}
        return found
    found["log_prob"] = posterior.log_prob(posterior.mode() | {})
    if isinstance(posterior, ScaledPosterior):
        check(0 < posterior.scale <= 1, "scale")
        check(found["log_prob"].isfinite().all(), "log_prob")
        return found | {"scale": torch.tensor(posterior.scale)}
    if isinstance(posterior, pl.methods.GaussianPosterior):
        check(found["log_prob"].isfinite().all(), "log_prob")
        check(posterior.log_prob(draws).isfinite().all(), "log_prob of draws")
        return (
            found | posterior.scale | {f"r/{s}": x for s, x in posterior.rows.items()}
        )
    found["log_evidence"] = posterior.log_evidence()
    for name in ("log_prob", "log_evidence"):
        check(found[name].isfinite().all(), f"{name} isn't finite")
    check(posterior.log_prob(draws).isfinite().all(), "log_prob of draws")
    drawn = posterior.prior(lora)
    for site, x in drawn.items():
        check(x.isfinite().all(), f"the prior's draws of {site}")
        check(x.shape == shapes.get(site, x.shape), f"the prior's shape of {site}")
    return found


def posterior_kind(make: Callable[[], tuple[Any, pl.LiftedNetwork]]) -> Kind:
    pyro.clear_param_store()
    posterior, lora = make()
    pyro.clear_param_store()

    def load(folder: Path) -> Numbers:
        found = numbers_of(pl.load(folder, lora), lora)
        check(not list(pyro.get_param_store()), "the param store changed")
        return found

    def write(folder: Path) -> None:
        pl.save(posterior, folder)
        pyro.clear_param_store()

    return Kind(write, load)


def laplace(**options: Any) -> tuple[Any, pl.LiftedNetwork]:
    setting = Setting(latents=options.pop("latents", False))
    return setting.laplace(**options), setting.lora


def refined() -> tuple[Any, pl.LiftedNetwork]:
    posterior, lora = laplace(structure=pl.structures.Exact())
    return posterior.refine("prior"), lora


def scaled() -> tuple[Any, pl.LiftedNetwork]:
    posterior, lora = laplace(sites="last_layer")
    return posterior.for_sampling(batches(), num_samples=2), lora


def normal() -> tuple[Any, pl.LiftedNetwork]:
    setting = Setting()
    weights = setting.lora.weights()
    a, b, *others = weights
    scale = {site: torch.rand_like(weights[site]) + 0.5 for site in [b, others[0]]}
    rows = {a: torch.eye(2).double() + 0.1 * torch.randn(1, 2, 2).double()}
    deviations = {site: torch.randn(3, *x.shape).double() for site, x in scale.items()}
    posterior = pl.methods.GaussianPosterior(
        weights, scale, (setting.lora,), setting.model, "y", rows, deviations
    )
    return posterior, setting.lora


def of_parameters() -> tuple[Any, pl.LiftedNetwork]:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.param(
            "scale", torch.tensor(0.5).double(), constraint=constraints.positive
        )
        return pl.priors.normal(scale=scale)(lora)

    setting = Setting(prior)
    return setting.laplace(), setting.lora


def of_particles() -> tuple[Any, pl.LiftedNetwork]:
    setting = Setting()
    return setting.particles(), setting.lora


def of_mixture() -> tuple[Any, pl.LiftedNetwork]:
    setting = Setting(latents=False)
    first = setting.laplace()
    inner = pl.MixturePosterior([first, first.with_prior_precision(30.0)], [1, 2])
    dense = setting.laplace(structure=pl.structures.Dense())
    return pl.MixturePosterior([inner, dense], [0.7, 0.3]), setting.lora


def generators() -> Numbers:
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
    }


def training_kind() -> Kind:
    setting = Setting()
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    )
    svgd = pl.SVGD(
        setting.model,
        pl.kernels.RBF(),
        optim,
        3,
        init_loc_fn=setting.lora.init_to_adapter(jitter=0.1),
    )
    svgd.run(batches(), num_epochs=1, progress_bar=False)
    svgd.step(**batches()[0])
    intact = svgd.state_dict()

    def state() -> Numbers:
        return {"engine": svgd.state_dict(), **generators()}

    def load(folder: Path) -> Numbers:
        before = torch.get_rng_state()
        svgd.load(folder)
        found = state()
        torch.set_rng_state(before)
        for site, x in svgd.get_named_particles().items():
            check(x.isfinite().all(), f"particles of {site} aren't finite")
            check(x.shape == intact["particles"][site].shape, f"shape of {site}")
        svgd.step(**batches()[1])
        for site, x in svgd.get_named_particles().items():
            check(x.isfinite().all(), f"particles of {site} aren't finite after a step")
        return found

    return Kind(
        svgd.save,
        load,
        state,
        lambda: svgd.load_state_dict(intact),
    )


class PowerCutError(Exception):
    pass


class Interrupted:
    """Batches whose reading fails after so many over all passes."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for one in batches():
            if self.left == 0:
                raise PowerCutError
            self.left -= 1
            yield one


def fit_kind(structure: Any, passes: int = 1, **options: Any) -> Kind:
    setting = Setting()
    guide = pl.AutoLaplace(
        setting.model,
        init_loc_fn=setting.lora.init_to_adapter(),
        structure=structure,
        **options,
    )
    guide.laplace_approximation(batches())
    name = "fisher" if passes == 1 else "fisher-2"

    def write(folder: Path) -> None:
        torch.manual_seed(2)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            guide.laplace_approximation(
                Interrupted(2 + 3 * (passes - 1)), checkpoint=folder.parent
            )
        except PowerCutError:
            (folder.parent / name).rename(folder)

    def load(folder: Path) -> Numbers:
        place = folder.parent / name
        folder.rename(place)
        try:
            found = guide.laplace_approximation(batches(), checkpoint=folder.parent)
        finally:
            if place.exists():
                place.rename(folder)
        return numbers_of(found, setting.lora)

    return Kind(write, load)  # a fit that fails midway has drawn random numbers


KINDS: dict[str, Callable[[], Kind]] = {
    "kfac": partial(posterior_kind, laplace),
    "low rank": partial(
        posterior_kind, partial(laplace, structure=pl.structures.KFAC(rank=1))
    ),
    "diagonal, last layer": partial(
        posterior_kind,
        partial(laplace, structure=pl.structures.Diagonal(), sites="last_layer"),
    ),
    "dense, latents": partial(
        posterior_kind, partial(laplace, structure=pl.structures.Dense(), latents=True)
    ),
    "exact": partial(
        posterior_kind, partial(laplace, structure=pl.structures.Exact(), fisher="mc")
    ),
    "refined": partial(posterior_kind, refined),
    "scaled": partial(posterior_kind, scaled),
    "normal": partial(posterior_kind, normal),
    "prior with parameters": partial(posterior_kind, of_parameters),
    "particles": partial(posterior_kind, of_particles),
    "mixture": partial(posterior_kind, of_mixture),
    "training": training_kind,
    "fit, kfac": partial(fit_kind, pl.structures.KFAC()),
    "fit, dense": partial(fit_kind, pl.structures.Dense(), fisher="mc"),
    "fit, ekfac": partial(fit_kind, pl.structures.EKFAC(), passes=2),
}
