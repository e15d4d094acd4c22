import os

import pytest

from pallas_kernels import static
from pallas_kernels.attention.api import on_hopper


@pytest.fixture(scope="session")
def hopper() -> None:
    """A GPU that the kernels are written for."""
    if not on_hopper():
        pytest.skip("needs a Hopper GPU")


@pytest.fixture(params=static.CHIPS)
def chip(request, monkeypatch):
    """A device of every kind of TPU, that is not here."""
    for name, value in static.environment(request.param).items():
        monkeypatch.setitem(os.environ, name, value)
    return static.device(request.param)
