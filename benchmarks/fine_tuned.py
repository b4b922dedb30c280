"""An adapter that was fine-tuned on its answers, as a classifier of them.

Usage: ``python -m benchmarks.fine_tuned --data FOLDER [--seeds 3] [--sets sst2]
[--runs .cache/language_model_quality] [--out benchmarks/results]``; ``--report`` writes
the table of what is there.

Fine-tuning minimises the loss of each answer over the whole vocabulary, without a
prior. So its end is no mode of the model of which of some answers it is: refining goes
to the linearised network's, and some epochs of SVI take the network itself nearer. The
language model and its rows are those of ``benchmarks.language_model_quality``.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.nn.functional import cross_entropy

import pyro_lora as pl
from benchmarks.language_model_quality import NUM_TEST, NUM_TRAIN, Scale, Study
from benchmarks.language_tasks import TASKS, OneToken, encoder
from benchmarks.language_top import NUM_LAYERS, LanguageTop, adapted
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report
from benchmarks.seed_runs import Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.ground.weights import Weights

EPOCHS, SVI_EPOCHS, RATE = (2, 4), 3, 1e-3
WAYS = {
    "adapter": "as it is",
    "evidence": "refined, evidence",
    "svi evidence": "SVI, refined, evidence",
    "loo": "refined, leave-one-out",
    "svi loo": "SVI, refined, leave-one-out",
}


def fine_tuned(
    study: Study, setting: Setting, name: str
) -> Iterator[tuple[int, Weights, float]]:
    """Epochs, weights, and the mean probability of all answers, of one training."""
    network, tokenizer = study.model
    task = TASKS[name]
    assert isinstance(task, OneToken)
    ids = [encoder(tokenizer)(answer)[0] for answer in task.answers]
    torch.manual_seed(setting.seed)
    whole = adapted(LanguageTop(network, range(len(network.lm_head.weight))))
    lora = pl.lift(whole)
    optim = torch.optim.Adam([x for x in whole.parameters() if x.requires_grad], RATE)
    done = 0
    for epochs in (0, *EPOCHS):
        for epoch in range(done, epochs):
            for batch in setting.train.shuffled(100 * setting.seed + epoch):
                logits = whole(batch["hidden"], batch["attention_mask"])
                loss = cross_entropy(logits, torch.tensor(ids)[batch["labels"]])
                optim.zero_grad()
                loss.backward()
                optim.step()
        done = epochs
        with torch.no_grad():
            mass = [
                whole(batch["hidden"], batch["attention_mask"])
                .softmax(-1)[:, ids]
                .sum(-1)
                for batch in setting.test.ordered()
            ]
        weights = {s: x.detach().clone() for s, x in lora.weights().items()}
        yield epochs, weights, float(torch.cat(mass).mean())


def after_svi(setting: Setting, weights: Weights) -> Weights:
    """The mode that a few epochs on the answers go to."""
    pyro.set_rng_seed(setting.seed)
    model = setting.model(len(setting.train))
    with pyro.get_param_store().scope():
        guide = pl.AutoLaplace(model, init_loc_fn=setting.lora.init_to(weights))
        svi = SVI(model, guide, Adam({"lr": RATE}), Trace_ELBO())
        for _ in range(SVI_EPOCHS):
            for batch in setting.train.shuffled(setting.seed):
                svi.step(**batch)
        median = guide.median()
    return {site: median[site].detach() for site in setting.lora.sites}


def nll(posterior: pl.Posterior, setting: Setting) -> float:
    """On the test rows."""
    return pl.predict(posterior, setting.test.ordered()).metrics()["nll"]


def run_one(setting: Setting, weights: Weights) -> Result:
    """The test NLL of every way on from an adapter."""
    model = setting.model(len(setting.train))
    found = {"adapter": nll(pl.ensemble(setting.lora, [weights], model=model), setting)}
    for before, mode in {"": weights, "svi ": after_svi(setting, weights)}.items():
        exact = setting.laplace(setting.train.by_length(), mode, pl.structures.Exact())
        by_evidence = exact.refine().optimize_prior()
        left_out = exact.refine(objective="loo").optimize_prior(objective="loo")
        found[f"{before}evidence"] = nll(by_evidence, setting)
        found[f"{before}loo"] = nll(left_out, setting)
    return found


def run(args: argparse.Namespace) -> None:
    """Every seed that isn't there yet."""
    study = Study(args.data, args.runs / "float32", Scale(rows=args.rows))
    for name in args.sets:
        for seed in range(args.seeds):
            if f"{name}-{EPOCHS[-1]}-{seed}" in kept(raw(args)):
                continue
            setting, _ = study.settings(name, seed)
            for epochs, weights, mass in fine_tuned(study, setting, name):
                found = run_one(setting, weights) if epochs else {}
                keep(raw(args), f"{name}-{epochs}-{seed}", {"mass": mass, **found})


def report(there: Mapping[str, Result]) -> list[str]:
    """The table, in Markdown."""
    found: dict[tuple[str, int], list[Result]] = {}
    for kept_as, result in there.items():
        name, epochs, _ = kept_as.split("-")
        found.setdefault((name, int(epochs)), []).append(result)
    lines = [
        "# A fine-tuned language model",
        "",
        f"SmolLM2-135M-Instruct, LoRA on its last {NUM_LAYERS} layers, fine-tuned on "
        f"the answers to {NUM_TRAIN} texts over the whole vocabulary, then asked which "
        f"of them it is: test NLL on {NUM_TEST} others, mean ± standard error over the "
        f"seeds. SVI: {SVI_EPOCHS} epochs on the classifier before it's refined. Mass: "
        "the mean probability of all answers together, by the adapter.",
        "",
        provenance(),
        "",
        *header("", "seeds", "mass", *WAYS.values()),
    ]
    for (task, trained), seeds in sorted(found.items()):
        cells = [over_seeds([x[way] for x in seeds if way in x]) for way in WAYS]
        mass = f"{fmean(x['mass'] for x in seeds):.2f}"
        lines.append(row(f"{task}, {trained} epochs", str(len(seeds)), mass, *cells))
    return [*lines, ""]


def main() -> None:
    parser = arguments(__doc__, "fine_tuned", ["sst2"], rows=NUM_TRAIN)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, default=Path(".cache/language_model_quality")
    )
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
