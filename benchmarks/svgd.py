"""Cost of SVGD: the Stein direction, a step, the trunk, and how all of it grows.

Usage: ``python -m benchmarks.svgd [--quick] [--repeats 3] [--device cuda]
[--out benchmarks/results]``, on a quiet machine (Linux, which tells peak memory), with
8 GB to spare. Networks, texts and particles are random; no download.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from pyro.infer import RBFSteinKernel
from pyro.optim import Adam
from torch import Tensor

import pyro_lora as pl
from benchmarks.allocator import SETTINGS, give_back_memory, keep_freed_memory
from benchmarks.devices import allocated
from benchmarks.lifting import (
    Size,
    Texts,
    one_after_another,
    plain_step,
)
from benchmarks.main_job import alternating_medians
from benchmarks.svgd_growth import Job, direction, growth, growth_table, plot
from benchmarks.tables import header, provenance
from pyro_lora.infer.svgd import delta_space, weight_space
from pyro_lora.infer.svgd.delta_space import DeltaSpace
from pyro_lora.infer.svgd.particle_model import (
    ParticlePass,
    check_finite,
    initial_particles,
    particle_model,
)
from pyro_lora.infer.svgd.weight_space import (
    Direction,
    Independent,
    JointSpace,
    Scores,
    SiteSpace,
    scores_at,
)

NUM_PARTICLES = 8
# The targets.
MIN_SPEEDUP, MAX_FLOATS = 20.0, 6.0
MAX_STEIN = 0.05  # of a step
MAX_SHORT, MAX_STEP = 1.0, 1.05  # of as many plain steps
MAX_SHARED, MAX_CACHED = 0.65, 0.55  # of a step without sharing
SPACES: tuple[Any, ...] = ("joint", "site", "delta", "function")


def pyro_direction(particles: Tensor, scores: Tensor) -> Tensor:
    """What ``pyro.infer.SVGD`` does with its kernel."""
    log_kernel, slope = RBFSteinKernel().log_kernel_and_grad(particles)
    kernel = log_kernel.sum(-1).exp()
    repulsion = torch.einsum("nm,nmd->nd", kernel, slope)
    return (kernel @ scores + repulsion) / len(particles)


def status(key: str) -> int:
    """Bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(key))


def peak(run: Job, device: str) -> int:
    """Most bytes in use during a call, beside those before."""
    run()
    if device != "cpu":
        return allocated(run, device)
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def kernel_table(num_weights: int, repeats: int, device: str) -> list[str]:
    """Kernel and Stein direction, against Pyro's."""
    shape = (NUM_PARTICLES, num_weights)
    x, scores = (torch.randn(shape, device=device) for _ in range(2))
    jobs: dict[str, Job] = {
        "joint": lambda: direction(x, scores),
        "Pyro, multivariate": lambda: pyro_direction(x, scores),
    }
    times = alternating_medians(jobs, repeats)
    lines = header("kernel", "ms", "times as fast as Pyro's", "floats over N D")
    pyros = {"joint": "Pyro, multivariate"}
    for name, job in jobs.items():
        floats = peak(job, device) / (4 * x.numel())
        faster = f"{times[pyros[name]] / times[name]:.1f}" if name in pyros else ""
        lines.append(f"| {name} | {1e3 * times[name]:.1f} | {faster} | {floats:.1f} |")
    return [
        *lines,
        f"| target (joint) | | {MIN_SPEEDUP:g} | {MAX_FLOATS:g} |",
    ]


