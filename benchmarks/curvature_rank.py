"""How near a low-rank KFAC's predictive covariance is to that of the full factors.

Usage: ``python -m benchmarks.curvature_rank [--epochs 4] [--quick]
[--out benchmarks/results]``. The network, data and training are the demo's: MiniLM with
LoRA r=8 on query and value of all six layers, and the head.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.tables import header, provenance
from examples import recipe, text, vader

RANKS = (4, 8, 16, 32, 64, 96, 128, 160)
WIDTH = 384


def variances(posterior: pl.LaplacePosterior, batches: Sequence[Any]) -> Tensor:
    """Of the difference of the two logits, (N,), float64."""
    contrast = torch.tensor([-1.0, 1.0]).double()
    found = [posterior.linearized(b).covariance_matrix.double() for b in batches]
    return torch.cat([contrast @ c @ contrast for c in found])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, over all test rows."""
    return float((found - exact).norm() / exact.norm())


def report(epochs: int, quick: bool) -> list[str]:
    """The table, in Markdown."""
    network, tokenizer = text.load_network(
        text.default_model(), num_classes=2, layers="all", device="cpu"
    )
    sizes = {"num_train": 64, "num_test": 16} if quick else {"num_test": 250}
    corpus = vader.load(**sizes)
    train = text.batches(corpus.train, tokenizer, device="cpu", shuffle_seed=0)
    test = list(text.batches(corpus.test, tokenizer, device="cpu"))
    lora = pl.lift(network, prior=pl.priors.normal(scale=recipe.PRIOR_PRECISION**-0.5))
    model = recipe.classifier(lora, len(corpus.train))
    guide = recipe.fit_map(model, lora, train, epochs=epochs, seed=0, title="training")
    mode = {site: guide.median()[site].detach() for site in lora.sites}
    in_order = list(text.batches(corpus.train, tokenizer, device="cpu"))

    def fitted(structure: Any) -> pl.LaplacePosterior:
        again = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to(mode), structure=structure
        )
        return again.laplace_approximation(in_order)

    full = fitted(pl.structures.KFAC())
    best = float(next(iter(full.optimize_prior().prior_precision.values())).mean())
    precisions = (recipe.PRIOR_PRECISION, best)
    exact = [variances(full.with_prior_precision(tau), test) for tau in precisions]
    rows = []
    for rank in RANKS:
        posterior = fitted(pl.structures.KFAC(rank=rank))
        errors = [
            error(variances(posterior.with_prior_precision(tau), test), v)
            for tau, v in zip(precisions, exact, strict=True)
        ]
        cells = [str(rank), f"{(2 * rank + 1) / WIDTH:.2f}"]
        cells += [f"{float(f'{100 * e:.2g}'):g} %" for e in errors]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return [
        "# KFAC of low rank",
        "",
        f"MiniLM, LoRA r=8 on query and value of all layers, and the head; "
        f"{len(corpus.train)} sentences, {epochs} epochs, prior precision "
        f"{recipe.PRIOR_PRECISION}. Relative error of the predictive variances of "
        f"{len(corpus.test)} test rows against `kfac_expand` of full rank, under the "
        f"prior of the training and under the one that the evidence chooses, {best:.2g}"
        f". The factors are {WIDTH} wide; a sketch of them takes 2 rank + 1 columns.",
        "",
        provenance(),
        "",
        *header("rank", "memory", "error, training's prior", "error, evidence's"),
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # a few epochs don't end at a mode
    pyro.set_rng_seed(0)
    lines = report(1 if args.quick else args.epochs, args.quick)
    print("\n".join(lines))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "curvature_rank.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
