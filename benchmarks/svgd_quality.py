"""Do particles that repel predict better than an ensemble, alone and with Laplace?

Usage: ``python -m benchmarks.svgd_quality [--sst2 FOLDER] [--seeds 5] [--quick]
[--runs .cache/svgd_quality] [--out benchmarks/results]``.

Networks, data sets, seeds and resuming are those of
``python -m benchmarks.curvature_quality``. Out of domain are editorials of vader's nyt.
"""

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pyro_lora as pl
from benchmarks.curvature_quality import EPOCHS, NUM_TRAIN, RANK, Study, study
from benchmarks.encoder_top import MAX_LENGTH, CachedRows, cache
from benchmarks.runs import Result, keep, kept
from benchmarks.seed_runs import PRIOR_PRECISION, Setting
from benchmarks.tables import header, over_seeds, provenance

NUM_PARTICLES, NUM_MORE = 5, 8
NUM_TEST, NUM_OTHER = 500, 250
OUT_OF_DOMAIN = "nyt"
SPACES: dict[str, Any] = {
    "SVGD, all weights": "joint",
    "SVGD, by site": "site",
    "SVGD, LoRA's updates": "delta",
}
EFFECTIVE, HELD_OUT = "effective parameters", "held-out nll"


class Job:
    """One data set, regime and seed."""

    def __init__(self, setting: Setting, other: CachedRows) -> None:
        self.setting = setting
        self.test, self.other = setting.test.ordered(), other.ordered()
        self.model = setting.model(len(setting.train))

    def some(
        self, posterior: pl.ParticlePosterior, number: int
    ) -> pl.ParticlePosterior:
        """The first few particles."""
        weights = {s: x[:number] for s, x in posterior.particles.items()}
        return pl.ParticlePosterior(weights, (self.setting.lora,), self.model, None)

    def laplace(self, posterior: pl.ParticlePosterior) -> pl.MixturePosterior:
        """A KFAC Gaussian at each particle, each with the prior of its evidence."""
        train = self.setting.train.by_length().ordered()
        components = []
        for k in range(posterior.num_particles):
            mode = {s: x[k] for s, x in posterior.particles.items()}
            init = self.setting.lora.init_to(mode)
            guide = pl.AutoLaplace(self.model, init_loc_fn=init)
            components.append(guide.laplace_approximation(train).optimize_prior())
        return pl.MixturePosterior(components)

    def result(self, posterior: Any, temperature: float = 1.0) -> Result:
        """What the table says of one posterior, with a tempered one, too."""
        mixture = isinstance(posterior, pl.MixturePosterior)
        method = "linearized" if mixture else "sample"
        test, other = (
            pl.predict(posterior, batches, model=self.model, method=method)
            for batches in (self.test, self.other)
        )
        if temperature != 1:
            test = test.with_temperature(temperature)
            other = other.with_temperature(temperature)
        found = test.metrics()
        return {
            **{name: found[name] for name in ("nll", "ece", "accuracy")},
            "auroc": pl.auroc(test, other),
            "diversity": float(test.epistemic_entropy.mean()),
        }

    def run_ensembles(self) -> Result:
        """MAP and deep ensembles, with and without temperature or Laplace."""
        many = self.setting.fit_particles(
            self.setting.train, pl.kernels.NoRepulsion(), NUM_MORE
        )
        few = self.some(many, NUM_PARTICLES)
        mixture = self.laplace(few)
        found = {
            "MAP": self.result(self.some(many, 1)),
            "deep ensemble of 5": self.result(few),
            "deep ensemble of 8": self.result(many),
            "Laplace": {
                **self.result(pl.MixturePosterior(mixture.components[:1])),
                EFFECTIVE: float(mixture.components[0].gaussian.effective_parameters()),
            },
            "mixture of Laplace": self.result(mixture),
        }
        kept, held_out = self.setting.halves()
        halves = self.setting.fit_particles(kept, pl.kernels.NoRepulsion())
        for name, number in (("MAP", 1), ("deep ensemble of 5", NUM_PARTICLES)):
            posterior = self.some(halves, number)
            tune = pl.predict(posterior, held_out.ordered(), model=self.model)
            temperature = pl.fit_temperature(tune)
            row = self.result(posterior, temperature)
            if number == 1:
                row[HELD_OUT] = tune.with_temperature(temperature).metrics()["nll"]
            found[f"{name} + temperature, 80 %"] = row
        return found

    def run_function_space(self, ensembles: Result) -> Result:
        """Repulsion of the predictions, by the default strength and by others.

        Each gate opens below a level of the training loss: 0.3; the expected optimism
        gamma / N of a fit with gamma effective parameters, as Laplace at MAP has them;
        or what MAP reaches on held-out rows at its best temperature.
        """
        num_data = len(self.setting.train)

        def gate(level: float) -> Callable[[float, float], float]:
            return lambda _, loss: 0.4 * num_data * max(0.0, 1 - loss / level)

        rules: dict[str, Any] = {
            "default": None,
            "level by Laplace": gate(ensembles["Laplace"][EFFECTIVE] / num_data),
            "held-out level": gate(ensembles["MAP + temperature, 80 %"][HELD_OUT]),
            "constant": 0.4 * num_data,
        }
        found = {}
        for name, repulsion in rules.items():
            posterior = self.setting.fit_particles(
                self.setting.train,
                pl.kernels.RBF(space="function"),
                repulsion=repulsion,
            )
            found[f"SVGD, function, {name}"] = self.result(posterior)
            found[f"SVGD, function, {name} + Laplace"] = self.result(
                self.laplace(posterior)
            )
        return found

    def run_weight_space(self, ensembles: Result) -> Result:
        """Textbook SVGD over weights, and hotter."""
        train = self.setting.train
        found = {
            name: self.result(
                self.setting.fit_particles(train, pl.kernels.RBF(space=space))
            )
            for name, space in SPACES.items()
        }
        hot = ensembles["Laplace"][EFFECTIVE] / math.log(NUM_PARTICLES + 1)
        found["SVGD, all weights, T by Laplace"] = self.result(
            self.setting.fit_particles(train, pl.kernels.RBF(), temperature=hot)
        )
        return found


