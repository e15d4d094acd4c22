import jax
import jax.numpy as jnp
import pytest

from jaxllm.train.config import BFloat16, Float16, Float32
from jaxllm.train.precision import MAX_SCALE, adjust, init_scale, policy

PARAMS = {"w": jnp.ones((2, 3)), "ids": jnp.arange(3)}


@pytest.mark.parametrize("cfg, dtype", [(Float32(), "float32"), (BFloat16(), "bfloat16"), (Float16(), "float16")])
def test_casting_changes_floats_only_and_their_gradients_come_back_in_float32(cfg, dtype):
    cast = policy(cfg).cast(PARAMS)
    assert cast["w"].dtype == dtype
    assert cast["ids"].dtype == jnp.int32
    grads = jax.grad(lambda w: policy(cfg).cast({"w": w})["w"].sum().astype(jnp.float32))(PARAMS["w"])
    assert grads.dtype == jnp.float32


@pytest.mark.parametrize("cfg", [Float32(), BFloat16()])
def test_only_float16_has_a_loss_scale(cfg):
    assert init_scale(cfg) is None
    assert init_scale(Float16()).scale == 2.0**15


def run(cfg, finite: list[bool]):
    state = init_scale(cfg)
    step = jax.jit(lambda s, f: adjust(cfg, s, f))
    scales = []
    for f in finite:
        state = step(state, jnp.bool_(f))
        scales.append(float(state.scale))
    return state, scales


def test_an_overflow_halves_the_scale_down_to_its_minimum_and_is_counted():
    state, scales = run(Float16(initial_scale=16.0, min_scale=3.0), [False] * 4)
    assert scales == [8, 4, 3, 3]
    assert state.overflows == 4


def test_growth_interval_good_steps_in_a_row_double_the_scale_and_an_overflow_starts_the_count_anew():
    state, scales = run(Float16(initial_scale=8.0, growth_interval=3), [True, True, False] + [True] * 6)
    assert scales == [8, 8, 4, 4, 4, 8, 8, 8, 16]
    assert (state.overflows, state.good_steps) == (1, 0)


def test_the_scale_stops_growing_at_its_cap():
    _, scales = run(Float16(initial_scale=MAX_SCALE / 2, growth_interval=1), [True] * 3)
    assert scales == [MAX_SCALE] * 3
    _, scales = run(Float16(initial_scale=4 * MAX_SCALE, growth_interval=1), [True, False])
    assert scales == [4 * MAX_SCALE, 2 * MAX_SCALE]


def test_the_types_of_the_state_are_those_it_starts_with():
    cfg = Float16()
    for finite in (True, False):
        after = adjust(cfg, init_scale(cfg), jnp.bool_(finite))
        assert [x.dtype for x in after] == [x.dtype for x in init_scale(cfg)]


def test_a_dynamic_scale_finds_the_largest_that_does_not_overflow():
    """Gradients of size 1 overflow float16 (65504) above 2^15: from either side the scale ends at 2^15 or 2^16."""
    for start in (1.0, MAX_SCALE):
        cfg, gradient = Float16(initial_scale=start, growth_interval=5), jnp.float16(1)
        state, good = init_scale(cfg), 0
        for _ in range(200):
            finite = jnp.isfinite(gradient * state.scale.astype(jnp.float16))
            good += bool(finite)
            state = adjust(cfg, state, finite)
        assert state.scale in (2.0**15, 2.0**16)
        assert good + int(state.overflows) == 200
