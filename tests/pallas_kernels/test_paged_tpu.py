"""The TPU kernel of attention over a paged cache: interpreted beside the reference, and by the real compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from pallas_kernels.paged_attention import api, reference
from tests.pallas_kernels.test_paged_attention import cache

tpu = pytest.importorskip("pallas_kernels.paged_attention.tpu")


def strictly(cores: int = 1):
    """Copies come when they are waited for, memory holds NaN before, and races are found."""
    return tpu.pltpu.InterpretParams(
        dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True, num_cores_or_threads=cores
    )


def unseen(pages_PKLH, table_BM, lengths, T: int, window: int | None, sinks: int):
    """The pages, and NaN in those that are not to be read."""
    L, read = pages_PKLH.shape[2], np.zeros(len(pages_PKLH), bool)
    for row, length in zip(np.asarray(table_BM), lengths, strict=True):
        begin = 0 if window is None else max(length - T - window + 1, 0) // L
        for m in range(-(-length // L)):
            read[row[m]] |= m >= begin or m < -(-sinks // L)
    return jnp.where(read[:, None, None, None], pages_PKLH, jnp.nan)


@st.composite
def cases(draw):
    B, T, (N, K) = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.sampled_from([(1, 1), (4, 2), (6, 1)]))
    L, H = draw(st.sampled_from([8, 16, 32, 64, 128, 256])), draw(st.sampled_from([64, 64, 128, 256]))
    M = draw(st.integers(1, max(1, 700 // L)))
    borders = [n for n in (0, 1, L - 1, L, L + 1, 127, 128, 129, M * L - 1, M * L) if n <= M * L]
    lengths = [draw(st.sampled_from(borders) | st.integers(0, M * L)) for _ in range(B)]
    dtype = draw(st.sampled_from([jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn]))
    how = {"window": draw(st.none() | st.integers(1, 300)), "softcap": draw(st.sampled_from([None, 3.0]))}
    how["sinks"] = draw(st.integers(0, 40)) if how["window"] else 0
    return (B, T, N, K, H, L, M), lengths, dtype, how, draw(st.sampled_from([1, 2])), draw(st.booleans())


@pytest.mark.slow
@given(cases())
@settings(max_examples=40, derandomize=True, deadline=None)
def test_the_kernel_is_the_reference_and_reads_no_page_that_no_query_sees(case):
    shape, lengths, dtype, how, cores, few = case
    (q, k, v, table), scales = cache(*shape, dtype)
    how = {"scale": 0.15} | how | scales
    exact = reference.paged_attention(q, k, v, table, jnp.asarray(lengths), **how)
    if jnp.issubdtype(dtype, jnp.floating):
        k, v = (unseen(x, table, lengths, shape[1], how["window"], how["sinks"]) for x in (k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "BLOCK", 1)  # blocks of 128 tokens
        patch.setattr(tpu, "AHEAD", 0 if few else tpu.AHEAD)
        ours = tpu.paged_attention(
            q, k, v, table, jnp.asarray(lengths), cores=cores, interpret=strictly(cores), **how
        )  # fmt: skip
    assert not interpreter.races.races_found
    np.testing.assert_allclose(np.float32(ours), np.float32(exact), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_queries_that_are_exact_stay_exact(dtype):
    (q, k, v, table), _ = cache(2, 3, 4, 2, 64, 16, 4, jnp.float32)
    q, lengths, how = jax.random.normal(jax.random.key(1), q.shape, dtype), jnp.asarray([50, 2]), {"scale": 0.1}
    ours = tpu.paged_attention(q, k, v, table, lengths, interpret=True, **how)
    exact = reference.paged_attention(q, k, v, table, lengths, **how)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, exact, rtol=2e-5 if dtype == jnp.float32 else 1e-3, atol=1e-5)


def test_a_table_that_scalar_memory_cannot_hold_goes_by_sections(monkeypatch):
    arrays, _ = cache(5, 1, 2, 1, 64, 16, 4)
    lengths, how = jnp.asarray([64, 3, 0, 17, 40]), {"scale": 0.2}
    whole = tpu.paged_attention(*arrays, lengths, interpret=True, **how)
    monkeypatch.setattr(tpu, "SCALARS", 9)  # two sequences of four pages
    np.testing.assert_array_equal(tpu.paged_attention(*arrays, lengths, interpret=True, **how), whole)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("L", [8, 64, 256])
@pytest.mark.parametrize(("N", "K", "H"), [(1, 1, 64), (40, 5, 128), (64, 8, 256), (128, 128, 128)])
def test_blocks_are_whole_pages_and_whole_vectors_of_tokens(N, K, H, L, scaled):
    cut = tpu.cut(jnp.zeros((1, 8, N, H), jnp.bfloat16), jnp.zeros((1, K, L, H), jnp.int8 if scaled else jnp.bfloat16))
    assert cut.each * L % 128 == 0 and cut.rows >= 8 * N // K
    assert cut.stages & (cut.stages - 1) == 0 and cut.memory <= tpu.ROOM


HEADS = [(64, 8), (8, 8), (32, 1)]
COMPILED = [
    *((1, *heads, H, 64, dtype, {}) for heads in HEADS for H in (64, 128, 256) for dtype in ("bfloat16", "int8")),
    *((8, *heads, 128, 16, dtype, {"window": 1000, "sinks": 4}) for heads in HEADS for dtype in ("bfloat16", "int8")),
    (1, 64, 8, 128, 8, "int8", {}),
    (8, 64, 8, 64, 32, "float8_e4m3fn", {"window": 128}),
    (1, 40, 5, 128, 128, "float8_e4m3fn", {}),
    (8, 64, 8, 256, 256, "bfloat16", {"softcap": 30.0}),
    (1, 64, 8, 128, 8, "float32", {}),
]  # tokens of a query, heads, key heads, their size, tokens of a page


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_it_compiles_for_every_chip_and_copies_no_cache_that_lies_as_it_is_written(chip):
    from jax.experimental.layout import Format, Layout

    here = jax.sharding.SingleDeviceSharding(chip)

    def array(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=Format(Layout(tuple(range(len(dims)))), here))

    for T, N, K, H, L, dtype, how in COMPILED:
        P, dtype = 8192 // K, jnp.dtype(dtype)
        pages = array(P, K, L, H, dtype=dtype)
        scales = {f"{name}_scale_PKL": array(P, K, L, dtype=jnp.float32) for name in "kv" if dtype.itemsize == 1}
        run = lambda *args, how=how, **scales: api.paged_attention(*args, **how, **scales, chip=chip.device_kind)
        args = array(5, T, N, H), pages, pages, array(5, 8192 // L, dtype=jnp.int32), array(5, dtype=jnp.int32)
        done = jax.jit(run).lower(*args, **scales).compile()
        assert done.as_text().count("tpu_custom_call") == 1
        assert done.memory_analysis().temp_size_in_bytes < P * K * L * H * dtype.itemsize / 4


def test_both_cores_of_a_chip_are_used():
    kinds = "TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite", "TPU7x"
    assert [tpu.cores_of(kind) for kind in kinds] == [2, 2, 1, 1, 1]
