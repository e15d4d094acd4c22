import pytest

from pallas_kernels.attention.api import on_hopper


@pytest.fixture(scope="session")
def hopper() -> None:
    """A GPU that the kernels are written for."""
    if not on_hopper():
        pytest.skip("needs a Hopper GPU")
