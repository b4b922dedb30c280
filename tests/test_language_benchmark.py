"""The language model's benchmark: its network, its scores and its methods."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import pyro_lora as pl
from benchmarks.encoder_top import CachedRows
from benchmarks.language_methods import METHODS, Job, Trainings
from benchmarks.language_model_quality import run_one
from benchmarks.language_top import NUM_LAYERS, LanguageTop, adapted
from benchmarks.out_of_domain import Mahalanobis, shrunk_covariance
from benchmarks.seed_runs import PRIOR_PRECISION, Setting

WIDTH, ANSWERS = 16, [3, 5, 7]
LENGTHS = (2, 3, 3, 4, 5, 7, 3, 4, 6, 2)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_the_top_on_cached_states_is_the_whole_network(llama: LlamaForCausalLM) -> None:
    texts = [torch.randint(20, (length,)) for length in (5, 2, 3)]
    with torch.no_grad():
        whole = [llama(x[None], output_hidden_states=True) for x in texts]
        below = [x.hidden_states[1][0] for x in whole]
        batch = CachedRows(below, torch.zeros(3)).batch(range(3))
        top = LanguageTop(llama, ANSWERS)(batch["hidden"], batch["attention_mask"])
    expected = torch.stack([x.logits[0, -1, ANSWERS] for x in whole])
    assert_close(top, expected)


@pytest.fixture
def setting(llama: LlamaForCausalLM) -> Setting:
    labels = torch.arange(len(LENGTHS)) % len(ANSWERS)
    rows = CachedRows([torch.randn(length, WIDTH) for length in LENGTHS], labels)
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    lora = pl.lift(adapted(LanguageTop(llama, ANSWERS)), prior=prior)
    return Setting(lora=lora, train=rows, test=rows, epochs=4, seed=0)


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
# Those that are no more than a call of what has tests of its own are left out.
@pytest.mark.parametrize(
    "key", ["map-t", "kfac-last", "refined", "blob", "ivon", "swag", "subspace", "tfb"]
)
def test_a_method_predicts_and_says_what_it_cost(
    key: str, setting: Setting, tmp_path: Path
) -> None:
    before = setting.lora.weights()
    trainings = Trainings(tmp_path)
    job = Job(setting=setting, dropping=setting, trainings=trainings)
    found = run_one(job, key, {"own": setting.test})
    assert 0 < found["nll"] < 3
    assert found["fit seconds"] > 0
    assert found["predict seconds"] > 0
    assert found["auroc"]["own"]["total entropy"] == pytest.approx(0.5, abs=0.2)
    if key != "ivon":  # which trains the network itself
        after = setting.lora.weights()
        assert all(torch.equal(after[site], x) for site, x in before.items())


def test_a_training_is_counted_by_all_who_use_it(
    setting: Setting, tmp_path: Path
) -> None:
    seconds = []
    for _ in range(2):
        trainings = Trainings(tmp_path)
        mode = Job(setting=setting, dropping=setting, trainings=trainings).mode()
        assert mode.keys() == setting.lora.sites.keys()
        seconds.append(trainings.reused)
    assert seconds[0] == 0 < seconds[1]


def test_every_method_has_a_title() -> None:
    assert len({title for title, _ in METHODS.values()}) == len(METHODS)


def test_the_covariance_is_shrunk_by_its_own_error() -> None:
    x: Tensor = torch.randn(9, 4).double() @ torch.randn(4, 4).double()
    s = sum(torch.outer(row, row) for row in x) / 9
    target = s.trace() / 4 * torch.eye(4).double()
    error = sum((torch.outer(row, row) - s).square().sum() for row in x) / 9**2
    rho = min(1.0, float(error / (s - target).square().sum()))
    assert 0 < rho < 1
    assert_close(shrunk_covariance(x), (1 - rho) * s + rho * target)


def test_the_distance_is_to_the_nearest_class() -> None:
    states, labels = torch.randn(12, 3).double(), torch.arange(12) % 2
    means = torch.stack([states[labels == c].mean(0) for c in (0, 1)])
    inverse = shrunk_covariance(states - means[labels]).inverse()
    points = torch.randn(5, 3).double()
    expected = [min(float((p - m) @ inverse @ (p - m)) for m in means) for p in points]
    found = Mahalanobis.of(states, labels)(points)
    assert_close(found, torch.tensor(expected).double())
