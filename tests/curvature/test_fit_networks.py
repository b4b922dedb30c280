"""Networks in the state that users train them in: checkpointed, in autocast."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import assert_same, flatten, laplace
from tests.networks import batch, bert, llama

pytestmark = [
    pytest.mark.untrained,
    # Which transformers itself uses.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),
]
STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]


def summary(posterior: pl.LaplacePosterior, texts: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            posterior.log_evidence()[None].double(),
            flatten(posterior.variance()).double(),
            posterior.linearized(texts).covariance_matrix.flatten().double(),
        ]
    )


@pytest.mark.grid
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.few(2)
def test_gradient_checkpointing_changes_nothing(
    build: Any, structure: Structure
) -> None:
    network, texts = build(3), batch(6, num_labels=3)
    plain = laplace(pl.lift(copy.deepcopy(network)), texts, 4, structure=structure)
    lora = pl.lift(network)
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lora.context_fn,
        }
    )
    network.train()
    posterior = laplace(lora, texts, 4, structure=structure)
    assert network.training
    assert_same(summary(posterior, texts), summary(plain, texts))


class Checkpointed(nn.Module):
    """Computes its layers again in every backward pass, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        self.context_fn: Any = None

    def layers(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.context_fn is None:
            return self.layers(x)
        out: Tensor = checkpoint(
            self.layers, x, use_reentrant=False, context_fn=self.context_fn
        )
        return out


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_network_that_checkpoints_itself(structure: Structure) -> None:
    network = Checkpointed().double()
    lora = pl.lift(network)
    one = {"x": torch.randn(8, 3).double(), "labels": torch.arange(8) % 3}

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    def fit() -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        return guide.laplace_approximation([one])

    plain = fit()
    expected = summary(plain, one)
    network.context_fn = lora.context_fn
    assert_same(summary(fit(), one), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_costs_digits_only(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3, dtype=torch.float32)), batch(6, num_labels=3)
    plain = pl.models.classification(lora, 6)

    def rounded(**texts: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(**texts)

    def fit(model: Any) -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        return guide.laplace_approximation([texts])

    expected, found = fit(plain), fit(rounded)
    for site, value in expected.variance().items():
        assert found.variance()[site].dtype == torch.float32
        error = (found.variance()[site] - value).abs().max()
        assert float(error) < 0.05 * float(value.max())
    assert not torch.equal(found.log_evidence(), expected.log_evidence())
    wanted = expected.linearized(texts).covariance_matrix
    error = (found.linearized(texts).covariance_matrix - wanted).norm()
    assert float(error / wanted.norm()) < 0.05


NUM_DATA = 6
TEXTS = batch(NUM_DATA, num_labels=3)


def rounded_lora(prior: Any = None) -> tuple[pl.LiftedNetwork, Any]:
    """A model whose network, and nothing else, is in autocast."""
    torch.manual_seed(0)
    network = bert(3, num_layers=1, hidden_size=8, dtype=torch.float32)
    lora = pl.lift(network, prior=prior)

    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        net = lora()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return lora, model


def fitted(structure: Structure) -> pl.LaplacePosterior:
    lora, model = rounded_lora()
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    return guide.laplace_approximation([TEXTS])


def mixture() -> pl.MixturePosterior:
    gaussian = fitted(pl.structures.KFAC())
    return pl.MixturePosterior(
        [gaussian, gaussian.with_prior_precision(3.0)], weights=[0.3, 0.7]
    )


def gaussian_posterior() -> Any:
    """With a diagonal, rows and deviations: all forms of it."""
    lora, model = rounded_lora()
    loc = lora.weights()
    first, *others = loc
    number, rank = loc[first].shape[:2]
    return pl.methods.GaussianPosterior(
        loc,
        {site: torch.full_like(loc[site], 0.1) for site in others},
        (lora,),
        model,
        rows={first: torch.eye(rank) + 0.1 * torch.rand(number, rank, rank).tril()},
        deviations={site: 0.1 * torch.randn(2, *loc[site].shape) for site in others},
    )


def svgd(space: Any, prior: Any) -> dict[str, Tensor]:
    lora, model = rounded_lora(prior)
    init = lora.init_to_adapter(jitter=0.1)
    optim = pyro.optim.SGD({"lr": 1e-2})
    made = pl.SVGD(model, pl.kernels.RBF(space=space), optim, 3, init_loc_fn=init)
    for _ in range(2):
        made.step(**TEXTS)
    return made.get_named_particles()


Call = Callable[[Any], Any]
DRAWS: dict[str, Call] = {
    "sample": lambda q: q.sample(3),
    "log_prob": lambda q: q.log_prob(q.sample(3)),
    "variance": lambda q: q.variance(),
    "mean": lambda q: q.mean(),
    "quantiles": lambda q: q.quantiles([0.1, 0.9]),
    "guide": lambda q: pyro.poutine.trace(q).get_trace().log_prob_sum(),
    "predict": lambda q: pl.predict(q, [TEXTS]).log_probs,
    "draws": lambda q: pl.predict(q, [TEXTS], method="sample").log_probs,
    "kept draws": lambda q: pl.predict(q, [TEXTS], keep_draws=True).draw_log_probs,
    "acquire": lambda q: (
        pl.acquire(
            pl.predict(q, [TEXTS], keep_draws=True), 2, method="batch_bald"
        ).scores
    ),
}
LAPLACE: dict[str, Call] = {
    **DRAWS,
    "evidence": lambda q: q.log_evidence(),
    "another prior": lambda q: q.with_prior_precision(2.0).log_evidence(),
    "optimize_prior": lambda q: q.optimize_prior(per="layer").prior_precision,
    "linearized": lambda q: q.linearized(TEXTS).covariance_matrix,
    "jointly": lambda q: q.linearized(TEXTS, joint=True).rsample((2,)),
    "for_sampling": lambda q: q.for_sampling([TEXTS], num_samples=2).scale,
    "effective": lambda q: q.gaussian.effective_parameters(),
    "informed": lambda q: q.gaussian.informed_directions(2),
    "newton": lambda q: q.gaussian.newton_decrement(q.gaussian.loc),
}
DIAGNOSED: dict[str, Call] = {
    "diagnose": lambda q: (
        pl.diagnose(q, [TEXTS], num_samples=25, num_directions=1).gaussian.log_joint
    ),
}
EXACT: dict[str, Call] = {
    "leave_one_out": lambda q: q.leave_one_out(),
    "by loo": lambda q: q.optimize_prior(objective="loo").prior_precision,
    "refine": lambda q: q.refine().mode(),
    "around the prior": lambda q: q.refine("prior").mode(),
}
OF_KIND: dict[str, tuple[Callable[[], Any], dict[str, Call]]] = {
    "KFAC": (lambda: fitted(pl.structures.KFAC()), LAPLACE),
    "thin KFAC": (lambda: fitted(pl.structures.KFAC(rank=2)), LAPLACE | DIAGNOSED),
    "Diagonal": (lambda: fitted(pl.structures.Diagonal()), LAPLACE),
    "Dense": (lambda: fitted(pl.structures.Dense()), LAPLACE),
    "Exact": (lambda: fitted(pl.structures.Exact()), LAPLACE | EXACT),
    "refined": (lambda: fitted(pl.structures.Exact()).refine(), DRAWS),
    "mixture": (mixture, DRAWS),
    "Gaussian": (gaussian_posterior, DRAWS),
}


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.few(3)
def test_autocast_around_everything_is_that_of_the_network(kind: str) -> None:
    # Whose passes are the same in both: nothing else may be rounded.
    make, calls = OF_KIND[kind]
    posterior, off = make(), {}
    for name, call in calls.items():
        expected, found = (
            _in_autocast(lambda: call(posterior), enabled)  # noqa: B023
            for enabled in (False, True)
        )
        try:
            assert_close(found, expected, rtol=1e-12, atol=1e-12)
        except AssertionError as error:
            off[name] = str(error)
    assert off == {}


def penalised() -> Any:
    """By norms, singular values and Gram matrices of the factors."""
    norms = pl.priors.spectral(frobenius_scale=1.0, penalty=lambda s: s.sum(-1))
    return pl.priors.orthogonal(0.5, prior=norms)


@pytest.mark.parametrize(
    ("space", "prior"),
    [("joint", penalised()), ("site", None), ("delta", None), ("function", None)],
)
def test_autocast_around_a_step_of_svgd_is_that_of_the_network(
    space: str, prior: Any
) -> None:
    expected, found = (
        _in_autocast(lambda: svgd(space, prior), enabled) for enabled in (False, True)
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _in_autocast(call: Callable[[], Any], enabled: bool) -> list[Any]:
    pyro.set_rng_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        return [torch.as_tensor(x) for x in tree_leaves(call())]
