"""What a posterior hands out is its reader's: writing there changes no posterior."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

import pyro_lora as pl
from pyro_lora.posteriors.dropout import DropoutPosterior
from pyro_lora.posteriors.posterior import as_posterior
from pyro_lora.posteriors.prior import log_prior_by_site
from tests.networks import batch, bert, inputs

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
    pytest.mark.filterwarnings("ignore:A Gaussian over several layers"),
    pytest.mark.filterwarnings("ignore:Averaged over draws of a Gaussian"),
    pytest.mark.filterwarnings("ignore:refine moves the weights"),
    pytest.mark.filterwarnings("ignore:Even at a scale"),
    pytest.mark.filterwarnings("ignore:The best prior precision"),
]
NUM_DATA = 5
TEXTS = batch(NUM_DATA)


class Setting:
    """A small network under a model, with latents beside the weights or without."""

    def __init__(self, latents: bool = False, **network: Any) -> None:
        prior = pl.priors.normal(scale=0.7)
        self.lora = pl.lift(bert(num_layers=1, **network), prior=prior)
        self.at = self.lora.weights()
        if latents:
            self.at |= {
                "width": torch.tensor(0.9).double(),
                "shares": torch.tensor([0.4, 0.6]).double(),
            }

    def model(self, labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = self.lora()(**texts).logits
        if "width" in self.at:
            zero = logits.new_zeros(())
            logits = logits * pyro.sample("width", dist.LogNormal(zero, 0.5))
            logits = logits + pyro.sample("shares", dist.Dirichlet(3 + logits[0] * 0))
        with pyro.plate("data", NUM_DATA, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    def laplace(self, structure: str = "KFAC", **options: Any) -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            self.model,
            init_loc_fn=self.lora.init_to(self.at),
            structure=getattr(pl.structures, structure)(),
            **options,
        )
        return guide.laplace_approximation([TEXTS])


def laplace(structure: str = "KFAC", **options: Any) -> pl.LaplacePosterior:
    return Setting(latents=options.pop("latents", False)).laplace(structure, **options)


def particles(setting: Setting | None = None) -> pl.ParticlePosterior:
    setting = setting or Setting()
    values = {s: torch.stack([x, 1.1 * x, 0.9 * x]) for s, x in setting.at.items()}
    return pl.ParticlePosterior(values, (setting.lora,), setting.model, "y")


def mixture() -> pl.MixturePosterior:
    setting = Setting()
    first = setting.laplace()
    return pl.MixturePosterior([first.with_prior_precision(9.0), particles(setting)])


def normal() -> Any:
    setting = Setting()
    scale = {s: torch.full_like(x, 0.1) for s, x in setting.at.items()}
    site = next(s for s in scale if s.endswith(".A"))
    x = scale.pop(site)
    rows = {site: 0.1 * torch.eye(x.shape[1]).double().expand(len(x), -1, -1).clone()}
    deviations = {s: 0.1 * torch.randn(2, *x.shape).double() for s, x in scale.items()}
    return pl.methods.GaussianPosterior(
        setting.at, scale, (setting.lora,), setting.model, "y", rows, deviations
    )


def dropout() -> DropoutPosterior:
    setting = Setting(dropout=0.1)
    return pl.mc_dropout(setting.lora, model=setting.model, obs_site="y")


def guide() -> Any:
    setting = Setting()
    delta = AutoDelta(setting.model, init_loc_fn=setting.lora.init_to_adapter())
    delta(**TEXTS)
    return as_posterior(delta)


KINDS: dict[str, Callable[[], Any]] = {
    "kfac": laplace,
    "ekfac": lambda: laplace("EKFAC"),
    "diagonal": lambda: laplace("Diagonal"),
    "dense": lambda: laplace("Dense"),
    "exact": lambda: laplace("Exact"),
    "refined": lambda: laplace("Exact").refine(),
    "refined around the prior": lambda: laplace("Exact").refine("prior"),
    "tuned": lambda: laplace().with_prior_precision(3.0),
    "latents": lambda: laplace(latents=True),
    "fixed": lambda: laplace(sites="last_layer"),
    "fixed, tuned": lambda: laplace(sites="last_layer").with_prior_precision(3.0),
    "narrow": lambda: laplace(sites="last_layer").for_sampling([TEXTS], num_samples=2),
    "narrow, refined": lambda: laplace("Exact").refine().for_sampling([TEXTS]),
    "mixture": mixture,
    "particles": particles,
    "normal": normal,
    "dropout": dropout,
    "guide": guide,
}

# Methods that need arguments, or may go without; those that write files or take long.
GIVEN: dict[str, tuple[Any, ...]] = {
    "sample": (2,),
    "sample_with_components": (2,),
    "sample_with_log_prob": (2,),
    "quantiles": ([0.2, 0.7],),
    "linearized": (inputs(TEXTS),),
    "with_prior_precision": (2.0,),
}
LEFT_OUT = {"save_pretrained", "push_to_hub", "for_sampling", "optimize_prior"}
# The user's own, and values of the library's inside.
LEFT_OUT |= {"model", "networks", "guide", "own_model", "called_with", "trace"}
LEFT_OUT |= {"gaussian", "gaussians", "base", "components"}
OTHERS = {"with_prior_precision", "refine", "scaled"}  # posteriors that it makes


def handed_out(posterior: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """All that a posterior says, by the name of what says it."""
    found = {}
    draws = posterior.sample(2)
    given = {**GIVEN, "log_prob": (draws,)}
    if not isinstance(posterior, pl.LaplacePosterior):  # whose own takes none
        given["scaled"] = (draws,)
    for name in dir(posterior):
        if name.startswith("_") or name in LEFT_OUT or name in without:
            continue
        value = getattr(posterior, name)
        if name == "prior":
            value = prior_of(posterior)
        elif inspect.ismethod(value):
            try:
                value = value(*given.get(name, ()))
            except ValueError:  # a mixture's mode, refine of KFAC
                continue
        found[name] = value
    return found


def prior_of(posterior: Any) -> list[Any]:
    (lora,) = posterior.networks
    draws = {s: x for s, x in posterior.sample(2).items() if s in lora.sites}
    density = log_prior_by_site(posterior.prior, (lora,), draws)
    return [density, posterior.prior(lora)]


def parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, pl.Posterior):
        return list(handed_out(value, OTHERS).values())
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what was handed out, and in what posteriors in it hand out."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in parts(value) for x in tensors(part)]


def uncached(posterior: Any) -> Any:
    """The same, without what it has computed."""
    if isinstance(posterior, pl.MixturePosterior):
        each = [uncached(component) for component in posterior.components]
        return pl.MixturePosterior(each, posterior.weights)
    if isinstance(posterior, pl.LaplacePosterior):
        gaussian: Any = posterior.gaussian
        return dataclasses.replace(posterior, gaussian=dataclasses.replace(gaussian))
    base = getattr(posterior, "base", None)
    return dataclasses.replace(posterior, **({"base": uncached(base)} if base else {}))


def said(posterior: Any) -> list[Tensor]:
    pyro.set_rng_seed(0)
    found = [x.clone() for x in tensors(handed_out(posterior))]
    prediction = pl.predict(posterior, [TEXTS], num_samples=3, obs_site="y")
    return [*found, prediction.log_probs.clone()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(6)
def test_writing_to_what_is_handed_out_changes_nothing(kind: str) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    posterior = KINDS[kind]()
    expected = said(uncached(posterior))
    assert len(expected) > 3
    each = [posterior, *getattr(posterior, "components", ())]
    each += [x for x in [getattr(posterior, "base", None)] if x is not None]
    with torch.no_grad():
        for value in [x for one in each for x in tensors(handed_out(one))]:
            value.mul_(3).add_(1)
    for found in (said(posterior), said(uncached(posterior))):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) or bool((a.isnan() & b.isnan()).all())
