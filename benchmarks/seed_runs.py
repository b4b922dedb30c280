"""One seed of ``python -m benchmarks.curvature_quality``: fits, errors, metrics."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyro_lora as pl
from benchmarks.dense_ggn import dense_ggn, layers_of, logit_jacobian
from benchmarks.encoder_top import Rows
from benchmarks.runs import Result
from pyro_lora.ground.weights import Weights

PRIOR_PRECISION, LEARNING_RATE, NUM_WARMUP_STEPS = 0.1, 2e-3, 20
HELD_OUT = 0.2
NUM_MEMBERS = 5
GRID = [10 ** (i / 8) for i in range(-32, 49)]  # as optimize_prior's
STRUCTURES: dict[str, Any] = {
    "kfac_expand": pl.structures.KFAC(),
    "kfac_reduce": pl.structures.KFAC(reduce=True),
    "ekfac": pl.structures.EKFAC(),
    "diagonal": pl.structures.Diagonal(),
}
RANKS = (4, 16, 64)
Model = Callable[..., Tensor]


def classes(lora: pl.LiftedNetwork, num_data: int) -> Model:
    """A label for each row, by the scores that the top of a network gives its text."""

    def model(
        hidden: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        logits = lora()(hidden, attention_mask)
        with pyro.plate("data", num_data, subsample=hidden):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set's rows, how long to train, and the seed.

    Attributes:
        likelihood: What makes the Pyro model of a lifted network and a number of rows.
    """

    lora: pl.LiftedNetwork
    train: Rows
    test: Rows
    epochs: int
    seed: int
    likelihood: Callable[[pl.LiftedNetwork, int], Model] = classes

    def halves(self) -> tuple[Rows, Rows]:
        """80 % to train on, 20 % to tune on."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        num_held_out = round(HELD_OUT * len(order))
        kept, held_out = order[num_held_out:], order[:num_held_out]
        return self.train.subset(kept).by_length(), self.train.subset(held_out)

    def model(self, num_data: int) -> Model:
        """The Pyro model of ``num_data`` rows."""
        return self.likelihood(self.lora, num_data)

    def fit_map(self, rows: Rows, member: int = 0) -> Weights:
        """The mode of the log joint from a fresh adapter and head."""
        seed = NUM_MEMBERS * self.seed + member
        pyro.set_rng_seed(seed)
        batches = rows.shuffled(seed)
        optim = decaying_adam(self.epochs * len(batches))
        model = self.model(len(rows))
        with pyro.get_param_store().scope():
            guide = pl.AutoLaplace(model, init_loc_fn=self.lora.init_to_fresh())
            svi = SVI(model, guide, optim, Trace_ELBO())
            for _ in range(self.epochs):
                for batch in batches:
                    svi.step(**batch)
                    optim.step()
            median = guide.median()
        return {site: median[site].detach().clone() for site in self.lora.sites}

    def fit_particles(
        self,
        rows: Rows,
        kernel: pl.kernels.Kernel | pl.kernels.NoRepulsion,
        num_particles: int = NUM_MEMBERS,
        **options: Any,
    ) -> pl.ParticlePosterior:
        """SVGD from fresh adapters, the same for each kernel with the same seed."""
        pyro.set_rng_seed(self.seed)
        batches = rows.shuffled(self.seed)
        optim = decaying_adam(self.epochs * len(batches))
        svgd = pl.SVGD(
            self.model(len(rows)),
            kernel,
            optim,
            num_particles,
            init_loc_fn=self.lora.init_to_fresh(),
            **options,
        )
        for _ in range(self.epochs):
            for batch in batches:
                svgd.step(**batch)
                optim.step()
        return svgd.posterior()

    def laplace(self, rows: Rows, mode: Weights, structure: Any) -> pl.LaplacePosterior:
        """Around the mode, under the prior that it was trained with."""
        guide = pl.AutoLaplace(
            self.model(len(rows)),
            init_loc_fn=self.lora.init_to(mode),
            structure=structure,
        )
        return guide.laplace_approximation(rows.ordered())


def decaying_adam(
    num_steps: int, rate: float = LEARNING_RATE
) -> pyro.optim.PyroLRScheduler:
    """Adam with a warm-up and a linear decay to zero."""

    def factor(step: int) -> float:
        return min((step + 1) / NUM_WARMUP_STEPS, 1.0) * (1 - step / num_steps)

    return pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": rate},
            "lr_lambda": factor,
        }
    )


def decaying_by_epoch(num_epochs: int) -> pyro.optim.PyroLRScheduler:
    """Adam for a refit, whose rate falls after each epoch."""
    return pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE},
            "lr_lambda": lambda epoch: 1 - epoch / num_epochs,
        }
    )


def metrics(log_probs: Tensor, labels: Tensor) -> Result:
    """NLL, ECE and accuracy."""
    prediction = pl.Prediction(
        log_probs=log_probs,
        aleatoric_entropy=log_probs.new_zeros(len(labels)),
        labels=labels,
    )
    return _kept(prediction)


def _kept(prediction: pl.Prediction) -> Result:
    found = prediction.metrics()
    return {name: found[name] for name in ("nll", "ece", "accuracy")}


def log_probs_of(f: Tensor, variance: Tensor | None = None) -> Tensor:
    """(N, 2) from the difference of the logits, Gaussian where it has a variance."""
    mean = torch.stack([-f, f], 1) / 2
    if variance is None:
        return mean.log_softmax(1)
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).to(variance)
    covariance = variance[:, None, None] / 4 * sign
    return pl.integrals.class_log_probs(pl.integrals.GaussianLogits(mean, covariance))


def variances(
    posterior: pl.LaplacePosterior, jacobian: Tensor, taus: Sequence[Any]
) -> Tensor:
    """Of f under several prior precisions, (Q, N)."""
    layers = layers_of(jacobian.float(), posterior.mode())
    precisions = [posterior.with_prior_precision(t).prior_precision for t in taus]
    return posterior.gaussian.covariance(layers, precisions)[..., 0, 0].double()


def compared(found: Tensor, exact: Tensor) -> Result:
    """Relative error of predictive variances, and by what factor they are off."""
    log_ratio = (found / exact).log()
    return {
        "covariance": float((found - exact).norm() / exact.norm()),
        "ratio": float(log_ratio.mean().exp()),
        "spread": float(log_ratio.std()),
    }


def scalar(posterior: pl.LaplacePosterior) -> float:
    """The one prior precision of all weights."""
    return float(next(iter(posterior.prior_precision.values())).flatten()[0])


def errors_and_evidence(
    setting: Setting, mode: Weights, with_ranks: bool
) -> tuple[Result, Result, Result]:
    """Errors against the dense GGN; test metrics and precisions by the evidence."""
    train = setting.train.by_length()
    labels = setting.test.labels
    f, jacobian = logit_jacobian(setting.lora, mode, setting.test)
    exact = dense_ggn(setting.lora, mode, train)
    best = exact.best_precision()
    errors: Result = {}
    found: Result = {"map": metrics(log_probs_of(f), labels)}
    precisions: Result = {"dense": best}
    priors = {"trained": PRIOR_PRECISION, "evidence": best}
    reference = exact.variances(jacobian, list(priors.values()))
    found["dense, evidence"] = metrics(log_probs_of(f, reference[1]), labels)
    structures = dict(STRUCTURES)
    if with_ranks:
        for rank in RANKS:
            structures[f"kfac_expand, rank {rank}"] = pl.structures.KFAC(rank=rank)
    posteriors = {}
    for name, structure in structures.items():
        posterior = setting.laplace(train, mode, structure)
        posteriors[name] = posterior
        tuned = posterior.optimize_prior()
        precisions[name] = scalar(tuned)
        *at_priors, own = variances(
            posterior, jacobian, [*priors.values(), precisions[name]]
        )
        errors[name] = {
            prior: {
                **compared(at_priors[i], reference[i]),
                "evidence": float(posterior.with_prior_precision(tau).log_evidence())
                - exact.log_evidence(tau),
                "dense evidence": exact.log_evidence(tau),
            }
            for i, (prior, tau) in enumerate(priors.items())
        }
        found[f"{name}, evidence"] = metrics(log_probs_of(f, own), labels)
    base = posteriors["kfac_expand"]
    for per in ("site", "layer"):
        tau = base.optimize_prior(per=per).prior_precision
        name = f"kfac_expand, evidence per {per}"
        found[name] = metrics(
            log_probs_of(f, variances(base, jacobian, [tau])[0]), labels
        )
    num_epochs = max(1, setting.epochs // 2)
    guide = pl.AutoLaplace(
        setting.model(len(train)), init_loc_fn=setting.lora.init_to_adapter()
    )
    refitted = guide.refit(
        base.optimize_prior(),
        setting.train.shuffled(setting.seed),
        decaying_by_epoch(num_epochs),
        num_epochs=num_epochs,
    ).optimize_prior()
    precisions["kfac_expand, one refit"] = scalar(refitted)
    f = at_mode(setting, refitted.mode())
    found["map, one refit"] = metrics(log_probs_of(f), labels)
    prediction = pl.predict(
        refitted,
        setting.test.ordered(),
        model=setting.model(len(train)),
        method="linearized",
    )
    found["kfac_expand, evidence, one refit"] = _kept(prediction)
    return errors, found, precisions


def held_out_nll(setting: Setting) -> tuple[Result, Result]:
    """Test metrics and precisions where 20 % of the rows are kept for tuning."""
    kept, held_out = setting.halves()
    mode = setting.fit_map(kept)
    labels = setting.test.labels
    f, jacobian = logit_jacobian(setting.lora, mode, setting.test)
    g, held_jacobian = logit_jacobian(setting.lora, mode, held_out)
    zeros = torch.zeros(len(held_out)).double()
    tune = pl.Prediction(
        log_probs=log_probs_of(g), aleatoric_entropy=zeros, labels=held_out.labels
    )
    temperature = pl.fit_temperature(tune)
    found = {
        "map 80": metrics(log_probs_of(f), labels),
        "temperature scaling 80": metrics(log_probs_of(f / temperature), labels),
    }
    exact = dense_ggn(setting.lora, mode, kept)
    index = held_out.labels[:, None]
    losses = [
        -float(log_probs_of(g, v).gather(1, index).mean())
        for v in exact.variances(held_jacobian, GRID)
    ]
    precisions = {"temperature": temperature, "dense": GRID[losses.index(min(losses))]}
    variance = exact.variances(jacobian, [precisions["dense"]])[0]
    found["dense, nll 80"] = metrics(log_probs_of(f, variance), labels)
    for name, structure in STRUCTURES.items():
        posterior = setting.laplace(kept, mode, structure)
        tuned = posterior.optimize_prior(objective="nll", batches=held_out.ordered())
        precisions[name] = scalar(tuned)
        variance = variances(posterior, jacobian, [precisions[name]])[0]
        found[f"{name}, nll 80"] = metrics(log_probs_of(f, variance), labels)
    return found, precisions


@torch.no_grad()
def at_mode(setting: Setting, weights: Weights) -> Tensor:
    """Difference of the logits of the test rows, (N,), float64."""
    with setting.lora.bind(weights) as net:
        logits = torch.cat(
            [net(b["hidden"], b["attention_mask"]) for b in setting.test.ordered()]
        )
    return (logits[:, 1] - logits[:, 0]).double()


def run_seed(setting: Setting, *, with_ranks: bool) -> Result:
    """All of one data set, regime and seed but the ensemble."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mode = setting.fit_map(setting.train)
        errors, found, precisions = errors_and_evidence(setting, mode, with_ranks)
        of_half, half_precisions = held_out_nll(setting)
    not_modes = [w for w in caught if "aren't a mode" in str(w.message)]
    return {
        "num_weights": sum(x.numel() for x in mode.values()),
        "errors": errors,
        "metrics": found | of_half,
        "precision": precisions,
        "precision 80": half_precisions,
        "fits away from a mode": len(not_modes),
        "logits at the mode": at_mode(setting, mode).tolist(),
    }


def run_ensemble(setting: Setting, first: Sequence[float]) -> Result:
    """A deep ensemble: the seed's own mode and four more, probabilities averaged."""
    members = [torch.tensor(first, dtype=torch.float64)]
    for member in range(1, NUM_MEMBERS):
        members.append(at_mode(setting, setting.fit_map(setting.train, member)))
    log_probs = torch.stack([log_probs_of(f) for f in members])
    mixed = log_probs.logsumexp(0) - math.log(NUM_MEMBERS)
    return {"metrics": {"ensemble of 5": metrics(mixed, setting.test.labels)}}
