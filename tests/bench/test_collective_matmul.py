import jax
import numpy as np
import pytest

from jaxllm.bench.collective_matmul import WAYS, over_tensor
from jaxllm.parallel.config import Mesh
from jaxllm.parallel.sharding import make_mesh


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_scatter_the_sum_of_a_product_is_the_product(way):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 8, 16)).astype(np.float32), rng.normal(size=(16, 6)).astype(np.float32)
    run = jax.jit(over_tensor(way, make_mesh(Mesh(fsdp=1, tensor=4), jax.devices()[:4])))
    np.testing.assert_allclose(run(x, w), x @ w, rtol=1e-5, atol=1e-5)