def resumed(raw: Path, name: str, compute: Callable[[], Result]) -> Result:
    """The results of a name, which are computed if they aren't there."""
    if name not in kept(raw):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*aren't a mode.*")
            keep(raw, name, compute())
    return kept(raw)[name]


def run(job: Study, num_seeds: int, raw: Path) -> None:
    """Every result that isn't there yet."""
    rows = job.corpora["vader"].domains[OUT_OF_DOMAIN][: 40 if job.quick else NUM_OTHER]
    other = cache(job.bert, job.tokenizer, rows).by_length()
    keys = [
        (name, regime, seed)
        for seed in range(num_seeds)
        for name, regime in EPOCHS
        if name in job.corpora
    ]
    for name, regime, seed in keys:
        one = Job(job.setting(name, regime, seed), other)
        stem = f"{name}_{regime}_{seed}"
        ensembles = resumed(raw, f"{stem}_ensembles", one.run_ensembles)
        function_space = partial(one.run_function_space, ensembles)
        resumed(raw, f"{stem}_function", function_space)
        weight_space = partial(one.run_weight_space, ensembles)
        resumed(raw, f"{stem}_weights", weight_space)


def collected(raw: Path) -> dict[tuple[str, str], dict[str, list[Result]]]:
    """By data set and regime, each method's results in the order of the seeds."""
    found: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for kept_as, results in sorted(kept(raw).items()):
        name, regime, *_ = kept_as.split("_")
        methods = found.setdefault((name, regime), {})
        for method, result in results.items():
            methods.setdefault(method, []).append(result)
    return found


def report(raw: Path) -> list[str]:
    """All tables, in Markdown."""
    lines = [
        "# Quality of particles",
        "",
        f"MiniLM, LoRA r={RANK}, alpha=16 on query and value of the last two layers, "
        f"and the head. Texts of at most {MAX_LENGTH} tokens, {NUM_TEST} test rows; "
        "each seed draws its own training rows, initial weights and order. "
        f"{NUM_PARTICLES} particles but where it says {NUM_MORE}. Prior precision in "
        f"training {PRIOR_PRECISION}. Mean ± standard error over the seeds; the "
        "column after NLL is the difference to the ensemble of 5, seed by seed.",
        "",
        provenance(),
        "",
        "AUROC: telling the editorials by the total entropy. Diversity: mean epistemic "
        "entropy, nats. 80 %: trained on 80 % of the rows, the temperature fitted on "
        "the rest. Laplace: a KFAC Gaussian, its prior by the evidence, linearised. By "
        "Laplace: with gamma effective parameters of Laplace at MAP, T is gamma / "
        "log(K + 1), and the gate opens below gamma / N nats.",
        "",
    ]
    for (name, regime), methods in collected(raw).items():
        lines += [
            f"## {name}, {NUM_TRAIN[name]} rows, {EPOCHS[name, regime]} epochs "
            f"({regime})",
            "",
            *header(
                *("method", "seeds", "NLL", "NLL − ensemble's", "ECE", "accuracy"),
                *("AUROC", "diversity"),
            ),
        ]
        ensemble = [r["nll"] for r in methods["deep ensemble of 5"]]
        for method, results in methods.items():
            gains = [
                r["nll"] - base for r, base in zip(results, ensemble, strict=False)
            ]
            columns = [over_seeds([r["nll"] for r in results]), over_seeds(gains)] + [
                over_seeds([r[key] for r in results])
                for key in ("ece", "accuracy", "auroc", "diversity")
            ]
            lines.append(f"| {method} | {len(results)} | {' | '.join(columns)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst2", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--report", action="store_true", help="write what there is, compute nothing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which keeps nothing"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "raw.jsonl")
            run(study(args.sst2, quick=True), 1, raw)
            print("\n".join(report(raw)))
        return
    raw = args.out / "raw" / "svgd_quality.jsonl"
    if not args.report:
        run(study(args.sst2, quick=False), args.seeds, raw)
    (args.out / "svgd_quality.md").write_text("\n".join(report(raw)) + "\n")


if __name__ == "__main__":
    main()
