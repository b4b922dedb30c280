r"""Network and settings -> how much memory each phase takes, before anything runs.

The phases themselves are run, on tensors that have a shape and a dtype but no values:
an SVGD step, a Laplace fit, a prediction, each with the network's weights, what
autograd keeps for the backward pass, and all else that is in use at the same time. So
the counts are those of the code, whatever the network. For a Llama of two layers::

    MAP step       99 kB (weights 25, particles 1, optimizer 3, activations 54)
    Laplace fit   139 kB (weights 25, factors 8, activations 61)
    ...

What depends on values is taken from a run of a twin: a network of the same layers, 8
wide, with values. Of it is known at which tokens each layer has gradients, so which
layers share a factor.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pyro import optim
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from pyro_lora.curvature.data_sums import OBSERVED
from pyro_lora.curvature.fit import check_rows
from pyro_lora.curvature.prior_moments import PriorAtMode
from pyro_lora.curvature.saved_observations import ObservedFactors
from pyro_lora.curvature.structures import (
    EKFAC,
    KFAC,
    BatchStructure,
    Chunks,
    Counts,
    Factors,
    Structure,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.interrupts import entered
from pyro_lora.ground.memory import FusedAttention, MemoryInUse, WithoutValues, address
from pyro_lora.ground.ranks import ALONE, Ranks, working_alone
from pyro_lora.ground.settings import (
    check_count,
    check_kind,
    check_positive,
    check_word,
)
from pyro_lora.ground.summary import Summarised, brief
from pyro_lora.ground.synchronisation import answers_kept, without_reading
from pyro_lora.ground.weights import Weights
from pyro_lora.infer.auto_laplace import AutoLaplace
from pyro_lora.infer.svgd.kernels import RBF, Kernel, NoRepulsion
from pyro_lora.infer.svgd.svgd import SVGD
from pyro_lora.lift import lift
from pyro_lora.lifting.described_network import (
    AdapterConfig,
    base_of,
    described_network,
    narrow_twin,
    without_values,
)
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.models import (
    classification,
    language_model,
    preference,
    regression,
    token_classification,
)
from pyro_lora.posteriors.posterior import Posterior, PredictionMethod
from pyro_lora.predict.draws import DRAWS_AT_ONCE
from pyro_lora.predict.predict import predict

if TYPE_CHECKING:
    from pandas import DataFrame

GB = 1e9
OneBatch = tuple[int, int] | Batch
MakeModel = Callable[[LiftedNetwork, int], Model]
Fisher = Literal["exact", "mc", "empirical"]

# PEFT's task -> our model.
_MODELS: dict[str, MakeModel] = {
    "SEQ_CLS": classification,
    "TOKEN_CLS": token_classification,
    "CAUSAL_LM": language_model,
}
# The end of a class's name in transformers -> PEFT's task.
_HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_TRAINING = ("MAP step", "SVGD step", "predict by particles")
_BY_DRAWS = ("predict by particles", "predict by draws")
_NAMES = {"draws_at_once": "chunk_size of predict"}  # of what a job calls otherwise
_RANK = 64  # of what is advised: see the docs page on large networks
_JITTER = 0.01  # any: particles apart, B not zero, so that A has gradients


@dataclass(frozen=True)
class _Outcomes:
    """What a model observes of a batch of texts.

    Attributes:
        rows: Texts that make a datum.
        by_token: Whether each of a text's tokens has an outcome.
        dtype: Of a label.
        fisher: Of ``AutoLaplace``, where nothing else is said.
        is_ours: Whether the model is, which takes ``labels=None``.
    """

    rows: int = 1
    by_token: bool = False
    dtype: torch.dtype = torch.long
    fisher: Fisher = "exact"
    is_ours: bool = True


_OUTCOMES: dict[MakeModel, _Outcomes] = {
    classification: _Outcomes(),
    regression: _Outcomes(dtype=torch.float32),
    token_classification: _Outcomes(by_token=True),
    language_model: _Outcomes(by_token=True, fisher="mc"),
    preference: _Outcomes(rows=2),
}


@dataclass(frozen=True, repr=False)
class _Texts:
    """A batch that is known by its size."""

    rows: int
    tokens: int

    has_twin: ClassVar[bool] = True  # of so many rows, for the narrow network

    def __repr__(self) -> str:
        """As ``plan_memory`` is told."""
        return f"({self.rows}, {self.tokens})"

    @property
    def words(self) -> str:
        """What it is."""
        return f"{self.rows:,} texts of {self.tokens:,} tokens"

    def num_data(self, outcomes: _Outcomes) -> int:
        """Of which a model observes an outcome."""
        return self.rows // outcomes.rows

    def example(self, outcomes: _Outcomes, device: torch.device) -> dict[str, Any]:
        """Texts with some padding."""
        ids = torch.ones(self.rows, self.tokens, dtype=torch.long, device=device)
        mask = torch.ones_like(ids)
        if self.tokens > 1:
            mask[0, -1] = 0
        labels = ids if outcomes.by_token else ids.new_zeros(self.num_data(outcomes))
        labels = labels.to(outcomes.dtype)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def fewer(self) -> Iterator[_Texts]:
        """Half of it, a quarter and so on."""
        for k in range(1, self.rows.bit_length()):
            yield _Texts(self.rows // 2**k, self.tokens)


@dataclass(frozen=True, eq=False)
class _Given:
    """A batch that is given, of which only shapes count."""

    batch: Batch

    has_twin: ClassVar[bool] = False

    @property
    def words(self) -> str:
        """What it is."""
        return brief(dict(self.batch))

    @property
    def rows(self) -> int:
        """Of its first tensor."""
        return len(next(iter(self.batch.values())))

    def num_data(self, outcomes: _Outcomes) -> int:
        """Of which a model observes an outcome."""
        labels = self.batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim:
            return len(labels)
        return self.rows // outcomes.rows

    def example(self, outcomes: _Outcomes, device: torch.device) -> dict[str, Any]:
        """It, without values."""
        return {
            name: x.to("meta") if isinstance(x, Tensor) else x
            for name, x in self.batch.items()
        }

    def fewer(self) -> Iterator[_Given]:
        """None: who gave it knows what is in it."""
        yield from ()


@dataclass(frozen=True)
class Phase:
    """The memory of one phase, in bytes.

    Attributes:
        name: Which.
        weights: The network's, adapter included; of a base that is shared out a
            rank's share, and what is whole.
        particles: All of them, or the mode that is trained.
        optimizer: Its state, after a step.
        factors: What the passes over the data sum.
        posterior: What stays after a fit: eigenbases, eigenvalues, the mode.
        activations: What a forward pass leaves for the backward pass.
        peak: All that is in use at a time, at most.
    """

    name: str
    weights: int
    particles: int = 0
    optimizer: int = 0
    factors: int = 0
    posterior: int = 0
    activations: int = 0
    peak: int = 0


# What a phase is made of; the peak has what is used for a moment, too.
_PARTS = [f.name for f in fields(Phase) if f.name not in ("name", "peak")]


@dataclass(frozen=True, repr=False)
class MemoryPlan(Summarised):
    """How much memory each phase takes, made by :func:`plan_memory`.

    Attributes:
        network: The network's class.
        batch: What a batch is.
        phases: In order.
        device_gb: What there is, in GB; None is unknown.
        changes: Name of a phase that takes more -> settings that make it smaller, and
            the phase with them.
        shard_base: Whether the ranks share the base out.
    """

    network: str
    batch: str
    phases: tuple[Phase, ...]
    device_gb: float | None = None
    changes: Mapping[str, tuple[tuple[str, Phase], ...]] = field(default_factory=dict)
    shard_base: bool = False

    def __getitem__(self, name: str) -> Phase:
        """A phase by its name.

        Raises:
            KeyError: If there is none of that name.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(f"{name!r} isn't one of {[p.name for p in self.phases]}")

    @property
    def too_large(self) -> tuple[Phase, ...]:
        """The phases that take more than there is."""
        most = float("inf") if self.device_gb is None else GB * self.device_gb
        return tuple(phase for phase in self.phases if phase.peak > most)

    def check(self) -> None:
        """Check that every phase fits.

        Raises:
            ValueError: If one doesn't, naming what it takes and what would fit.
        """
        if self.too_large:
            raise ValueError(
                f"{self.network}, {self.batch}: of {self.device_gb:g} GB "
                + "; ".join(self._advice(phase) for phase in self.too_large)
                + "."
            )

    def _advice(self, phase: Phase) -> str:
        takes = f"the {phase.name} takes {_amount(phase.peak)}"
        assert self.device_gb is not None
        ways = self.changes.get(phase.name, ())
        fit = [way for way in ways if way[1].peak <= GB * self.device_gb]
        if fit:
            said = [f"{_amount(p.peak)} with {name}" for name, p in fit]
            return f"{takes}, {' or '.join(said)}"
        if phase.weights > GB * self.device_gb:
            most = "the network alone is larger: load it in bfloat16 or quantised"
        else:
            most = "nothing tried is enough: give shorter texts, adapt fewer layers"
        if self.shard_base:
            return f"{takes}, and {most}, or share it out over more devices"
        shared = [x.peak for name, x in ways if "shard_base" in name]
        least = f" ({_amount(min(shared))} at least)" if shared else ""
        return (
            f"{takes}, and {most}, or share it out over devices by fully_shard{least}"
        )

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Phase -> its parts and its peak, in bytes."""
        return {
            phase.name: {k: x for k, x in asdict(phase).items() if k != "name"}
            for phase in self.phases
        }

    def to_pandas(self) -> DataFrame:
        """A row for each phase, in bytes.

        Returns:
            A ``pandas.DataFrame``, its index called ``phase``.

        Raises:
            ImportError: If pandas isn't installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'pyro-lora[arviz]'"
            ) from error
        return pd.DataFrame.from_dict(self.to_dict(), orient="index").rename_axis(
            index="phase"
        )

    def _facts(self) -> dict[str, str]:
        facts = {"network": self.network, "batch": self.batch}
        for phase in self.phases:
            parts = {part: getattr(phase, part) for part in _PARTS}
            said = [f"{k} {_amount(x)}" for k, x in parts.items() if x]
            facts[phase.name] = f"{_amount(phase.peak)} ({', '.join(said)})"
        if self.device_gb is not None:
            facts["device_gb"] = f"{self.device_gb:g}"
            large = {phase.name: self._advice(phase) for phase in self.too_large}
            facts |= {f"{name}, too large": says for name, says in large.items()}
        return facts


