"""A base over several devices: one table, which the tests fill and the page shows.

Each row is a form of spreading a network, each column something that is done with it.
A cell is filled by doing it: "same", where it gives what the network whole gives in one
process, or the error. ``docs/large.md`` has the table as :func:`markdown` writes it.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForSequenceClassification

import pyro_lora as pl
from tests.distributed.jobs import (
    DIMS,
    PowerCutError,
    data,
    engine,
    guide_of,
    members,
    numbers_of,
    rank,
    size,
    writing_each_batch,
)
from tests.networks import (
    batch,
    bert,
    classifier,
    inputs,
    leaves,
    llama,
    particles,
    without_peft,
)

COLUMNS = ("lifted", "bound", "folded", "fitted", "predicted", "SVGD", "saved")
SAME = "same"
Cells = Mapping[str, Any]
EXACT = 1e-10
SMALL = partial(bert, 3, hidden_size=8)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way of spreading a network.

    Attributes:
        name: What it is, in Markdown.
        spread: The network, spread; in a folder of its own, if it needs one.
        build: Makes the plain network.
        num_data: Of the batches of two.
        chunk_size: Of SVGD's particles.
        mesh: Of the ranks, if not all of them share data and particles.
    """

    name: str
    spread: Callable[[PeftModel, Path], PeftModel]
    build: Callable[[], PeftModel] = SMALL
    num_data: int = 4
    chunk_size: int | None = None
    mesh: Callable[[], DeviceMesh | None] = lambda: None


def cells(form: Form, folder: Path) -> Cells:
    """What each column gives, or the error that it ends with."""
    whole = form.build()
    torch.manual_seed(0)  # as before the first
    network = form.spread(form.build(), folder)
    torch.manual_seed(0)  # whoever spreads it may have drawn numbers
    return done(
        network,
        folder / re.sub(r"\W+", "-", form.name),
        whole=whole if size() > 1 else None,
        mesh=form.mesh(),
        num_data=form.num_data,
        chunk_size=form.chunk_size,
    )


def done(
    network: nn.Module,
    folder: Path,
    *,
    whole: nn.Module | None = None,
    mesh: DeviceMesh | None = None,
    num_data: int = 4,
    chunk_size: int | None = None,
) -> Cells:
    """The same of a network that is there already.

    Args:
        network: Spread.
        folder: For files, the same on all ranks.
        whole: The same network, which takes its files and gives it some; None: itself.
        mesh: As the form's, like the others.
    """
    found: dict[str, Any] = {}

    @contextmanager
    def column(name: str) -> Any:
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = error

    with column("lifted"):
        lora = pl.lift(network)
        found["lifted"] = lora.weights()
    if isinstance(found["lifted"], Exception):
        return found
    model, batches = classifier(lora, num_data), data(number=num_data)
    twin = lora if whole is None else pl.lift(whole)
    guides = [guide_of(x, classifier(x, num_data)) for x in (lora, twin)]
    for name, lead in (("bound", ()), ("folded", (3,))):
        with column(name):
            found[name] = at_weights(lora, particles(lora, *lead))
    with column("fitted"):
        fitted = guides[0].laplace_approximation(
            pl.share(batches, mesh=mesh), mesh=mesh
        )
        own = pl.share(batches, mesh=mesh)
        resumed = [
            after_a_cut(guides[i], guides[1 - i], own, folder, mesh) for i in range(2)
        ]
        saved_by_first(fitted, folder / "fitted")
        fits = [fitted, *resumed, pl.load(folder / "fitted", lora, model=model)]
        found["fitted"] = [numbers_of(x) for x in fits]
    with column("predicted"):
        drawn = pl.ensemble(lora, members(lora, 2), model=model)
        of = [drawn] if isinstance(found["fitted"], Exception) else [drawn, fitted]
        found["predicted"] = [
            pl.predict(x, pl.share(batches, mesh=mesh), mesh=mesh).probs for x in of
        ]
    with column("SVGD"):
        kernel = pl.kernels.RBF(space="function")
        made = engine(lora, model, kernel, 3, mesh=mesh, chunk_size=chunk_size)
        made.run(batches, num_epochs=1, progress_bar=False)
        if rank() == 0:
            made.save(folder / "SVGD")
        everyone()
        made.load(folder / "SVGD")
        found["SVGD"] = made.get_named_particles()
    with column("saved"):
        found["saved"] = saved(lora, twin, folder)
    return found


