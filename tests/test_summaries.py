"""What values say of themselves is short, of every kind and in every state."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from html import escape, unescape
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora.ground.summary import Summarised, brief, extent, text
from pyro_lora.posteriors.guide_posterior import GuidePosterior
from pyro_lora.predict.generate import Generation
from tests.networks import batch, bert, inputs

MOST = 1200  # characters
NUM_DATA = 5
pytestmark = pytest.mark.untrained


def lifted(**settings: Any) -> pl.LiftedNetwork:
    return pl.lift(bert(num_layers=3, hidden_size=32, **settings))


def laplace(**settings: Any) -> pl.LaplacePosterior:
    lora = lifted()
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **settings)
    return guide.laplace_approximation([batch()])


def with_latents() -> pl.LaplacePosterior:
    lora, texts = lifted(num_labels=1), batch()
    model = pl.models.regression(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    texts["labels"] = texts["labels"].double()
    return guide.laplace_approximation([texts])


def particles() -> pl.ParticlePosterior:
    lora = lifted()
    doubled = {site: 2 * x for site, x in lora.weights().items()}
    return pl.ensemble(lora, [lora.weights(), doubled])


def mixture() -> pl.MixturePosterior:
    posterior = laplace()
    several = [posterior.with_prior_precision(float(n)) for n in range(1, 9)]
    return pl.MixturePosterior([*several, particles()])


def guide() -> GuidePosterior:
    lora = lifted()
    model = pl.models.classification(lora, NUM_DATA)
    own = AutoNormal(model)
    own(**batch())
    return GuidePosterior(own, model)


def svgd(steps: int = 0, **options: Any) -> pl.SVGD:
    lora = lifted()
    engine = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        pl.kernels.RBF(space="function"),
        pyro.optim.Adam({"lr": 1e-3}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
        **options,
    )
    for _ in range(steps):
        engine.step(**batch())
    return engine


def stale() -> pl.LiftedNetwork:
    lora = lifted()
    pl.lift(lora.network)
    return lora


def auto_laplace(steps: int = 0) -> pl.AutoLaplace:
    lora = lifted()
    own = pl.AutoLaplace(
        pl.models.classification(lora, NUM_DATA), init_loc_fn=lora.init_to_adapter()
    )
    for _ in range(steps):
        own(**batch())
    return own


def many_scales() -> Any:
    scales = {site: 1 + x for site, x in lifted().weights().items()}
    return pl.priors.normal(scale={s: x.abs() + 0.1 for s, x in scales.items()})


def exact_with_evidence() -> pl.LaplacePosterior:
    found = laplace(structure=pl.structures.Exact())
    found.log_evidence()
    return found


def diagnosis() -> Any:
    return pl.diagnose(laplace(), [batch()], num_samples=25, num_directions=2)


def generation() -> Any:
    sequences = torch.zeros(64, 500)
    return Generation(
        sequences=sequences,
        prompt_length=400,
        total_entropy=sequences,
        aleatoric_entropy=sequences,
        log_probs=sequences,
        finished=sequences[:, 0] == 0,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "lifted network": lifted,
    "stale network": stale,
    "kronecker": laplace,
    "low rank": lambda: laplace(structure=pl.structures.KFAC(rank=2)),
    "diagonal": lambda: laplace(structure=pl.structures.Diagonal()),
    "exact": lambda: laplace(structure=pl.structures.Exact()),
    "fisher terms": lambda: laplace(structure=pl.structures.Exact(), fisher="mc"),
    "last layer, dense": lambda: laplace(
        structure=pl.structures.Dense(), sites="last_layer"
    ),
    "tuned": lambda: laplace().optimize_prior(per="layer"),
    "latents": with_latents,
    "scaled": lambda: laplace().for_sampling([batch()]),
    "normal": lambda: pl.methods.swag(lifted(), [lifted().weights() for _ in "ab"]),
    "particles": particles,
    "mixture": mixture,
    "dropout": lambda: pl.mc_dropout(lifted(dropout=0.1)),
    "guide": guide,
    "block": lambda: laplace().gaussian,
    "eigenblocks": lambda: laplace().gaussian.blocks["head.classifier.bias"],  # type: ignore[attr-defined]
    "dual": lambda: laplace(structure=pl.structures.Exact()).gaussian,
    "rows": lambda: laplace(structure=pl.structures.Exact()).gaussian.rows,  # type: ignore[attr-defined]
    "latent block": lambda: with_latents().latents,
    "logits": lambda: laplace().linearized(inputs(batch())),
    "joint logits": lambda: laplace().linearized(inputs(batch()), joint=True),
    "svgd": svgd,
    "svgd, a step": lambda: svgd(1),
    "auto laplace": auto_laplace,
    "auto laplace, called": lambda: auto_laplace(1),
    "auto laplace, given weights": lambda: pl.AutoLaplace(
        pl.models.classification(lifted(), NUM_DATA),
        init_loc_fn=lifted().init_to(lifted().weights()),
    ),
    "exact, evidence known": exact_with_evidence,
    "diagnosis": diagnosis,
    "charge": lambda: diagnosis().charge,
    "directions": lambda: diagnosis().gaussian,
    "prediction": lambda: pl.predict(laplace(), [batch()]),
    "generation": generation,
    "prior of scales": many_scales,
    "prior of a posterior": lambda: pl.priors.from_posterior(mixture()),
    "chosen prior": lambda: laplace().with_prior_precision(2.0).prior,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_kind_is_short(make: Callable[[], Any]) -> None:
    value = make()
    pyro.clear_param_store()
    state = torch.get_rng_state()
    shown = repr(value)
    assert len(shown) <= MOST
    assert shown.startswith(f"{type(value).__name__.lstrip('_')}(")
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert repr(twin) == shown
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())
    if isinstance(value, Summarised):
        html = value._repr_html_()
        rows = re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", html)
        assert all(f"{unescape(n)}={unescape(fact)}" in shown for n, fact in rows)
        assert rows
        assert len(html) <= 2 * MOST


def test_an_exact_evidence_is_shown_once_it_is_known() -> None:
    exact = laplace(structure=pl.structures.Exact())
    assert facts(exact)["log_evidence"] == f"{float(exact.log_evidence()):.4g}"
    posterior = exact.refine()
    evidence, twin = float(posterior.log_evidence()), copy.deepcopy(posterior)
    assert facts(twin)["log_evidence"] == f"{evidence:.4g}"
    for ask in (
        lambda p: p.log_evidence(),
        lambda p: pl.predict(p, [batch()]).metrics(),
    ):
        other = exact.refine()
        assert facts(other)["log_evidence"] == "computed when asked for"
        ask(other)
        assert facts(other)["log_evidence"] == f"{evidence:.4g}"
        assert float(other.log_evidence()) == pytest.approx(evidence, rel=1e-12)
    chosen = facts(posterior.with_prior_precision(2.0))
    assert chosen["log_evidence"] == "computed when asked for"


def test_a_mixture_says_what_its_parts_have() -> None:
    posterior = laplace()
    parts = [posterior.with_prior_precision(x) for x in (2.0, 0.5, 8.0)]
    evidences = sorted(float(part.log_evidence()) for part in parts)
    said = facts(pl.MixturePosterior([*parts, particles()]))
    assert said["prior_precision"] == "0.5 to 8"
    assert said["log_evidence"] == f"{evidences[0]:.4g} to {evidences[-1]:.4g}"
    said = facts(pl.MixturePosterior([particles(), particles()]))
    assert not {"prior_precision", "log_evidence"} & said.keys()
    exact = laplace(structure=pl.structures.Exact()).refine()
    assert "log_evidence" not in facts(pl.MixturePosterior([exact]))
    exact.log_evidence()
    found = facts(pl.MixturePosterior([exact]))["log_evidence"]
    assert found == facts(exact)["log_evidence"]


def test_starts_and_priors_are_said_in_words() -> None:
    lora = lifted()
    model = pl.models.classification(lora, NUM_DATA)
    for init, words in (
        (lora.init_to_adapter(), "the adapter's weights"),
        (lora.init_to_adapter(jitter="auto"), "the adapter's weights with noise"),
        (lora.init_to(lora.weights()), f"given weights of {len(lora.sites)} sites"),
        (lora.init_to_fresh(), "PEFT's own random weights"),
    ):
        guide = pl.AutoLaplace(model, init_loc_fn=init)
        assert facts(guide)["mode"] == f"not set up, starts at {words}"
        assert f"<td>not set up, starts at {escape(words)}</td>" in guide._repr_html_()
    chosen = laplace().with_prior_precision(4.0)
    assert facts(chosen)["prior"] == "SitePriors(scale=0.5, loc=0)"


def facts(value: Any) -> dict[str, str]:
    lines = repr(value).splitlines()[1:-1]
    return dict(line.strip().rstrip(",").split("=", 1) for line in lines)


def test_a_posterior_says_what_it_holds() -> None:
    lora = lifted()
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation([batch()])
    said = facts(posterior)
    num_weights = sum(x.numel() for x in lora.weights().values())
    assert said == {
        "sites": "lora...self.query.A (3, 3, 32), lora...self.query.B (3, 32, 3), "
        "lora...self.value.A (3, 3, 32), and 3 more",
        "weights": f"{num_weights:,}",
        "structure": "Kronecker",
        "prior_precision": "1",
        "num_data": f"{NUM_DATA}",
        "prior": "normal(scale=1.0, center=0.0)",
        "log_likelihood": f"{float(posterior.log_likelihood):.4g}",
        "log_evidence": f"{float(posterior.log_evidence()):.4g}",
        "obs_site": "'y'",
        "model": f"classification(lora=LiftedNetwork, num_data={NUM_DATA})",
    }
    precisions = dict.fromkeys(lora.sites, 4.0) | {next(iter(lora.sites)): 0.25}
    assert facts(posterior.with_prior_precision(precisions))["prior_precision"] == (
        "0.25 to 4"
    )
    total = sum(p.numel() for p in lora.network.parameters())
    said = facts(lora)
    assert said["weights"] == f"{num_weights:,} of the network's {total:,}"
    assert said["network"] == "PeftModelForSequenceClassification"
    assert "stale" not in said
    pl.lift(lora.network)
    assert facts(lora)["stale"].endswith("has been lifted again")


def test_svgd_says_how_far_it_is() -> None:
    engine = svgd(2)
    said = facts(engine)
    assert said["kernel"] == "RBF(space='function', bandwidth=None)"
    assert (said["optim"], said["num_particles"], said["steps"]) == ("Adam", "3", "2")
    assert said["nll"] == f"{engine.diagnostics['nll'][-1]:.3f}"
    # The loss is above .3 nats, from which on the default doesn't repel.
    assert said["repulsion"] == "0, gate closed"
    posterior = engine.posterior()
    assert facts(posterior)["sites"] == said["sites"]
    assert facts(posterior)["weights"] == said["weights"]


def test_a_repulsion_of_0_that_was_asked_for_is_no_gate() -> None:
    assert facts(svgd(1, repulsion=0.0))["repulsion"] == "0"


def test_a_diagnosis_has_its_verdicts_and_what_they_rest_on() -> None:
    found = diagnosis()
    said = facts(found)
    assert said["stationarity"] == (
        f"{found.stationarity.verdict} ({found.stationarity.lines()[0]})"
    )
    assert said["diversity"] == "- (LaplacePosterior has none)"


def test_exact_posteriors_know_their_data() -> None:
    posterior = laplace(structure=pl.structures.Exact())
    assert facts(posterior)["structure"] == f"exact, in {NUM_DATA} rows of 5 data"
    assert "mode" not in facts(posterior)
    assert facts(posterior.refine())["mode"].endswith("a prior around the weights")
    assert facts(posterior.refine("prior"))["mode"].endswith("under the prior")


def test_an_exact_posterior_can_be_pickled_when_it_has_been_asked() -> None:
    posterior = laplace(structure=pl.structures.Exact())
    expected = posterior.leave_one_out()
    twin = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(twin.leave_one_out(), expected, rtol=0, atol=0)


def test_a_guide_whose_copy_has_forgotten_its_model() -> None:
    posterior = GuidePosterior(guide().guide)
    assert "model=classification" in repr(posterior)
    assert "model=None" in repr(copy.deepcopy(posterior))


class Odd:
    """A setting of somebody else's."""

    def __repr__(self) -> str:
        raise RuntimeError("not now")


