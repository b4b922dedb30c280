r"""What every kind of prediction does: N data that are counted, chosen, joined, shown.

A kind is a frozen value with some fields that have a row for each datum, along a dim
that it names, and others that all data share. Of classes, for instance,

    log_probs (N, C): 0, draw_log_probs (S, N, C): 1, labels (N,): 0; ordered: shared

so that ``prediction[10:20]`` takes rows 10 to 19 along these dims, and
``concatenated`` puts the rows of several predictions after one another. One more kind
is one more subclass, in a file of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.summary import Summarised
from pyro_lora.lifting.lifted_network import LiftedNetwork

if TYPE_CHECKING:
    from pandas import DataFrame

Index = int | slice | Sequence[int] | Sequence[bool] | Tensor | np.ndarray

_NAMES_SHOWN = 6  # of the classes, in a line
_OUTPUTS = 2  # dims of numbers that are outputs of data, (N, P)

_RMSE = 0.1  # of the mode's, by which that must be ahead
_NUM_ERRORS = 3.0  # standard errors of the mean over the data


class AnyPrediction(OutsideAutocast, Summarised):
    """N data's predictions of one kind, frozen: every function of it makes a new one.

    ``len(prediction)`` is N. ``prediction[10:20]``, an index tensor or list, and a mask
    of N booleans choose data, in that order and as often as they are named; one number
    is one datum. All that is known of these data stays.
    """

    _row: ClassVar[str] = "datum"  # what a row of the table is

    @property
    @abstractmethod
    def labels(self) -> Tensor | None:
        """The outcomes, as each kind has them; None where there are none."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """C; None of numbers."""

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def metrics(self, *, num_bootstrap: int = 0) -> dict[str, float]:
        """Quality against the labels, by name."""

    @abstractmethod
    def columns(self) -> dict[str, np.ndarray]:
        """A table, one row a datum or a token, name -> column."""

    @abstractmethod
    def with_labels(self, labels: Tensor, place: str = "The prediction") -> Self:
        """The same prediction with the outcomes of its data.

        Args:
            labels: One for each datum.
            place: What the data are, for the error.

        Raises:
            ValueError: If they are something else.
        """

    @abstractmethod
    def with_names_of(self, networks: Sequence[LiftedNetwork]) -> Self:
        """The same with the names that a network has for its classes, if it has any."""

    @abstractmethod
    def worse_than(self, at_mode: Self) -> str | None:
        """In which words it's far worse than the mode's prediction; None if it isn't.

        Args:
            at_mode: Of the same data.
        """

    @property
    @abstractmethod
    def _has_label(self) -> Tensor:
        """Which data have a label that counts, (N,), where there are labels."""

    @abstractmethod
    def _rows(self, rows: Tensor) -> Self:
        """The data of an index, (N',), on the CPU."""

    @classmethod
    @abstractmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        """All data of one prediction or more of this kind."""

    def __getitem__(self, index: Index) -> Self:
        return self._rows(_chosen(index, len(self)))

    def labelled(self, caller: str = "labelled") -> Self:
        """The data that have a label.

        Args:
            caller: What needs them, for the error.

        Raises:
            ValueError: If there are none.
        """
        self._labels(caller)
        # What the likelihood masks, or has as missing, is in no metric's mean.
        rows = self._has_label
        if not bool(rows.any()):
            raise ValueError(
                f"{caller} needs labels, and no datum of this prediction has one that "
                "counts: all are masked or missing."
            )
        return self if bool(rows.all()) else self[rows]

    def to_pandas(self) -> DataFrame:
        """The table of :meth:`columns`, its index called ``datum`` or ``token``.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            ImportError: If pandas isn't installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'pyro-lora[arviz]'"
            ) from error
        columns = self.columns()
        size = len(next(iter(columns.values())))
        return pd.DataFrame(columns, index=pd.RangeIndex(size, name=self._row))

    @classmethod
    def concatenated(cls, predictions: Sequence[Self]) -> Self:
        """The data of several predictions, in order, as one.

        Args:
            predictions: All of this kind, with labels or all without, and of as many
                classes or draws.

        Returns:
            One prediction.

        Raises:
            TypeError: If one is of another kind.
            ValueError: If there are none, or they don't fit each other.
        """
        predictions = list(predictions)
        if not predictions:
            raise ValueError("concatenated got no predictions; give at least one.")
        for index, prediction in enumerate(predictions):
            if not isinstance(prediction, cls):
                raise TypeError(
                    f"predictions[{index}] is a {type(prediction).__name__}, expected "
                    f"a {cls.__name__}: concatenate predictions of one kind."
                )
        return cls._joined(predictions)

    def _labels(self, caller: str) -> Tensor:
        """The labels.

        Raises:
            ValueError: If there are none.
        """
        if self.labels is None:
            raise ValueError(
                f"{caller} needs labels, and this prediction has none. Put 'labels' "
                "(what the likelihood observes) into every batch given to predict."
            )
        return self.labels


class NumberPrediction(AnyPrediction):
    """Numbers: N of them, or P outputs for each of N data."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of a new outcome, (N,) or (N, P)."""

    @property
    @abstractmethod
    def noise_variance(self) -> Tensor:
        """Mean variance of the noise, (N,) or (N, P): what more data would leave."""

    @property
    @abstractmethod
    def weight_variance(self) -> Tensor:
        """Variance of the mean under the posterior, (N,) or (N, P)."""

    @abstractmethod
    def log_prob(self, values: Tensor) -> Tensor:
        """Log density, or probability, of outcomes, nats, (N,) or (N, P)."""

    @property
    @abstractmethod
    def has_label(self) -> Tensor:
        """Which outcomes have a label, (N,) or (N, P).

        Raises:
            ValueError: If there are no labels at all.
        """

    @cached_property
    def variance(self) -> Tensor:
        """Variance of a new outcome, of noise and weights, (N,) or (N, P)."""
        # Var y = E[Var(y | w)] + Var(E[y | w]), the law of total variance.
        return self.noise_variance + self.weight_variance

    @property
    def num_classes(self) -> None:
        """None: they are numbers."""
        return None

    def columns(self) -> dict[str, np.ndarray]:
        """A table, one row a datum: mean, standard deviations, the label.

        ``mean``, ``sd``, ``noise_sd``, ``weight_sd`` and, where there are labels,
        ``label``; with P outputs ``mean_0`` and so on.
        """
        columns = {
            "mean": self.mean,
            "sd": self.variance.sqrt(),
            "noise_sd": self.noise_variance.sqrt(),
            "weight_sd": self.weight_variance.sqrt(),
        }
        if self.labels is not None:
            columns["label"] = self.labels
        if self.mean.ndim == _OUTPUTS:
            columns = {
                f"{name}_{p}": x
                for name, values in columns.items()
                for p, x in enumerate(values.mT)
            }
        return {name: x.cpu().numpy() for name, x in columns.items()}

    def with_labels(self, labels: Tensor, place: str = "The prediction") -> Self:
        """The same prediction with the outcomes of its data.

        Args:
            labels: (N,) or (N, P), NaN where there is none; a column (N, 1), too.
            place: What the data are, for the error.

        Raises:
            ValueError: If they are something else.
        """
        shape = tuple(self.mean.shape)
        if labels.shape == (*shape, 1):  # as the network's outputs are
            labels = labels[..., 0]
        check_labels(labels, shape, place)
        return replaced(self, labels=labels.to(self.mean))

    def with_names_of(self, networks: Sequence[LiftedNetwork]) -> Self:
        """The same: numbers have no classes."""
        return self

    def worse_than(self, at_mode: Self) -> str | None:
        """Of the mean, by its squared error."""
        if self.labels is None:
            # Where the mean has moved by more than the noise, by the mode's own word.
            shift = (self.mean - at_mode.mean).square()
            noise = at_mode.noise_variance
            if not is_ahead((shift - noise).flatten(), 0.0):
                return None
            moved, scale = (float(x.mean().sqrt()) for x in (shift, noise))
            return f"the outcomes' mean is {moved:.3g} (noise {scale:.3g}) from that"
        counts = self.labels.isfinite()
        error, best = ((p.mean - self.labels).square()[counts] for p in (self, at_mode))
        # The RMSE is ahead by 10% where the squares are by 1.1² - 1.
        gain = float(((1 + _RMSE) ** 2 - 1) * best.mean())
        if not is_ahead(error - best, gain):
            return None
        rmse, at_best = (float(x.mean().sqrt()) for x in (error, best))
        return f"the prediction has RMSE {rmse:.3g}, against {at_best:.3g}"

    @property
    def _has_label(self) -> Tensor:
        return self.has_label.reshape(len(self), -1).any(-1)  # of an output at least

    def _facts(self) -> dict[str, str]:
        facts = {"N": str(len(self))}
        if self.mean.ndim == _OUTPUTS:
            facts["P"] = str(self.mean.shape[1])
        if self.labels is None:
            return facts | {"labels": "None"}
        facts["labels"] = str(int(self._has_label.sum()))
        error = (self.mean - self.labels).square().nanmean().sqrt()
        return facts if error.isnan() else facts | {"rmse": f"{float(error):.3g}"}


def class_facts(num_classes: int | None, names: Sequence[str] | None) -> dict[str, str]:
    """What a short description says of the classes.

    Args:
        num_classes: C, if it's known.
        names: Of the classes, if they have any.
    """
    facts = {} if num_classes is None else {"C": str(num_classes)}
    return facts if names is None else facts | {"classes": listed(names)}


def listed(names: Sequence[str]) -> str:
    """Names in brackets, not too many.

    Args:
        names: Of classes, or places.
    """
    rest = len(names) - _NAMES_SHOWN
    more = [f"{rest} more"] if rest > 0 else []
    return f"({', '.join([*names[:_NAMES_SHOWN], *more])})"


def check_labels(labels: Tensor, shape: tuple[int, ...], place: str) -> None:
    """Check that labels are one for each datum.

    Args:
        labels: Of N data.
        shape: What they should have.
        place: What the data are.

    Raises:
        ValueError: If they are something else, or their number is.
    """
    if labels.is_complex() or labels.shape != shape:
        raise ValueError(
            f"{place}: expected labels as a tensor of real numbers of shape "
            f"{shape}, one for each datum, found {tuple(labels.shape)}."
        )


def is_ahead(gains: Tensor, least: float) -> bool:
    """Whether the mean over the data is large, and larger than chance makes it.

    Args:
        gains: Of each datum, (N,).
        least: What the mean must be above.
    """
    if len(gains) < 2:
        return False
    gains = gains.double()
    error = gains.std() / len(gains) ** 0.5
    return bool(gains.mean() > torch.clamp(_NUM_ERRORS * error, min=least))


def _chosen(index: Index, num_data: int) -> Tensor:
    """The rows that an index names, (N',), on the CPU.

    Raises:
        IndexError: If one isn't there.
        TypeError: If it's no index.
        ValueError: If a mask is of another length, or no datum is left.
    """
    if isinstance(index, slice):
        places = range(num_data)[index]
        rows = places.start + places.step * torch.arange(len(places), device="cpu")
    else:
        if isinstance(index, tuple):
            raise TypeError(
                "A prediction is indexed by its data alone, prediction[10:20]; found "
                f"{len(index)} indices."
            )
        named = torch.as_tensor(index, device="cpu").reshape(-1)
        if named.dtype == torch.bool:
            if named.shape != (num_data,):
                raise ValueError(
                    f"A mask of a prediction has {num_data} booleans, one for each "
                    f"datum; found {len(named)}."
                )
            rows = named.nonzero()[:, 0]
        elif len(named) and (named.is_floating_point() or named.is_complex()):
            raise TypeError(
                "A prediction is indexed by numbers of its data, a slice or a mask of "
                f"booleans; found {named.dtype}."
            )
        else:
            rows = named.long()
            outside = rows[(rows < -num_data) | (rows >= num_data)]
            if len(outside):
                raise IndexError(
                    f"There is no datum {int(outside[0])}: the prediction has "
                    f"{num_data} data, 0 to {num_data - 1}."
                )
            rows = rows % num_data
    if not len(rows):
        raise ValueError(
            f"The index leaves none of the {num_data} data of the prediction; expected "
            "one at least."
        )
    return rows


P = TypeVar("P", bound=AnyPrediction)


def rows_of(prediction: P, rows: Tensor, dims: Mapping[str, int]) -> P:
    """A prediction of some of the data.

    Args:
        prediction: A frozen dataclass.
        rows: Which, (N',).
        dims: Field -> the dim along which it has the data.
    """
    values = {name: getattr(prediction, name) for name in dims}
    return replaced(
        prediction,
        **{
            name: x.index_select(dims[name], rows.to(x.device))
            for name, x in values.items()
            if x is not None
        },
    )


def joined(predictions: Sequence[P], dims: Mapping[str, int], **own: Any) -> P:
    """A prediction of the data of several.

    Args:
        predictions: Frozen dataclasses of one kind.
        dims: Field -> the dim along which it has the data; what isn't among them must
            be the same in all.
        **own: Fields that are joined in another way.

    Raises:
        ValueError: If they don't fit each other.
    """
    first = predictions[0]
    for field in fields(first):  # type: ignore[arg-type]  # they are dataclasses
        name = field.name
        values = [getattr(p, name) for p in predictions]
        if name in own or all(x is None for x in values):
            continue
        for index, x in enumerate(values):
            if not _fits(x, values[0], dims.get(name)):
                raise ValueError(
                    f"predictions[{index}] doesn't fit the first one: its {name} is "
                    f"{_form(x)}, not {_form(values[0])}. Concatenate predictions of "
                    "the same outcomes (where data have choices, pad these to as many "
                    "in each batch), with labels and as many draws, or all without."
                )
        if name in dims:
            own[name] = torch.cat([x.to(values[0].device) for x in values], dims[name])
    return replaced(first, **own)


def _fits(x: Any, first: Any, dim: int | None) -> bool:
    """Whether a field is like another, but for its size along the data's dim."""
    if not (isinstance(x, Tensor) and isinstance(first, Tensor)):
        return bool(x == first)
    if dim is not None:
        return x.ndim == first.ndim and all(
            d == dim or m == n
            for d, (m, n) in enumerate(zip(x.shape, first.shape, strict=True))
        )
    return x.shape == first.shape and torch.allclose(x.to(first), first)


def _form(value: Any) -> str:
    return (
        f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    )


def replaced(prediction: P, **changes: Any) -> P:
    """``dataclasses.replace`` of a prediction, whose kinds are all dataclasses.

    Args:
        prediction: A frozen dataclass.
        **changes: Its new fields.
    """
    changed: P = replace(prediction, **changes)  # type: ignore[type-var]
    return changed


def class_columns(
    log_probs: Tensor, names: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Columns ``p_0`` and so on, or ``p_negative``, of probabilities (N, C).

    Args:
        log_probs: Their logarithms, (N, C).
        names: Of the classes; None: their numbers.
    """
    # Rounding may end at 1 + 1e-16.
    columns = log_probs.exp().clamp_max(1).cpu().numpy().T
    return {f"p_{c if names is None else names[c]}": p for c, p in enumerate(columns)}


def named(classes: Tensor, names: Sequence[str] | None) -> np.ndarray:
    """Classes (N,) by their names, None where there is none; numbers without names.

    Args:
        classes: (N,), -100 where there is none.
        names: Of the classes; None: their numbers.
    """
    if names is None:
        return classes.cpu().numpy()
    return np.array(
        [names[c] if c >= 0 else None for c in classes.tolist()], dtype=object
    )


def check_class_names(names: Sequence[str] | None, num_classes: int) -> None:
    """Check that there is a name of its own for each class.

    Args:
        names: What was given, None for none.
        num_classes: C.

    Raises:
        ValueError: If there isn't.
    """
    if names is None:
        return
    strings = not isinstance(names, str) and all(isinstance(n, str) for n in names)
    if not strings or len(names) != num_classes or len({*names}) < num_classes:
        raise ValueError(
            f"class_names must be {num_classes} different strings, one for each class, "
            f"found {names!r}."
        )


def names_in(networks: Sequence[LiftedNetwork], num: int) -> tuple[str, ...] | None:
    """The names that a network's config has for so many classes, if they're a user's.

    ``config.id2label`` is {0: "LABEL_0", 1: "LABEL_1"} where nobody has named them.
    Where two networks differ, nobody knows whose classes these are.

    Args:
        networks: Those of the posterior.
        num: How many names it should have.
    """
    of_users = set()
    for lora in networks:
        by_class = getattr(getattr(lora.network, "config", None), "id2label", None)
        if isinstance(by_class, Mapping) and {*by_class} == {*range(num)}:
            of_users.add(tuple(str(by_class[c]) for c in range(num)))
    of_users.discard(tuple(f"LABEL_{c}" for c in range(num)))
    names = of_users.pop() if len(of_users) == 1 else ()
    return names if len({*names}) == num > 0 else None