def everyone() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def after_a_cut(
    cut: pl.AutoLaplace,
    resuming: pl.AutoLaplace,
    batches: list[dict[str, Tensor]],
    folder: Path,
    mesh: DeviceMesh | None,
) -> pl.LaplacePosterior:
    """A fit that goes on from where another one of the same network was cut off."""

    class Cut:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield batches[0]
            raise PowerCutError

    options: dict[str, Any] = {"checkpoint": folder / "checkpoint", "mesh": mesh}
    with writing_each_batch(), suppress(PowerCutError):
        cut.laplace_approximation(Cut(), **options)
    everyone()
    assert [*(folder / "checkpoint").rglob("manifest.json")]
    fitted = resuming.laplace_approximation(batches, **options)
    everyone()
    assert not [*(folder / "checkpoint").rglob("manifest.json")]
    return fitted


def saved_by_first(posterior: pl.Posterior, folder: Path) -> None:
    """Save on one rank, while the others do nothing."""
    if rank() == 0:
        pl.save(posterior, folder)
    everyone()


def saved(lora: pl.LiftedNetwork, twin: pl.LiftedNetwork, folder: Path) -> Any:
    """What is read of files: by each of each, its own and those of the first rank."""
    here, there = (pl.ensemble(x, [lora.weights()] * 2) for x in (lora, twin))
    pl.save(here, folder / f"{rank()}")
    saved_by_first(here, folder / "here")
    saved_by_first(there, folder / "there")
    read: list[Any] = [
        pl.load(folder / name, x).sample(1)
        for name in (f"{rank()}", "here", "there")
        for x in (lora, twin)
    ]
    if twin is lora:
        return read[:1]
    with pytest.raises(ValueError, match="shared out over processes already"):
        pl.plan_memory(lora)
    with torch.no_grad():
        for p in twin.network.parameters():
            p.add_(0 if p.requires_grad else 1e-3)
    saved_by_first(there, folder / "other")
    for name, x in (("other", lora), ("here", twin)):
        with pytest.raises(ValueError, match="this is another network"):
            pl.load(folder / name, x)
    return read[:1]


def at_weights(lora: pl.LiftedNetwork, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs and gradients, and how many rows the network sees at once."""
    rows: list[int] = []
    handle = lora.network.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    own = leaves(weights)
    with lora.bind(own) as net:
        logits = net(**inputs(batch())).logits
        gradients = torch.autograd.grad(logits.square().sum(), list(own.values()))
    handle.remove()
    return {"logits": logits.detach(), "gradients": list(gradients), "rows": rows}


# The forms


def trained(network: nn.Module) -> set[nn.Parameter]:
    return {p for p in network.parameters() if p.requires_grad}


def sharded(
    network: PeftModel,
    folder: Path,
    *,
    whole: bool = True,
    by_block: bool = True,
    **options: Any,
) -> PeftModel:
    """By FSDP2, with or without the adapter, each block by itself or all at once."""
    if whole:
        options["ignored_params"] = trained(network)
    encoder = network.base_model.model.bert
    mesh = init_device_mesh("cpu", (size(),))
    for module in (*(encoder.encoder.layer if by_block else ()), network):
        fully_shard(module, mesh=mesh, **options)
    assert isinstance(encoder.encoder.layer[0].output.dense.weight, DTensor)
    return network


def split(
    network: PeftModel, folder: Path, mesh: DeviceMesh | None = None, **styles: Any
) -> PeftModel:
    """Linear layers of each block by PyTorch's tensor parallelism."""
    mesh = mesh or init_device_mesh("cpu", (size(),))
    before = trained(network)
    for layer in network.base_model.model.bert.encoder.layer:
        plan = {name.replace("__", "."): style() for name, style in styles.items()}
        parallelize_module(layer, mesh, plan)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter in before)  # torch 2.10 has all trained
    return network


