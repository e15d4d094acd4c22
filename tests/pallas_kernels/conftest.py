import jax
import pytest


@pytest.fixture(scope="session")
def hopper() -> None:
    """A GPU that the kernels are written for."""
    device = jax.devices()[0]
    if device.platform != "gpu" or device.compute_capability != "9.0":
        pytest.skip(f"needs a Hopper GPU, this is {device.device_kind}")
