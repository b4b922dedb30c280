"""What a posterior is: a Pyro guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Guide = Callable[..., Any]  # any Pyro guide
