"""From a LoRA adapter to a calibrated posterior: ``python -m examples.demo``.

Fine-tunes a small encoder on sentences that people rated, finds its posterior by
Laplace and by SVGD, and compares the probabilities with those of MAP, temperature
scaling and a deep ensemble. Ends with a table; pictures, ArviZ files and adapters go
into a folder.
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

EPOCHS = 7  # over-fitted, as fine-tuning often is


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        argv: Command line arguments; None takes those of the process.

    Raises:
        SystemExit: With a message and a remedy, if data or model can't be read.
    """
    args = _parser().parse_args(argv)
    if (args.train is None) != (args.test is None):
        raise SystemExit("demo: --train and --test go together: give both or none.")
    start = time.perf_counter()
    if args.model is None or Path(args.model).is_dir():
        # Read once by the imports below: nothing is asked of the hub for local files.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    import pyro_lora as pl
    from examples import methods, report, rows, text, vader
    from examples.recipe import PRIOR_PRECISION

    try:
        report.make_folder(args.out)
        if args.train is None:
            corpus = vader.load()
        else:
            corpus = rows.read_corpus(args.train, args.test)
        torch.manual_seed(args.seed)
        model = args.model or text.default_model()
        network, tokenizer = text.load_network(
            model,
            num_classes=len(corpus.classes),
            layers=args.layers,
            device=args.device,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error

    text.skip_unread(network)  # half of the operations
    task = methods.Task(
        corpus=corpus,
        network=network,
        tokenizer=tokenizer,
        lora=pl.lift(network, prior=pl.priors.normal(scale=PRIOR_PRECISION**-0.5)),
        device=args.device,
        epochs=args.epochs,
        seed=args.seed,
        num_particles=args.num_particles,
    )
    name = "MiniLM-L6" if args.model is None else Path(args.model).name
    # The layers below the adapter see the same texts in each epoch of each method.
    has_trunk = args.layers == "last2" and network.config.num_hidden_layers > 2
    with pl.cached_trunk(task.lora) if has_trunk else nullcontext():
        study = methods.run(task, quick=args.quick)
        table = report.write(study, task, name, args.out)
    print(f"\n{table}\n\nWritten to {args.out} in {_clock(start)} all in all.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Compare the probabilities of posteriors over a LoRA adapter.",
    )
    add = parser.add_argument
    add("--model", help="folder or hub name of an encoder (default: MiniLM-L6)")
    add("--train", type=Path, help="JSON lines or CSV with the fields text and label")
    add("--test", type=Path, help="the same, to test on (default: VADER's sentences)")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add("--epochs", type=_positive, default=EPOCHS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--out",
        type=Path,
        default=Path("demo-out"),
        help="folder; what an earlier demo wrote there is replaced "
        "(default: %(default)s)",
    )
    add(
        "--layers",
        choices=("last2", "all"),
        default="last2",
        help="layers with LoRA on query and value (default: %(default)s)",
    )
    add("--num-particles", type=_positive, default=5, help="default: %(default)s")
    add(
        "--quick",
        action="store_true",
        help="MAP, temperature scaling and Laplace only",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _clock(start: float) -> str:
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    return f"{minutes} min {seconds:02d} s"


if __name__ == "__main__":
    main()
