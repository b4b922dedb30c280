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
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_lora.ground.summary import FieldsShown, Summarised
from pyro_lora.predict.regression import COVERAGE

NUM_LAYERS_SHOWN = 4  # of the effective parameters by layer
# Share of the draws that they must be worth to be nearly equal: the variance of the log
# weights is then some 0.1, and p is 0.05 nats from q.
NEARLY_EQUAL = 0.9
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


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightedDraws(ABC):
    r"""Draws of q with their importance weights w = p / q.

    Attributes:
        k_hat: Pareto shape of the weights' tail.
        k_hat_error: Its standard error for the rows; 0 where the network itself was run
            on all, NaN where k-hat isn't finite.
        effective_samples: How many equal weights they are worth,
            :math:`(\sum w)^2 / \sum w^2`.
        effective_samples_error: Its standard error for the rows.
        num_samples: S.
    """

    k_hat: float
    k_hat_error: float = 0.0
    effective_samples: float
    effective_samples_error: float = 0.0
    num_samples: int

    @property
    def nearly_equal(self) -> bool:
        """Whether the weights are so alike that their tail is that of rounding."""
        at_least = self.effective_samples - self.effective_samples_error
        return at_least >= NEARLY_EQUAL * self.num_samples

    @property
    def k_hat_standard_error(self) -> float:
        """Of k-hat, for draws and rows together; infinite where it isn't known."""
        error = math.hypot(k_error(self.k_hat, self.num_samples), self.k_hat_error)
        return math.inf if math.isnan(error) else error

    @property
    def weights_fit(self) -> bool | None:
        """Whether the weights are good; None where k-hat's error leaves both open."""
        return self.nearly_equal or self._k_hat_fits(self.k_hat_standard_error)

    @property
    def draws_are_few(self) -> bool:
        """Whether the error for the draws alone leaves both open."""
        error = k_error(self.k_hat, self.num_samples)
        return not self.nearly_equal and self._k_hat_fits(error) is None

    def _k_hat_fits(self, error: float) -> bool | None:
        # One standard error: at two, 50 draws would leave all from 0.15 to 1.5 open.
        bound = good_k(self.num_samples)
        if not self.k_hat - error <= bound:  # also where it is infinite
            return False
        return True if self.k_hat + error <= bound else None

    def _words(self, where: str) -> str:
        if self.nearly_equal:
            return (
                f"{self.num_samples} draws{where} have nearly equal weights p / q, "
                f"worth {self.effective_samples:.1f} equal ones"
            )
        return (
            f"k-hat {self.k_hat:.2f} +- {self.k_hat_standard_error:.2f} over "
            f"{self.num_samples} draws{where} (good below "
            f"{good_k(self.num_samples):.2f})"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Directions(WeightedDraws, FieldsShown):
    """The log joint along the directions in which the data count most.

    The draws are of these directions, all others at the mode.

    Attributes:
        names: Site and layer of each of Q directions.
        shares: The data's share of the precision, (Q,).
        offsets: In standard deviations, (T,).
        log_joint: Less that of the mode, (Q, T), nats; the Gaussian's is
            :math:`-t^2 / 2`.
        log_joint_errors: Their standard errors for the rows that were drawn, (Q, T); 0
            where the network itself was run on all.
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
    draws_log_likelihood: float
    draws_standard_error: float
    draws_expected: float
    num_rows: int
    num_data: int
    refined: bool = False

    @property
    def falls(self) -> tuple[Tensor, Tensor]:
        """How fast the log joint falls, both ways together, and its error, each (Q,).

        As a multiple of what the Gaussian says.
        """
        # Averaged over both ways, what is odd in t (skewness) cancels.
        expected = (-0.5 * self.offsets.square()).mean()
        # A mean's standard error is at most the mean of them.
        error = self.log_joint_errors.mean(-1) / expected.abs()
        return self.log_joint.mean(-1) / expected, error

    @property
    def lines_fit(self) -> bool | None:
        """Whether both ways together the log joint falls as fast, within a factor 2.

        None where the rows' standard error leaves both open.
        """
        if self._misfits():
            return False
        ratio, error = self.falls
        within = (ratio - error > 0.5) & (ratio + error < 2)
        return True if within.all() else None

    def _misfits(self) -> list[int]:
        """Places of the directions that aren't within a factor 2, whatever the rows."""
        ratio, error = self.falls
        fits = (ratio + error > 0.5) & (ratio - error < 2)  # not of NaN
        return (~fits).nonzero()[:, 0].tolist()

    @property
    def draws_fit(self) -> bool:
        """Whether whole draws lose no more than twice what the Gaussian says."""
        # One nat more is little, where the Gaussian itself says next to nothing.
        lost = self.draws_log_likelihood + 2 * self.draws_standard_error
        return lost >= 2 * self.draws_expected - 1

    @property
    def verdict(self) -> str:
        """``"yes"``, ``"no"``, or ``"near the mode"`` where whole draws don't fit.

        ``"unclear"`` where a standard error leaves both yes and no open.
        """
        fit = (self.lines_fit, self.weights_fit)
        if False in fit:
            return "no"
        if None in fit:
            return "unclear"
        return "yes" if self.draws_fit else "near the mode"

    def lines(self) -> list[str]:
        """The numbers in words."""
        in_part = self.num_rows < self.num_data
        result = [self._words(f" of the {len(self.names)} main directions")]
        if misfits := self._misfits():  # k-hat may well be good beside that
            ratio, error = self.falls
            found = ", ".join(
                f"{ratio[q]:.2f} +- {error[q]:.2f} (direction {q + 1})" for q in misfits
            )
            result.insert(
                0,
                "the log joint doesn't fall as fast as the Gaussian, within a factor "
                f"2: times {found}",
            )
        at = " ".join(f"{t:+.0f}" for t in self.offsets.tolist())
        says = " ".join(f"{-(t**2) / 2:.1f}" for t in self.offsets.tolist())
        result.append(f"log joint at {at} sd, where the Gaussian says {says}:")
        for number, (name, share, row) in enumerate(
            zip(self.names, self.shares.tolist(), self.log_joint.tolist(), strict=True),
            start=1,
        ):
            fall = " ".join(f"{x:.1f}" for x in row)
            result.append(f"  {fall}  {number}: mostly {name} ({share:.0%} data)")
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
        if self.verdict == "unclear":
            result.append(f"the errors leave it open: {self._settled_by()} would tell")
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

    def _settled_by(self) -> str:
        settings = []
        of_draws = k_error(self.k_hat, self.num_samples)
        if (
            self.lines_fit is None
            or not self.draws_are_few
            or not self.k_hat_error < of_draws
        ):
            settings.append("max_passes=None")
        if self.draws_are_few:
            settings.append(more_draws(self.num_samples))
        return " and ".join(settings)


@dataclass(frozen=True, kw_only=True)
class Importance(WeightedDraws):
    """Importance weights p / q of a guide's draws (Yao et al. 2018)."""

    @property
    def verdict(self) -> str:
        """``"yes"``, ``"no"``, or ``"unclear"`` where its error leaves both open."""
        return {True: "yes", False: "no", None: "unclear"}[self.weights_fit]

    def lines(self) -> list[str]:
        """The numbers in words."""
        result = [self._words("")]
        if self.verdict == "unclear":
            more = more_draws(self.num_samples)
            result.append(f"the error leaves it open: {more} would tell")
        return result


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


def k_error(k_hat: float, num_samples: int) -> float:
    r"""Standard error of a Pareto shape that was found from S draws, :math:`\hat k`.

    Of M draws in the tail it is :math:`(1 + k) / \sqrt M` asymptotically for
    :math:`k > -1/2` (Hosking & Wallis 1987, https://doi.org/10.2307/1269343, whose k
    has the other sign), and :math:`\hat k = (M k + 5) / (M + 10)` is drawn to 1/2
    (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646).

    >>> round(k_error(0.5, 50), 2), round(k_error(0.5, 1000), 2)
    (0.24, 0.14)
    """
    tail = min(num_samples // 5, math.floor(3 * math.sqrt(num_samples)))
    k = max(((tail + 10) * k_hat - 5) / tail, -0.5)
    return math.sqrt(tail) * (1 + k) / (tail + 10)


def more_draws(num_samples: int) -> str:
    """A setting by which k-hat's standard error is about half as large."""
    return f"num_samples={4 * num_samples}"
