"""Four fake CPU devices, and every annotated function of the project checked while it runs."""

import importlib.util
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
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
