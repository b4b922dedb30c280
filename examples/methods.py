"""The rows of the demo's table: each method's fit and its predictions."""

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import pyro_lora as pl
from examples.recipe import Batches, classifier, fit_map, fit_particles
from examples.rows import Corpus, Row
from examples.text import batches

HELD_OUT = 0.2
# Repulsion in function space, a share of the number of rows. The library's default
# fades where the particles fit no better than the data support, for ordinary training;
# this recipe over-fits throughout, and there a constant strength does more.
REPULSION = 0.4

Predictor = Callable[[Batches], pl.Prediction]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every method has in common."""

    corpus: Corpus
    network: PeftModel
    tokenizer: PreTrainedTokenizerBase
    lora: pl.LiftedNetwork
    device: str
    epochs: int
    seed: int
    num_particles: int

    def model(self, rows: list[Row]) -> Callable[..., Tensor]:
        """The Pyro model with ``rows`` as the whole data set."""
        return classifier(self.lora, len(rows))

    def shuffled(self, rows: list[Row]) -> Batches:
        """Batches to train on, in a new order each pass, the same for each method."""
        return batches(rows, self.tokenizer, device=self.device, shuffle_seed=self.seed)

    def ordered(self, rows: list[Row]) -> Batches:
        """Batches in the order of the rows."""
        return batches(rows, self.tokenizer, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row of the table.

    ``seconds`` is the time of the method's own fit and of its predictions for all
    test rows and domains, without the fit of the row that it starts from.
    """

    name: str
    test: pl.Prediction
    domains: dict[str, pl.Prediction]
    seconds: float


@dataclass(kw_only=True)
class Study:
    """All rows of the table, and the posteriors that are kept."""

    outcomes: list[Outcome] = field(default_factory=list)
    laplace: pl.LaplacePosterior | None = None
    svgd: pl.SVGD | None = None  # in function space
    mixture: pl.MixturePosterior | None = None


def run(task: Task, *, quick: bool) -> Study:
    """Fit the methods one after the other.

    Args:
        task: What they have in common.
        quick: MAP, temperature scaling and Laplace only.

    Returns:
        Their predictions and posteriors.
    """
    study = Study()
    train = task.corpus.train
    kept, held_out = _split(train, task.seed)
    model, model_kept = task.model(train), task.model(kept)

    method = _Method(task, study, "MAP")
    guide = method.fit_map(model, train)
    method.add(_at_mode(task.lora, model, guide))

    method = _Method(task, study, "MAP + temperature scaling")
    guide_kept = method.fit_map(model_kept, kept)
    at_mode = _at_mode(task.lora, model_kept, guide_kept)
    temperature = pl.fit_temperature(at_mode(task.ordered(held_out)))
    method.add(lambda data: at_mode(data).with_temperature(temperature))

    if not quick:
        method = _Method(task, study, "deep ensemble")
        members = method.fit_particles(model, pl.kernels.NoRepulsion())
        method.add(_sampled(model, members.posterior()))

    method = _Method(task, study, "Laplace (evidence)")
    laplace = guide.laplace_approximation(task.ordered(train))
    study.laplace = laplace.optimize_prior()
    method.add(_linearized(model, study.laplace))

    method = _Method(task, study, "Laplace, refined (evidence)")
    method.add(_linearized(model, method.fit_refined(model, guide)))
    if quick:
        return study

    method = _Method(task, study, "Laplace (held-out nll)")
    laplace = guide_kept.laplace_approximation(task.ordered(kept))
    laplace = laplace.optimize_prior(objective="nll", batches=task.ordered(held_out))
    method.add(_linearized(model_kept, laplace))

    method = _Method(task, study, "SVGD (all weights)")
    svgd = method.fit_particles(model, pl.kernels.RBF())
    method.add(_sampled(model, svgd.posterior()))

    method = _Method(task, study, "SVGD (function space)")
    kernel = pl.kernels.RBF(space="function")
    study.svgd = method.fit_particles(model, kernel, REPULSION * len(train))
    particles = study.svgd.posterior()
    method.add(_sampled(model, particles))

    method = _Method(task, study, "mixture of Laplace at these particles")
    study.mixture = method.fit_mixture(model, particles)
    method.add(_linearized(model, study.mixture))
    return study


