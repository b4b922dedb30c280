"""Which prior scale is neither flat nor saturated, by the prior predictive.

Usage: ``python -m benchmarks.prior_scale [--path FILE] [--out benchmarks/results]``.
The network and the sentences are the demo's; ``--path`` adds a second data set, a file
of JSON lines or CSV with the fields ``text`` and ``label``, named by its folder.
``--fit`` also trains to the mode under some of the priors, a few minutes more.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.tables import provenance
from examples import recipe, rows, text, vader

SCALES = (0.03, 0.06, 0.1, 0.3, 1.0, 3.0)
HEAD_SCALE = 1.0  # where the scale of the adapter alone varies
NUM_ROWS, NUM_DRAWS = 48, 12
SURE = 0.99
FITS = ((3.0, 3.0), (1.0, 1.0), (1.0, 0.3), (1.0, 0.1), (1.0, 0.06))
NUM_TRAIN, NUM_TEST, NUM_EPOCHS = 400, 200, 6


def contrasts(
    lora: pl.LiftedNetwork,
    batches: Sequence[dict[str, Tensor]],
    head: float,
    adapter: float,
) -> Tensor:
    """Logits of prior draws, their mean over classes removed, (S, B, C).

    The same seed at all scales: draws differ in their size alone.
    """
    pyro.set_rng_seed(0)
    prior = pl.priors.by_site(
        {"head.*": pl.priors.normal(head), "*": pl.priors.normal(adapter)}
    )
    with torch.no_grad():
        with pyro.plate("draws", NUM_DRAWS):
            weights = prior(lora)
        with lora.bind(weights) as net:
            logits = torch.cat([net(**batch).logits for batch in batches], 1)
    return logits - logits.mean(-1, keepdim=True)


def summary(logits: Tensor, plain: Tensor) -> dict[str, float]:
    """What a draw from the prior predicts, averaged over draws and rows."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)  # (S, B)
    predicted = probs.argmax(-1)
    majority = predicted.mode(1, keepdim=True).values
    return {
        "entropy": float(entropy.mean()) / math.log(logits.shape[-1]),
        "sure": float((probs.amax(-1) > SURE).double().mean()),
        "one class": float((predicted == majority).double().mean()),
        "kept": statistics.fmean(map(kept, logits, plain)),
    }


def kept(logits: Tensor, plain: Tensor) -> float:
    """Squared correlation over rows with the same head's logits without an adapter."""
    x, y = (z - z.mean(0) for z in (logits, plain))  # (B, C)
    return float((x * y).sum() ** 2 / (x.square().sum() * y.square().sum()))


def measure(corpus: rows.Corpus, layers: str) -> list[str]:
    """One row for each scale, in Markdown."""
    network, tokenizer = text.load_network(
        text.default_model(),
        num_classes=len(corpus.classes),
        layers=layers,  # type: ignore[arg-type]
        device="cpu",
    )
    batches = []
    for batch in text.batches(corpus.test[:NUM_ROWS], tokenizer, device="cpu"):
        del batch["labels"]
        batches.append(batch)
    lora = pl.lift(network)
    plain = contrasts(lora, batches, 1.0, 1e-6)
    lines = []
    pairs = [(s, s) for s in SCALES] + [(HEAD_SCALE, s) for s in SCALES]
    for head, adapter in dict.fromkeys(pairs):
        found = summary(contrasts(lora, batches, head, adapter), plain)
        lines.append(
            f"| {layers} | {head:g} | {adapter:g} | {found['entropy']:.2f} | "
            f"{found['sure']:.2f} | {found['one class']:.2f} | {found['kept']:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def fitted(corpus: rows.Corpus) -> list[str]:
    """Loss and accuracy at the mode under different scales, in Markdown."""
    lines = []
    train, test = corpus.train[:NUM_TRAIN], corpus.test[:NUM_TEST]
    for head, adapter in FITS:
        network, tokenizer = text.load_network(
            text.default_model(), num_classes=2, layers="last2", device="cpu"
        )
        prior = pl.priors.by_site(
            {"head.*": pl.priors.normal(head), "*": pl.priors.normal(adapter)}
        )
        lora = pl.lift(network, prior=prior)
        model = recipe.classifier(lora, len(train))
        batches = text.batches(train, tokenizer, device="cpu", shuffle_seed=0)
        guide = recipe.fit_map(
            model, lora, batches, epochs=NUM_EPOCHS, seed=0, title=f"{head}, {adapter}"
        )
        with pyro.get_param_store().scope():
            mode = guide.median()
        cells = [f"{head:g}", f"{adapter:g}"]
        for split in (train, test):
            log_probs, labels = [], []
            with torch.no_grad(), lora.bind(mode) as net:
                for batch in text.batches(split, tokenizer, device="cpu"):
                    labels.append(batch.pop("labels"))
                    log_probs.append(net(**batch).logits.log_softmax(-1))
            log_prob, label = torch.cat(log_probs), torch.cat(labels)
            nll = -log_prob.gather(1, label[:, None]).mean()
            accuracy = (log_prob.argmax(1) == label).double().mean()
            cells += [f"{nll:.2f}", f"{accuracy:.2f}"]
        update = [
            (b @ a).square().sum() for b, a in lora.delta_weight_factors(mode).values()
        ]
        cells.append(f"{torch.stack(update).mean().sqrt():.2f}")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, help="rows of a second data set")
    parser.add_argument("--fit", action="store_true", help="train under the priors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    corpora = {"vader": vader.load()}
    if args.path is not None:
        corpora[args.path.parent.name] = rows.read_corpus(args.path, args.path)
    lines = [
        "# Scale of the prior",
        "",
        f"What {NUM_DRAWS} draws from a normal prior on a lifted MiniLM classifier "
        "(LoRA r=8, alpha=16 on query and value of the last two layers or all six; "
        f"new head) predict for {NUM_ROWS} texts of at most {text.MAX_LENGTH} tokens, "
        "before any training:",
        "",
        "- entropy: of a draw's prediction, relative to log C; 1 is flat, 0 saturated;",
        f"- sure: share of predictions with a probability above {SURE};",
        "- one class: share of texts that a draw puts into its most frequent class;",
        "- kept: squared correlation over texts of a draw's logits with those of the "
        "same head on the pretrained encoder; 0: nothing is left of its features.",
        "",
        provenance(),
        "",
    ]
    for name, corpus in corpora.items():
        lines += [
            f"{name}, {len(corpus.classes)} classes:",
            "",
            "| layers | head's scale | adapter's | entropy | sure | one class | kept |",
            "|---|---|---|---|---|---|---|",
            *(line for layers in ("last2", "all") for line in measure(corpus, layers)),
            "",
        ]
    if args.fit:
        lines += [
            f"At the mode after {NUM_EPOCHS} epochs on {NUM_TRAIN} sentences of vader, "
            f"adapter on the last two layers; {NUM_TEST} test sentences; norm of the "
            "update of a matrix, root mean square over matrices:",
            "",
            "| head's scale | adapter's | training loss | accuracy | test loss | "
            "accuracy | update |",
            "|---|---|---|---|---|---|---|",
            *fitted(corpora["vader"]),
            "",
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prior_scale.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
