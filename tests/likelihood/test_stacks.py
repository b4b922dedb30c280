"""A model that counts dims from the left is refused wherever it would meet a stack."""

import gc
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks

NUM_DATA = 6
Logits = Callable[[Tensor], Any]


def one_output(f: Tensor) -> Any:
    return dist.Normal(f, 0.5)


# What is made of the logits, (..., B, C): from the left, and from the right.
WRONG: dict[str, Logits] = {
    "a column": lambda x: one_output(x[:, 0]),
    "softmax": lambda x: dist.Categorical(probs=x.softmax(1)),
    "log_softmax": lambda x: dist.Categorical(logits=x.log_softmax(1)),
    "norm": lambda x: dist.Categorical(logits=x / x.norm(dim=1, keepdim=True)),
    "mean": lambda x: dist.Categorical(logits=x - x.mean(0)),
}
RIGHT: dict[str, Logits] = {
    "a column": lambda x: one_output(x[..., 0]),
    "softmax": lambda x: dist.Categorical(probs=x.softmax(-1)),
    "log_softmax": lambda x: dist.Categorical(logits=x.log_softmax(-1)),
    "norm": lambda x: dist.Categorical(logits=x / x.norm(dim=-1, keepdim=True)),
    "mean": lambda x: dist.Categorical(logits=x - x.mean(-2, keepdim=True)),
}


def parts(
    likelihood: Logits, num_data: int = NUM_DATA, prior: Any = None
) -> tuple[pl.LiftedNetwork, Any, list[dict[str, Tensor]]]:
    """A network, a model and two batches."""
    num_outputs = 1 if likelihood in (WRONG["a column"], RIGHT["a column"]) else 3
    lora = pl.lift(networks.bert(num_outputs), prior=prior or pl.priors.normal(1.0))

    def model(labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        fn = likelihood(lora()(**inputs).logits)
        with pyro.plate("data", num_data, subsample=inputs["input_ids"]):
            return pyro.sample("y", fn, obs=labels)

    whole = networks.batch(num_data, num_labels=num_outputs)
    size = num_data // 2
    batches = [{k: x[i : i + size] for k, x in whole.items()} for i in (0, size)]
    return lora, model, batches


def particles(lora: pl.LiftedNetwork, model: Any, num: int) -> pl.ParticlePosterior:
    own = lora.weights()
    sets = [{s: x + 0.1 * k for s, x in own.items()} for k in range(num)]
    return pl.ensemble(lora, sets, model=model)


def svgd(lora: pl.LiftedNetwork, model: Any) -> pl.SVGD:
    init = lora.init_to_adapter(jitter=0.1)
    kernel = pl.kernels.NoRepulsion()
    return pl.SVGD(model, kernel, SGD({"lr": 1e-3}), 2, init_loc_fn=init)


def test_rounding_under_an_autocast_of_the_models_own_is_no_mixing() -> None:
    lora = pl.lift(networks.bert(3, dtype=torch.float32))

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = lora()(**inputs).logits
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits.float()), obs=labels)

    texts = networks.batch(NUM_DATA, num_labels=3)
    sets = particles(lora, model, 3)
    found = pl.predict(sets, [texts], keep_draws=True).draw_log_probs
    assert found is not None
    for k, alone in enumerate(found):
        one = {site: x[k] for site, x in sets.particles.items()}
        with lora.bind(one) as net, torch.autocast("cpu", torch.bfloat16):
            logits = net(**networks.inputs(texts)).logits
        assert_close(alone, logits.double().log_softmax(-1), rtol=0, atol=0.03)


@pytest.mark.grid
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("name", WRONG)
def test_draws(name: str, num: int) -> None:
    lora, model, batches = parts(WRONG[name])
    for _ in range(2):  # it isn't forgotten either
        with pytest.raises(ValueError, match=r"Site 'y'.*from the right, logits\[\.\."):
            pl.predict(particles(lora, model, num), batches)
    with pytest.raises(ValueError, match=r"Site 'y'.*from the right"):
        pl.to_datatree(particles(lora, model, num), batches)
    with pytest.raises(ValueError, match=r"Site 'y'.*from the right"):
        svgd(lora, model).step(**batches[0])


def test_draws_of_latents_that_a_prior_makes_the_sites_of() -> None:
    _, model, batches = parts(WRONG["mean"], prior=pl.priors.subspace(0.3))
    guide = AutoNormal(model, init_scale=0.1)
    guide(**batches[0])
    with pytest.raises(ValueError, match=r"Site 'y'.*from the right, logits\[\.\."):
        pl.predict(guide, batches, num_samples=3)


@pytest.mark.parametrize("name", RIGHT)
def test_models_that_count_from_the_right(name: str) -> None:
    """The oracle is each draw by itself, for which both ways are the same."""
    lora, model, batches = parts(RIGHT[name])
    posterior = particles(lora, model, 3)
    found = pl.predict(posterior, batches)
    svgd(lora, model).step(**batches[0])
    means = []
    for k in range(3):
        with lora.bind({s: x[k] for s, x in posterior.particles.items()}) as net:
            logits = [net(**networks.inputs(batch)).logits for batch in batches]
        each = [WRONG[name](x.detach()) for x in logits]
        means.append(
            torch.cat([x.mean if name == "a column" else x.probs for x in each])
        )
    expected = torch.stack(means).mean(0)
    assert_close(found.mean if name == "a column" else found.probs, expected)


