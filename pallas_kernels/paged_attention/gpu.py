"""Attention over a paged cache for Hopper GPUs, in Pallas Mosaic GPU.

What limits it is reading the cache: each key head's pages are read once for all query heads and tokens that share it,
which fill the 64 rows of one product. One warpgroup copies pages into shared memory ahead of those that compute, which
take the blocks of a sequence in turns. Where there are fewer sequences than multiprocessors these are cut into parts
(Dao et al. 2023, "Flash-Decoding for long-context inference"). The work follows the length of each sequence.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu import (
    COMPILE, ROWS, barrier, copy_ahead, divided, interpreted, loaded, over_rows, slot, softmax, sums, tanh,
    tiles,
)  # fmt: skip
from pallas_kernels.attention.logits import bent, unit

PROCESSORS = 132  # of an H100 SXM or H200; a guess for others
BLOCK = 64  # tokens of a step, at least
SHARED = 220 * 1024  # bytes of shared memory, less some for barriers and what reductions take


class Cut(NamedTuple):
    """How work is cut."""

    block: int  # tokens of a step,
    each: int  # of so many pages
    wide: int  # warpgroups whose rows a block is for
    streams: int  # of such, that take blocks in turns
    stages: int  # blocks in shared memory

    @property
    def groups(self) -> int:
        return self.wide * self.streams


def cut(rows: int, H: int, L: int, dtype, kept, *, scaled: bool) -> Cut:
    """For so many rows of queries, heads of H, pages of L tokens, and the dtypes of queries and of the cache."""
    block, wide = max(BLOCK, L), -(-rows // ROWS)
    streams = 2 if wide == 1 and H <= 128 else 1
    queries, answers = wide * ROWS * H * dtype.itemsize, wide * streams * ROWS * H * 4
    cast = wide * streams * block * H * dtype.itemsize if kept != dtype else 0
    stage = 2 * block * (H * kept.itemsize + (4 if scaled else 0))
    stages = min(8, (SHARED - queries - answers - cast) // stage) // streams * streams
    return Cut(block, block // L, wide, streams, stages)


def why_not(q_BTNH: jax.Array, k_PKLH: jax.Array, *, scaled: bool) -> str | None:
    """What of these arrays the kernel cannot take; None if it can."""
    T, N, H = q_BTNH.shape[1:]
    K, L = k_PKLH.shape[1:3]
    rows = T * (N // K)
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes queries of bfloat16 and float16, not {q_BTNH.dtype}"
    if k_PKLH.dtype not in (q_BTNH.dtype, jnp.int8, jnp.float8_e4m3fn):
        return f"it takes a cache of {q_BTNH.dtype}, int8 or float8_e4m3fn, not {k_PKLH.dtype}"
    if H not in (64, 128, 256):
        return f"it takes heads of 64, 128 and 256, not of {H}"
    if L not in (8, 16, 32, 64, 128):
        return f"it takes pages of 8, 16, 32, 64 and 128 tokens, not of {L}"
    if scaled and L < 32:
        return f"it takes scales of pages of 32 tokens or more, not of {L}"  # what is copied begins at 128 bytes
    if rows > 2 * ROWS:
        return f"{T} tokens of {N // K} heads that share a key head are more rows than it has: {2 * ROWS}"
    if cut(rows, H, L, q_BTNH.dtype, k_PKLH.dtype, scaled=scaled).stages < 1:
        return f"{rows} rows, heads of {H} and pages of {L} tokens do not fit into shared memory together"
    return None


def paged_attention(
    q_BTNH: jax.Array, k_PKLH: jax.Array, v_PKLH: jax.Array, table_BM: jax.Array, length_B: jax.Array, *,
    scale: float, window: int | None = None, sinks: int = 0, softcap: float | None = None,
    k_scale_PKL: jax.Array | None = None, v_scale_PKL: jax.Array | None = None, parts: int | None = None,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """What `reference.paged_attention` gives.

    Args:
      parts: of a sequence, worked on at the same time; None: as many as there are multiprocessors for.
    """
    (B, T, N, H), (K, L), M, dtype = q_BTNH.shape, k_PKLH.shape[1:3], table_BM.shape[1], q_BTNH.dtype
    G, small, scaled = N // K, k_PKLH.dtype != dtype, k_scale_PKL is not None
    sizes = cut(T * G, H, L, dtype, k_PKLH.dtype, scaled=scaled)
    block, each, wide, streams, stages = sizes
    groups = sizes.groups
    parts = parts or max(1, min(-(-M // each) // streams, PROCESSORS // (B * K)))
    rows = -(-T * G // 8) * 8 if wide == 1 else wide * ROWS  # of the answer
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, wide * ROWS - T * G), (0, 0)))
    scales = [x.astype(jnp.float32) for x in (k_scale_PKL, v_scale_PKL)] if scaled else [None, None]

    def kernel(q_ref, k_ref, v_ref, scale_refs, table_ref, length_ref, o_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, o_smem, lse_smem, cast_smem, scale_smem, q_ready, k_ready, v_ready, k_free, v_free = (
            scratch
        )
        head, part, b, group = (lax.axis_index(name) for name in ("head", "part", "row", "group"))
        length = length_ref[b]
        there = jnp.minimum(length, M * L)  # of a length that the table has no pages for
        first, skipped = jnp.int32(0), jnp.int32(0)
        if window is not None:
            start = lax.div(jnp.maximum(length - (T + window - 1), 0), jnp.int32(block))
            first = jnp.minimum(start, -(-sinks // block))  # blocks that begin the sequence, before those in the window
            skipped = start - first
        todo = lax.div(there + (block - 1), jnp.int32(block)) - skipped
        share = lax.div(todo + (parts - 1), jnp.int32(parts))
        low = part * share
        steps = jnp.maximum(jnp.minimum(low + share, todo) - low, 0)

        def block_of(step):
            at = low + step
            return at + jnp.where(at < first, 0, skipped)

        @pl.when(group == groups)
        def _copy():
            last = lax.div(there + (L - 1), jnp.int32(L)) - 1

            def copy(ref, smem, scale_ref, scale_at, ready, step, here):
                for i in range(each):
                    page = table_ref[b, jnp.minimum(block_of(step) * each + i, last)]
                    tokens = here if each == 1 else (here, pl.ds(i * L, L))
                    plgpu.copy_gmem_to_smem(ref.at[page, head], smem.at[tokens], ready.at[here])
                    if scaled:
                        plgpu.copy_gmem_to_smem(scale_ref.at[page, head], scale_at.at[tokens], ready.at[here])

            keys = functools.partial(copy, k_ref, k_smem, scale_refs[0], scale_smem[0], k_ready)
            values = functools.partial(copy, v_ref, v_smem, scale_refs[1], scale_smem[1], v_ready)
            copy_ahead(steps, stages, (k_free, keys), (v_free, values))

        @pl.when(group < groups)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            tile, stream = lax.rem(group, jnp.int32(wide)), lax.div(group, jnp.int32(wide))

            @pl.when(stream == 0)
            def _copy_queries():
                mine = b, head, pl.ds(tile * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[tile], q_ready.at[tile])

            plgpu.barrier_wait(q_ready.at[tile])
            of_two = unit(scale, softcap, sloped=False)

            def readable(smem, here):
                """The block as products read it."""
                if not small:
                    return smem.at[here]
                x = smem[here]
                cast_smem[group] = (x if x.dtype == jnp.int8 else x.astype(jnp.float32)).astype(dtype)
                plgpu.commit_smem()
                return cast_smem.at[group]

            def grown(x, smem, here):
                by = loaded(smem, here, interpret=interpret) if scaled else None
                return x * over_rows(by, x.shape, 1) if scaled else x

            def one(turn, carry):
                o, top, total = carry
                step = turn * streams + stream
                here = slot(step, stages)
                plgpu.barrier_wait(k_ready.at[here])
                keys = readable(k_smem, here)

                def ask(s):
                    s.add(q_smem.at[tile], keys, transposed=True)
                    return s.get()

                s = grown(sums(ask, (ROWS, block), interpret=interpret), scale_smem[0], here)
                plgpu.barrier_arrive(k_free.at[here])
                s, _ = bent(s, scale, softcap, sloped=False, tanh=tanh)
                row, column = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
                q = length - T + lax.div(row + tile * ROWS, jnp.int32(G))
                k = block_of(step) * block + column
                seen = (k <= q) & (k < there)
                if window is not None:
                    seen = seen & ((k > q - window) | (k < sinks))
                new = softmax(jnp.where(seen, s, -jnp.inf), of_two, top, total, masked=True)
                o = o * over_rows(new.shrink, o.shape)
                plgpu.barrier_wait(v_ready.at[here])
                p = grown(new.p, scale_smem[1], here)
                values = readable(v_smem, here)
                o, p = lax.optimization_barrier((o, p.astype(dtype)))

                def gather(o):
                    o.add(p, values)
                    return o.get()

                o = sums(gather, o, interpret=interpret)
                plgpu.barrier_arrive(v_free.at[here])
                return o, new.top, new.total

            none = jnp.full(ROWS, -jnp.inf, jnp.float32)
            turns = lax.div(steps - stream + (streams - 1), jnp.int32(streams))
            o_smem[group], lse_smem[group] = divided(
                *lax.fori_loop(0, turns, one, (jnp.zeros((ROWS, H), jnp.float32), none, jnp.zeros(ROWS, jnp.float32)))
            )
            plgpu.commit_smem()
            n = min(rows, ROWS)
            at = b, head, part * streams + stream, pl.ds(tile * ROWS, n)
            plgpu.copy_smem_to_gmem(o_smem.at[group, pl.ds(0, n)], o_ref.at[at])
            plgpu.copy_smem_to_gmem(lse_smem.at[group, pl.ds(0, n)], lse_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

    swizzled, row = plgpu.SwizzleTransform(128), 128 // k_PKLH.dtype.itemsize  # of 128 bytes
    cache = plgpu.SMEM(
        (stages, block, H), k_PKLH.dtype,
        transforms=(plgpu.TilingTransform((8, row)), swizzled) if H >= row else (),
    )  # fmt: skip
    arrivals = each * (2 if scaled else 1)
    o_BKXRH, lse_BKXR = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, K, parts * streams, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts * streams, rows), jnp.float32),
        ],
        scratch_types=[
            tiles(wide, ROWS, H, dtype), cache, cache,
            plgpu.SMEM((groups, ROWS, H), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), swizzled)),
            plgpu.SMEM((groups, ROWS), jnp.float32), tiles(groups, block, H, dtype) if small else None,
            [plgpu.SMEM((stages, block), jnp.float32)] * 2 if scaled else [None, None], barrier(wide),
            barrier(stages, arrivals), barrier(stages, arrivals), barrier(stages, wide), barrier(stages, wide),
        ],
        grid=(K, parts, B), grid_names=("head", "part", "row"), num_threads=groups + 1, thread_name="group",
        compiler_params=COMPILE, interpret=interpreted(interpret),
    )(q_BKRH, k_PKLH, v_PKLH, scales, table_BM, length_B)  # fmt: skip
    top = lse_BKXR.max(2, keepdims=True)
    weight = jnp.exp2(lse_BKXR - jnp.where(top == -jnp.inf, 0, top))
    weight /= jnp.maximum(weight.sum(2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    o_BKRH = (o_BKXRH * weight[..., None]).sum(2)[:, :, : T * G].astype(dtype)
    return o_BKRH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
