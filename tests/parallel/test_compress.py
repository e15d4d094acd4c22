import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxllm.parallel.collectives import by_device
from jaxllm.parallel.compress import all_reduce, dequantise, quantise
from jaxllm.parallel.config import Mesh
from jaxllm.parallel.sharding import make_mesh
from jaxllm.plan.hlo import COLLECTIVES, parse

pytestmark = pytest.mark.slow

DEVICES = 4


@functools.cache
def summed(block: int):
    """(values of each device) -> the sum that each device decodes, and what each has lost; compiled."""
    mesh, spec = make_mesh(Mesh(data=DEVICES, fsdp=1)), PartitionSpec("data")

    def local(x):
        total, lost = all_reduce(x[0], "data", block)
        return total[None], lost[None]

    return jax.jit(by_device(local, mesh, (spec,), (spec, spec)))


def values(size: int, seed: int) -> np.ndarray:
    """What the devices have, over many orders of magnitude; the first device has zeros in places."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(DEVICES, size)) * 10 ** rng.uniform(-4, 2, size=size)
    x[0, ::3] = 0
    return x.astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e20))
def test_a_value_is_off_by_half_a_step_of_its_block_at_most(seed, scale):
    x = scale * np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    back = np.asarray(dequantise(*quantise(jnp.asarray(x))))
    assert (abs(back - x) <= 0.5001 * abs(x).max(1, keepdims=True) / 127).all()
    assert abs(back).max(1) == pytest.approx(abs(x).max(1), rel=1e-6)  # the largest of a block is exact


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    assert not np.asarray(dequantise(*quantise(jnp.zeros((2, 4))))).any()
    for bad in (np.nan, np.inf, -np.inf):
        back = np.asarray(dequantise(*quantise(jnp.array([[1.0, bad], [1.0, 2.0]]))))
        assert not np.isfinite(back[0]).all() and np.isfinite(back[1]).all()


@pytest.mark.parametrize("size", [1, 24, 100])  # less than a block a device, whole blocks, and neither
def test_the_sum_and_what_is_lost_are_the_exact_sum(size):
    x = values(size, 0)
    total, lost = jax.device_get(summed(8)(x))
    assert (total == total[0]).all()  # all devices have the same bits
    exact = x.sum(0, dtype=np.float64)
    room = 1e-6 * abs(x).sum(0).max()
    np.testing.assert_allclose(total[0] + lost.sum(0, dtype=np.float64), exact, atol=room)
    assert abs(total[0] - exact).max() > 10 * room or size == 1  # something was lost


def test_over_many_sums_what_is_lost_does_not_grow():
    """Sums of what was sent and the last residual are the exact sum, and the residual stays that of about one round."""
    size, rounds = 100, 40
    residual, sent, exact = np.zeros((DEVICES, size), np.float32), np.zeros(size), np.zeros(size)
    worst = []
    for i in range(rounds):
        x = values(size, 1)  # the same each time: without feedback the errors would add up
        total, residual = jax.device_get(summed(8)(x + residual))
        sent, exact = sent + total[0], exact + x.sum(0, dtype=np.float64)
        np.testing.assert_allclose(sent + residual.sum(0), exact, atol=1e-5 * (i + 1) * abs(x).max())
        worst.append(abs(exact - sent).max())
    once = abs(jax.device_get(summed(8)(values(size, 1)))[0][0] - values(size, 1).sum(0)).max()
    assert max(worst) < 4 * once


def test_a_sum_sends_a_quarter_of_the_bytes_of_a_float32_all_reduce():
    size, block = 4096, 256
    program = parse(summed(block).lower(jax.ShapeDtypeStruct((DEVICES, size), jnp.float32)).compile().as_text())
    instructions = [i for c in program.computations.values() for i in c.instructions if i.op in COLLECTIVES]
    assert {i.op for i in instructions} == {"all-to-all", "all-gather"}  # each sends (n - 1) / n of its bytes
    sent = {dtype: sum(a.bytes for i in instructions for a in i.arrays if a.dtype == dtype) for dtype in ("s8", "f32")}
    assert sent == {"s8": 2 * size, "f32": 2 * 4 * size / block}
    assert sum(sent.values()) < 0.26 * 2 * 4 * size
