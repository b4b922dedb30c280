"""What SVGD refuses, with words, and without moving a particle."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.optim import SGD, Adam
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer.engines import assert_same, assert_same_state
from tests.infer.targets import NUM_DATA, bert, hierarchical_regression


def svgd(model: Any, num_particles: int = 3, **settings: Any) -> pl.SVGD:
    arguments: dict[str, Any] = {
        "kernel": kernels.RBF(),
        "optim": SGD({"lr": 0.1}),
        "init_loc_fn": init_to_sample,
        **settings,
    }
    return pl.SVGD(model, num_particles=num_particles, **arguments)


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, found 0"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, found 0\.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": float("inf")}, "positive and finite, found inf"),
        ({"chunk_size": 4}, "chunk_size must lie between 1 and num_particles=3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, found 0"),
        ({"transport": "annealed"}, "'stein', 'repulsive' or None, found 'annealed'"),
        (
            {"kernel": kernels.RBF(space="function"), "transport": "stein"},
            "repulsive transport only",
        ),
        ({"repulsion": 2.0}, "has no effect"),
        ({"repulsion": 2.0, "transport": "stein"}, "has no effect"),
        (
            {
                "repulsion": 2.0,
                "transport": "repulsive",
                "kernel": kernels.NoRepulsion(),
            },
            "has no effect",
        ),
        ({"repulsion": -1.0, "transport": "repulsive"}, "and at least 0"),
        (
            {"repulsion": float("nan"), "transport": "repulsive"},
            "finite and at least 0",
        ),
        ({"optim": Adam(lambda name: {"lr": 0.1})}, "Per-parameter callables"),
        (
            {"optim": Adam({"lr": 0.1}, lambda module, name: {"clip_norm": 1.0})},
            "Per-parameter callables",
        ),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        svgd(model, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 2.0}, r"num_particles must be an integer, found 2\.0"),
        ({"num_particles": None}, "num_particles must be an integer, found None"),
        ({"chunk_size": 1.5}, "chunk_size must be an integer"),
        ({"kernel": "rbf"}, "kernel must be .* found 'rbf'"),
        ({"kernel": kernels.RBF}, "kernel must be"),
        ({"kernel": kernels.NoRepulsion}, "kernel must be"),
        ({"optim": torch.optim.Adam}, "pyro.optim"),
        ({"optim": torch.optim.Adam([torch.zeros(1)])}, "pyro.optim"),
    ],
)
def test_arguments_of_a_wrong_type(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        svgd(model, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"space": "weights"}, "'weights'"),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"bandwidth": -1.0}, "bandwidth must be positive"),
        ({"bandwidth": float("nan")}, "bandwidth must be positive"),
    ],
)
def test_kernels_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kernels.RBF(**settings)


def test_a_schedule_that_leaves_its_range() -> None:
    engine = svgd(model, temperature=lambda fraction: 1 - fraction)
    with pytest.raises(ValueError, match=r"positive and finite, found 0\.0"):
        engine.step()


def test_nothing_before_the_first_step() -> None:
    engine = svgd(model)
    for function in (
        engine.get_named_particles,
        engine.get_samples,
        engine.posterior,
        engine.state_dict,
    ):
        with pytest.raises(ValueError, match="before the first step"):
            function()


def assert_nothing_starts(
    engine: pl.SVGD, match: str, *args: Any, **kwargs: Any
) -> None:
    """The first step is refused, each time, and leaves nothing behind."""
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            engine.step(*args, **kwargs)
        with pytest.raises(ValueError, match="before the first step"):
            engine.state_dict()
        assert engine.diagnostics == {}
    assert not pyro.get_param_store()


def test_no_latents() -> None:
    def observed() -> None:
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=torch.ones(()))

    assert_nothing_starts(svgd(observed), "no latent sites")


def test_a_discrete_latent() -> None:
    def discrete() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    assert_nothing_starts(svgd(discrete), r"'z' is discrete")


def test_labels_missing() -> None:
    lora = pl.lift(networks.bert())
    before = lora.weights()
    engine = svgd(
        pl.models.classification(lora, NUM_DATA),
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    batch = networks.batch()
    assert_nothing_starts(engine, r"'y' is discrete.* labels", **networks.inputs(batch))
    assert_same(lora.weights(), before)
    engine.step(**batch)  # nothing stands in the way of another try
    assert engine.get_named_particles().keys() == lora.sites.keys()


def test_a_support_without_a_transform() -> None:
    def mixture() -> None:
        weights = dist.Categorical(torch.ones(2))
        pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(torch.ones(2), 1)))

    assert_nothing_starts(svgd(mixture), r"'x': there is no transform")


def test_labels_missing_in_a_regression() -> None:
    target = hierarchical_regression(3)

    def unlabelled(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0))

    match = r"'y' belongs to the data of a minibatch"
    assert_nothing_starts(svgd(unlabelled), match, target.batch["x"])


def test_plates_deeper_than_said() -> None:
    target = bert(3)
    engine = svgd(target.model, init_loc_fn=target.init, max_plate_nesting=0)
    match = r"'y' takes 1 batch dims.*nesting=0"
    assert_nothing_starts(engine, match, **target.batch)


def test_a_start_at_nan() -> None:
    engine = svgd(model, init_loc_fn=lambda site: torch.full((2,), torch.nan))
    assert_nothing_starts(engine, r"'x': a particle starts at NaN")


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(2,), (3,), (2,)], r"'x'.*particle 1 .*shape \(3,\), the site's is \(2,\)"),
        ([(2,), (2,), ()], r"'x'.*particle 2 .*shape \(\), the site's is \(2,\)"),
        ([(1,), (1,), (1,)], r"'x'.*particle 0 .*shape \(1,\), the site's is \(2,\)"),
    ],
)
def test_starts_of_other_shapes(shapes: list[tuple[int, ...]], match: str) -> None:
    def init(site: dict[str, Any]) -> Tensor:
        return torch.randn(shapes[site["infer"].get("particle", 0)])

    assert_nothing_starts(svgd(model, init_loc_fn=init), match)


def test_a_model_whose_shapes_change() -> None:
    runs = []

    def growing() -> None:
        runs.append(1)
        pyro.sample("x", dist.Normal(torch.zeros(len(runs)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'x': particle 0 .*\(2,\).*\(1,\)"):
        svgd(growing).step()


def test_updates_of_a_model_without_lora() -> None:
    # All weights would count as they are: the joint space under another name.
    target = hierarchical_regression(3)
    for transport in ("stein", "repulsive"):
        engine = svgd(
            target.model,
            kernel=kernels.IMQ(space="delta"),
            init_loc_fn=target.init,
            transport=transport,
        )
        match = r"'delta'.*\['m', 'tau', 'w'\].*space='joint'"
        assert_nothing_starts(engine, match, **target.batch)


def test_a_kernel_of_a_wrong_shape() -> None:
    engine = svgd(model, kernel=lambda sq_dists: sq_dists.exp().sum(1))
    with pytest.raises(ValueError, match=r"\(3, 3\) to shape \(3,\)"):
        engine.step()


def assert_nothing_moves(
    engine: pl.SVGD, match: str, *args: Any, **kwargs: Any
) -> None:
    before = engine.state_dict()
    with pytest.raises(ValueError, match=match):
        engine.step(*args, **kwargs)
    assert_same_state(engine.state_dict(), before)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": kernels.RBF()},
        {"kernel": kernels.NoRepulsion()},
        {"kernel": kernels.RBF(), "transport": "repulsive"},
    ],
)
def test_nan_names_site_and_particle(
    settings: dict[str, Any], chunk_size: int | None
) -> None:
    # The Stein direction would spread one particle's NaN to all of them. With its
    # validation on, Pyro itself refuses such a factor, and doesn't say whose it is.
    def broken(bad: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("f", (1 - x[..., 0] * bad).log() + y)

    def init(site: dict[str, Any]) -> Tensor:
        if site["name"] == "y":
            return torch.tensor(0.5)
        return torch.tensor(0.1 * (1 + site["infer"].get("particle", 0))).repeat(3)

    engine = svgd(
        broken,
        init_loc_fn=init,
        optim=Adam({"lr": 0.0}),
        chunk_size=chunk_size,
        **settings,
    )
    engine.step(torch.tensor(1.0))
    # x is .1, .2, .3: the argument of the logarithm is negative at the last, 0 there,
    # or negative at the last two.
    last_two = r"'f'.*\[1\]" if chunk_size else r"'f'.*\[1, 2\]"  # 1 comes first
    for validation in (True, False):
        with pyro.validation_enabled(validation):
            text = r"'f': the log density of particle\(s\) \[2\] is NaN"
            assert_nothing_moves(engine, text, torch.tensor(4.0))
            assert_nothing_moves(engine, r"'f'.*\[2\]", 1 / torch.tensor(0.3))
            assert_nothing_moves(engine, last_two, torch.tensor(6.0))
    engine.step(torch.tensor(1.0))  # as if nothing had been
    assert len(engine.diagnostics["loss"]) == 2


def test_nan_gradients_name_site_and_particle() -> None:
    def broken(bad: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("f", -(bad * (x - 1)).abs().sqrt())

    engine = svgd(
        broken,
        init_loc_fn=lambda site: torch.tensor(float(site["infer"].get("particle", 0))),
        optim=Adam({"lr": 0.0}),
    )
    with pytest.raises(ValueError, match=r"'x': the gradient of particle\(s\) \[1\]"):
        engine.step(torch.tensor(1.0))


def test_a_kernel_that_gives_nan() -> None:
    engine = svgd(model, kernel=lambda sq_dists: (sq_dists - 1e9).sqrt())
    with pytest.raises(ValueError, match=r"'x': the direction of particle"):
        engine.step()


def test_particles_that_ran_away() -> None:
    engine = svgd(model, optim=SGD({"lr": float("inf")}))
    engine.step()
    with pytest.raises(ValueError, match=r"'x': the value of particle.*learning rate"):
        engine.step()


def test_a_users_own_error_is_not_hidden() -> None:
    def picky(bad: bool) -> None:
        if bad:
            raise ValueError("no such text")
        model()

    engine = svgd(picky)
    engine.step(False)
    assert_nothing_moves(engine, "no such text", True)


@pytest.mark.grid
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("space", ["joint", "site", "delta", "function"])
def test_logits_that_overflow(space: Any, chunk_size: int | None) -> None:
    lora = pl.lift(networks.bert(dtype=torch.float32))
    engine = svgd(
        pl.models.classification(lora, NUM_DATA),
        kernel=kernels.RBF(space=space),
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
        chunk_size=chunk_size,
    )
    batch = networks.batch()
    engine.step(**batch)
    state = engine.state_dict()
    for site, x in state["particles"].items():
        if ".query." in site:  # the density of the prior is still finite, B A isn't
            x[1, 0, 0, 0] = 1.8e19
    engine.load_state_dict(state)
    assert_nothing_moves(engine, r"Site 'y'.*particle\(s\) \[1\] is NaN", **batch)
    assert all(torch.isfinite(x[0]).all() for x in state["particles"].values())


@pytest.mark.parametrize("as_event", [False, True])
def test_tokens_in_a_plate_of_their_own(as_event: bool) -> None:
    lora = pl.lift(nn.Linear(3, 2).double())
    x, labels = torch.randn(5, 4, 3).double(), torch.randint(2, (5, 4))

    def model(x: Tensor, labels: Tensor) -> None:
        fn = dist.Categorical(logits=lora()(x))
        if as_event:
            with pyro.plate("data", 5, subsample=x):
                pyro.sample("y", fn.to_event(1), obs=labels)
        else:
            with pyro.plate("data", 5, subsample=x, dim=-2), pyro.plate("token", 4):
                pyro.sample("y", fn, obs=labels)

    engine = svgd(model, init_loc_fn=lora.init_to_adapter(jitter=0.1))
    if as_event:
        engine.step(x=x, labels=labels)
        return
    with pytest.raises(ValueError, match=r"'y'.*\['data', 'token'\].*\.to_event\(1\)"):
        engine.step(x=x, labels=labels)


def test_particles_that_meet_in_a_dim_of_no_plate() -> None:
    features, y = torch.randn(4), torch.randn(4)

    def regression() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            mean = slope[..., None] * features  # under particles it has its dim already
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    engine = svgd(regression)
    with pytest.raises(ValueError, match=r"Site 'y'.*3 particles.*\(3, 3, 4\).*plate"):
        engine.step()


SPACES: list[dict[str, Any]] = [
    {"kernel": kernels.NoRepulsion()},
    {"kernel": kernels.RBF()},
    {"kernel": kernels.RBF(space="site"), "chunk_size": 2},
    {"kernel": kernels.RBF(space="site"), "transport": "repulsive"},
    {"kernel": kernels.RBF(space="function")},
    {"kernel": kernels.RBF(space="function"), "chunk_size": 2},
]


def regression(x: Tensor, y: Tensor | None = None, *, sampled: bool = True) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 20, subsample=x):
        if sampled or y is not None:
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def regression_batch(**settings: Any) -> dict[str, Any]:
    return {"x": torch.randn(4, 2).double(), "y": torch.randn(4).double(), **settings}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("obs_site", [None, "y"])
@pytest.mark.grid
def test_a_later_batch_without_labels(
    space: dict[str, Any], sampled: bool, obs_site: str | None
) -> None:
    batch = regression_batch(sampled=sampled)
    engine = svgd(regression, obs_site=obs_site, **space)
    for _ in range(2):
        engine.step(**batch)
    before = engine.state_dict()
    with pytest.raises(ValueError, match=r"batch 2 \(from 0\): .*has no 'y'"):
        engine.step(**{**batch, "y": None})
    assert_same_state(engine.state_dict(), before)
    engine.step(**batch)


def test_an_outcome_beside_the_named_one_without_labels() -> None:
    def model(y: Tensor, z: Tensor | None) -> None:
        w = pyro.sample("w", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)
            pyro.sample("z", dist.Normal(w, 1.0), obs=z)

    y = torch.randn(4).double()
    for space in (kernels.RBF(), kernels.RBF(space="function")):
        engine = svgd(model, kernel=space, obs_site="y")
        engine.step(y=y, z=y)
        with pytest.raises(ValueError, match=r"batch 1 .*has no 'z'"):
            engine.step(y=y, z=None)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["no_such_site", "w", "data"])
@pytest.mark.grid
def test_a_site_that_is_not_observed_is_refused_at_once(
    space: dict[str, Any], name: str
) -> None:
    batch = regression_batch()
    engine = svgd(regression, obs_site=name, **space)
    with pytest.raises(ValueError, match=rf"'{name}' isn't observed; observed .*'y'"):
        engine.step(**batch)
    with pytest.raises(ValueError, match="before the first step"):
        engine.get_named_particles()


def test_a_model_without_data_needs_no_site() -> None:
    engine = svgd(model)
    engine.step()
    first = engine.get_named_particles()["x"].clone()
    engine.step()
    second = engine.get_named_particles()["x"]
    assert second.shape == (3, 2)
    assert not torch.equal(first, second)
