"""Four fake CPU devices, and every annotated function of the project checked while it runs."""

import gc
import importlib.util
import os
from collections.abc import Iterator

# Most of the time here is spent in the compiler: half of it optimizes code that runs once (tests of the command line
# start processes without this). Devices that wait for each other hold a thread each: more of them than XLA would take.
# It may still hang, on a busy machine, where some devices wait in one collective and one in another that is in a loop;
# XLA then ends the process.
os.environ.setdefault("NPROC", "12")  # threads
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jaxtyping
import pytest

jaxtyping.install_import_hook(["jaxllm", "pallas_kernels"], "beartype.beartype").__enter__()

# A first example that compiles outlasts any deadline.
hypothesis.settings.register_profile("jaxllm", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("jaxllm")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("tpu_aot") and not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install 'jaxllm[tpu]'")
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU, and JAX_PLATFORMS=cuda in the environment")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_module_end_with_it() -> Iterator[None]:
    """XLA's CPU backend maps memory some seven times for a program, and compiling crashes at Linux's 65530 maps."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def v5e():
    """Four TPU chips to compile for (marker `tpu_aot`)."""
    from jax.experimental import topologies

    from pallas_kernels.static import CHIPS, environment

    for name, value in environment("v5e").items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(CHIPS["v5e"].topology, "tpu").devices
