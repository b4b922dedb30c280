"""Warnings that point at the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

# What may stand between that line and ours: this package, and wrappers around it.
_PASSED = (str(Path(__file__).parents[1]), "contextlib.py", "_contextlib.py")


def warn(message: str) -> None:
    """Warn, at whatever depth of the package, of the call that came into it.

    Args:
        message: Of a ``UserWarning``.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_passed(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_passed(file: str) -> bool:
    package, *wrappers = _PASSED
    return file.startswith(package) or Path(file).name in wrappers
