"""Comparing what a tree holds with what it should."""

from typing import Any

import numpy as np


def assert_allclose(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal within a tolerance, absolute or relative."""
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance
    )
