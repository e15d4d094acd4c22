"""The Triton kernels, interpreted, beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import reference, triton
from pallas_kernels.attention.bias import Slopes
from pallas_kernels.attention.masks import Causal
from tests.pallas_kernels.test_attention import cases, close, drawn, of_these_beside_the_reference
from tests.pallas_kernels.test_attention_masks import kinds


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short sequences have several."""
    small = triton.Tuning(64, 32, 4, 3), triton.Tuning(32, 64, 4, 3)
    monkeypatch.setattr(triton, "TUNED", dict.fromkeys(triton.TUNED, small))


def beside_the_reference(q, k, v, do, mask, *, scale, bias: Slopes | None = None, **how):
    """o, lse and gradients of inputs, beside those of the reference in float32."""
    how |= dict(scale=scale, slopes_N=None if bias is None else bias.slopes_N)
    o, lse = triton.forward(q, k, v, mask, interpret=True, **how)
    do = do.astype(o.dtype)
    ours = o, *triton.backward(q, k, v, o, lse, do, mask, interpret=True, **how)
    arrays = [x.astype(jnp.float32) for x in (q, k, v)]
    exact, pull, log = jax.vjp(lambda q, k, v: reference.attention(q, k, v, mask, **how), *arrays, has_aux=True)
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, (exact, *pull(do.astype(jnp.float32))), strict=True):
        assert a.dtype == q.dtype and a.shape == b.shape
        close(a, b, name)
    np.testing.assert_allclose(lse, log, rtol=1e-4, atol=1e-4)
    return *ours, lse


@pytest.mark.parametrize("case", cases(1, 1, 1))
def test_the_kernel_interpreted_is_the_reference(case, small_blocks):
    B, T, N, K = (2, 200, 4, 2) if case in ("documents", "prefix") else (1, 192, 2, 1)
    mask, how = cases(B, T, N)[case]
    o, dq, _, _, lse = beside_the_reference(*drawn(1, B, T, T, N, K, 64), mask, **{"scale": 0.125} | how)
    if case == "nothing":
        assert not o[:, : T // 2].any() and not dq[:, : T // 2].any()
        assert (lse[:, :, : T // 2] == -jnp.inf).all() and bool(jnp.isfinite(lse[:, :, T // 2 :]).all())


@pytest.mark.parametrize(
    ("heads", "sizes", "dtype"),
    [((4, 2), (80, 80), jnp.bfloat16), ((3, 1), (64, 96), jnp.float32), ((2, 2), (192, 64), jnp.float16)],
)
def test_it_is_whatever_the_heads(heads, sizes, dtype, small_blocks):
    T, S = 70, 100
    q, k, _, _ = drawn(1, 1, T, S, *heads, sizes[0], dtype)
    _, _, v, do = drawn(2, 1, T, S, *heads, sizes[1], dtype)
    beside_the_reference(q, k, v, do, Causal(S - T), scale=0.1)


def test_it_is_taken_if_asked_for_by_name(small_blocks):
    q, k, v, do = drawn(1, 1, 100, 100, 2, 1, 64)
    how = dict(mask=Causal(), bias=Slopes(jnp.asarray([0.5, 0.1])), implementation="triton", interpret=True)
    of_these_beside_the_reference(q, k, v, do, jnp.float32, **how)


@pytest.mark.slow
@given(
    st.data(), st.sampled_from([1, 129, 300]), st.sampled_from([70, 256]), st.sampled_from([(3, 1), (4, 2), (1, 1)]),
    st.sampled_from([(32, 32), (64, 96), (128, 128), (80, 256)]), st.none() | st.floats(1, 20), st.booleans(),
    st.integers(-100, 100), st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)  # fmt: skip
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_whatever_the_shapes(small_blocks, data, T, S, heads, sizes, softcap, sloped, shift, dtype):
    mask = data.draw(kinds(2, T, S))
    q, k, _, _ = drawn(1, 2, T, S, *heads, sizes[0], dtype)
    _, _, v, do = drawn(2, 2, T, S, *heads, sizes[1], dtype)
    bias = Slopes(jnp.linspace(0.05, 0.01, heads[0])) if sloped else None
    beside_the_reference(q, k, v, do, mask, scale=0.2, softcap=softcap, shift=shift, bias=bias)


@pytest.mark.parametrize(
    ("dtype", "H", "V", "why"),
    [
        (jnp.int8, 64, 64, "it takes bfloat16, float16 and float32, not int8"),
        (jnp.bfloat16, 16, 64, "it takes heads of 32 to 256, not of 16 with values of 64"),
        (jnp.float32, 256, 257, "it takes heads of 32 to 256, not of 256 with values of 257"),
        (jnp.float32, 80, 256, None),
    ],
)
def test_what_it_cannot_take_is_told(dtype, H, V, why):
    arrays = (jnp.zeros((1, 8, 1, width), dtype) for width in (H, H, V))
    assert triton.why_not(*arrays) == why


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_there_are_blocks_for_whatever_it_takes(dtype):
    for H in range(32, 257):
        narrow, wide = (jnp.zeros((1, 1, 1, width), dtype) for width in (32, H))
        assert triton.why_not(narrow, narrow, wide) is None
        for tuning in triton.tuned(narrow, wide):
            assert tuning.rows.bit_count() == tuning.block.bit_count() == 1 and min(tuning.rows, tuning.block) >= 16