def plan_memory(
    network: nn.Module | LiftedNetwork | PretrainedConfig,
    *,
    peft_config: AdapterConfig | None = None,
    structure: Structure | None = KFAC(),
    num_particles: int | None = None,
    batch: OneBatch = (8, 128),
    world_size: int = 1,
    shard_base: bool = False,
    model: MakeModel | None = None,
    kernel: Kernel | NoRepulsion | None = None,
    chunk_size: int | None = None,
    gradient_checkpointing: bool = False,
    fisher: Fisher | None = None,
    num_data: int | None = None,
    max_memory_gb: float | None = None,
    device_gb: float | None = None,
    dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """How much memory training, a Laplace fit and predictions will take.

    Nothing is computed: the network may be on the meta device, or a configuration. Each
    phase runs on tensors without values, and what is in use at a time is counted, so
    that this is the memory of PyTorch's tensors; what PyTorch, a GPU's driver and the
    program take themselves comes on top. Kernels are taken to work as on a CPU:
    attention by ``sdpa`` keeps no weight for each pair of tokens.

    Phases are the steps of training one set of weights, by Adam, and of SVGD; a Laplace
    fit's passes over the data, and what it does with the sums; and predictions of one
    batch, by linearising (where it can be done) and by draws.

    Args:
        network: With an adapter, or lifted; or a configuration of transformers.
        peft_config: Of the adapter, for a network without one or a configuration; its
            ``task_type`` says which head a configuration gets.
        structure: Of ``AutoLaplace``; None plans no Laplace.
        num_particles: K of SVGD; None plans none.
        batch: Rows and tokens; or a batch, of which only shapes count (labels
            included). Of several ranks one rank's.
        world_size: Ranks, which share the particles: each has K / W of them at a time,
            but the adapter of all. Of data each has batches of its own.
        shard_base: Whether the ranks share the frozen weights out by FSDP2, each of
            them whole only while it's used: ``fully_shard`` of each block and of the
            network, what is trained in ``ignored_params``. Blocks are the members of
            an ``nn.ModuleList``.
        model: From the lifted network and the number of data to the Pyro model, such as
            those of ``models``; None is the one for the network's head.
        kernel: Of SVGD; None is ``kernels.RBF()``.
        chunk_size: Of SVGD.
        gradient_checkpointing: Whether it's switched on for training, as
            ``gradient_checkpointing_enable`` of transformers' networks does it; where
            the network has it on, and is in training mode, it is anyway.
        fisher: Of ``AutoLaplace``; None is ``"mc"`` for language models, else
            ``"exact"``.
        num_data: N, which counts for ``structures.Exact`` alone; None is two batches.
            Whatever it is, three batches are run at most: the second one's rows count
            as those of many.
        max_memory_gb: Of ``laplace_approximation``.
        device_gb: What there is, in GB: the plan then says what to change where a
            phase takes more.
        dtype: Of a configuration's weights; None is the configuration's own.

    Returns:
        The plan, whose repr is a table.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If a configuration has no ``peft_config``, it can't be told what
            the network is for, it's split over processes already, there are more
            rows than ``structures.Exact`` takes, or the network has no gradient
            checkpointing.

    Example, of a network on the meta device::

        plan = pl.plan_memory(
            LlamaConfig(),
            peft_config=LoraConfig(task_type="CAUSAL_LM"),
            num_particles=4,
        )
        plan["SVGD step"].peak
    """
    kinds: Any = (nn.Module, LiftedNetwork, PretrainedConfig)
    check_kind("network", network, kinds, "a network, or a configuration")
    if structure is not None:
        check_kind("structure", structure, Structure, "such as structures.KFAC()")
    counts = {"num_particles": num_particles, "world_size": world_size}
    counts |= {"chunk_size": chunk_size, "num_data": num_data}
    for name, count in counts.items():
        if count is not None:
            check_count(name, count)
    for name, size in {"max_memory_gb": max_memory_gb, "device_gb": device_gb}.items():
        if size is not None:
            check_positive(name, size)
    check_word("fisher", fisher, ("exact", "mc", "empirical", None))
    planned = _planned_batch(batch)
    whole = described_network(network, peft_config, dtype)
    make_model = _model_for(whole) if model is None else model
    of_ours = (x for own, x in _OUTCOMES.items() if own is make_model)
    outcomes = next(of_ours, _Outcomes(is_ours=False))
    at_once = chunk_size or num_particles or 1
    if num_particles is not None:  # W ranks, or as many as there are particles
        at_once = min(at_once, -(-num_particles // world_size))
    job = _Job(
        network=whole,
        make_model=make_model,
        outcomes=outcomes,
        structure=structure,
        num_particles=num_particles,
        batch=planned,
        kernel=RBF() if kernel is None else kernel,
        chunk_size=at_once,
        gradient_checkpointing=gradient_checkpointing,
        fisher=fisher or outcomes.fisher,
        num_data=num_data,
        max_memory_gb=max_memory_gb,
        world_size=world_size,
        shard_base=shard_base,
    )
    with working_alone(), _quick_collections():
        phases = tuple(job.phases())
        plan = MemoryPlan(
            type(base_of(whole)).__name__,
            planned.words,
            phases,
            device_gb,
            shard_base=shard_base,
        )
        if device_gb is None:
            return plan
        changes = {p.name: tuple(job.smaller(p, device_gb)) for p in plan.too_large}
        return replace(plan, changes=changes)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """A block in which garbage is looked for among what is made in it alone."""
    is_ours = gc.get_freeze_count() == 0
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def _planned_batch(batch: OneBatch) -> _Texts | _Given:
    if isinstance(batch, Mapping):
        return _Given(batch)
    check_kind("batch", batch, Sequence, "(rows, tokens), or a mapping of tensors")
    if len(batch) != 2:
        raise ValueError(f"batch must be (rows, tokens), found {tuple(batch)}.")
    for name, size in zip(("rows", "tokens"), batch, strict=True):
        check_count(f"The {name} of batch", size)
    return _Texts(*batch)


def _model_for(network: nn.Module) -> MakeModel:
    """Our model for a head of transformers.

    Raises:
        ValueError: If there is none.
    """
    base = base_of(network)
    name = type(base).__name__
    tasks = [task for end, task in _HEADS.items() if name.endswith(end)]
    if not tasks:
        raise ValueError(
            f"A {name} may be for anything. Say by model= what it is: "
            "model=pl.models.classification, or a function of the lifted network and "
            "the number of data."
        )
    if tasks == ["SEQ_CLS"] and base.config.num_labels == 1:
        return regression
    return _MODELS[tasks[0]]


def _said(setting: object) -> str:
    return f"{setting:.3g}" if isinstance(setting, float) else repr(setting)


def _amount(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


@dataclass(eq=False)
class _Run:
    """Phases that run one after another on one network without values.

    Attributes:
        lora: The network.
        memory: What is in use.
        shapes: What operations give.
        weights: The network's bytes.
        shares: Of its base.
        activations: What a forward pass has left at most, since the last phase.
    """

    lora: LiftedNetwork
    memory: MemoryInUse
    shapes: WithoutValues
    weights: int
    shares: _Shares
    activations: int = 0

    def begin(self) -> None:
        """Count from here."""
        gc.collect()
        self.memory.most = self.memory.now
        self.activations = 0

    def phase(self, name: str, peak: int | None = None, **parts: int) -> Phase:
        """What has run since the beginning, as a phase."""
        peak = self.memory.most if peak is None else peak
        return Phase(
            name, self.weights, activations=self.activations, peak=peak, **parts
        )

    def watch_forward(self, network: nn.Module) -> None:
        """Look at what the network's calls leave, for a backward pass."""
        before: list[int] = []

        def starts(*_: object) -> None:
            before.append(self.memory.now - self.shares.gathered)

        def ends(*_: object) -> None:
            left = self.memory.now - self.shares.gathered - before.pop()
            if torch.is_grad_enabled():
                self.activations = max(self.activations, left)

        network.register_forward_pre_hook(starts)
        network.register_forward_hook(ends)


class _Shares:
    """A frozen base that ranks share out by FSDP2, and what is whole of it at a time.

    A block's weights are gathered into a buffer, and copied out of it before it runs.
    Forwards the buffer is there until the next block's are copied, backwards the next
    block's already is: two of a block, and three while they are copied, beside the
    weights outside of blocks, which are whole from a forward pass to the end of the
    backward pass (seen with PyTorch 2.13).

    Args:
        network: Without values.
        world_size: Ranks; one has all.
    """

    def __init__(self, network: nn.Module, world_size: int) -> None:
        self._whole: dict[str, Tensor] = {}
        self._is_backward = False
        self.sizes: dict[nn.Parameter, int] = {}
        if world_size == 1:
            return
        for p in network.parameters():
            if not p.requires_grad:  # rows are shared out, and the first has the most
                rows = -(-len(p) // world_size)
                self.sizes[p] = rows * (p.nbytes // max(len(p), 1))
        blocks = _blocks(network)
        rest = self.sizes.keys() - {p for x in blocks for p in x.parameters()}
        for module, name, parameters in [
            (network, "rest", rest),
            *((x, "block", self.sizes.keys() & {*x.parameters()}) for x in blocks),
        ]:
            size = world_size * sum(self.sizes[p] for p in parameters)
            module.register_forward_pre_hook(partial(self._before, name, size))
            module.register_forward_hook(partial(self._after, name, size))

    @property
    def gathered(self) -> int:
        """Bytes of what is whole at the moment."""
        return sum(x.nbytes for x in self._whole.values())

    def _gather(self, name: str, size: int) -> None:
        self._whole |= {
            key: torch.empty(size, dtype=torch.uint8, device="meta")
            for key in ("buffer", name)
        }  # only now the last buffer goes

    def _before(self, name: str, size: int, *_: object) -> None:
        if not self._is_backward and name not in self._whole:
            self._gather(name, size)

    def _after(self, name: str, size: int, *call: Any) -> None:
        if not self._is_backward:  # where a layer may run again
            self._whole.pop("block" if name == "block" else "buffer", None)
        for x in tree_leaves(call[-1]):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(partial(self._backward, name, size))

    def _backward(self, name: str, size: int, _: Tensor) -> None:
        if not self._is_backward:
            self._is_backward = True
            Variable._execution_engine.queue_callback(self._end)
        if name == "block":
            for key in ("block", "buffer"):
                self._whole.pop(key, None)
        if name not in self._whole:
            self._gather(name, size)

    def _end(self) -> None:
        self._is_backward = False
        self._whole.clear()


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The members of its lists of modules that are in no other list."""
    lists = [x for x in network.modules() if isinstance(x, nn.ModuleList)]
    inner = {x for whole in lists for x in whole.modules() if x is not whole}
    return [block for x in lists if x not in inner for block in x]


@contextmanager
def _planned(
    network: nn.Module, world_size: int, answers: Sequence[float] = ()
) -> Iterator[_Run]:
    """A block in which a copy of the network, without values, is lifted.

    Args:
        network: With values or on the meta device; it isn't touched.
        world_size: Ranks that share the base.
        answers: What is known of a run in the block.
    """
    memory, shapes = MemoryInUse(), WithoutValues()
    copied = without_values(network)
    shares = _Shares(copied, world_size)
    with (
        warnings.catch_warnings(),
        without_reading(answers),
        entered(memory),
        entered(shapes),
        entered(FusedAttention()),
    ):
        warnings.simplefilter("ignore")  # of values that are none
        for p in copied.parameters():
            memory.add(p, shares.sizes.get(p))
        for x in copied.buffers():
            memory.add(x)
        lora = lift(copied)
        _recompute_with(lora)
        run = _Run(lora, memory, shapes, memory.now, shares)
        run.watch_forward(copied)
        run.begin()
        yield run


def _switch_checkpointing_on(lora: LiftedNetwork) -> None:
    """As its users do, and in training mode, where transformers' networks mind it.

    Raises:
        ValueError: If there is nothing to switch on.
    """
    base: Any = base_of(lora.network)
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing=True: {type(base).__name__} has none that is "
            "switched on by gradient_checkpointing_enable. Leave it out."
        )
    settings = {"use_reentrant": False, "context_fn": lora.context_fn}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    lora.network.train()


def _recompute_with(lora: LiftedNetwork) -> None:
    """Let a copy's gradient checkpointing ask the copy, where it asked the original."""
    for module in lora.network.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, partial) and function.keywords.get("context_fn"):
            settings = {**function.keywords, "context_fn": lora.context_fn}
            module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                function.func, *function.args, **settings
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """What is planned; the fields are :func:`plan_memory`'s arguments, but for two.

    Attributes:
        outcomes: Of the model.
        draws_at_once: In a prediction by draws.
    """

    network: nn.Module
    make_model: MakeModel
    outcomes: _Outcomes
    structure: Structure | None
    num_particles: int | None
    batch: _Texts | _Given
    kernel: Kernel | NoRepulsion
    chunk_size: int
    gradient_checkpointing: bool
    fisher: Fisher
    num_data: int | None
    max_memory_gb: float | None
    world_size: int
    shard_base: bool
    draws_at_once: int = DRAWS_AT_ONCE

    @property
    def _sharing(self) -> int:
        """Ranks that share the base."""
        return self.world_size if self.shard_base else 1

    def _run(self, answers: Sequence[float] = ()) -> AbstractContextManager[_Run]:
        return _planned(self.network, self._sharing, answers)

    def phases(self) -> Iterator[Phase]:
        """Each of them."""
        yield from self.training()
        if self.structure is not None:
            yield from self.laplace(self.structure)

    def training(self) -> Iterator[Phase]:
        """A step of one weight set, of SVGD, and predictions by particles."""
        with self._run() as run:
            if self.gradient_checkpointing:
                _switch_checkpointing_on(run.lora)
            # Of one particle, which nothing repels, SVGD is training.
            yield self._step(run, "MAP step", NoRepulsion(), 1)[0]
        if self.num_particles is None:
            return
        with self._run() as run:
            if self.gradient_checkpointing:
                _switch_checkpointing_on(run.lora)
            name, number = "SVGD step", self.num_particles
            phase, posterior = self._step(run, name, self.kernel, number)
            yield phase
            name, stays = "predict by particles", {"particles": phase.particles}
            yield self._predicting(run, posterior, name, "sample", stays)

    def laplace(self, structure: Structure) -> Iterator[Phase]:
        """A fit in its two parts, and predictions by it."""
        with self._run(self._answers_of_twin()) as run:
            before = run.memory.now
            noting = _Noting(structure, run.memory, max(1, self._num_batches - 2))
            posterior = self._fitted(run.lora, noting, run.shapes)
            gc.collect()
            stays = {"posterior": run.memory.now - before}
            finish = max(noting.finish, run.memory.most)
            yield run.phase("Laplace fit", noting.passes, factors=noting.factors)
            yield replace(run.phase("Laplace finish", finish, **stays), activations=0)
            if not self.outcomes.by_token:
                name = "predict linearized"
                yield self._predicting(run, posterior, name, "linearized", stays)
            name = "predict by draws"
            yield self._predicting(run, posterior, name, "sample", stays)

    def _step(
        self, run: _Run, name: str, kernel: Kernel | NoRepulsion, num_particles: int
    ) -> tuple[Phase, Posterior]:
        num_data, (batch, *_) = self._batches(run.lora, run.shapes)
        adam = optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]
        svgd = SVGD(
            self.make_model(run.lora, num_data),
            kernel,
            adam,
            num_particles,
            chunk_size=min(self.chunk_size, num_particles),
            init_loc_fn=run.lora.init_to_adapter(jitter=_JITTER),
        )
        for _ in range(2):  # the optimiser has a state then
            svgd.step(**batch)
        states = [x.state_dict()["state"] for x in adam.optim_objs.values()]
        phase = run.phase(
            name,
            particles=tensor_bytes(svgd.get_named_particles()),
            optimizer=tensor_bytes(states),
        )
        return phase, svgd.posterior()

    def _fitted(
        self,
        lora: LiftedNetwork,
        structure: Structure,
        shapes: WithoutValues | None = None,
    ) -> Posterior:
        num_data, batches = self._batches(lora, shapes)
        guide = AutoLaplace(
            self.make_model(lora, num_data),
            init_loc_fn=lora.init_to_adapter(jitter=_JITTER),
            structure=structure,
            fisher=self.fisher,
        )
        return guide.laplace_approximation(
            batches, max_memory_gb=self.max_memory_gb, progress_bar=False
        )

    def _predicting(
        self,
        run: _Run,
        posterior: Posterior,
        name: str,
        method: PredictionMethod,
        stays: Mapping[str, int],
    ) -> Phase:
        batch = self._example(run.lora, run.shapes)
        if "labels" in batch or self.outcomes.is_ours:
            batch["labels"] = None  # left out, the first of a pair would be preferred
        tokens: Any = "last" if self.outcomes.by_token else None
        run.begin()
        predict(
            posterior,
            [batch],
            method=method,
            tokens=tokens,
            chunk_size=self.draws_at_once,
            progress_bar=False,
        )
        return run.phase(name, **stays)

    def _batches(
        self, lora: LiftedNetwork, shapes: WithoutValues | None
    ) -> tuple[int, list[Batch]]:
        """The number of data, and batches that have them all: three at most."""
        number = min(3, self._num_batches)
        batches: list[Batch] = [self._example(lora, shapes) for _ in range(number)]
        return number * self._data_in_batch, batches

    @property
    def _data_in_batch(self) -> int:
        return self.batch.num_data(self.outcomes)

    @property
    def _num_batches(self) -> int:
        """Of a fit: two, unless it keeps rows of all of them rather than their sum."""
        if self.num_data is None or not (self.structure and self.structure.linear):
            return 2
        return max(2, -(-self.num_data // self._data_in_batch))

    def _example(
        self, lora: LiftedNetwork, shapes: WithoutValues | None
    ) -> dict[str, Any]:
        """A batch, with some padding.

        Args:
            lora: The network.
            shapes: What runs it, if it has no values.
        """
        device = next(iter(lora.zeros().values())).device
        batch = self.batch.example(self.outcomes, device)
        for name, x in batch.items():
            if shapes is not None and "mask" in name:
                shapes.mask(x)
        return batch

    def smaller(self, phase: Phase, device_gb: float) -> Iterator[tuple[str, Phase]]:
        """Settings under which a phase takes less, until it fits, and what it takes.

        Args:
            phase: Which.
            device_gb: What there is, in GB.
        """
        ways: list[dict[str, Any]] = [{"chunk_size": 1}]
        base = base_of(self.network)
        if getattr(base, "supports_gradient_checkpointing", False):
            again = {"gradient_checkpointing": True}
            ways += [again, {"chunk_size": 1, **again}]
        if phase.name in _BY_DRAWS:
            ways = [{"draws_at_once": 1}]
        elif phase.name not in _TRAINING:
            least: dict[str, Any] = {"max_memory_gb": device_gb / 20}
            ways = [least]
            if self.structure in (KFAC(), KFAC(reduce=True), EKFAC()):
                reduce = self.structure == KFAC(reduce=True)
                narrow = KFAC(reduce=reduce, rank=_RANK)
                ways += [{"structure": narrow}, {**least, "structure": narrow}]
        ways += [{**ways[-1], "batch": few} for few in self.batch.fewer()]
        if self.world_size > 1 and not self.shard_base:
            shared = [{"shard_base": True, **way} for way in ({}, *ways)]
            is_larger = phase.weights > GB * device_gb  # whatever the other settings
            ways = shared if is_larger else [*ways, *shared]
        for way in ways:
            job = replace(self, **way)
            phases = (
                job.training()
                if phase.name in _TRAINING or job.structure is None
                else job.laplace(job.structure)
            )
            (found,) = (x for x in phases if x.name == phase.name)
            if found.peak < phase.peak:
                words = (f"{_NAMES.get(k, k)}={_said(x)}" for k, x in way.items())
                yield ", ".join(words), found
            if found.peak <= GB * device_gb:
                return

    def _answers_of_twin(self) -> Sequence[float]:
        """What a fit asks of values, answered by a network that has some."""
        if self.structure is None or not self.batch.has_twin:
            return ()
        try:
            return self._twin_fitted(self.structure)
        except ValueError:  # a model that asks for tokens by their ids, perhaps
            return self._twin_fitted(self.structure, is_vocabulary_whole=True)

    def _twin_fitted(
        self, structure: Structure, is_vocabulary_whole: bool = False
    ) -> Sequence[float]:
        with (
            torch.random.fork_rng(),
            warnings.catch_warnings(),
            answers_kept() as answers,
        ):
            warnings.simplefilter("ignore")  # of weights that are at random
            torch.manual_seed(0)
            twin = narrow_twin(self.network, self.batch.rows, is_vocabulary_whole)
            if twin is not None:
                _Shares(twin, self._sharing)  # hooks count, where a network is watched
                self._fitted(lift(twin), structure)
        return answers


class _Noting(Structure):
    """A structure that notes how much memory its passes and its end take.

    Args:
        structure: The structure.
        memory: What is in use.
        number: Of batches for which the second one stands.

    Attributes:
        factors: Bytes of what the first pass sums.
        passes: Most bytes in use in passes over the data.
        finish: Most bytes in use between them and after them.
    """

    def __init__(self, structure: Structure, memory: MemoryInUse, number: int) -> None:
        self._structure, self._memory, self._number = structure, memory, number
        self.linear = structure.linear  # type: ignore[misc]
        self.factors = self.passes = self.finish = 0

    @property
    def num_passes(self) -> int:
        """See the base class."""
        return self._structure.num_passes

    @property
    def first_pass(self) -> BatchStructure:
        """See the base class."""
        return self._few(self._structure.first_pass)

    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """See the base class."""
        self.factors = tensor_bytes([vars(x) for x in factors.values()])
        self.passes = self._since()
        self._complete(self._structure.first_pass, factors)

        def noted(summed: BatchStructure) -> Factors:
            self.finish = max(self.finish, self._since())
            sums = next_pass(self._few(summed))
            self.passes = max(self.passes, self._since())
            self._complete(summed, sums)
            return sums

        return self._structure.gaussian(loc, prior, factors, noted, ranks)

    def _few(self, summed: BatchStructure) -> BatchStructure:
        return summed if self._number == 1 else _FewBatches(summed, self._number)

    def _complete(self, summed: BatchStructure, sums: Factors) -> None:
        """Let what was observed be of all batches, as the rows are.

        Raises:
            ValueError: If they have more rows than the structure takes.
        """
        if self._number > 1 and OBSERVED in sums:
            each = [ObservedFactors((x,)) for x in sums[OBSERVED].batches]
            sums[OBSERVED] = each[0] + each[1].like(self._number) + each[2]
        if summed.max_rows is not None:
            check_rows(sum(map(len, sums[0].batches)), summed.max_rows)

    def _since(self) -> int:
        """Most bytes in use since this was last asked."""
        most, self._memory.most = self._memory.most, self._memory.now
        return most


class _FewBatches(BatchStructure):
    """A pass over three batches, the second one of which stands for more.

    Args:
        summed: The pass.
        number: For how many.
    """

    def __init__(self, summed: BatchStructure, number: int) -> None:
        self.joint = summed.joint  # type: ignore[misc]
        self.max_rows = summed.max_rows
        self._summed, self._number = summed, number
        self._seen: set[int] = set()

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class."""
        for layers in self._summed.batch_factors(chunks, counts):
            yield {
                i: x if i in self._seen else _First(x, self._number)
                for i, x in layers.items()
            }
            self._seen |= layers.keys()


@dataclass(frozen=True)
class _First:
    """Rows of the first batch, to which the second one adds those of many like it.

    Attributes:
        rows: Of the first batch.
        number: Of the others.
    """

    rows: Any
    number: int

    def at(self, places: Tensor) -> _First:
        """Those at places of the flattened (M, B)."""
        return replace(self, rows=self.rows.at(places))

    def plus(self, other: Any, add: Any) -> Any:
        """The rows of all of these."""
        return self.rows.plus(other.like(self.number), add)


def tensor_bytes(values: Any) -> int:
    """Bytes of tensors, those that are there twice once.

    Args:
        values: In mappings and lists, which may be in one another.
    """
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return sum({address(x): x.nbytes for x in tensors}.values())