def test_a_model_is_looked_at_once() -> None:
    lora, plain, batches = parts(RIGHT["softmax"])
    runs: list[int] = []

    def model(**batch: Any) -> Tensor:
        runs.append(1)
        return plain(**batch)

    posterior = particles(lora, model, 2)
    numbers = []
    for _ in range(3):
        runs.clear()
        pl.predict(posterior, batches)
        numbers.append(len(runs))
    assert numbers[0] == numbers[1] + 2 == numbers[2] + 2


def test_weights_of_zero() -> None:
    """All data have the same outputs there."""
    lora, model, batches = parts(WRONG["a column"])
    with torch.no_grad():
        for name, parameter in lora.network.named_parameters():
            if "classifier" in name:
                parameter.zero_()
    with pytest.raises(ValueError, match="from the right"):
        pl.predict(pl.ensemble(lora, [lora.weights()] * 2, model=model), batches)


def test_one_datum_tells_nothing() -> None:
    lora, model, batches = parts(WRONG["a column"], num_data=4)
    first = [{k: x[:1] for k, x in batches[0].items()}]
    pl.predict(particles(lora, model, 2), first)  # right by chance
    with pytest.raises(ValueError, match="from the right"):
        pl.predict(particles(lora, model, 2), batches)
    with pytest.raises(ValueError, match="from the right"):
        pl.predict(particles(lora, model, 2), [*first, *batches])
    found = svgd(lora, model)
    found.step(**first[0])
    with pytest.raises(ValueError, match="from the right"):
        found.step(**batches[0])
    rest = [{k: x[1:] for k, x in batches[0].items()}, batches[1]]
    with pytest.raises(ValueError, match="from the right"):
        pl.kernelized_stein_discrepancy(
            model, particles(lora, model, 2).particles, [*first, *rest]
        )


def test_one_datum_after_another_is_looked_at_once() -> None:
    lora, plain, batches = parts(RIGHT["softmax"])
    runs: list[int] = []

    def model(**batch: Any) -> Tensor:
        runs.append(1)
        return plain(**batch)

    def number(text: dict[str, Tensor]) -> int:
        runs.clear()
        pl.predict(particles(lora, model, 2), [text])
        return len(runs)

    one, another = ({k: x[i : i + 1] for k, x in batches[0].items()} for i in (0, 1))
    first, second = number(one), number(another)
    assert first == second + 2
    assert number(one) == second


def test_one_datum_of_another_shape() -> None:
    """Of a single token nothing could be mixed."""
    network = torch.nn.Linear(3, 1)
    lora = pl.lift(network)

    def model(x: Tensor, labels: Tensor | None = None) -> Tensor:
        weights = lora()(x)[..., 0].softmax(1)  # (B, T)
        f = (weights * x[..., 0]).sum(-1)
        with pyro.plate("data", NUM_DATA, subsample=x):
            return pyro.sample("y", one_output(f), obs=labels)

    posterior = particles(lora, model, 2)
    x = torch.randn(1, 1, 3)
    assert_close(pl.predict(posterior, [{"x": x}]).mean, x[0, :, 0].double())
    with pytest.raises(ValueError, match="from the right"):
        pl.predict(posterior, [{"x": torch.randn(1, 4, 3)}])


def test_another_site_is_another_question() -> None:
    lora = pl.lift(networks.bert(2))

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("right", one_output(logits[..., 0]), obs=labels)
            pyro.sample("wrong", one_output(logits.softmax(1)[..., 0]), obs=labels)

    batches = [networks.batch(NUM_DATA)]
    posterior = particles(lora, model, 2)
    assert len(pl.predict(posterior, batches, obs_site="right")) == NUM_DATA
    with pytest.raises(ValueError, match=r"Site 'wrong'.*from the right"):
        pl.predict(posterior, batches, obs_site="wrong")


def test_one_datum_each_and_a_mean_over_the_stack() -> None:
    """Which is the datum's own of one weight set, and of copies of it."""
    lora, model, batches = parts(WRONG["mean"])
    rows = [{k: x[i : i + 1] for k, x in b.items()} for b in batches for i in (0, 1, 2)]
    with pytest.raises(ValueError, match=r"Site 'y'.*from the right"):
        pl.predict(particles(lora, model, 2), rows)
    with pytest.raises(ValueError, match=r"Site 'y'.*from the right"):
        svgd(lora, model).step(**rows[0])
    lora, model, _ = parts(RIGHT["mean"])
    assert len(pl.predict(particles(lora, model, 2), rows)) == NUM_DATA


def test_a_model_that_draws_at_random_is_left_alone() -> None:
    def noisy(x: Tensor) -> Any:
        return dist.Categorical(logits=x + torch.randn_like(x))

    lora, model, batches = parts(noisy)
    assert len(pl.predict(particles(lora, model, 2), batches)) == NUM_DATA


def test_torchs_generator_stays_where_it_is() -> None:
    lora, plain, batches = parts(RIGHT["softmax"])
    draws = []
    for _ in range(2):  # a model that isn't known, and the same again
        torch.manual_seed(3)
        pl.predict(particles(lora, plain, 2), batches)
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


def test_models_are_not_kept_alive() -> None:
    from pyro_lora.likelihood import stacks

    gc.collect()
    before = len(stacks._SEEN)
    lora, model, batches = parts(RIGHT["softmax"])
    pl.predict(particles(lora, model, 2), batches)
    assert len(stacks._SEEN) == before + 1
    del lora, model
    gc.collect()
    assert len(stacks._SEEN) == before
