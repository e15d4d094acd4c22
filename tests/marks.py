"""Parameters of tests of which a few stand for all where time is short."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values, all but the `fast` ones marked slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
