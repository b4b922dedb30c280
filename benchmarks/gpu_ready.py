"""What a GPU would see: how often a program waits, what it launches, how it rounds.

Usage: ``python -m benchmarks.gpu_ready [--out benchmarks/results]``, on any machine: it
counts and compares, and nothing is timed. Networks and texts are random; no download.
Half a minute.
"""

import argparse
import copy
import itertools
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro.optim import SGD
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig

import pyro_lora as pl
from benchmarks.synchronisations import Counts, counted
from benchmarks.tables import header, provenance

BATCH, LENGTH = 8, 12
QUERY_VALUE = ("query", "value")
ALL = ("query", "key", "value", "dense")
# The same counts at 8d400d5, where each check was read by itself, by network.
BEFORE = {
    "SVGD step, joint": (43, 43, 93),
    "SVGD step, function": (48, 48, 98),
    "KFAC fit, a batch": (81, 165, 200),
    "EKFAC fit, a batch of both passes": (124, 224, 297),
    "Diagonal fit, a batch": (45, 65, 102),
    "predict linearized, a batch": (33, 33, 59),
    "predict by 4 draws, a batch": (36, 36, 76),
}


def lifted(num_layers: int, targets: tuple[str, ...]) -> pl.LiftedNetwork:
    """A small BERT with LoRA."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
        pad_token_id=0,
    )
    base = AutoModelForSequenceClassification.from_config(config)
    lora = LoraConfig(
        r=4, target_modules=list(targets), init_lora_weights=False, task_type="SEQ_CLS"
    )
    return pl.lift(get_peft_model(base, lora).eval())


def texts(num_batches: int) -> list[dict[str, Tensor]]:
    """Random texts, padded."""
    batches = []
    for _ in range(num_batches):
        ids = torch.randint(1, 50, (BATCH, LENGTH))
        mask = torch.arange(LENGTH) < LENGTH - torch.arange(BATCH)[:, None] % 5
        labels = torch.randint(2, (BATCH,))
        batches.append(
            {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
        )
    return batches


def of_step(lora: pl.LiftedNetwork, kernel: Any, num_particles: int) -> Counts:
    """Of one SVGD step, by plain gradient descent."""
    svgd = pl.SVGD(
        pl.models.classification(lora, 100),
        kernel,
        SGD({"lr": 1e-4}),
        num_particles,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    first, second = texts(2)
    svgd.step(**first)
    with counted() as counts:
        svgd.step(**second)
    return counts


def of_batch(function: Callable[[list[dict[str, Tensor]]], object]) -> Counts:
    """Of a pass over the data, a batch: what two more of them add, by two."""
    function(texts(1))
    passes = []
    for num_batches in (2, 4):
        with counted() as counts:
            function(texts(num_batches))
        passes.append(counts)
    two, four = passes
    waits = {k: (n - two.waits[k]) // 2 for k, n in four.waits.items()}
    return Counts(
        (four.operations - two.operations) // 2,
        waits=type(four.waits)({k: n for k, n in waits.items() if n}),
    )


def fit(
    lora: pl.LiftedNetwork, structure: Any, batches: list[dict[str, Tensor]]
) -> pl.LaplacePosterior:
    """Laplace's approximation, of however many data there are."""
    model = pl.models.classification(lora, BATCH * len(batches))
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    return guide.laplace_approximation(batches)


def jobs(lora: pl.LiftedNetwork) -> dict[str, Callable[[], Counts]]:
    """What is counted."""
    posterior = fit(lora, pl.structures.KFAC(), texts(1))
    structures = pl.structures

    def predicted(batches: list[dict[str, Tensor]], **settings: Any) -> None:
        pl.predict(posterior, batches, **settings)

    return {
        "SVGD step, joint": lambda: of_step(lora, pl.kernels.RBF(), 3),
        "SVGD step, function": lambda: of_step(
            lora, pl.kernels.RBF(space="function"), 3
        ),
        "KFAC fit, a batch": lambda: of_batch(
            lambda batches: fit(lora, structures.KFAC(), batches)
        ),
        "EKFAC fit, a batch of both passes": lambda: of_batch(
            lambda batches: fit(lora, structures.EKFAC(), batches)
        ),
        "Diagonal fit, a batch": lambda: of_batch(
            lambda batches: fit(lora, structures.Diagonal(), batches)
        ),
        "predict linearized, a batch": lambda: of_batch(predicted),
        "predict by 4 draws, a batch": lambda: of_batch(
            lambda batches: predicted(batches, method="sample", num_samples=4)
        ),
    }


