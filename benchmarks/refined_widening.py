r"""When may a refined posterior be widened? Rules that need no held-out label.

Usage: ``python -m benchmarks.refined_widening --data FOLDER [--seeds 2]
[--sets agnews sst2] [--epochs 2 4 8 25] [--shard 0/2]
[--out benchmarks/results]``; ``--report`` writes the table of what there is.

Network, rows and training are those of ``benchmarks.refined``. All rules share the mean
that ``refine()`` finds. Beside the evidence's width there are

- the same prior with the Fisher information expected under the Gaussian itself,
  :math:`E[W]`, in place of that at its mean: the covariance with the least
  Kullback-Leibler divergence to the linearised network's posterior (Opper & Archambeau
  2009, "The variational Gaussian approximation revisited");
- a choice between step 1 alone and each of these by leave-one-out. The weights knew
  each datum, so that leaving its likelihood out must also move the mean: as under the
  prior around the untrained adapter (A as trained, all else 0) at whose mode the data
  are as likely as at these weights. Early stopping is taken to be that prior.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

import pyro_lora as pl
from benchmarks.refined import at_weights, predicted, run
from benchmarks.runs import Result, arguments, run_or_report
from benchmarks.seed_runs import Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.curvature import linear_model
from pyro_lora.curvature.dual_gaussian import DualGaussian, Roots, cholesky_of
from pyro_lora.ground.weights import Weights

SETS, EPOCHS = ("agnews", "boolq_closed", "sst2", "vader"), (2, 4, 8, 25)
NUM_POINTS, NUM_ROUNDS = 128, 12  # of the expectations
NUM_BISECTIONS = 7
TITLES = {
    "map": "MAP",
    "step 1": "step 1 alone",
    "both": "both steps, evidence",
    "expected": "both steps, expected Fisher information",
    "loo": "step 1 or both, by leave-one-out",
    "loo expected": "step 1 or expected, by leave-one-out",
}


def expected_roots(gaussian: DualGaussian) -> Roots:
    r"""Roots of :math:`E_q[W]`, q the Gaussian with these roots: a fixed point."""
    kernel = gaussian.rows.kernel(gaussian.prior_precision)
    z = linear_model.data_under(gaussian, gaussian.loc).offset
    (part,) = gaussian.observations
    num, width = part.at_fit.shape
    points = _normal_points(width)
    each = torch.arange(num).repeat(len(points))
    roots = gaussian.roots
    for _ in range(NUM_ROUNDS):
        inside = torch.linalg.solve_triangular(
            cholesky_of(kernel, roots), roots.right(kernel), upper=False
        ).mT.reshape(num, width, -1)
        own = kernel.reshape(num, width, num, width).diagonal(dim1=0, dim2=2)
        sigma = own.movedim(-1, 0) - inside @ inside.mT
        root = torch.linalg.cholesky(sigma + 1e-9 * torch.eye(width).double())
        at = z.reshape(num, width) + torch.einsum("nij,qj->qni", root, points)
        of_points = part.where(each).at(at.flatten(0, 1)).root
        w = (of_points @ of_points.mT).unflatten(0, (len(points), num)).mean(0)
        values, vectors = torch.linalg.eigh(w)
        roots = Roots((vectors * values.clamp_min(0).sqrt()[:, None, :],))
    return roots


def _normal_points(width: int) -> Tensor:
    """Of a standard normal, quasi-random, with its first two moments, (Q, M)."""
    u = SobolEngine(width, scramble=True, seed=0).draw(NUM_POINTS // 2).double()
    x = math.sqrt(2) * torch.erfinv(2 * u - 1)
    x = torch.cat([x, -x])
    root = torch.linalg.cholesky(x.mT @ x / len(x))
    return torch.linalg.solve_triangular(root, x.mT, upper=False).mT


def matched_precision(gaussian: DualGaussian, around: Weights, like: float) -> float:
    """The tau of N(around, 1/tau) at whose mode the data have this log likelihood."""
    ones = {site: x.new_ones(()) for site, x in gaussian.loc.items()}
    gram = gaussian.rows.kernel(ones)
    data = linear_model.data_under(gaussian, around)
    first = math.log10(float(gram.diagonal().mean()))
    low, high = first - 4.5, first + 2
    start = None
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        mode = linear_model.find_mode(gram / 10**middle, data, start, 1e-5)
        start = mode.at.pull
        weak = float(mode.at.log_likelihood) > like
        low, high = (middle, high) if weak else (low, middle)
    return float(10 ** ((low + high) / 2))


def left_out(gaussian: DualGaussian, matched: float) -> float:
    """Mean leave-one-out log density, the mean moved as under the matched prior."""
    tau = {site: x.new_tensor(matched) for site, x in gaussian.loc.items()}
    as_mode = replace(gaussian, mode_precision=gaussian.rows.by_matrix(tau))
    return float(linear_model.log_leave_one_out(as_mode).mean())


def run_one(job: Setting) -> Result:
    """All rules on one data set, number of epochs and seed."""
    rows, labels = job.train.by_length(), job.test.labels
    mode = job.fit_map(job.train)
    near = job.laplace(rows, mode, pl.structures.Exact()).refine()
    step_1 = linear_model.checked(near.gaussian)
    assert step_1.mode_precision is not None
    step_1 = step_1.with_prior_precision(step_1.mode_precision)
    both = linear_model.checked(near.optimize_prior().gaussian)
    gaussians = {
        "step 1": step_1,
        "both": both,
        "expected": replace(both, roots=expected_roots(both)),
    }
    untrained = {s: x if s[-2:] == ".A" else 0 * x for s, x in mode.items()}
    matched = matched_precision(step_1, untrained, float(near.log_likelihood))
    loo = {name: left_out(g, matched) for name, g in gaussians.items()}
    log_probs = predicted(job, gaussians) | {"map": at_weights(job, job.test, mode)}
    nll = {
        name: -float(log_p.gather(1, labels[:, None]).mean())
        for name, log_p in log_probs.items()
    }
    return {"nll": nll, "loo": loo}


def with_choices(result: Result) -> dict[str, float]:
    """NLL of each rule, those that choose among others with them."""
    nll, loo = dict(result["nll"]), result["loo"]
    for name, wide in (("loo", "both"), ("loo expected", "expected")):
        nll[name] = nll[max(("step 1", wide), key=loo.__getitem__)]
    return nll


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for kept_as, result in there.items():
        _, name, _, epochs, _ = kept_as.split("-")
        results.setdefault((name, int(epochs)), []).append(with_choices(result))
    keys = sorted(results)
    every = [r for of_key in results.values() for r in of_key]
    lines = [
        "# When to widen",
        "",
        "Test NLL of rules that need no held-out label, in the settings of "
        "`refined.md`, 500 rows. Mean ± standard error over the seeds, where there are "
        f"several; worst and mean are over all {len(every)} fits.",
        "",
        provenance(),
        "",
        *header("data, epochs", "seeds", *TITLES.values()),
    ]
    for name, epochs in keys:
        own = results[name, epochs]
        cells = [over_seeds((r[rule] for r in own), 3) for rule in TITLES]
        lines.append(row(f"{name}, {epochs}", str(len(own)), *cells))
    means = [f"{fmean(r[rule] for r in every):.3f}" for rule in TITLES]
    lines.append(row("mean", "", *means))
    worst = [f"{max(r[rule] - r['map'] for r in every):+.3f}" for rule in TITLES]
    lines.append(row("worst, less MAP's", "", *worst))
    counts = [str(sum(r[rule] > r["map"] + 0.005 for r in every)) for rule in TITLES]
    lines.append(row("worse than MAP by .005", "", *counts))
    return [*lines, ""]


def main() -> None:
    parser = arguments(__doc__, "refined_widening", SETS, rows=500)
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.set_defaults(network="minilm_2")
    run_or_report(parser.parse_args(), partial(run, run_one=run_one), report)


if __name__ == "__main__":
    main()