def split_and_sharded(network: PeftModel, folder: Path) -> PeftModel:
    """The same, and what each rank has of a block by FSDP2, over one rank."""
    mesh = init_device_mesh("cpu", (1, size()), mesh_dim_names=("fsdp", "tensor"))
    split(network, folder, mesh["tensor"], **MLP)
    for layer in network.base_model.model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh["fsdp"], ignored_params=trained(network))
    return network


def in_another_order(folder: Path) -> Any:
    """Rank 1 runs a network that is tensor parallel on the rows reversed."""
    lora = pl.lift(split(SMALL(), folder, **MLP))
    rows = {k: x.flip(0) if rank() else x for k, x in inputs(batch(4)).items()}
    with lora.bind(lora.weights()) as net:
        return net(**rows).logits


def planned(network: PeftModel, folder: Path, *, plan: Any) -> PeftModel:
    """By transformers, where the base is loaded, and then by PEFT."""
    adapter = copy.deepcopy(network.peft_config["default"])
    weights = network.state_dict()
    base: Any = without_peft(network)
    saved = folder / type(base).__name__
    base.save_pretrained(saved)  # the first rank does
    torch.distributed.barrier()
    base = AutoModelForSequenceClassification.from_pretrained(
        saved, tp_plan=plan, tp_size=size()
    )
    again: Any = get_peft_model(base, adapter)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.copy_(weights[name])
    return again.eval()


def offloaded(network: PeftModel, folder: Path) -> PeftModel:
    """The first block's weights on a disk, and on the meta device between calls."""
    first = network.base_model.model.bert.encoder.layer[0]
    disk_offload(first, str(folder), execution_device=torch.device("cpu"))
    assert first.attention.self.key.weight.is_meta
    return network


def all_on_each() -> DeviceMesh:
    """Every rank has all data and particles."""
    return init_device_mesh("cpu", (1, 1, size()), mesh_dim_names=(*DIMS, "tensor"))


def particles_over_each() -> DeviceMesh:
    """Every rank has all data, and some of the particles and draws."""
    return init_device_mesh("cpu", (1, size()), mesh_dim_names=DIMS)


MLP = {"intermediate__dense": ColwiseParallel, "output__dense": RowwiseParallel}
QUERY = {"attention__self__query__base_layer": ColwiseParallel}
MLP_PLAN = {
    "bert.encoder.layer.*.intermediate.dense": "colwise",
    "bert.encoder.layer.*.output.dense": "rowwise",
}
OF_RANKS = (
    Form(
        name="FSDP2 (`fully_shard`), the base frozen, the adapter whole",
        spread=sharded,
    ),
    Form(
        name="FSDP2, particles and draws shared out by `mesh=`",
        spread=sharded,
        mesh=particles_over_each,
    ),
    Form(
        name="FSDP2 that shards the adapter, too",
        spread=partial(sharded, whole=False),
    ),
    Form(
        name="FSDP2 where a rank has more batches, or more chunks of particles",
        spread=sharded,
        num_data=6,
        chunk_size=1,
    ),
    Form(
        name="FSDP2 by one call, of the whole network",
        spread=partial(sharded, by_block=False),
    ),
    Form(
        name="FSDP2 that keeps what it gathers, `reshard_after_forward=False`",
        spread=partial(sharded, reshard_after_forward=False),
    ),
    Form(
        name="FSDP2 where one rank's batches have more rows, another's one",
        spread=sharded,
        num_data=3,
    ),
    Form(
        name="tensor parallel, of layers without an adapter",
        spread=partial(split, **MLP),
        mesh=all_on_each,
    ),
    Form(
        name="the same without `mesh=`",
        spread=partial(split, **MLP),
    ),
    Form(
        name="tensor parallel, particles and draws shared out by `mesh=`",
        spread=partial(split, **MLP),
        mesh=particles_over_each,
    ),
    Form(
        name="FSDP2 and tensor parallel together, of layers without an adapter",
        spread=split_and_sharded,
        mesh=all_on_each,
    ),
    Form(
        name="tensor parallel, of a layer with an adapter",
        spread=partial(split, **QUERY),
        mesh=all_on_each,
    ),
    Form(
        name="transformers' `tp_plan`, of layers without an adapter",
        spread=partial(planned, plan=MLP_PLAN),
        mesh=all_on_each,
    ),
    Form(
        name="transformers' `tp_plan`, of a layer with one",
        spread=partial(planned, plan="auto"),
        build=partial(llama, 3, target_modules=["o_proj"]),
        mesh=all_on_each,
    ),
)
OFFLOADED = (
    Form(
        name="offloaded to a disk (on the meta device between calls), of layers "
        "without an adapter",
        spread=offloaded,
        build=partial(bert, 3, hidden_size=8, layers_to_transform=[1]),
    ),
    Form(name="offloaded to a disk, of a layer with one", spread=offloaded),
)
TWO_DEVICES = "`device_map` over two devices of one process"
JOBS: dict[str, Callable[[Path], Any]] = {
    **{form.name: partial(cells, form) for form in OF_RANKS},
    "another order": in_another_order,
}

