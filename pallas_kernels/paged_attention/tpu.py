"""Attention over a paged cache for TPUs, in Pallas Mosaic.

What limits it is reading the cache: copies run ahead of the work, a few blocks of several pages with all their key
heads, through the ends of sequences into those that follow. Of a block the products of all heads are under way
together. The work follows the length of each sequence, and pages between sinks and a window are left out as if they
were not there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.logits import bent, unit, whole
from pallas_kernels.attention.tpu import LANES, MIB

SUBLANES = 8
BLOCK, TOKENS = 2 * MIB, 4096  # bytes of keys of a block, and its tokens, at most
LOGITS = 2**19  # of a block, at most
AHEAD = 16 * MIB  # bytes of all blocks, if they are more than two
ROOM = 48 * MIB  # bytes of vector memory that the kernel may take: each chip has 64 MiB or more
SCALARS = 2**17  # pages that a table may name at once: it lies in scalar memory, which has 1 MiB


class Cut(NamedTuple):
    """How work is cut."""

    rows: int  # of the queries that share a key head
    work: Any  # the dtype of products
    each: int  # pages of a block
    stages: int  # blocks in vector memory, a power of 2
    memory: int  # bytes that all takes there


def cut(q_BTNH: jax.Array, k_PKLH: jax.Array) -> Cut:
    """Large blocks: how long a product takes is hidden by others, and many bytes are on their way."""
    (T, N, H), (K, L), kept = q_BTNH.shape[1:], k_PKLH.shape[1:3], k_PKLH.dtype
    rows = -(-T * (N // K) // SUBLANES) * SUBLANES
    exact = q_BTNH.dtype != jnp.bfloat16 or kept == jnp.float32
    work = jnp.dtype(jnp.float32 if exact else jnp.bfloat16)
    wide = K * max(H, LANES)  # a token's keys, as they lie in memory
    tokens = min(BLOCK // (wide * kept.itemsize), LOGITS // (K * rows), TOKENS)
    each = max(1, max(1, tokens // LANES) * LANES // L)
    block = each * L
    both = 2 * block * wide * kept.itemsize
    stages = 4 if 4 * both <= AHEAD else 2
    cast = 2 * block * wide * work.itemsize if kept != work else 0
    logits, queries = 4 * block * K * rows * 4, rows * (wide * (4 * work.itemsize + 8) + K * LANES * 8)
    return Cut(rows, work, each, stages, stages * both + cast + logits + queries)


def cores_of(chip: str) -> int:
    """Cores that work on one program, of a TPU of this `device_kind`."""
    return 2 if chip in ("TPU v4", "TPU v5", "TPU v5p") else 1


def why_not(q_BTNH: jax.Array, k_PKLH: jax.Array, *, scaled: bool) -> str | None:
    """What of these arrays the kernel cannot take; None if it can."""
    (T, N, H), (K, L) = q_BTNH.shape[1:], k_PKLH.shape[1:3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes queries of bfloat16, float16 and float32, not {q_BTNH.dtype}"
    if k_PKLH.dtype not in (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn):
        return f"it takes a cache of bfloat16, float32, int8 or float8_e4m3fn, not {k_PKLH.dtype}"
    if H not in (64, 128, 256):
        return f"it takes heads of 64, 128 and 256, not of {H}"
    if L not in (8, 16, 32, 64, 128, 256):
        return f"it takes pages of 8, 16, 32, 64, 128 and 256 tokens, not of {L}"
    if cut(q_BTNH, k_PKLH).memory > ROOM:
        return f"{T} tokens of {N // K} heads that share a key head are more than fit beside pages of {K} such heads"
    return None


class Span(NamedTuple):
    """Pages that are read of a sequence: `first` that begin it, and those that come after `skipped` more."""

    count: Any
    first: Any
    skipped: Any


def paged_attention(
    q_BTNH: jax.Array, k_PKLH: jax.Array, v_PKLH: jax.Array, table_BM: jax.Array, length_B: jax.Array, *,
    scale: float, window: int | None = None, sinks: int = 0, softcap: float | None = None,
    k_scale_PKL: jax.Array | None = None, v_scale_PKL: jax.Array | None = None, cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:  # fmt: skip
    """What `reference.paged_attention` gives.

    Pages and scales are read where they are if these arrays lie row by row: `jax.experimental.layout.Layout((0, 1, 2,
    3))` and `Layout((0, 1, 2))`. By itself XLA puts another axis innermost where the last one is of less than 128, as
    that of heads of 64 and of the scales of small pages, and then copies all of them for each call.

    Args:
      cores: that share the sequences.
    """
    (B, T, N, H), (K, L), M = q_BTNH.shape, k_PKLH.shape[1:3], table_BM.shape[1]
    how = dict(
        scale=scale, window=window, sinks=sinks, softcap=softcap, k_scale_PKL=k_scale_PKL, v_scale_PKL=v_scale_PKL,
        cores=cores, interpret=interpret,
    )  # fmt: skip
    if B > (most := max(1, SCALARS // M)):
        cuts = [slice(begin, begin + most) for begin in range(0, B, most)]
        return jnp.concatenate(
            [paged_attention(q_BTNH[x], k_PKLH, v_PKLH, table_BM[x], length_B[x], **how) for x in cuts]
        )
    rows, dtype, each, stages, _ = cut(q_BTNH, k_PKLH)
    each = min(each, max(1, -(-M * L // LANES) * LANES // L))  # no more than a table can name
    widths = [w for w in (each // 8, each // 4, each // 2, each) if w and w * L % LANES == 0]  # pages worked on as one
    G, block, scaled = N // K, each * L, k_scale_PKL is not None
    q_BKRH = q_BTNH.astype(dtype).reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    q_BKRH = whole(whole(q_BKRH, rows, 2), cores, 0)
    table, length_B = whole(table_BM, cores, 0).reshape(-1), whole(length_B, cores, 0)
    share = len(length_B) // cores
    pages = [k_PKLH, v_PKLH] + ([x.astype(jnp.float32) for x in (k_scale_PKL, v_scale_PKL)] if scaled else [])

    def kernel(table_ref, length_ref, q_ref, pages_refs, o_ref, *scratch):
        k_vmem, v_vmem, scale_vmem, arrived, acc_ref, top_ref, sum_ref, at_ref = scratch
        i = pl.program_id(1)
        b, end = pl.program_id(0) * share + i, (pl.program_id(0) + 1) * share

        def there(b):
            return jnp.minimum(length_ref[b], M * L)

        def span(b) -> Span:
            last = lax.div(there(b) + (L - 1), L)
            if window is None:
                return Span(last, 0, 0)
            start = jnp.minimum(lax.div(jnp.maximum(length_ref[b] - (T + window - 1), 0), L), last)
            first = jnp.minimum(start, -(-sinks // L))
            return Span(last - (start - first), first, start - first)

        def each_copy(count, slot, page: Callable, what: Callable):
            """Of `count` pages, which `page` gives, into a slot."""

            def one(n):
                tokens, source = pl.ds(pl.multiple_of(n * L, L), L), page(n)
                places = [x.at[slot, :, tokens] for x in (k_vmem, v_vmem)] + [x.at[slot, n] for x in scale_vmem]
                for ref, place in zip(pages_refs, places, strict=True):
                    what(pltpu.make_async_copy(ref.at[source], place, arrived.at[slot]))

            repeat(0, count, one, unroll=4)

        def filled(b):
            """This sequence, or the next one of which there are pages."""
            return lax.while_loop(lambda b: (b < end) & (span(jnp.minimum(b, end - 1)).count == 0), lambda b: b + 1, b)

        def start(slot, fresh: bool):
            """Copies of the next block that is not on its way, if there is one more."""
            b, step = at_ref[0], at_ref[1]

            @pl.when(b < end)
            def _start():
                read = span(b)
                count = jnp.minimum(read.count - step * each, each)
                if fresh:
                    clear(slot, count)

                def page(n):
                    m = step * each + n
                    return table_ref[b * M + m + jnp.where(m < read.first, 0, read.skipped)]

                each_copy(count, slot, page, lambda copy: copy.start())
                more = (step + 1) * each < read.count
                at_ref[0], at_ref[1] = jnp.where(more, b, filled(b + 1)), jnp.where(more, step + 1, 0)

        def clear(slot, count):
            """What is not copied into a slot: its weight is 0, but it must be finite."""

            def tokens(n):
                at = slot, slice(None), pl.ds(pl.multiple_of(n * LANES, LANES), LANES)
                v_vmem[at] = jnp.zeros((K, LANES, H), v_vmem.dtype)

            def scale_of_page(n):
                scale_vmem[1][slot, n] = jnp.zeros((K, L), jnp.float32)

            repeat(lax.div(count * L, LANES), block // LANES, tokens)
            if scaled:
                repeat(count, each, scale_of_page)

        @pl.when(i == 0)
        def _begin():
            at_ref[0], at_ref[1], at_ref[2] = filled(b), 0, 0
            repeat(0, stages, lambda slot: start(slot, True))

        length, read, done = length_ref[b], span(b), at_ref[2]
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...], acc_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(acc_ref)
        of_two = unit(scale, softcap, sloped=False)

        def seen(step, tokens: int):
            """[rows, tokens], of the first tokens of a block."""
            row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            q = length - T + sum((row >= t * G).astype(jnp.int32) for t in range(1, T))
            k = step * block + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
            last = jnp.minimum(q, there(b) - 1)
            if window is None:
                return k <= last
            k = k + jnp.where(k < read.first * L, 0, read.skipped * L)
            return (k <= last) & ((k > q - window) | (k < sinks))

        def weigh(step, slot, tokens: int):
            """The first tokens of a block."""

            def grown(x, which: int):
                if not scaled:
                    return x
                scales = [scale_vmem[which][slot, n] for n in range(tokens // L)]
                return x * jnp.concatenate(scales, 1)[:, None]

            s = grown(product(q_ref[0], k_vmem[slot, :, :tokens].astype(dtype), 2), 0)
            s, _ = bent(s, scale, softcap, sloped=False)
            s = jnp.where(seen(step, tokens)[None], s * of_two, -jnp.inf)
            top = top_ref[...]
            new = jnp.maximum(top, s.max(2, keepdims=True))
            safe = jnp.where(new == -jnp.inf, 0.0, new)  # of a row that has seen nothing yet
            p, shrink = jnp.exp2(s - safe[:, :, :1]), jnp.exp2(top - safe)
            top_ref[...] = new
            sum_ref[...] = sum_ref[...] * shrink + p.sum(2, keepdims=True)
            o = product(grown(p, 1).astype(dtype), v_vmem[slot, :, :tokens].astype(dtype), 1)
            acc_ref[...] = acc_ref[...] * shrink[:, :, :1] + o

        def one(step):
            slot = (done + step) & (stages - 1)
            count = jnp.minimum(read.count - step * each, each)
            each_copy(count, slot, lambda n: 0, lambda copy: copy.wait())
            for below, width in zip((0, *widths), widths):
                pl.when((below < count) & (count <= width))(functools.partial(weigh, step, slot, width * L))
            start(slot, False)

        steps = lax.div(read.count + (each - 1), each)
        repeat(0, steps, one)
        at_ref[2] = done + steps
        total = sum_ref[:, :, :1]
        o_ref[0] = jnp.where(total > 0, acc_ref[...] / jnp.where(total > 0, total, 1.0), 0.0).astype(o_ref.dtype)

    of_sequence = pl.BlockSpec((1, K, rows, H), lambda core, i, *_: (core * share + i, 0, 0, 0))
    o_BKRH = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, share),
            in_specs=[of_sequence, [pl.BlockSpec(memory_space=pltpu.HBM)] * len(pages)],
            out_specs=of_sequence,
            scratch_shapes=[
                pltpu.VMEM((stages, K, block, H), k_PKLH.dtype), pltpu.VMEM((stages, K, block, H), k_PKLH.dtype),
                [pltpu.VMEM((stages, each, K, L), jnp.float32)] * 2 if scaled else [],
                pltpu.SemaphoreType.DMA((stages,)), pltpu.VMEM((K, rows, H), jnp.float32),
                pltpu.VMEM((K, rows, LANES), jnp.float32), pltpu.VMEM((K, rows, LANES), jnp.float32),
                pltpu.SMEM((3,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=ROOM),
        interpret=interpret,
        name="paged_attention",
    )(table, length_B, q_BKRH, pages)  # fmt: skip
    o_BTKGH = o_BKRH[:B, :, : T * G].reshape(B, K, T, G, H).swapaxes(1, 2)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def repeat(first, end, one: Callable, unroll: int = 1) -> None:
    """`one` of each number."""

    def some(i, _):
        for n in range(unroll):
            one(first + i * unroll + n)
        return ()

    groups = lax.div(end - first, unroll)
    lax.fori_loop(0, groups, some, ())
    if unroll > 1:
        repeat(first + groups * unroll, end, one)


def product(a, b, b_axis: int):
    """Of each key head."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((2,), (b_axis,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32
    )
