import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import pyro_lora as pl
from benchmarks import refined_mixtures, refined_widening, svgd_growth
from benchmarks.dense_ggn import dense_ggn, layers_of, logit_jacobian
from benchmarks.encoder_top import CachedRows, EncoderTop, adapted
from benchmarks.refined import at_weights, mixed
from benchmarks.runs import arguments, keep, kept, shard
from benchmarks.seed_runs import PRIOR_PRECISION, Setting
from benchmarks.serving import Job
from benchmarks.tables import over_seeds

NUM_ROWS = 6


def test_mean_and_standard_error_over_seeds() -> None:
    assert over_seeds([]) == ""
    assert over_seeds([0.25]) == "0.250"
    assert over_seeds([1, 2, 3, 6], digits=2) == "3.00 ± 1.08"  # sqrt(14 / 3 / 4)


def test_results_are_kept_and_jobs_shared_out(tmp_path: Path) -> None:
    path = tmp_path / "raw" / "study.jsonl"
    assert kept(path) == {}
    keep(path, "sst2-0", {"nll": 1 / 3, "seeds": 2, "losses": [{"map": 2 / 3}]})
    keep(path, "sst2-1", {"nll": float("inf")})
    assert kept(path) == {
        "sst2-0": {"nll": 0.333333, "seeds": 2, "losses": [{"map": 0.666667}]},
        "sst2-1": {"nll": float("inf")},
    }
    parser = arguments(None, "study", sets=["sst2"], rows=5)
    shares = [
        shard(range(7), parser.parse_args(["--shard", f"{i}/3"])) for i in range(3)
    ]
    assert sorted(job for share in shares for job in share) == [*range(7)]


def test_each_page_of_results_has_its_row() -> None:
    root = Path(__file__).parents[1]
    index = (root / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[\]\((.+?)\) \|", index, flags=re.MULTILINE)
    pages = (root / "benchmarks" / "results").glob("*.md")
    assert sorted(rows) == sorted(page.name for page in pages)


@pytest.fixture
def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def rows(bert: BertForSequenceClassification) -> CachedRows:
    hidden = [torch.randn(length, 16) for length in (2, 3, 3, 4, 5, 7)]
    return CachedRows(hidden, torch.tensor([0, 1, 1, 0, 1, 0]))


@pytest.fixture
def setting(bert: BertForSequenceClassification, rows: CachedRows) -> Setting:
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    lora = pl.lift(adapted(bert, rank=2), prior=prior)
    return Setting(lora=lora, train=rows, test=rows, epochs=1, seed=0)


@pytest.fixture
def mode(setting: Setting) -> dict[str, Tensor]:
    weights = setting.lora.weights()
    return {site: 0.3 * torch.randn_like(x) for site, x in weights.items()}


def test_the_top_on_cached_states_is_the_whole_network(
    bert: BertForSequenceClassification,
) -> None:
    ids = torch.randint(20, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        whole = bert(ids, attention_mask=mask, output_hidden_states=True)
        top = EncoderTop(bert)(whole.hidden_states[1], mask)
    torch.testing.assert_close(top, whole.logits)


@pytest.mark.untrained
@pytest.mark.parametrize("tau", [0.1, 3.0])
def test_data_space_algebra_gives_the_dense_posterior(
    setting: Setting, mode: dict[str, Tensor], tau: float
) -> None:
    exact = dense_ggn(setting.lora, mode, setting.train)
    posterior = setting.laplace(setting.train, mode, pl.structures.Dense())
    posterior = posterior.with_prior_precision(tau)
    torch.testing.assert_close(
        float(posterior.log_evidence()), exact.log_evidence(tau), rtol=1e-5, atol=0
    )
    f, jacobian = logit_jacobian(setting.lora, mode, setting.test)
    found = posterior.linearized(setting.test.batch(range(NUM_ROWS)))
    contrast = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close((found.mean @ contrast).double(), f, rtol=1e-4, atol=0)
    variance = exact.variances(jacobian, [tau])[0]
    for other in (
        contrast @ found.covariance_matrix @ contrast,
        posterior.gaussian.covariance(
            layers_of(jacobian.float(), mode), [posterior.prior_precision]
        )[0, :, 0, 0],
    ):
        torch.testing.assert_close(other.double(), variance, rtol=1e-4, atol=0)


@pytest.mark.untrained
def test_the_best_precision_is_that_of_the_librarys_evidence(
    setting: Setting, mode: dict[str, Tensor]
) -> None:
    exact = dense_ggn(setting.lora, mode, setting.train)
    tuned = setting.laplace(setting.train, mode, pl.structures.Dense()).optimize_prior()
    found = float(next(iter(tuned.prior_precision.values())).flatten()[0])
    assert found == pytest.approx(exact.best_precision(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_rules_of_when_to_widen(setting: Setting) -> None:
    found = refined_widening.with_choices(refined_widening.run_one(setting))
    assert found.keys() == refined_widening.TITLES.keys()
    assert all(0 < nll < 5 for nll in found.values())


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_mixtures_are_those_of_their_members(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one member, everything is that member's."""
    found = refined_mixtures.run_one(setting)["metrics"]
    assert found.keys() == refined_mixtures.TITLES.keys()
    assert found["one, refined"] != found["ensemble, refined"] != found["svgd, refined"]
    monkeypatch.setattr(refined_mixtures, "NUM_MEMBERS", 1)
    found = refined_mixtures.run_one(setting)["metrics"]
    for kind in ("plain", "kfac", "refined"):
        assert found[f"one, {kind}"] == pytest.approx(found[f"ensemble, {kind}"])


@pytest.mark.untrained
def test_the_direction_that_is_timed_goes_up() -> None:
    x, scores = torch.randn(2, 5, 3)
    found = svgd_growth.direction(x, 100 * scores)  # beside it repulsion is little
    assert found.shape == x.shape
    assert float((found * scores).sum() / (found.norm() * scores.norm())) > 0.5


@pytest.mark.untrained
def test_exported_adapters_are_averaged_under_peft(
    bert: BertForSequenceClassification, rows: CachedRows, tmp_path: Path
) -> None:
    plain = EncoderTop(deepcopy(bert))
    lora = pl.lift(adapted(bert, rank=2))
    setting = Setting(lora=lora, train=rows, test=rows, epochs=1, seed=0)
    members = [{s: torch.randn_like(x) for s, x in lora.weights().items()}] * 2
    members[1] = {site: 0.3 * x for site, x in members[0].items()}
    served = Job(setting, plain, tmp_path).served(pl.ensemble(lora, members))
    expected = mixed([at_weights(setting, rows, x) for x in members])
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-6)