def waits() -> list[str]:
    """How often each job waits, by network."""
    networks = {
        "2 layers, 6 sites": lifted(2, QUERY_VALUE),
        "6 layers, 6 sites": lifted(6, QUERY_VALUE),
        "2 layers, many sites": lifted(2, ALL),
    }
    columns = [jobs(lora) for lora in networks.values()]
    rows = header("job, before and now", *networks)
    for name in columns[0]:
        cells = [
            f"{before} → {of_network[name]().num_waits}"
            for before, of_network in zip(BEFORE[name], columns, strict=True)
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def launches() -> list[str]:
    """Operations as particles, layers and sites grow."""
    rows = header("SVGD step", "K=2", "K=4", "K=8")
    for name, lora in {
        "2 layers, query and value": lifted(2, QUERY_VALUE),
        "4 layers, query and value": lifted(4, QUERY_VALUE),
        "2 layers, every linear layer": lifted(2, ALL),
    }.items():
        for space in ("joint", "function"):
            kernel = pl.kernels.RBF(space=space)  # type: ignore[arg-type]
            cells = [str(of_step(lora, kernel, k).operations) for k in (2, 4, 8)]
            title = f"{name}, {len(lora.sites)} sites, {space}"
            rows.append(f"| {title} | {' | '.join(cells)} |")
    rows += ["", *header("predict by draws, a batch", "S=2", "S=4", "S=8")]
    lora = lifted(2, QUERY_VALUE)
    posterior = fit(lora, pl.structures.KFAC(), texts(1))
    cells = [
        str(
            of_batch(
                lambda batches, s=s: pl.predict(  # type: ignore[misc]
                    posterior, batches, method="sample", num_samples=s
                )
            ).operations
        )
        for s in (2, 4, 8)
    ]
    return [*rows, f"| 2 layers, query and value | {' | '.join(cells)} |"]


# How results round. A GPU multiplies matrices in float32 by TF32 where it's told so.


class TF32(TorchDispatchMode):
    """Products of float32 matrices as a GPU makes them in TF32.

    Their entries are rounded to 10 bits after the leading one; sums are in float32.
    """

    _PRODUCTS = frozenset(
        "mm addmm bmm baddbmm _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention_for_cpu_backward".split()
    )
    _SUMMANDS = frozenset("addmm baddbmm".split())  # their first argument is no factor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self._PRODUCTS:
            first = int(name in self._SUMMANDS)
            args = (*args[:first], *map(_in_tf32, args[first:]))
        return func(*args, **(kwargs or {}))


def _in_tf32(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@contextmanager
def medium() -> Iterator[None]:
    """A block in which torch may multiply float32 matrices in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_error() -> float:
    """Of a product of float32 matrices, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).abs().max() / exact.abs().max())


