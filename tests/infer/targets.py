"""Pyro models for SVGD, each with its log joint written out by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.infer.double_loop import LogJoint, Point

NUM_DATA = 12


@dataclass(frozen=True)
class Target:
    """A model, one minibatch of it, particles and what the model means by them.

    Attributes:
        model: The Pyro model.
        batch: Its keyword arguments.
        particles: Site -> (K, ...), unconstrained.
        constrained: Site -> the transform to the support, where it isn't the identity.
        log_joint: Of one particle, in unconstrained space.
        outputs: What a kernel in function space compares, (B, M), of one particle.
    """

    model: Callable[..., Any]
    batch: dict[str, Any]
    particles: dict[str, Tensor]
    constrained: dict[str, Callable[[Tensor], Tensor]]
    log_joint: LogJoint
    outputs: Callable[[Point], Tensor] | None = None

    def init(self, site: dict[str, Any]) -> Tensor:
        if site["name"] not in self.particles:
            return site["fn"].sample()
        value = self.particles[site["name"]][site["infer"]["particle"]].clone()
        return self.constrained.get(site["name"], lambda x: x)(value)


def normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """The log density, summed."""
    scale = torch.as_tensor(scale, dtype=value.dtype)
    log_probs = (
        -((value - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
    )
    return log_probs.sum()


def hierarchical_regression(num_particles: int) -> Target:
    """Sites of shapes (), (3,) and (2, 3); the first is the scale of the second."""
    x, y = torch.randn(5, 3).double(), torch.randn(5).double()

    def model(x: Tensor, y: Tensor) -> None:
        one = torch.ones((), dtype=torch.float64)
        tau = pyro.sample("tau", dist.Gamma(2 * one, 3 * one))
        w = pyro.sample("w", dist.Normal(one.new_zeros(3), tau[..., None]).to_event(1))
        m = pyro.sample("m", dist.Normal(one.new_zeros(2, 3), 0.7 * one).to_event(2))
        hidden = torch.tanh(m @ x[..., None])[..., 0].sum(-1)
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", dist.Normal((x * w).sum(-1) + hidden, 0.5), obs=y)

    def outputs(p: Point) -> Tensor:
        return (x @ p["w"] + torch.tanh(x @ p["m"].T).sum(1))[:, None]

    def log_joint(p: Point) -> Tensor:
        tau = p["tau"].exp()
        gamma = 2 * math.log(3.0) + tau.log() - 3 * tau  # log Gamma(2) = 0
        jacobian = p["tau"]
        prior = normal(p["w"], 0.0, tau) + normal(p["m"], 0.0, 0.7)
        likelihood = normal(y, outputs(p)[:, 0], 0.5)
        return gamma + jacobian + prior + NUM_DATA / 5 * likelihood

    particles = {
        "tau": 0.3 * torch.randn(num_particles).double(),
        "w": torch.randn(num_particles, 3).double(),
        "m": torch.randn(num_particles, 2, 3).double(),
    }
    return Target(
        model, {"x": x, "y": y}, particles, {"tau": torch.exp}, log_joint, outputs
    )


def bert(num_particles: int, num_labels: int = 3, max_plate_nesting: int = 1) -> Target:
    """A lifted BERT with a normal prior."""
    lora = pl.lift(networks.bert(num_labels), prior=pl.priors.normal(0.7))
    batch = networks.batch(4, num_labels=num_labels)
    return Target(
        pl.models.classification(lora, NUM_DATA),
        batch,
        networks.particles(lora, num_particles),
        {},
        lambda p: (
            sum(normal(x, 0.0, 0.7) for x in p.values())
            + NUM_DATA / 4 * _log_likelihood(_logits(lora, p, batch), batch["labels"])
        ),
        lambda p: _centred(_logits(lora, p, batch)),
    )


def hierarchical_bert(num_particles: int) -> Target:
    """A lifted BERT whose prior has a scale of its own, half-normal, for all sites."""

    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        zeros = lora.zeros()
        one = torch.ones((), dtype=torch.float64)
        scale = pyro.sample("scale", dist.HalfNormal(2 * one))
        weights = {}
        for site, zero in zeros.items():
            wide = scale.reshape(*scale.shape, *[1] * zero.ndim)
            fn = dist.Normal(zero, wide).to_event(zero.ndim)
            weights[site] = pyro.sample(site, fn)
        return weights

    lora = pl.lift(networks.bert(2), prior=prior)
    batch = networks.batch(4)

    def log_joint(p: Point) -> Tensor:
        weights = {site: x for site, x in p.items() if site != "scale"}
        scale = p["scale"].exp()
        half_normal = math.log(2.0) + normal(scale, 0.0, 2.0)
        jacobian = p["scale"]
        prior = torch.stack([normal(x, 0.0, scale) for x in weights.values()]).sum()
        logits = _logits(lora, weights, batch)
        likelihood = NUM_DATA / 4 * _log_likelihood(logits, batch["labels"])
        return half_normal + jacobian + prior + likelihood

    particles = networks.particles(lora, num_particles)
    particles["scale"] = 0.2 * torch.randn(num_particles).double()
    return Target(
        pl.models.classification(lora, NUM_DATA),
        batch,
        particles,
        {"scale": torch.exp},
        log_joint,
    )


def bernoulli_bert(num_particles: int) -> Target:
    """A lifted BERT with one output, the logit of a yes."""
    lora = pl.lift(networks.bert(1), prior=pl.priors.normal(0.7))
    batch = networks.batch(4)
    batch["labels"] = batch["labels"].double()

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Bernoulli(logits=logits[..., 0]), obs=labels)

    def log_joint(p: Point) -> Tensor:
        f = _logits(lora, p, batch)[:, 0]
        y = batch["labels"]
        likelihood = (y * f - (1 + f.exp()).log()).sum()
        prior = torch.stack([normal(x, 0.0, 0.7) for x in p.values()]).sum()
        return prior + NUM_DATA / 4 * likelihood

    return Target(
        model,
        batch,
        networks.particles(lora, num_particles),
        {},
        log_joint,
        lambda p: _logits(lora, p, batch),
    )


def _logits(lora: pl.LiftedNetwork, weights: Point, batch: dict[str, Tensor]) -> Tensor:
    with lora.bind(weights) as net:
        return net(**networks.inputs(batch)).logits


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    return log_probs[torch.arange(len(labels)), labels].sum()
