"""What one process and several do alike: a job is a function of a folder.

Each makes its network by the same seed and gives what the functions of the library
return; where there are several ranks ``pl.share`` leaves each its own part.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader

import pyro_lora as pl
from benchmarks.devices import allocated
from pyro_lora.curvature import data_sums, structures
from pyro_lora.diagnose.log_joint import LogJoint, WeightSets, exact, linear_pass
from pyro_lora.ground.ranks import all_ranks, ranks_of
from tests.curvature.own_structures import LayerDense, OwnFactors
from tests.networks import VOCABULARY, batch, bert, classifier, llama

Batch = dict[str, Tensor]
NUM_DATA = 7  # which neither 2 nor 3 ranks divide


class PowerCutError(Exception):
    pass


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def size() -> int:
    there = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def lifted(num_labels: int = 3, **options: Any) -> tuple[pl.LiftedNetwork, Any]:
    lora = pl.lift(bert(num_labels, num_layers=1, hidden_size=8, **options))
    return lora, classifier(lora, NUM_DATA)


def sharded() -> tuple[pl.LiftedNetwork, Any]:
    """Of a base that the ranks share out, whose passes need all of them."""
    network = bert(3, num_layers=1, hidden_size=8)
    trained = {p for p in network.parameters() if p.requires_grad}
    if size() > 1:
        mesh = init_device_mesh("cpu", (size(),))
        layers = network.base_model.model.bert.encoder.layer
        for module in (*layers, network):
            fully_shard(module, mesh=mesh, ignored_params=trained)
    torch.manual_seed(0)
    lora = pl.lift(network)
    return lora, classifier(lora, 8)


def fit_of_split_in_chunks(folder: Path) -> Any:
    """A rank's batch has more gradients than fit at a time, the other's has one row."""
    lora, model = sharded()
    (whole,) = data(by=8, number=8)
    batches = [
        {k: x[:1] for k, x in whole.items()},
        {k: x[1:] for k, x in whole.items()},
    ]
    guide = guide_of(lora, model)
    return numbers_of(
        guide.laplace_approximation(pl.share(batches), max_memory_gb=2e-6)
    )


def data(num_labels: int = 3, by: int = 2, number: int = NUM_DATA) -> list[Batch]:
    whole = batch(number, 6, num_labels=num_labels)
    return [
        {name: x[i : i + by] for name, x in whole.items()} for i in range(0, number, by)
    ]


def guide_of(lora: pl.LiftedNetwork, model: Any, **options: Any) -> pl.AutoLaplace:
    return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)


def posterior(**options: Any) -> tuple[pl.LaplacePosterior, list[Batch]]:
    lora, model = lifted()
    batches = data()
    guide = guide_of(lora, model, **options)
    return guide.laplace_approximation(pl.share(batches)), batches


def numbers_of(fitted: pl.LaplacePosterior) -> dict[str, Any]:
    return {
        "mode": fitted.mode(),
        "variance": fitted.variance(),
        "log_evidence": fitted.log_evidence(),
        "log_likelihood": fitted.log_likelihood,
        "effective": fitted.gaussian.effective_parameters(),
    }


def fit(structure: Any, folder: Path) -> Any:
    fitted, _ = posterior(structure=structure)
    return numbers_of(fitted)


def fit_exact(folder: Path) -> Any:
    fitted, _ = posterior(structure=pl.structures.Exact())
    return {
        **numbers_of(fitted),
        "loo": fitted.leave_one_out(),
        "refined": numbers_of(fitted.refine().optimize_prior()),
    }


def fit_of_few_batches(folder: Path) -> Any:
    """One for each of two ranks: what layers share is not yet a sum of any."""
    lora, model = lifted()
    return numbers_of(guide_of(lora, model).laplace_approximation(pl.share(data(by=4))))


def fit_in_chunks(folder: Path) -> Any:
    lora, model = lifted()
    return numbers_of(
        guide_of(lora, model).laplace_approximation(
            pl.share(data()), max_memory_gb=1e-6
        )
    )


def regression(lora: pl.LiftedNetwork) -> Any:
    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        out = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            return pyro.sample("y", dist.Normal(out[..., 0], noise), obs=labels)

    return model


def decompositions(folder: Path) -> Any:
    """How wide the factors are that are decomposed, on all ranks together."""
    own: list[int] = []

    def counting(matrix: Tensor) -> Any:
        own.append(len(matrix))
        return eigh(matrix)

    eigh = torch.linalg.eigh
    found = {}
    for name in ("KFAC", "thin KFAC", "EKFAC"):
        own.clear()
        with mock.patch.object(torch.linalg, "eigh", counting):
            posterior(structure=STRUCTURES[name])
        by_rank = [list(own)]
        if size() > 1:
            by_rank = [[] for _ in range(size())]
            torch.distributed.all_gather_object(by_rank, own)
        found[name] = sorted(n for of_rank in by_rank for n in of_rank)
        costs = [sum(n**3 for n in of_rank) for of_rank in by_rank]
        # The largest first, each to whoever has the least to do: then nobody has more
        # than an even share by as much as one of them.
        most = sum(costs) / size() + max(found[name]) ** 3
        found[f"{name}, balanced"] = max(costs) < most
    return found


def broken_factors(folder: Path) -> Any:
    """A factor that is no sum of outer products, which one rank alone looks at."""
    return posterior(structure=Broken())


@dataclass(frozen=True)
class Broken(pl.structures.LayerStructure):
    """KFAC, with inputs that have a negative eigenvalue."""

    def input_factor(self, a: Tensor, counts: Any) -> Any:
        total, count = pl.structures.KFAC().input_factor(a, counts)
        return total - 2 * total.trace() * torch.eye(len(total)).to(total), count

    def gradient_factor(self, inputs: Any, g: Tensor, counts: Any) -> Tensor:
        return pl.structures.KFAC().gradient_factor(inputs, g, counts)

    def combine(self, inputs: Any, gradients: Tensor) -> Any:
        return pl.structures.KFAC().combine(inputs, gradients)


def fit_latents(folder: Path) -> Any:
    lora, _ = lifted(1)
    batches = data(2)
    for one in batches:
        one["labels"] = one["labels"].double()
    fitted = guide_of(lora, regression(lora)).laplace_approximation(pl.share(batches))
    return {**numbers_of(fitted), "noise": fitted.latents.precision}


def predict(folder: Path) -> Any:
    # KFAC's draws hang on a sum's last digit, where eigenvalues are equal.
    fitted, batches = posterior(structure=pl.structures.Diagonal())
    linear = pl.predict(fitted, pl.share(batches))
    torch.manual_seed(5 + rank())  # draws are the first rank's
    drawn = pl.predict(
        fitted, pl.share(batches), method="sample", num_samples=3, keep_draws=True
    )
    return {
        "probs": linear.probs,
        "labels": linear.labels,
        "metrics": linear.metrics(),
        "sampled": drawn.probs,
        "draws": drawn.draw_log_probs,
        "distances": pl.state_distance(fitted, pl.share(batches))(pl.share(batches)),
    }


def token_model(lora: pl.LiftedNetwork) -> Any:
    def model(input_ids: Tensor, attention_mask: Tensor) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        seen = attention_mask[:, 1:].bool()
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            fn = dist.Categorical(logits=logits[..., :-1, :]).mask(seen).to_event(1)
            pyro.sample("y", fn, obs=input_ids[:, 1:])

    return model


def predict_tokens(folder: Path) -> Any:
    lora = pl.lift(llama(None, num_layers=1, hidden_size=8))
    batches = [{k: x for k, x in b.items() if k != "labels"} for b in data()]
    members = [lora.weights() for _ in range(2)]
    particles = pl.ensemble(lora, members, model=token_model(lora))
    found = pl.predict(particles, pl.share(batches), tokens="each")
    return {"log_probs": found.log_probs, "labels": found.labels}


def tune(folder: Path) -> Any:
    fitted, batches = posterior()
    by_nll = fitted.optimize_prior(objective="nll", batches=pl.share(batches))
    torch.manual_seed(5 + rank())
    narrow = fitted.for_sampling(pl.share(batches), num_samples=2)
    by_evidence = fitted.optimize_prior(per="layer")
    return {
        "tau": by_nll.prior_precision,
        "scale": narrow.scale,
        "by evidence": [by_evidence.prior_precision, by_evidence.log_evidence()],
    }


def trees(folder: Path) -> Any:
    fitted, batches = posterior(structure=pl.structures.Diagonal())
    found: dict[str, Any] = {}
    for name, options in {
        "memory": {"num_samples": 4},
        "file": {"num_samples": 4, "path": folder / "tree.zarr"},
        "raw": {"num_samples": 2, "weights": "raw", "method": "sample"},
    }.items():
        torch.manual_seed(5 + rank())
        tree = pl.to_datatree(fitted, pl.share(batches), **options)
        for group in ("posterior", "log_likelihood", "sample_stats", "observed_data"):
            for variable, values in tree[group].data_vars.items():
                found[f"{name} {group} {variable}"] = torch.as_tensor(values.values)
        drawn = tree["posterior_predictive"]["y"]
        found[f"{name} drawn"] = list(drawn.shape)
        found[f"{name} inputs"] = torch.as_tensor(
            tree["constant_data"]["input_ids"].values
        )
    return found


def diagnose(folder: Path) -> Any:
    fitted, batches = posterior(structure=pl.structures.Diagonal())
    torch.manual_seed(5 + rank())
    found = pl.diagnose(fitted, pl.share(batches), num_samples=25, num_directions=1)
    particles = pl.ensemble(
        fitted.networks[0],
        [{s: x + k * 0.1 for s, x in fitted.mode().items()} for k in range(3)],
        model=fitted.model,
    )
    diverse = pl.diagnose(particles, pl.share(batches)).diversity
    assert found.stationarity is not None
    return {
        "newton": found.stationarity.newton_decrement,
        "lines": found.gaussian.log_joint,
        "k_hat": found.gaussian.k_hat,
        "draws": found.gaussian.draws_log_likelihood,
        "overconfidence": found.confidence.overconfidence,
        "num_data": found.num_data,
        "disagreement": diverse.disagreement,
        "error": diverse.error,
        "epistemic": diverse.epistemic_share,
    }


def rows_of_a_log_joint(shares_draws: bool, folder: Path) -> Any:
    """With every row of each rank: those of a few are other ones on other ranks."""
    fitted, batches = posterior(structure=pl.structures.Diagonal())
    mesh = pairs() if shares_draws else None
    mine = pl.share(batches, mesh=mesh)
    ranks = ranks_of(mesh, "data")
    joint = LogJoint(fitted, fitted.model, mine, fitted.obs_site, ranks, mesh)
    steps, _ = fitted.gaussian.informed_directions(1)
    points = torch.linspace(-1.0, 1.0, 3, dtype=torch.float64)[:, None]
    sets = WeightSets(fitted.mode(), steps, points, fitted.sample(2))
    found = linear_pass(
        joint, fitted, sets, 1000, has_joint=True, predicts=True, labels=None
    )
    value, error = found.log_likelihoods.of(lambda x: x)
    return {
        "value": value,
        "error": error,
        "exact": exact(joint, sets).known,
        "gaussian": pl.diagnose(
            fitted, mine, num_samples=25, max_passes=None, mesh=mesh
        ).gaussian.log_joint,
        "num_rows": found.log_likelihoods.num_data,
        "gradient": found.gradient,
        "log_probs": found.prediction.log_probs,
        "labels": found.prediction.labels,
    }


def pairs() -> Any:
    """Of the draws, and the data over these where there are two; None of one rank."""
    if size() == 1:
        return None
    return init_device_mesh("cpu", (size() // 2, 2), mesh_dim_names=DIMS)


def members(lora: pl.LiftedNetwork, number: int, **others: Any) -> list[Any]:
    return [
        {
            **{s: x * (1 + 0.1 * k) + 0.05 * k for s, x in lora.weights().items()},
            **{s: x + 0.1 * k for s, x in others.items()},
        }
        for k in range(number)
    ]


def shared_draws(folder: Path) -> Any:
    """Five particles over pairs of ranks, which is two or three for each."""
    mesh, found = pairs(), {}
    lora, model = lifted()
    batches = pl.share(data(by=1), mesh=mesh)
    torch.manual_seed(5 + rank())  # draws are the first rank's
    particles = pl.ensemble(lora, members(lora, 5), model=model)
    for name, options in {
        "sums": {"num_samples": 4},
        "kept": {"keep_draws": True, "chunk_size": 1},
        "one": {"num_samples": 1},
    }.items():
        seen = pl.predict(particles, batches, mesh=mesh, **options)
        found[name] = [seen.log_probs, seen.aleatoric_entropy, seen.labels]
    found["draws"] = pl.predict(
        particles, batches, mesh=mesh, keep_draws=True
    ).draw_log_probs
    diverse = pl.diagnose(particles, batches, mesh=mesh).diversity
    assert diverse is not None
    found["diversity"] = [diverse.disagreement, diverse.error, diverse.epistemic_share]

    def impossible(
        input_ids: Tensor, attention_mask: Tensor, labels: Any = None
    ) -> Any:
        """Without the last class, and of tiny probabilities."""
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        last = torch.tensor([0.0, 0.0, -torch.inf])
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=3e4 * logits + last), obs=labels)

    sure = pl.ensemble(lora, members(lora, 3), model=impossible)
    found["sure"] = pl.predict(sure, batches, mesh=mesh).log_probs
    return found | shared_numbers(mesh) | shared_tokens(mesh)


def shared_numbers(mesh: Any) -> Any:
    """Of a density with a latent, of counts; and what is drawn of all these."""
    lora, _ = lifted(1)
    model = regression(lora)
    texts = data(2, by=1)
    for one in texts:
        one["labels"] = one["labels"].double()
    batches = pl.share(texts, mesh=mesh)
    noise = torch.tensor(0.5, dtype=torch.float64)
    particles = pl.ensemble(lora, members(lora, 5, noise=noise), model=model)
    seen = pl.predict(particles, batches, mesh=mesh)
    tree = pl.to_datatree(
        particles, batches, prior_predictive=True, chunk_size=3, mesh=mesh
    )
    drawn = torch.as_tensor(tree["posterior_predictive"]["y"].values)
    under_prior = torch.as_tensor(tree["prior_predictive"]["y"].values)
    one = pl.to_datatree(particles, batches, num_samples=1, mesh=mesh)
    of_one = torch.as_tensor(one["posterior_predictive"]["y"].values)
    torch.manual_seed(5 + rank())  # several ranks have drawn other outcomes
    guide = guide_of(lora, model, structure=pl.structures.Diagonal())
    fitted = guide.laplace_approximation(batches, mesh=mesh)
    sampled = pl.predict(fitted, batches, method="sample", num_samples=3, mesh=mesh)

    def counts(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> None:
        out = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Poisson(out[..., 0].exp()), obs=labels)

    counted = pl.predict(
        pl.ensemble(lora, members(lora, 5), model=counts), batches, mesh=mesh
    )
    return {
        "loc": [seen.loc, seen.noise_scale, sampled.loc, sampled.noise_scale],
        "counts": [counted.mean, counted.metrics()],
        **{
            f"{group} {variable}": torch.as_tensor(values.values)
            for group in ("log_likelihood", "sample_stats", "log_prior")
            for variable, values in tree[group].data_vars.items()
        },
        # No two outcomes by the same random numbers, and the same ones on each rank.
        "drawn apart": [of_standard(drawn, seen), drawn.shape, under_prior.shape],
        "drawn alike": [
            all(torch.equal(x, other) for other in all_ranks().collected(x))
            for x in (drawn, under_prior, of_one)
        ],
    }


def of_standard(drawn: Tensor, seen: Any) -> int:
    """How many different numbers of a standard normal made the outcomes."""
    z = (drawn.reshape(seen.loc.shape) - seen.loc) / seen.noise_scale
    return len(z.round(decimals=8).unique())


def shared_tokens(mesh: Any) -> Any:
    torch.manual_seed(0)
    lora = pl.lift(llama(None, num_layers=1, hidden_size=8))
    particles = pl.ensemble(lora, members(lora, 3), model=token_model(lora))
    batches = [{k: x for k, x in one.items() if k != "labels"} for one in data(by=3)]
    seen = pl.predict(particles, pl.share(batches, mesh=mesh), tokens="each", mesh=mesh)
    last = pl.predict(particles, pl.share(batches, mesh=mesh), tokens="last", mesh=mesh)
    return {
        "tokens": [seen.log_probs, seen.aleatoric_entropy, seen.text_log_probs],
        "last": [last.log_probs, last.labels],
    }


def shared_masks(folder: Path) -> Any:
    """Each draw has its own dropout; and each rank runs some of the draws."""
    lora, model = lifted(dropout=0.5)
    mesh = pairs()
    batches = pl.share(data(), mesh=mesh)
    dropped = pl.predict(
        pl.mc_dropout(lora, model=model),
        batches,
        num_samples=4,
        keep_draws=True,
        mesh=mesh,
    )
    texts: list[int] = []
    lora.network.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    particles = pl.ensemble(lora, members(lora, 16), model=model)
    pl.predict(particles, batches, mesh=mesh)
    one_each = sum(texts)
    texts.clear()
    pl.predict(particles, pl.share(data(), mesh=mesh))
    return {
        "masks": len(dropped.draw_log_probs[:, :, 0].unique()),
        "fewer": size() == 1 or one_each < 0.7 * sum(texts),
    }


def discrepancy(folder: Path) -> Any:
    lora, model = lifted()
    weights = {
        s: x + 0.1 * torch.randn(3, *x.shape, dtype=x.dtype)
        for s, x in lora.weights().items()
    }
    batches = data()
    found = pl.kernelized_stein_discrepancy(
        model, weights, pl.share(batches), num_bootstrap=20
    )
    effective = pl.effective_num_predictions(model, weights, pl.share(batches))
    return [found.u_statistic, found.v_statistic, found.p_value, effective]


def engine(
    lora: pl.LiftedNetwork, model: Any, kernel: Any, num: int = 5, **options: Any
) -> pl.SVGD:
    # Momentum, since Adam's first steps are as long whatever the gradient.
    optim = pyro.optim.SGD({"lr": 1e-2, "momentum": 0.5})
    init = lora.init_to_adapter(jitter=0.1)
    return pl.SVGD(model, kernel, optim, num, init_loc_fn=init, **options)


def masks_of_particles(folder: Path) -> Any:
    """Particles at one place go apart by dropout alone, whoever runs them."""
    lora, model = lifted(dropout=0.5)
    lora.network.train()
    optim = pyro.optim.SGD({"lr": 1e-2})
    init, kernel = lora.init_to_adapter(), pl.kernels.NoRepulsion()
    made = pl.SVGD(model, kernel, optim, 4, init_loc_fn=init)
    made.step(**data()[0])
    moved = made.get_named_particles()[next(iter(lora.sites))].flatten(1)
    return {"apart": torch.pdist(moved).gt(0).all()}


def written(is_told: bool, folder: Path) -> Any:
    """Texts by draws, of a base that the ranks share out."""
    network = llama(None)
    trained = {p for p in network.parameters() if p.requires_grad}
    if size() > 1:
        mesh = init_device_mesh("cpu", (size(),))
        for module in (*network.get_base_model().model.layers, network):
            fully_shard(module, mesh=mesh, ignored_params=trained)
        if is_told:
            register_fsdp_forward_method(network, "generate")
    lora = pl.lift(network)
    torch.manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (2, 5))
    draws = pl.ensemble(lora, members(lora, 3))
    texts = pl.generate(draws, prompts, max_new_tokens=4, progress_bar=False)
    return {"texts": texts.sequences, "log_probs": texts.log_probs}


def all_data_to_each(folder: Path) -> Any:
    """Whoever forgets to share the data is told so, and nobody else."""
    fitted, batches = posterior()
    told = {}
    for name, given in (("all", batches), ("shares", pl.share(batches))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pl.predict(fitted, given)
        found = any("ranks have the same batch" in str(x.message) for x in caught)
        told[name] = found == (name == "all" and size() > 1)
    return told


def svgd(kernel: Any, options: dict[str, Any], folder: Path) -> Any:
    lora, model = lifted()
    batches = data()
    torch.manual_seed(5 + rank())
    made = engine(lora, model, kernel, **options)
    made.run(batches, num_epochs=1, progress_bar=False)
    return {"particles": made.get_named_particles(), **made.diagnostics}


def svgd_on_shares(kernel: Any, folder: Path) -> Any:
    """Each batch shared out, by rows; the particles on every rank."""
    lora, model = lifted()
    mesh = None
    if size() > 1:
        mesh = init_device_mesh("cpu", (size(), 1), mesh_dim_names=DIMS)
    made = engine(lora, model, kernel, 2, mesh=mesh)
    whole = data(by=NUM_DATA)[0]
    rows = torch.tensor(list(pl.share(range(NUM_DATA), mesh=mesh)))
    for _ in range(2):
        made.step(**{name: x[rows] for name, x in whole.items()})
    return {"particles": made.get_named_particles(), **made.diagnostics}


DIMS = ("data", "particles")


class InPlace:
    """An all-gather that takes no memory while it's measured, as NCCL's takes none.

    Gloo's threads may be the last to let go of what they send, and PyTorch's profiler
    sees nothing that is freed there. So they send from memory that stays.

    Args:
        module: Whose weights are gathered, at most.
    """

    def __init__(self, module: nn.Module) -> None:
        self._stays = torch.empty(sum(p.numel() for p in module.parameters()))

    def allocate(self, size: Any, *, dtype: Any, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool
    ) -> None:
        sent = self._stays[: input_tensor.numel()]
        for source, part in enumerate(output_tensor.chunk(group.size())):
            if source == group.rank():
                sent.copy_(input_tensor)
            torch.distributed.broadcast(sent, source, group=group)
            part.copy_(sent)


# Of a base of which a batch's activations are most, and of one that is most itself.
MEASURED: dict[str, Any] = {
    "long": (
        partial(bert, 3, num_layers=3, hidden_size=64, dtype=torch.float32),
        (8, 16),
    ),
    "wide": (
        partial(llama, 3, num_layers=4, hidden_size=192, dtype=torch.float32),
        (2, 8),
    ),
}
MEASURED_PARTICLES = 4
MEASURED_STRUCTURE = pl.structures.KFAC(rank=3)


def sharded_memory(shape: str, folder: Path) -> Any:
    """Bytes that phases have in use at most, beside those before them."""
    make, (rows, tokens) = MEASURED[shape]
    network: Any = make()
    trained = {p for p in network.parameters() if p.requires_grad}
    mesh = init_device_mesh("cpu", (size(),))
    blocks = [x for m in network.modules() if isinstance(m, nn.ModuleList) for x in m]
    gather = InPlace(network)
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, ignored_params=trained)
        module.set_custom_all_gather(gather)
    lora = pl.lift(network)
    model = classifier(lora, 2 * size() * rows)
    batches = [batch(rows, tokens, num_labels=3) for _ in range(2)]
    init = lora.init_to_adapter(jitter=0.01)
    adam = pyro.optim.Adam({"lr": 1e-3})
    svgd = pl.SVGD(model, RBF(), adam, MEASURED_PARTICLES, init_loc_fn=init)
    guide = pl.AutoLaplace(model, init_loc_fn=init, structure=MEASURED_STRUCTURE)
    found: list[Any] = []
    runs: dict[str, Callable[[], object]] = {
        "SVGD step": lambda: [svgd.step(**batches[0]) for _ in range(2)],
        "Laplace fit": lambda: found.append(guide.laplace_approximation(batches)),
        "predict linearized": lambda: pl.predict(found[0], batches[:1]),
        "predict by draws": lambda: pl.predict(found[0], batches[:1], method="sample"),
    }
    return {name: allocated(run) for name, run in runs.items()}


def refitted(folder: Path) -> Any:
    lora, model = lifted()
    batches = pl.share(data())
    guide = guide_of(lora, model)
    fitted = guide.laplace_approximation(batches)
    return guide.refit(fitted, batches, pyro.optim.SGD({"lr": 1e-3}))


def repeated(mesh: bool, folder: Path) -> Any:
    """All data on each rank: with a mesh that says so it's as in one process."""
    lora, model = lifted()
    several = mesh and size() > 1
    fitted = guide_of(lora, model).laplace_approximation(
        data(),
        mesh=init_device_mesh("cpu", (1, size()), mesh_dim_names=DIMS)
        if several
        else None,
    )
    return numbers_of(fitted)