def test_what_others_give_is_short_and_safe() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        return pl.priors.normal()(lora)

    endless: list[Any] = []
    endless.append(endless)
    assert brief(prior).endswith("<locals>.prior")
    assert brief(functools.partial(lifted, dropout=0.1)) == "partial of lifted"
    assert brief(poutine.scale(lifted, 0.5)) == "lifted under ScaleMessenger"
    assert brief(poutine.scale(scale=0.5)(lifted)) == "lifted under ScaleMessenger"
    assert brief(nn.Linear(100, 100)) == "Linear"
    assert brief(Odd()).startswith("<Odd instance at")
    assert brief(endless) == "[[[...]]]"
    assert len(brief(list(range(10**4)))) < 50
    assert len(brief("a" * 10**4)) < 130
    assert brief(torch.ones(3, 4, device="meta")) == "tensor (3, 4)"
    assert brief(torch.ones((), requires_grad=True)) == "tensor(1.)"
    fn = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    assert brief(fn) == "Normal (2, 3)"
    assert extent([]) == extent([torch.zeros(0), torch.ones(2, device="meta")])
    assert text("A", {"b": "c" * 10**4}).endswith("...,\n)")


def test_a_notebook_gets_it_escaped() -> None:
    lora = pl.lift(bert(), prior=lambda lora: pl.priors.normal()(lora))
    assert "&lt;lambda&gt;" in lora._repr_html_()
    assert "<lambda>" not in lora._repr_html_()