# The table


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The table, and the sentences of what is refused.

    Args:
        rows: Name -> column -> "same", or an error's text.
    """
    sentences = dict.fromkeys(
        text for row in rows.values() for text in row.values() if text != SAME
    )
    numbers = {text: f"refused ({i})" for i, text in enumerate(sentences, 1)}
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, row in rows.items():
        texts = [
            numbers.get(row.get(column, ""), row.get(column, "")) for column in COLUMNS
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", *(f"{i}. {x}" for i, x in enumerate(sentences, 1))])


def filled(one: Callable[[], Cells], others: list[Cells]) -> dict[str, str]:
    """A row of the table.

    Args:
        one: Gives what the network whole gives, if it comes to that.
        others: What the spread one gives, on each rank.
    """
    row = {}
    for column in others[0]:
        texts = {str(x[column]) for x in others if isinstance(x[column], Exception)}
        if texts:
            assert len(texts) == 1, texts
            assert all(isinstance(x[column], Exception) for x in others), texts
            row[column] = texts.pop()
            continue
        for other in others:
            gaps = differences(one()[column], other[column])
            wrong = {path: gap for path, gap in gaps.items() if not gap < EXACT}
            assert not wrong, (column, wrong)
        row[column] = SAME
    return row


def differences(one: Any, other: Any, path: str = "") -> dict[str, float]:
    """By how much the numbers in two results differ, relative to their size."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return {path: float("inf")} if repr(one) != repr(other) else {}
    if isinstance(one, Mapping):
        assert set(one) == set(other), (path, list(one), list(other))
        found = {}
        for key in one:
            found |= differences(one[key], other[key], f"{path}/{key}")
        return found
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        found = {}
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            found |= differences(a, b, f"{path}/{i}")
        return found
    if isinstance(one, torch.Tensor | float | int):
        a, b = (
            torch.as_tensor(x).double()
            if isinstance(x, torch.Tensor)
            else torch.tensor(x, dtype=torch.float64)
            for x in (one, other)
        )
        assert a.shape == b.shape, (path, a.shape, b.shape)
        if a.numel() == 0 or torch.equal(a, b):
            return {path: 0.0}
        same = (a == b) | (a.isnan() & b.isnan())
        gap = (a - b).where(~same, torch.zeros_like(a)).abs().max()
        size = a.where(a.isfinite(), torch.zeros_like(a)).abs().max().clamp_min(1e-3)
        return {path: float(gap / size)}
    assert one == other, (path, one, other)
    return {}