def two_dims(folder: Path) -> Any:
    """Data over the pairs of ranks, of which each has the same; particles in a pair."""
    mesh = None
    if size() > 1:
        mesh = init_device_mesh("cpu", (size() // 2, 2), mesh_dim_names=DIMS)
    lora, model = lifted()
    guide = guide_of(lora, model, structure=pl.structures.Diagonal())
    batches = pl.share(data(by=1), mesh=mesh)
    with writing_each_batch(), suppress(PowerCutError):
        guide.laplace_approximation(
            Interrupted(batches, 1), checkpoint=folder / "pairs", mesh=mesh
        )
    fitted = guide.laplace_approximation(
        batches, checkpoint=folder / "pairs", mesh=mesh
    )
    tree = pl.to_datatree(
        fitted, batches, num_samples=2, path=folder / "pairs.zarr", mesh=mesh
    )
    torch.manual_seed(5)  # each has drawn outcomes for its own data
    made = engine(lora, model, RBF(space="function"), 4, mesh=mesh)
    rows = torch.tensor(list(pl.share(range(NUM_DATA), mesh=mesh)))
    made.step(**{name: x[rows] for name, x in data(by=NUM_DATA)[0].items()})
    return {
        **numbers_of(fitted),
        "log likelihood": torch.as_tensor(tree["log_likelihood"]["y"].values),
        "particles": made.get_named_particles(),
    }


def broken(index: int, number: int = NUM_DATA) -> list[Batch]:
    """Batches of which one has a label that is none, on the last rank alone."""
    batches = data(number=number)
    if rank() == size() - 1:
        batches[index]["labels"] = batches[index]["labels"] + 9
    return batches


def broken_fit(folder: Path) -> Any:
    lora, model = lifted()
    return guide_of(lora, model).laplace_approximation(pl.share(broken(-1)))


def broken_prediction(folder: Path) -> Any:
    lora, model = lifted()
    particles = pl.ensemble(lora, [lora.weights()], model=model)
    return pl.predict(particles, pl.share(broken(-1)))


def broken_step(folder: Path) -> Any:
    lora, model = lifted()
    made = engine(lora, model, pl.kernels.RBF())
    made.run(broken(1), num_epochs=1, progress_bar=False)


def broken_fit_of_split(folder: Path) -> Any:
    lora, model = sharded()
    return guide_of(lora, model).laplace_approximation(pl.share(broken(2, 8)))


def broken_prediction_of_split(folder: Path, **options: Any) -> Any:
    lora, model = sharded()
    fitted = guide_of(lora, model).laplace_approximation(pl.share(data(number=8)))
    return pl.predict(fitted, pl.share(broken(2, 8)), **options)


def broken_tuning_of_split(folder: Path) -> Any:
    lora, model = sharded()
    fitted = guide_of(lora, model).laplace_approximation(pl.share(data(number=8)))
    return fitted.optimize_prior(objective="nll", batches=pl.share(broken(2, 8)))


def broken_step_of_split(folder: Path) -> Any:
    lora, model = sharded()
    mesh = init_device_mesh("cpu", (size(), 1), mesh_dim_names=DIMS)
    made = engine(lora, model, pl.kernels.RBF(), 2, mesh=mesh)
    batches = pl.share(broken(3, 8), mesh=mesh)
    made.run(batches, num_epochs=1, progress_bar=False)


def too_many_rows(folder: Path) -> Any:
    """Of all ranks together: no first batch tells, and no rank has them alone."""
    lora, _ = lifted()

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            fn = dist.Categorical(logits=logits).mask(labels != 0)
            pyro.sample("y", fn, obs=labels)

    batches = data()
    for one, labels in zip(batches, ([0, 1], [1, 2], [0, 2], [1]), strict=True):
        one["labels"] = torch.tensor(labels)
    guide = guide_of(lora, model, structure=pl.structures.Exact())
    with mock.patch.object(structures, "MAX_ROWS", 8):  # of two ranks' 6 and 4
        return guide.laplace_approximation(pl.share(batches))


def other_weights(folder: Path) -> Any:
    torch.manual_seed(rank())
    lora, model = lifted()
    return guide_of(lora, model).laplace_approximation(pl.share(data()))


def other_particles(folder: Path) -> Any:
    batches = data()
    torch.manual_seed(rank())
    lora, model = lifted()
    engine(lora, model, pl.kernels.RBF()).run(batches, num_epochs=1)


def padded_sampler(folder: Path) -> Any:
    """What torch's own sampler does where data don't divide."""
    lora, model = lifted()
    rows = torch.utils.data.DistributedSampler(
        list(range(NUM_DATA)), num_replicas=size(), rank=rank(), shuffle=False
    )
    whole = data(by=NUM_DATA)[0]
    mine = torch.tensor(list(rows))
    batches = [{name: x[mine] for name, x in whole.items()}]
    return guide_of(lora, model).laplace_approximation(batches)


def one_batch(folder: Path) -> Any:
    lora, model = lifted()
    return guide_of(lora, model).laplace_approximation(pl.share(data(by=NUM_DATA)))


def other_data(folder: Path) -> Any:
    """Shared out over all ranks, of which a pair should have the same."""
    lora, model = lifted()
    particles = pl.ensemble(lora, members(lora, 2), model=model)
    return pl.predict(particles, pl.share(data()), mesh=pairs())


def other_draws(folder: Path) -> Any:
    lora, model = lifted()
    particles = pl.ensemble(lora, members(lora, 3)[rank() :][:2], model=model)
    return pl.to_datatree(particles, data(), mesh=pairs())


def broken_draws(folder: Path) -> Any:
    lora, model = lifted()
    particles = pl.ensemble(lora, members(lora, 2), model=model)
    return pl.to_datatree(particles, broken(2), mesh=pairs())


def other_lengths(folder: Path) -> Any:
    lora, model = lifted()
    made = engine(lora, model, pl.kernels.RBF())
    made.run(data()[: 3 - (rank() == 1)], num_epochs=1, progress_bar=False)


def other_batches(folder: Path) -> Any:
    lora, model = lifted()
    made = engine(lora, model, pl.kernels.RBF())
    made.run(data()[rank() :], num_epochs=1, progress_bar=False)


def few_particles(folder: Path) -> Any:
    lora, model = lifted()
    engine(lora, model, pl.kernels.RBF(), 1).run(data(), num_epochs=1)


def other_base(folder: Path) -> Any:
    lora, model = lifted()
    frozen = next(p for p in lora.network.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.add_(1e-3 * rank())
    return guide_of(lora, model).laplace_approximation(pl.share(data()))


def shuffled_share(folder: Path) -> Any:
    return pl.share(DataLoader(list(range(7)), shuffle=True))  # type: ignore[arg-type]


def no_mesh(folder: Path) -> Any:
    fitted, batches = posterior()
    return pl.predict(fitted, pl.share(batches), mesh=(2, 1))  # type: ignore[arg-type]


def mesh_of_others(folder: Path) -> Any:
    fitted, batches = posterior()
    mesh = init_device_mesh("cpu", (size(),), mesh_dim_names=("rows",))
    return pl.predict(fitted, pl.share(batches), mesh=mesh)


class Interrupted:
    """Batches whose reading fails after so many, in one of the passes, on a rank."""

    def __init__(self, batches: Any, after: int, passes: int = 1) -> None:
        self.batches, self.after, self.passes = batches, after, passes

    def __iter__(self) -> Iterator[Batch]:
        for index, one in enumerate(self.batches):
            self.passes -= index == self.after
            is_time = index == self.after and self.passes == 0
            if is_time and rank() == size() - 1:
                raise PowerCutError(f"after {index} batches")
            yield one


def writing_each_batch() -> Any:
    return mock.patch.object(data_sums, "_REST", 0)


def interrupted_fit(name: str, folder: Path) -> Any:
    lora, model = lifted()
    guide = guide_of(lora, model, structure=STRUCTURES[name])
    batches = Interrupted(pl.share(data(by=1)), 2, CUT[name])
    # Else the first pass writes after its first batch, and at its end.
    with writing_each_batch() if CUT[name] == 1 else nullcontext():
        return guide.laplace_approximation(batches, checkpoint=folder / "fits" / name)


def resumed_fit(name: str, folder: Path) -> Any:
    lora, model = lifted()
    guide = guide_of(lora, model, structure=STRUCTURES[name])
    calls: list[int] = []
    lora.network.register_forward_hook(lambda *_: calls.append(1))
    batches, checkpoint = pl.share(data(by=1)), folder / "fits" / name
    with writing_each_batch():
        fitted = guide.laplace_approximation(batches, checkpoint=checkpoint)
    assert not checkpoint.exists() or not any(checkpoint.iterdir())
    return {**numbers_of(fitted), "calls": calls}


def saved_svgd(folder: Path) -> Any:
    lora, model = lifted()
    made = engine(lora, model, pl.kernels.RBF())
    made.run(data(), num_epochs=1, progress_bar=False)
    if rank() == 0:
        made.save(folder / "svgd")


def resumed_svgd(folder: Path) -> Any:
    lora, model = lifted()
    made = engine(lora, model, pl.kernels.RBF())
    if (folder / "svgd").exists():
        made.load(folder / "svgd")
    else:
        made.run(data(), num_epochs=1, progress_bar=False)
    made.run(data(), num_epochs=1, progress_bar=False)
    return {"particles": made.get_named_particles(), **made.diagnostics}


def slow_fit(name: str, folder: Path) -> Any:
    """A fit to be killed in, of batches that take a moment."""
    lora, model = lifted()
    lora.network.register_forward_hook(lambda *_: time.sleep(0.1))
    guide = guide_of(lora, model, structure=STRUCTURES[name])
    batches, checkpoint = pl.share(data(by=1)), folder / "fits" / name
    return numbers_of(guide.laplace_approximation(batches, checkpoint=checkpoint))


def slow_svgd(folder: Path) -> Any:
    """Four epochs, saved after each, from where they were saved."""
    lora, model = lifted()
    lora.network.register_forward_hook(lambda *_: time.sleep(0.05))
    batches = data()
    made = engine(lora, model, RBF())
    path, num_done = folder / "svgd", 0
    if (path / "manifest.json").exists():
        made.load(path)
        num_done = made.state_dict()["num_epochs"]
    for _ in range(num_done, 4):
        made.run(batches, num_epochs=1, progress_bar=False)
        if rank() == 0:
            made.save(path)
    return {"particles": made.get_named_particles(), **made.diagnostics}


def plan(folder: Path) -> Any:
    """What a rank plans by itself, however often the others do."""
    lora, _ = lifted()
    # What torch.compile loads on its first use turns validation off.
    with pyro.validation_enabled(False):
        for _ in range(1 + rank()):
            planned = pl.plan_memory(lora, batch=(2, 4))
    return {name: torch.tensor([*x.values()]) for name, x in planned.to_dict().items()}


def plan_of_a_part(folder: Path) -> Any:
    network = bert(num_layers=1, hidden_size=8)
    trained = {p for p in network.parameters() if p.requires_grad}
    fully_shard(network, ignored_params=trained)
    return pl.plan_memory(network)


RBF = pl.kernels.RBF  # the jobs, by name
STRUCTURES = {
    "KFAC": pl.structures.KFAC(),
    "reduced KFAC": pl.structures.KFAC(reduce=True),
    "thin KFAC": pl.structures.KFAC(rank=2),
    "EKFAC": pl.structures.EKFAC(),
    "Diagonal": pl.structures.Diagonal(),
    "Dense": pl.structures.Dense(),
    "Exact": pl.structures.Exact(),
    "all rows drawn": pl.structures.Exact(num_inducing=14),
    "own factors": OwnFactors(),
    "dense layers": LayerDense(),
}
SAME: dict[str, Callable[[Path], Any]] = {
    **{name: partial(fit, x) for name, x in STRUCTURES.items()},
    "Exact": fit_exact,
    "few batches": fit_of_few_batches,
    "chunks of terms": fit_in_chunks,
    "chunks of a split base": fit_of_split_in_chunks,
    "decompositions": decompositions,
    "latent noise": fit_latents,
    "all data on each": partial(repeated, True),
    "two dims": two_dims,
    "predict": predict,
    "tokens": predict_tokens,
    "tune": tune,
    "trees": trees,
    "diagnose": diagnose,
    "rows of a log joint": partial(rows_of_a_log_joint, False),
    "weight sets of a log joint": partial(rows_of_a_log_joint, True),
    "draws": shared_draws,
    "masks of draws": shared_masks,
    "discrepancy": discrepancy,
    "joint": partial(svgd, RBF(), {}),
    "site": partial(svgd, RBF(space="site"), {"chunk_size": 1}),
    "delta": partial(svgd, RBF(space="delta"), {}),
    "function": partial(svgd, RBF(space="function"), {"repulsion": 3.0}),
    "function in chunks": partial(
        svgd, RBF(space="function"), {"repulsion": 3.0, "chunk_size": 2}
    ),
    "gated": partial(
        svgd,
        RBF(),
        {"transport": "repulsive", "repulsion": lambda done, loss: 1 + loss},
    ),
    "ensemble": partial(svgd, pl.kernels.NoRepulsion(), {}),
    "shares, joint": partial(svgd_on_shares, RBF()),
    "shares, function": partial(svgd_on_shares, RBF(space="function")),
    "all data to each": all_data_to_each,
    "masks of particles": masks_of_particles,
    "texts of a split base": partial(written, True),
    "plan": plan,
}
OF_LABEL = r"Batch \d, site 'y'.* (9|10|11) is outside of the support of Cat"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a broken batch of a fit": (broken_fit, r"Batch \d.*'y'"),
    "a broken batch of predict": (broken_prediction, r"Batch \d.*label"),
    "a broken batch of SVGD": (broken_step, r"^SVGD's batch 1 \(from 0\): (?!SVGD)"),
    "a broken batch of a fit, a split base": (broken_fit_of_split, OF_LABEL),
    "a broken batch of predict, a split base": (
        broken_prediction_of_split,
        OF_LABEL,
    ),
    "a broken batch of draws, a split base": (
        partial(broken_prediction_of_split, method="sample", num_samples=2),
        OF_LABEL,
    ),
    "a broken batch of tuning, a split base": (broken_tuning_of_split, OF_LABEL),
    "a broken batch of SVGD, a split base": (
        broken_step_of_split,
        f"^SVGD's batch 1.*{OF_LABEL}",
    ),
    "broken factors": (broken_factors, r"Site '.*', layer 0: the factor of its inp"),
    "too many rows": (too_many_rows, r"contrasts, here 10 or more, and takes 8"),
    "other weights": (other_weights, r"Site '.*': the weights of rank 1 are others"),
    "a shuffled share": (shuffled_share, r"DataLoader\(pl\.share\(dataset\), shuffle"),
    "another base": (other_base, r"The frozen weight '.*' of rank 1 is another"),
    "texts of a split base, untold": (
        partial(written, False),
        r"register_fsdp_forward_method\(network, 'generate'\)",
    ),
    "other particles": (other_particles, r"Site '.*': the particles of rank 1"),
    "a padded sampler": (
        padded_sampler,
        r"of all \d ranks together hold \d data.*share",
    ),
    "all data on each rank": (
        partial(repeated, False),
        r"of all \d ranks together hold \d+ data.*pl\.share",
    ),
    "one batch": (one_batch, r"Rank \d of \d has no batches"),
    "other numbers of batches": (
        other_lengths,
        "The ranks do different things: rank 0",
    ),
    "other batches": (other_batches, r"batch 0.*The batch of rank 1 is another"),
    "fewer particles than ranks": (few_particles, "num_particles=1 can't be shared"),
    "a plan of a part": (plan_of_a_part, r"shared out over processes.*shard_base=True"),
    "other data for the draws": (other_data, "The batch of rank 1 is another.*draws"),
    "other draws": (other_draws, "Site '.*': the draws of rank 1 are others"),
    "a broken batch of draws": (broken_draws, "The batch of rank 1 is another"),
    "a refit": (refitted, "refit trains in one process"),
    "a mesh that is none": (no_mesh, "mesh must be a torch.distributed"),
    "a mesh of other dims": (mesh_of_others, r"mesh has the dims \('rows',\)"),
}
# Sums, sums of two passes, rows, and sums of a user's own; and the pass that is cut
CUT = {"KFAC": 1, "EKFAC": 1, "Exact": 1, "own factors": 1, "all rows drawn": 2}
INTERRUPTED = {f"interrupted {name}": partial(interrupted_fit, name) for name in CUT}
RESUMED = {f"resumed {name}": partial(resumed_fit, name) for name in CUT}
JOBS: dict[str, Callable[[Path], Any]] = {
    **SAME,
    **{name: job for name, (job, _) in REFUSED.items()},
    **INTERRUPTED,
    **RESUMED,
    **{f"memory {name}": partial(sharded_memory, name) for name in MEASURED},
    "slow KFAC": partial(slow_fit, "KFAC"),
    "slow EKFAC": partial(slow_fit, "EKFAC"),
    "slow SVGD": slow_svgd,
    "save SVGD": saved_svgd,
    "resume SVGD": resumed_svgd,
}