def classifier(lora: pl.LiftedNetwork, **options: Any) -> Callable[..., None]:
    """A Pyro model of texts, whose network is called with the options."""

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        net = lora()
        logits = net(
            input_ids=input_ids, attention_mask=attention_mask, **options
        ).logits
        with pyro.plate("data", 1000, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def step(
    model: Callable[..., None],
    lora: pl.LiftedNetwork,
    texts: Texts,
    kernel: Any,
    num_particles: int = NUM_PARTICLES,
    **settings: Any,
) -> Job:
    """A step of SVGD with Adam."""
    svgd = pl.SVGD(
        model,
        kernel,
        Adam({"lr": 1e-4}),
        num_particles,
        init_loc_fn=lora.init_to_adapter(jitter="auto"),
        **settings,
    )
    return lambda: svgd.step(**texts)


class Update:
    """One update's gradients, and the part of it that is SVGD's own."""

    def __init__(
        self, lora: pl.LiftedNetwork, texts: Texts, num_particles: int
    ) -> None:
        init = lora.init_to_adapter(jitter="auto")
        target = particle_model(classifier(lora), init, None, (), texts)
        particles = initial_particles(target, init, num_particles, (), texts)
        self.at = ParticlePass(target, particles, (), texts, num_particles)

    def gradients(self) -> Scores:
        """Of the log joint."""
        return scores_at(self.at, 1.0)

    def own(self, move: Callable[[ParticlePass, Scores, float], Direction]) -> Job:
        """Direction and diagnostics, of gradients that are known."""
        scores, particles = self.gradients(), self.at.particles

        def job() -> None:
            check_finite(particles, "value")
            check_finite(move(self.at, scores, 1.0).by_site, "direction")
            weight_space.spread(particles)
            delta_space.spread(self.at.target.networks, particles)

        return job


def space_table(size: Size, repeats: int, device: str) -> list[str]:
    """A step in each kernel space, and what of it is SVGD's own."""
    lora, texts = pl.lift(size.network(device)), size.texts(device)
    kernels: dict[str, Any] = {"ensemble": pl.kernels.NoRepulsion()}
    kernels |= {space: pl.kernels.RBF(space=space) for space in SPACES}
    model = classifier(lora)
    steps = alternating_medians(
        {name: step(model, lora, texts, kernel) for name, kernel in kernels.items()},
        repeats,
    )
    update, rbf = Update(lora, texts, NUM_PARTICLES), pl.kernels.RBF()
    spaces = Independent(), JointSpace(rbf), SiteSpace(rbf), DeltaSpace(rbf)
    names = [name for name in kernels if name != "function"]
    own = alternating_medians(
        {n: update.own(s.move) for n, s in zip(names, spaces, strict=True)}, repeats
    )
    own["function"] = steps["function"] - steps["ensemble"]
    lines = header("kernel space", "step, ms", "SVGD's own part, ms", "share", "target")
    for name, value in steps.items():
        lines.append(
            f"| {name} | {1e3 * value:.0f} | {1e3 * own[name]:.1f} | "
            f"{own[name] / value:.2%} | {MAX_STEIN:.0%} |"
        )
    return lines


def plain_table(
    sizes: list[tuple[Size, float]], repeats: int, device: str
) -> list[str]:
    """A step of K particles over K plain steps, by particles in one pass."""
    chunk_sizes = [None, 2, 1]
    names = ["all at once" if c is None else f"chunk_size={c}" for c in chunk_sizes]
    lines = header(
        "batch", "length", f"{NUM_PARTICLES} plain steps, ms", *names, "target"
    )
    for size, target in sizes:
        texts = size.texts(device)
        lora = pl.lift(size.network(device))
        plain = plain_step(size.network(device), texts)
        jobs: dict[str, Job] = {"plain": one_after_another(plain, NUM_PARTICLES)}
        for name, chunk_size in zip(names, chunk_sizes, strict=True):
            jobs[name] = step(
                classifier(lora),
                lora,
                texts,
                pl.kernels.RBF(),
                chunk_size=chunk_size,
            )
        times = alternating_medians(jobs, repeats)
        ratios = [f"{times[name] / times['plain']:.2f}" for name in names]
        lines.append(
            f"| {size.batch} | {size.length} | {1e3 * times['plain']:.0f} | "
            f"{' | '.join(ratios)} | {target} |"
        )
    return lines


def upper_layers(size: Size, device: str) -> pl.LiftedNetwork:
    """A lifted network with adapters on its last two layers only."""
    base: Any = size.network(device).unload()
    vars(base).pop("peft_config", None)
    config = LoraConfig(
        r=8,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        layers_to_transform=[size.layers - 2, size.layers - 1],
    )
    return pl.lift(get_peft_model(base, config).eval())  # a trunk without dropout


def trunk_table(size: Size, repeats: int, device: str) -> list[str]:
    """A step with adapters on the last two layers, by what happens below them."""
    texts = size.texts(device)
    apart, shared, cached = (upper_layers(size, device) for _ in range(3))
    kernel = pl.kernels.RBF()
    # Who asks for every layer's states gets those of each particle.
    unshared = classifier(apart, output_hidden_states=True)
    with pl.cached_trunk(cached):
        times = alternating_medians(
            {
                "for each particle": step(unshared, apart, texts, kernel),
                "once a batch": step(classifier(shared), shared, texts, kernel),
                "cached": step(classifier(cached), cached, texts, kernel),
            },
            repeats,
        )
    unit = times["for each particle"]
    targets = {"once a batch": MAX_SHARED, "cached": MAX_CACHED}
    lines = header("the trunk runs", "step, ms", "relative", "target")
    for name, value in times.items():
        lines.append(
            f"| {name} | {1e3 * value:.0f} | {value / unit:.2f} | "
            f"{targets.get(name, '')} |"
        )
    return lines


def gradient_times(
    size: Size, counts: list[int], repeats: int, device: str
) -> dict[int, float]:
    """Seconds of the gradients of N particles."""
    lora, texts = pl.lift(size.network(device)), size.texts(device)
    jobs: dict[str, Job] = {
        str(count): Update(lora, texts, count).gradients for count in counts
    }
    times = alternating_medians(jobs, repeats)
    return {count: times[str(count)] for count in counts}


def report(repeats: int, device: str, quick: bool, out: Path | None) -> list[str]:
    """All tables, in Markdown; the plot goes to ``out``."""
    size = Size(layers=6, hidden=384, batch=32, length=32)
    others = [(8, 16, MAX_SHORT), (32, 32, MAX_STEP), (8, 128, MAX_STEP)]
    num_weights, counts, sizes = 10**6, [2, 4, 8, 16, 32, 64], [10**4, 10**5, 10**6]
    sizes.append(10**7)
    passes = [1, 4, 16, 64]
    if quick:
        size, others = Size(layers=3, hidden=64, batch=2, length=4), [(2, 4, MAX_SHORT)]
        num_weights, counts, sizes, passes = 10**4, [2, 4], [10**3, 10**4], [1, 2]
    plain = [(replace(size, batch=b, length=t), target) for b, t, target in others]
    times = growth(counts, sizes, repeats, device)
    gradients = gradient_times(plain[0][0], passes, repeats, device)
    if out is not None:
        plot(times, gradients, out / "svgd_growth.png")
    lines = [
        "# Cost of SVGD",
        "",
        f"Medians of {repeats}, the jobs taking turns, float32.",
        "",
        provenance(device=device),
        "",
        f"Kernel and Stein direction of N={NUM_PARTICLES} particles of D={num_weights} "
        "weights; peak memory beside particles and gradients:",
        "",
        *kernel_table(num_weights, repeats, device),
        "",
        f"The networks are BERTs of MiniLM's shape ({size.layers} layers of "
        f"{size.hidden}, random weights), LoRA r=8 on query and value. A step of "
        f"K={NUM_PARTICLES} particles, adapters on all layers, batch {size.batch}, "
        f"length {size.length}. SVGD's own part is kernel, direction and diagnostics; "
        "in function space, what the step costs more than an ensemble's:",
        "",
        *space_table(size, repeats, device),
        "",
        f"A step of K={NUM_PARTICLES} particles (joint), over as many steps of plain "
        "PyTorch, Adam on the PEFT model:",
        "",
        *plain_table(plain, repeats, device),
        "",
        f"Adapters on the last 2 of {size.layers} layers, K={NUM_PARTICLES}:",
        "",
        *trunk_table(size, repeats, device),
        "",
        "Growth of the Stein direction with N and D, and of the gradients with N "
        f"(batch {plain[0][0].batch}, length {plain[0][0].length}):",
        "",
        *growth_table(times, gradients),
        "",
        *([] if out is None else ["![Cost over N D and N](svgd_growth.png)", ""]),
    ]
    if device == "cpu" and keep_freed_memory():
        lines += [
            f"A step over as many plain steps once more, both with `{SETTINGS}`, by "
            "which glibc keeps the memory of freed tensors:",
            "",
            *plain_table(plain, repeats, device),
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    pyro.set_rng_seed(0)
    if args.quick:
        print("\n".join(report(1, args.device, quick=True, out=None)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    lines = report(args.repeats, args.device, quick=False, out=args.out)
    print("\n".join(lines))
    (args.out / "svgd.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