def rounded_base(network: nn.Module) -> nn.Module:
    """The frozen base in bfloat16, what is trained in float32: PEFT's default."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return network


PRECISIONS: dict[
    str, tuple[Callable[[nn.Module], nn.Module], Callable[[], AbstractContextManager]]
] = {
    "float32": (nn.Module.float, nullcontext),
    "float32, products in TF32": (nn.Module.float, TF32),
    "float32, products in torch's `medium`": (nn.Module.float, medium),
    "autocast(bfloat16) around all": (
        nn.Module.float,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ),
    "base in bfloat16, adapter in float32": (rounded_base, nullcontext),
    "all in bfloat16": (nn.Module.bfloat16, nullcontext),
}


def results(
    lora: pl.LiftedNetwork, drawn: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """What is compared: of the same texts, weights and draws, in any precision."""
    torch.manual_seed(1)
    batches = texts(4)
    model = pl.models.classification(lora, BATCH * len(batches))
    posterior = fit(lora, pl.structures.KFAC(), batches)
    gaussian = posterior.linearized(batches[0])
    if drawn is None:
        drawn = posterior.sample(4)
    dtype = {site: w.dtype for site, w in lora.weights().items()}
    draws = [{s: x[i].float().to(dtype[s]) for s, x in drawn.items()} for i in range(4)]
    by_draws = pl.predict(pl.ensemble(lora, draws, model=model), batches)
    with torch.no_grad(), lora.bind(lora.weights()) as net:
        logits = net(**{k: x for k, x in batches[0].items() if k != "labels"}).logits
    particles = []
    for lr in (0.0, 1e-4):
        svgd = pl.SVGD(
            model, pl.kernels.RBF(), SGD({"lr": lr}), 3, init_loc_fn=near(lora)
        )
        svgd.step(**batches[0])
        moved = svgd.get_named_particles().values()
        particles.append(torch.cat([x.double().flatten() for x in moved]))
    start, end = particles
    return {
        "logits": logits,
        "evidence": posterior.log_evidence().detach() / (BATCH * len(batches)),
        "variances": gaussian.covariance_matrix.diagonal(dim1=-2, dim2=-1),
        "probs": pl.predict(posterior, batches).probs,
        "probs by draws": by_draws.probs,
        "step": end - start,
        **{f"drawn {site}": x for site, x in drawn.items()},
    }


def near(lora: pl.LiftedNetwork) -> Callable[[Any], Tensor]:
    """Where particles start: noise around the adapter, the same in any precision."""
    calls: dict[str, Iterator[int]] = defaultdict(itertools.count)

    def init(site: Any) -> Tensor:
        name = site["name"]
        seed = zlib.crc32(f"{name} {next(calls[name])}".encode())
        value = lora.weights()[name]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        return value + 0.1 * noise.to(value)

    return init


def precisions() -> list[str]:
    """How far results are from float64's, by precision."""
    network = lifted(2, ALL).network
    # Under a wide prior the draws of an untrained network amplify all rounding.
    prior = pl.priors.normal(scale=0.1)
    exact = results(pl.lift(copy.deepcopy(network).double(), prior=prior), None)
    drawn = {k.removeprefix("drawn "): x for k, x in exact.items() if "drawn" in k}
    rows = header(
        "against float64",
        "logits",
        "evidence, nats a datum",
        "linearised variances",
        "linearised probabilities",
        "probabilities by the same draws",
        "a step of SVGD",
    )
    for name, (made, around) in PRECISIONS.items():
        with around():
            found = results(pl.lift(made(copy.deepcopy(network)), prior=prior), drawn)
        gaps = {k: (found[k].double() - x).abs().max() for k, x in exact.items()}
        for relative in ("logits", "variances", "step"):
            gaps[relative] /= exact[relative].abs().max()
        cells = [f"{float(gap):.1e}" for k, gap in gaps.items() if "drawn" not in k]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    before = matmul_error()
    with medium():
        after = matmul_error()
    with TF32():
        tf32 = matmul_error()
    error = (
        f"a product of two matrices of 256 rows is off by {before:.0e} of its largest"
    )
    rows += [
        "",
        f"In float32 {error} entry; rounded as in TF32 by {tf32:.0e}; and where "
        f"`torch.set_float32_matmul_precision('medium')` allows bfloat16, by "
        f"{after:.0e}"
        + (
            "."
            if after > 10 * before
            else ": this CPU doesn't make use of it, and that row is float32's."
        ),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    lines = [
        "# What a GPU would see",
        "",
        "Counted on the CPU, where nothing waits: operations that would wait for a GPU "
        "(values that are read, shapes that depend on values), but for those in the "
        "network's own code; and all operations that are dispatched, each a launch or "
        "none. Pyro validates. Two classes; with more, `predict linearized` has one "
        "eigendecomposition a batch, which waits, too. `structures.Exact()` waits "
        "four times.",
        "",
        provenance(),
        "",
        "How often a job waits:",
        "",
        *waits(),
        "",
        "Operations, which grow with sites and layers, and not with particles or draws "
        "of one forward pass. At f6c25ca a step of SVGD had 5 to 13 % more, which was "
        "within 5 % of 8d400d5:",
        "",
        *launches(),
        "",
        "How far results are from the same in float64, of 32 texts and LoRA on every "
        "linear layer of 2; logits, variances and SVGD's steps as a share of the "
        "largest, the others as they are. bfloat16 keeps 8 bits (4e-3), TF32 11 (5e-4) "
        "and float32 24 (6e-8). Sites, factors and draws are float32 in all rows. "
        "Where all is bfloat16 the weights are rounded, too, and with them the prior's "
        "density, which is most of that row's evidence.",
        "",
        *precisions(),
        "",
    ]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_ready.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