class _Method:
    """A row of the table under way: its clock runs from here on."""

    def __init__(self, task: Task, study: Study, name: str) -> None:
        self._task, self._study, self._name = task, study, name
        self._start = time.perf_counter()

    def fit_map(self, model: Callable[..., Tensor], rows: list[Row]) -> pl.AutoLaplace:
        return fit_map(
            model,
            self._task.lora,
            self._task.shuffled(rows),
            epochs=self._task.epochs,
            seed=self._task.seed,
            title=self._name,
        )

    def fit_particles(
        self,
        model: Callable[..., Tensor],
        kernel: pl.kernels.Kernel | pl.kernels.NoRepulsion,
        repulsion: float | None = None,
    ) -> pl.SVGD:
        return fit_particles(
            model,
            self._task.lora,
            self._task.shuffled(self._task.corpus.train),
            kernel,
            repulsion=repulsion,
            num_particles=self._task.num_particles,
            epochs=self._task.epochs,
            seed=self._task.seed,
            title=self._name,
        )

    def fit_refined(
        self, model: Callable[..., Tensor], guide: pl.AutoLaplace
    ) -> pl.LaplacePosterior:
        """The exact Gaussian of the linearised network, around its own mode."""
        with pyro.get_param_store().scope():  # a store of its own, as in fit_map
            start = self._task.lora.init_to(guide.median())
            exact = pl.AutoLaplace(
                model, init_loc_fn=start, structure=pl.structures.Exact()
            )
            data = self._task.ordered(self._task.corpus.train)
            laplace = exact.laplace_approximation(data)
        return laplace.refine().optimize_prior()

    def fit_mixture(
        self, model: Callable[..., Tensor], particles: pl.ParticlePosterior
    ) -> pl.MixturePosterior:
        """A Laplace approximation at each particle, its prior by its own evidence."""
        data = self._task.ordered(self._task.corpus.train)
        components = []
        for k in range(particles.num_particles):
            weights = {site: x[k] for site, x in particles.particles.items()}
            guide = pl.AutoLaplace(model, init_loc_fn=self._task.lora.init_to(weights))
            with warnings.catch_warnings():
                # Particles that repel one another stop a little off the modes.
                warnings.filterwarnings("ignore", message="The weights aren't a mode")
                laplace = guide.laplace_approximation(data)
            components.append(laplace.optimize_prior())
        return pl.MixturePosterior(components)

    def add(self, predict: Predictor) -> None:
        """Predict the test rows and the other domains; stop the clock."""
        corpus = self._task.corpus
        predictions = {
            domain: predict(
                tqdm(
                    self._task.ordered(rows),
                    desc=f"{self._name}: predict {domain}",
                    unit="batch",
                    disable=None,  # without a terminal
                )
            )
            for domain, rows in {"test": corpus.test, **corpus.domains}.items()
        }
        self._study.outcomes.append(
            Outcome(
                name=self._name,
                test=predictions.pop("test"),
                domains=predictions,
                seconds=time.perf_counter() - self._start,
            )
        )


def _at_mode(
    lora: pl.LiftedNetwork, model: Callable[..., Tensor], guide: pl.AutoLaplace
) -> Predictor:
    with pyro.get_param_store().scope():  # a store of its own, as in fit_map
        mode = pl.ensemble(lora, [guide.median()], model=model)
    return lambda data: pl.predict(mode, data)


def _sampled(
    model: Callable[..., Tensor], particles: pl.ParticlePosterior
) -> Predictor:
    return lambda data: pl.predict(particles, data, model=model)


def _linearized(
    model: Callable[..., Tensor],
    posterior: pl.LaplacePosterior | pl.MixturePosterior,
) -> Predictor:
    return lambda data: pl.predict(posterior, data, model=model, method="linearized")


def _split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    rows = random.Random(seed).sample(rows, len(rows))
    num_held_out = max(1, round(HELD_OUT * len(rows)))
    return rows[num_held_out:], rows[:num_held_out]
