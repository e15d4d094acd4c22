"""Attention over a paged cache: the reference beside whole sequences, and the kernels beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import reference as attention
from pallas_kernels.attention.masks import Causal, Sinks, Window
from pallas_kernels.paged_attention import api, reference


def cache(B, T, N, K, H, L, M, dtype=jnp.bfloat16, seed=0):
    """Queries, pages of keys and values, what scales them, and a table of pages in no order."""
    keys = jax.random.split(jax.random.key(seed), 4)
    P = B * M + 2
    q = jax.random.normal(keys[0], (B, T, N, H)).astype(jnp.bfloat16)
    table = jax.random.permutation(keys[3], P)[: B * M].reshape(B, M).astype(jnp.int32)
    pages = [jax.random.normal(key, (P, K, L, H)) for key in keys[1:3]]
    if jnp.dtype(dtype).itemsize > 1:
        return (q, *(x.astype(dtype) for x in pages), table), {}
    top = 127 if dtype == jnp.int8 else 448
    scales = [jnp.abs(x).max(-1) / top for x in pages]
    small = [x / s[..., None] for x, s in zip(pages, scales, strict=True)]
    small = [(jnp.round(x) if dtype == jnp.int8 else x).astype(dtype) for x in small]
    return (q, *small, table), {"k_scale_PKL": scales[0], "v_scale_PKL": scales[1]}


@pytest.mark.parametrize("how", [{}, {"window": 7, "sinks": 2, "softcap": 3.0}])
def test_the_reference_is_attention_over_each_whole_sequence(how):
    (q, k, v, table), _ = cache(3, 2, 4, 2, 8, 4, 6)
    lengths = jnp.asarray([24, 9, 2])
    ours = reference.paged_attention(q, k, v, table, lengths, scale=0.4, **how)
    for b, n in enumerate(lengths.tolist()):
        keys, values = (x[table[b]].swapaxes(0, 1).reshape(2, -1, 8)[:, :n].swapaxes(0, 1)[None] for x in (k, v))
        mask = Causal(n - 2)
        if how:
            mask = mask & (Window(how["window"] - 1, None, n - 2) | Sinks(how["sinks"]))
        expected, _ = attention.attention(
            q[b : b + 1], keys, values, mask, scale=0.4, softcap=how.get("softcap")
        )  # fmt: skip
        np.testing.assert_allclose(np.float32(ours[b]), np.float32(expected[0]), rtol=1e-2, atol=1e-2)


def beside_the_reference(kernel, shape, lengths, dtype=jnp.bfloat16, *, interpret=False, parts=None, **how):
    arrays, scales = cache(*shape, dtype)
    lengths = jnp.asarray(lengths, jnp.int32)
    how = {"scale": 0.15} | how | scales
    ours = api.paged_attention(*arrays, lengths, implementation=kernel, interpret=interpret, parts=parts, **how)
    exact = reference.paged_attention(*arrays, lengths, **how)
    assert ours.dtype == jnp.bfloat16 and np.isfinite(np.float32(ours)).all()
    np.testing.assert_allclose(np.float32(ours), np.float32(exact), rtol=2e-2, atol=5e-3)


CASES = {
    "one token": ((3, 1, 8, 2, 64, 64, 3), [150, 1, 192], {}),
    "small pages": ((1, 2, 4, 1, 64, 16, 12), [180], {"parts": 2, "window": 70, "sinks": 3, "softcap": 10.0}),
    "int8": ((1, 1, 2, 1, 128, 64, 3), [130], {"dtype": jnp.int8}),
    "float8": ((1, 1, 2, 1, 128, 64, 2), [100], {"dtype": jnp.float8_e4m3fn}),
    "many rows": ((1, 8, 16, 1, 64, 64, 2), [128], {"window": 40}),
    "wide heads": ((1, 1, 4, 1, 256, 32, 4), [97], {}),
    "nothing yet": ((2, 1, 2, 2, 64, 64, 2), [0, 5], {"parts": 4}),
    "longer than its pages": ((2, 1, 2, 1, 64, 64, 2), [128, 200], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_gpu_kernel_interpreted_is_the_reference(case):
    shape, lengths, how = CASES[case]
    beside_the_reference("gpu", shape, lengths, interpret=True, **how)


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_kernel_interpreted_is_the_reference(case):
    shape, lengths, how = CASES[case]
    beside_the_reference("tpu", shape, lengths, interpret=True, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_gpu_kernel_is_the_reference(hopper, case):
    shape, lengths, how = CASES[case]
    beside_the_reference("gpu", shape, lengths, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("L", [16, 64, 128])
def test_the_gpu_kernel_is_the_reference_over_long_sequences(hopper, L):
    beside_the_reference("gpu", (4, 1, 32, 4, 128, L, 4096 // L), [4096, 1000, 1, 2049])


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 2, 1, 80, 64, 1), "heads of 64, 128 and 256, not of 80"),
        ((1, 1, 2, 1, 64, 24, 1), "pages of 8, 16, 32, 64"),
        ((1, 1024, 16, 1, 64, 64, 1), "1024 tokens of 16 heads that share a key head are more"),
    ],
)
def test_what_a_kernel_cannot_take_is_told(kernel, shape, message):
    arrays, _ = cache(*shape)
    with pytest.raises(ValueError, match=message):
        api.paged_attention(*arrays, jnp.asarray([1]), scale=1.0, implementation=kernel)


@pytest.mark.parametrize("kept", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("L", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("T", [1, 8])
def test_what_is_taken_has_room_for_a_block_in_every_stream(T, L, H, kept):
    gpu = pytest.importorskip("pallas_kernels.paged_attention.gpu")
    q, pages = jnp.zeros((1, T, 16, H), jnp.bfloat16), jnp.zeros((1, 1, L, H), kept)
    scaled = kept == jnp.int8
    if gpu.why_not(q, pages, scaled=scaled) is None:
        sizes = gpu.cut(T * 16, H, L, q.dtype, pages.dtype, scaled=scaled)
        assert sizes.stages >= sizes.streams and sizes.each * L == sizes.block


def test_shapes_that_do_not_match_are_named():
    (q, k, v, table), _ = cache(2, 1, 4, 2, 64, 16, 2)
    for args in (
        (q[:, :, :3], k, v, table),
        (q, k[..., :32], v, table),
        (q, k, v.astype(jnp.int8), table),
        (q, k, v, table[:1]),
    ):
        with pytest.raises(ValueError, match="must be"):
            api.paged_attention(*args, jnp.asarray([1, 1]), scale=1.0)
