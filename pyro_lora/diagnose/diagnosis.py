"""What a diagnosis finds, as numbers and in words: one frozen value for each question.

A value says its verdict, a word or two, and the lines of numbers behind it; a question
without an answer has the reason. Printed, in part:

    Is the mode stationary?     yes           g' P^-1 g = 0.211 against 9.4 ...
    Are particles diverse?      -             LaplacePosterior has none

One more question is one more class, with a row in ``_QUESTIONS`` and a function in
:mod:`~pyro_lora.diagnose.diagnose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_lora.ground.summary import FieldsShown, Summarised
from pyro_lora.predict.regression import COVERAGE

NUM_LAYERS_SHOWN = 4  # of the effective parameters by layer
TOO_ALIKE = 0.5  # of the disagreement that a calibrated ensemble would have
_GIVE_HELD_OUT = "give held_out= for what counts: data not trained on"


class LeftOut(Exception):
    """Why a question has no answer here."""


@dataclass(frozen=True, kw_only=True)
class Stationarity:
    r"""Is the mode a mode of the log joint?

    Attributes:
        newton_decrement: :math:`g^T P^{-1} g`, nats: twice what a Newton step gains.
        effective_parameters: :math:`\mathrm{tr}(F P^{-1})`, what it is small against.
    """

    newton_decrement: float
    effective_parameters: float

    @property
    def verdict(self) -> str:
        """``"yes"`` or ``"no"``."""
        return "yes" if self.newton_decrement <= self.effective_parameters else "no"

    def lines(self) -> list[str]:
        """The numbers in words."""
        words = (
            f"g' P^-1 g = {self.newton_decrement:.3g} against "
            f"{self.effective_parameters:.3g} effective parameters"
        )
        if self.verdict == "no":
            return [words, "train longer, or with the prior that the posterior has"]
        return [words]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Directions(FieldsShown):
    """The log joint along the directions in which the data count most.

    Attributes:
        names: Site and layer of each of Q directions.
        shares: The data's share of the precision, (Q,).
        offsets: In standard deviations, (T,).
        log_joint: Less that of the mode, (Q, T), nats; the Gaussian's is
            :math:`-t^2 / 2`.
        log_joint_errors: Their standard errors for the rows that were drawn, (Q, T); 0
            where the network itself was run on all.
        k_hat: Pareto shape of the weights p / q for draws of these directions.
        k_hat_error: Its standard error for the rows; NaN where k-hat isn't finite.
        num_samples: Draws that k-hat is from.
        draws_log_likelihood: Mean over whole draws less that of the mode, nats.
        draws_standard_error: Of that mean, for draws and rows.
        draws_expected: What the Gaussian says, minus half the effective parameters.
        num_rows: Data that the network itself was run on; of all others it was
            linearised.
        num_data: N.
        refined: Whether the Gaussian is about a network that is linearised elsewhere
            than at its mode, so that the network itself may be another one there.
    """

    names: tuple[str, ...]
    shares: Tensor
    offsets: Tensor
    log_joint: Tensor
    log_joint_errors: Tensor
    k_hat: float
    k_hat_error: float
    num_samples: int
    draws_log_likelihood: float
    draws_standard_error: float
    draws_expected: float
    num_rows: int
    num_data: int
    refined: bool = False

    @property
    def lines_fit(self) -> bool:
        """Whether both ways together the log joint falls as fast, within a factor 2."""
        # Averaged over both ways, what is odd in t (skewness) cancels.
        ratio = self.log_joint.mean(-1) / (-0.5 * self.offsets.square()).mean()
        return bool(((ratio > 0.5) & (ratio < 2)).all())

    @property
    def draws_fit(self) -> bool:
        """Whether whole draws lose no more than twice what the Gaussian says."""
        # One nat more is little, where the Gaussian itself says next to nothing.
        lost = self.draws_log_likelihood + 2 * self.draws_standard_error
        return lost >= 2 * self.draws_expected - 1

    @property
    def verdict(self) -> str:
        """``"yes"``, ``"no"``, or ``"near the mode"`` where whole draws don't fit."""
        if not (self.lines_fit and self.k_hat <= good_k(self.num_samples)):
            return "no"
        return "yes" if self.draws_fit else "near the mode"

    def lines(self) -> list[str]:
        """The numbers in words."""
        in_part = self.num_rows < self.num_data
        error = f" +- {self.k_hat_error:.2f}" if in_part else ""
        result = [
            f"k-hat {self.k_hat:.2f}{error} in the {len(self.names)} main directions "
            f"(good below {good_k(self.num_samples):.2f})"
        ]
        at = " ".join(f"{t:+.0f}" for t in self.offsets.tolist())
        says = " ".join(f"{-(t**2) / 2:.1f}" for t in self.offsets.tolist())
        result.append(f"log joint at {at} sd, where the Gaussian says {says}:")
        for name, share, row in zip(
            self.names, self.shares.tolist(), self.log_joint.tolist(), strict=True
        ):
            fall = " ".join(f"{x:.1f}" for x in row)
            result.append(f"  {fall}  {name} ({share:.0%} data)")
        if in_part:
            result.append(
                f"  by {self.num_rows} rows of {self.num_data}, the others linearised: "
                f"+- {float(self.log_joint_errors.max()):.2g} at most"
            )
        result.append(
            f"a whole draw loses {-self.draws_log_likelihood:.3g} +- "
            f"{self.draws_standard_error:.2g} nats of log likelihood, where the "
            f"Gaussian says {-self.draws_expected:.3g}"
        )
        if self.refined and self.verdict != "yes":
            result += [
                "all of this is about the network itself, not linearised, at weights "
                "where a refined",
                "posterior doesn't claim to know it: predictions by 'linearized', the "
                "default, aren't",
                "judged by it. For draws of the network train on and fit anew, or take "
                "for_sampling()",
            ]
        elif not self.draws_fit:
            result.append("predict by method='linearized', not 'sample'")
        return result


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Importance weights p / q of a guide's draws (Yao et al. 2018).

    Attributes:
        k_hat: Their Pareto shape.
        num_samples: Draws that it is from.
    """

    k_hat: float
    num_samples: int

    @property
    def verdict(self) -> str:
        """``"yes"`` or ``"no"``."""
        return "yes" if self.k_hat <= good_k(self.num_samples) else "no"

    def lines(self) -> list[str]:
        """The numbers in words."""
        return [
            f"k-hat {self.k_hat:.2f} over {self.num_samples} draws (good below "
            f"{good_k(self.num_samples):.2f})"
        ]


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How far particles, or a mixture's components, differ in what they predict.

    Attributes:
        num_particles: K.
        disagreement: Share of the data where two particles predict different
            classes, averaged over the pairs.
        error: Share that a particle gets wrong, averaged; None without labels.
        epistemic_share: Epistemic over total entropy, both averaged over the data.
    """

    num_particles: int
    disagreement: float
    error: float | None
    epistemic_share: float

    @property
    def verdict(self) -> str:
        """``"yes"``, ``"hardly"``, or ``"no"`` where no two of them differ."""
        if self.disagreement == 0:
            return "no"
        if self.error is not None and self.disagreement < TOO_ALIKE * self.error:
            return "hardly"
        return "yes"

    def lines(self) -> list[str]:
        """The numbers in words."""
        result = [
            f"two of {self.num_particles} disagree on {self.disagreement:.1%} of the "
            f"data; {self.epistemic_share:.1%} of the entropy is epistemic"
        ]
        if self.error is not None:
            result.append(
                f"one errs on {self.error:.1%}, which is how often two would disagree "
                "if they were calibrated together"
            )
        return result


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Charge(FieldsShown):
    """Whether the data or the prior say where the weights are.

    Attributes:
        by_layer: Site -> effective number of parameters of each layer, (L,).
        num_weights: Site -> weights in each layer.
    """

    by_layer: Mapping[str, Tensor]
    num_weights: Mapping[str, int]

    @property
    def effective_parameters(self) -> float:
        """Of all layers together."""
        return float(sum(float(x.sum()) for x in self.by_layer.values()))

    @property
    def total_weights(self) -> int:
        """D."""
        return sum(n * len(self.by_layer[s]) for s, n in self.num_weights.items())

    @property
    def verdict(self) -> str:
        """``"likelihood"`` or ``"prior"``, who decides on more than half of them."""
        half = self.total_weights / 2
        return "likelihood" if self.effective_parameters > half else "prior"

    def lines(self) -> list[str]:
        """The numbers in words."""
        rows = [
            (float(value), f"{site}[{layer}]" if len(values) > 1 else site, site)
            for site, values in self.by_layer.items()
            for layer, value in enumerate(values)
        ]
        rows = sorted(rows, reverse=True)[:NUM_LAYERS_SHOWN]
        return [
            f"the data determine {self.effective_parameters:.4g} of "
            f"{self.total_weights:,} weights",
            "most of them in",
            *(
                f"  {value:.3g} of {self.num_weights[site]:,}  {name}"
                for value, name, site in rows
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Whether predicted probabilities are too sure.

    Attributes:
        overconfidence: Mean probability of the predicted class less accuracy.
        standard_error: Of that.
        ece: Expected calibration error.
        num_data: N.
        held_out: Whether the data are other than those trained on.
    """

    overconfidence: float
    standard_error: float
    ece: float
    num_data: int
    held_out: bool

    @property
    def verdict(self) -> str:
        """``"over"``, ``"under"``, or ``"neither"`` within two standard errors."""
        if abs(self.overconfidence) <= 2 * self.standard_error:
            return "neither"
        return "over" if self.overconfidence > 0 else "under"

    def lines(self) -> list[str]:
        """The numbers in words."""
        where = "held-out" if self.held_out else "training"
        result = [
            f"confidence less accuracy {self.overconfidence:+.3f} +- "
            f"{self.standard_error:.3f}, ECE {self.ece:.3f}, on {self.num_data} "
            f"{where} data"
        ]
        return result if self.held_out else [*result, _GIVE_HELD_OUT]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Whether the intervals of real outcomes are too narrow.

    Attributes:
        coverage: Share of the outcomes inside their central 90% intervals.
        num_data: N.
        held_out: Whether the data are other than those trained on.
    """

    coverage: float
    num_data: int
    held_out: bool

    @property
    def standard_error(self) -> float:
        """Of the coverage, if it were right: binomial, one trial a datum.

        Several outputs of a datum may err together, and so count as one.
        """
        return math.sqrt(COVERAGE * (1 - COVERAGE) / self.num_data)

    @property
    def verdict(self) -> str:
        """``"over"``, ``"under"``, or ``"neither"`` within two standard errors."""
        excess = self.coverage - COVERAGE
        if abs(excess) <= 2 * self.standard_error:
            return "neither"
        return "under" if excess > 0 else "over"

    def lines(self) -> list[str]:
        """The numbers in words."""
        where = "held-out" if self.held_out else "training"
        result = [
            f"{self.coverage:.1%} of {self.num_data} {where} data inside the central "
            f"{COVERAGE:.0%} interval, +- {self.standard_error:.1%} by chance"
        ]
        return result if self.held_out else [*result, _GIVE_HELD_OUT]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Diagnosis(Summarised):
    """Five questions to a posterior; printed, a short table in words.

    Attributes:
        posterior: Its kind.
        num_data: N.
        stationarity: Is the mode stationary?
        gaussian: Is the Gaussian believable?
        diversity: Are particles diverse?
        charge: Is the prior or the likelihood in charge?
        confidence: Is it over- or under-confident?
        left_out: Field -> why it is None.
    """

    posterior: str
    num_data: int
    stationarity: Stationarity | None
    gaussian: Directions | Importance | None
    diversity: Diversity | None
    charge: Charge | None
    confidence: Confidence | Coverage | None
    left_out: Mapping[str, str]

    def _facts(self) -> dict[str, str]:
        facts = {"posterior": self.posterior, "num_data": str(self.num_data)}
        for field in _QUESTIONS:
            answer = getattr(self, field)
            if answer is None:
                facts[field] = f"- ({self.left_out[field]})"
            else:
                facts[field] = f"{answer.verdict} ({answer.lines()[0]})"
        return facts

    def __str__(self) -> str:
        rows = [f"{self.posterior}, {self.num_data} data"]
        for field, question in _QUESTIONS.items():
            answer = getattr(self, field)
            verdict = "-" if answer is None else answer.verdict
            lines = [self.left_out[field]] if answer is None else answer.lines()
            rows.append(f"{question:<28}{verdict:<14}{lines[0]}")
            rows += [" " * 42 + line for line in lines[1:]]
        return "\n".join(rows)


_QUESTIONS = {
    "stationarity": "Is the mode stationary?",
    "gaussian": "Is the density believable?",
    "diversity": "Are particles diverse?",
    "charge": "Prior or likelihood?",
    "confidence": "Over- or under-confident?",
}


def good_k(num_samples: int) -> float:
    r"""The largest believable Pareto shape of S weights, :math:`1 - 1 / \log_{10} S`.

    At most .7 (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646).

    >>> round(good_k(50), 2)
    0.41
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)
