"""Flash attention for TPUs, in Pallas Mosaic.

After Dao 2023, arXiv:2307.08691, with keys and values of a head whole in the chip's vector memory: a block of queries
goes through them in chunks, several to a step, so that the compiler schedules the products of one chunk beside the
softmax of another. The backward pass asks for logits once: it goes through the queries of each chunk of keys, adds
what these give the queries to a sum in vector memory, and transposes nothing but the derivatives of the logits.

Which chunks there are is `masks.work`'s to say: first those that are partly visible, then those that are wholly
visible and need no mask. Of a mask without arrays that is arithmetic of the block's index, which the compiler's
simulator of cycles follows; else it is read from scalar memory. All sums have an order: the same arguments give the
same bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.dropout import grown
from pallas_kernels.attention.logits import LOG2E, any_head, bent, of_queries, unit, whole
from pallas_kernels.attention.masks import Mask, Role, Work, work

LANES = 128
MIB = 2**20
EXTRAS = {"slopes_N", "values_NX", "seed"}  # of `api.EXTRAS`, those that there are
SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Queries of a block, keys of a chunk, and chunks of a step; of the backward pass the other way round."""

    block: int
    chunk: int
    unroll: int


FORWARD, BACKWARD = Tuning(512, 512, 4), Tuning(512, 512, 2)


def why_not(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array) -> str | None:
    """What of these arrays the kernels cannot take; None if they can."""
    return any_head(q_BTNH, v_BSKV)


# --- the way through the chunks ---------------------------------------------------------------------------------


class Steps(NamedTuple):
    """`Work`, of whole rows: how many chunks are partly and how many wholly visible, and which those are."""

    partial: Callable
    full: Callable
    at: Callable  # of a row and a step
    most: int  # partly visible chunks of a row, as far as is known


def line(values: np.ndarray) -> Callable | None:
    """These integers as arithmetic of their index: a straight line that bends a few times; None if it bends often."""
    values = [int(v) for v in values]
    slopes = [after - before for before, after in zip(values, values[1:])] or [0]
    bends = [(i, slopes[i] - slopes[i - 1]) for i in range(1, len(slopes)) if slopes[i] != slopes[i - 1]]
    if len(bends) > 6:
        return None

    def at(row):
        return sum((by * jnp.maximum(row - i, 0) for i, by in bends), slopes[0] * row + values[0])

    return at


def closed(todo: Work) -> Steps | None:
    """The steps of work that is known while a kernel is traced, as arithmetic; None if they follow no simple rule."""
    if not isinstance(todo.order, np.ndarray) or len(todo.order) > 1:
        return None
    order, partial, full = todo.order[0], todo.partial[0], todo.full[0]
    starts = []  # of each row: where its order jumps, and how far
    for chunks, count in zip(order, partial + full, strict=True):
        offset = chunks[:count] - np.arange(count)
        jumps = np.flatnonzero(np.diff(offset, prepend=0))
        starts.append([(int(s), int(offset[s] - (offset[s - 1] if s else 0))) for s in jumps])
    most = max(map(len, starts), default=0)
    if most > 4:
        return None
    never = order.shape[1]
    filled = np.array([s + [(never, 0)] * (most - len(s)) for s in starts], np.int64).reshape(len(starts), most, 2)
    lines = [[line(filled[:, i, what]) for what in (0, 1)] for i in range(most)]
    counts = line(partial), line(full)
    if None in (*counts, *(x for pair in lines for x in pair)):
        return None

    def at(row, step):
        return sum((jnp.where(step >= start(row), by(row), 0) for start, by in lines), step)

    return Steps(*counts, at, int(partial.max()))


def read(refs: Work, b) -> Steps:
    """The steps of a row of the batch, from scalar memory."""
    b = 0 if refs.order.shape[0] == 1 else b
    return Steps(
        partial=lambda row: refs.partial[b, row], full=lambda row: refs.full[b, row],
        at=lambda row, step: refs.order[b, row, step], most=2,
    )  # fmt: skip


def through(steps: Steps, row, unroll: int, ask: Callable, use: Callable) -> None:
    """`use(ask(chunk), chunk, masked)` of all chunks of a row, some at a time.

    A chunk is asked for before the answer of the one before is used, so that both may be under way together: first
    partly visible ones, if there are many, one by one; the last few of them with what is over of the others; those by
    `unroll`, a power of 2.
    """
    masked = min(steps.most, unroll)  # of the few
    partial = steps.partial(row)
    begin = jnp.maximum(partial - masked, 0)
    left = partial + steps.full(row) - begin
    # No division: the simulator of cycles follows bits.
    joined = jnp.where(left < masked, left, masked + ((left - masked) & (unroll - 1)))

    def some(first, masks: list[bool]):
        chunks = [steps.at(row, first + i) for i in range(len(masks))]
        answer = ask(chunks[0])
        for chunk, following, hidden in zip(chunks, [*chunks[1:], None], masks, strict=True):
            ahead = None if following is None else ask(following)
            use(answer, chunk, hidden)
            answer = ahead

    def one(step, _):
        some(step, [True])
        return ()

    def group(i, _):
        some(begin + joined + i * unroll, [False] * unroll)
        return ()

    lax.fori_loop(0, begin, one, ())
    for n in range(1, masked + unroll):
        pl.when(joined == n)(functools.partial(some, begin, [i < masked for i in range(n)]))
    lax.fori_loop(0, (left - joined) >> (unroll.bit_length() - 1), group, ())


# --- logits -----------------------------------------------------------------------------------------------------


class Extras(NamedTuple):
    """What may come besides queries, keys and values; inside a kernel all are refs."""

    slopes: Any  # [N]
    seed: Any  # [1]
    values: Any  # [N, 1, X], by distance

    @property
    def added(self) -> bool:
        """Whether anything is added to logits."""
        return self.slopes is not None or self.values is not None


class Logits(NamedTuple):
    """What makes logits of products."""

    extras: Extras
    scale: float
    softcap: float | None
    shift: int
    rate: float  # of dropout
    S: int | None  # where keys end, if they do within a block

    @property
    def unit(self) -> float:
        """What turns `of` into exponents of 2."""
        return unit(self.scale, self.softcap, self.extras.added)

    def of(self, s, n, q, k, mask: Mask | None, at: Callable):
        """Logits of products, and their derivatives: see `bent`.

        Args:
          q: indices of queries, and k of keys, which broadcast.
          mask: with arrays that broadcast; None: all see all.
          at: of a number of values by distance, those from where those of `s` begin: see `spread`.
        """
        s, slope = bent(s, self.scale, self.softcap, self.extras.added)
        if self.extras.slopes is not None:
            s = s - self.extras.slopes[n] * jnp.abs(q + self.shift - k).astype(jnp.float32)
        if self.extras.values is not None:
            s = s + spread(self.extras.values[0, :, at(sum(s.shape))], s.shape[0])
        if mask is not None:
            seen = mask.visible(q, k)
            s = jnp.where(seen if self.S is None else seen & (k < self.S), s, -jnp.inf)
        return s, slope

    def kept(self, head, q, k):
        """What weights are multiplied with: see `dropout.grown`."""
        return grown(self.rate, self.extras.seed[0], head, q, k)


def spread(values, n: int):
    """[1, n + m] -> [n, m]: row i has those that begin at `n - i`."""
    width = values.shape[1]
    x = jnp.broadcast_to(values, (n, width))
    return pltpu.roll(x, width - n, 1, stride=1, stride_axis=0)[:, : width - n]


def gathered(x):
    """[n, m] -> [1, n + m]: the sums that are the gradient of `spread`."""
    n, m = x.shape
    x = jnp.concatenate([x, jnp.zeros((n, n), x.dtype)], axis=1)
    row, step = lax.broadcasted_iota(jnp.int32, x.shape, 0), 1
    while step < n:  # row i goes back by i, bit by bit
        x = jnp.where((row & step) > 0, pltpu.roll(x, n + m - step, 1), x)
        step *= 2
    return pltpu.roll(x.sum(axis=0, keepdims=True), n, 1)


def rows(x: jax.Array, block: int, fill: float = 0.0) -> jax.Array:
    """Arrays of a mask, and numbers of queries, as they are kept: [..., 1, T], padded to whole blocks."""
    return whole(x, block, x.ndim - 1, fill)[..., None, :]


def column(x) -> jax.Array:
    """[1, n] -> [n, LANES], the same in all lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def lanes(x, width: int):
    """[n, LANES] with the same in all lanes -> [n, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def dot(a, b, a_axis: int, b_axis: int):
    precision = "highest" if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


# --- forward ----------------------------------------------------------------------------------------------------


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, mask: Mask, *, scale: float, softcap: float | None = None,
    slopes_N: jax.Array | None = None, values_NX: jax.Array | None = None, shift: int = 0, rate: float = 0.0,
    seed: jax.Array | None = None, memory: int = 64 * MIB, tuning: Tuning | None = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What `reference.attention` gives.

    Args:
      memory: bytes of the chip's vector memory; keys and values of a head that have no room there go by sections.
    """
    T, S, dtype, tuning = q_BTNH.shape[1], k_BSKH.shape[1], v_BSKV.dtype, tuning or FORWARD
    q_BTNH, k_BSKH, v_BSKV = map(taken, (q_BTNH, k_BSKH, v_BSKV))
    length, keys = (-(-n // block) * block for n, block in ((T, tuning.block), (S, tuning.chunk)))
    extras = _extras(slopes_N, seed, values_NX, length - T + 1, length + keys)
    how = dict(extras=extras, scale=scale, softcap=softcap, shift=shift, rate=rate, tuning=tuning, interpret=interpret)
    a_key = (_wide(k_BSKH.shape[3]) + _wide(v_BSKV.shape[3])) * k_BSKH.dtype.itemsize
    size, buffers, memory = _sections(S, a_key, 0, memory, tuning.chunk, 0 if values_NX is None else length + keys)
    found = None
    for begin in range(0, S, size):
        cut = slice(begin, begin + size)
        part = _forward(
            q_BTNH, k_BSKH[:, cut], v_BSKV[:, cut], _cut(mask, "keys", cut), begin=begin, buffers=buffers,
            memory=memory, **how,
        )  # fmt: skip
        found = part if found is None else _merged(found, part)
    return found[0].astype(dtype), found[1]


def _extras(slopes_N, seed, values_NX, left: int, width: int) -> Extras:
    """As kernels take them: values begin with `left` that nobody asks for, and are `width` in all."""
    f32 = jnp.float32
    if values_NX is not None:
        right = width - left - values_NX.shape[1]
        values_NX = jnp.pad(values_NX.astype(f32), ((0, 0), (left, right)))[:, None]
    return Extras(None if slopes_N is None else slopes_N.astype(f32), None if seed is None else seed[None], values_NX)


def taken(x: jax.Array) -> jax.Array:
    """As the kernels take it: they compute in float32 what float16 is exact in."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _sections(length: int, a_token: int, again: int, memory: int, block: int, values: int = 0) -> tuple[int, int, int]:
    """Into sections of how many tokens a sequence is cut, the buffers there are for each, and bytes that takes in all.

    Args:
      a_token: bytes of one that are copied into vector memory, and `again` that are kept there besides.
      values: by distance, that are copied there too, in float32.
    """
    rest = 18 * MIB + 2 * 4 * values
    takes = lambda buffers: (a_token * buffers + again) * block  # for each block
    fits = lambda buffers: (memory - rest) // takes(buffers) * block
    buffers = 2 if length <= fits(2) else 1
    size = length if length <= fits(buffers) else max(block, fits(buffers))
    return size, buffers, min(memory, rest + takes(buffers) * -(-size // block))


def _wide(n: int) -> int:
    """What a row of so many takes in vector memory."""
    return -(-n // LANES) * LANES


def _cut(mask: Mask, of: Role, cut: slice) -> Mask:
    return mask.mapped(lambda x, role: x[:, cut] if role == of else x)


def _merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to keys of two sections, of that to each."""
    lse_BNT = jnp.logaddexp(a[1], b[1])
    safe_BNT = jnp.where(lse_BNT == -jnp.inf, 0, lse_BNT)
    parts = (o.astype(jnp.float32) * jnp.exp(lse - safe_BNT).swapaxes(1, 2)[..., None] for o, lse in (a, b))
    return sum(parts), lse_BNT


def _forward(
    q_BTNH, k_BSKH, v_BSKV, mask, *, extras, scale, softcap, shift, rate, begin, buffers, memory, tuning, interpret
):
    """Of a section of keys that begins at `begin`."""
    (B, T, N, H), (S, K), V, dtype = q_BTNH.shape, k_BSKH.shape[1:3], v_BSKV.shape[3], q_BTNH.dtype
    G, block, chunk = N // K, tuning.block, tuning.chunk
    logits = Logits(extras, scale, softcap, shift, rate, begin + S if S % chunk else None)
    q_BNTH = whole(q_BTNH, block, 1).swapaxes(1, 2)
    k_BKSH, v_BKSV = (whole(x, chunk, 1).swapaxes(1, 2) for x in (k_BSKH, v_BSKV))
    length, keys = q_BNTH.shape[2], k_BKSH.shape[2]
    todo = work(mask, block, chunk, T, S, k_begin=begin)
    static = closed(todo)

    def kernel(todo_refs, extra_refs, mask_refs, q_ref, k_ref, v_ref, o_ref, lse_ref, top_ref, sum_ref, acc_ref):
        b, i = pl.program_id(0), pl.program_id(3)
        n = pl.program_id(1) * G + pl.program_id(2)
        of = logits._replace(extras=extra_refs)
        q = q_ref[0, 0]
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...], acc_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(acc_ref)

        def at(j):
            return pl.ds(pl.multiple_of(j * chunk, chunk), chunk)

        def ask(j):
            return dot(q, k_ref[0, 0, at(j)], 1, 1)

        def weigh(s, j, masked: bool):
            q_index = lax.broadcasted_iota(jnp.int32, (block, 1), 0) + i * block
            k_index = lax.broadcasted_iota(jnp.int32, (1, chunk), 1) + (begin + j * chunk)
            beside = dict(row=lambda x: x[b], queries=lambda x: column(x[0])[:, :1], keys=lambda x: x[0, :, at(j)])
            first = length + begin + j * chunk - (i + 1) * block
            seen = mask_refs.mapped(lambda x, r: beside[r](x)) if masked else None
            s, _ = of.of(s, n, q_index, k_index, seen, lambda size: pl.ds(pl.multiple_of(first, LANES), size))
            top = top_ref[...]
            new = jnp.maximum(top, s.max(axis=1, keepdims=True) * of.unit)
            nothing = masked or of.extras.values is not None  # a row may have seen nothing yet
            safe = jnp.where(new == -jnp.inf, 0.0, new) if nothing else new
            p = jnp.exp2(s * of.unit - lanes(safe, chunk))
            shrink = jnp.exp2(top - safe)
            top_ref[...] = new
            sum_ref[...] = sum_ref[...] * shrink + sum(p[:, x : x + LANES] for x in range(0, chunk, LANES))
            p = p if not rate else p * of.kept(b * N + n, q_index, k_index)
            acc_ref[...] = acc_ref[...] * lanes(shrink, V) + dot(p.astype(dtype), v_ref[0, 0, at(j)], 1, 0)

        through(static or read(todo_refs, b), i, tuning.unroll, ask, weigh)
        total = jnp.broadcast_to(sum_ref[...].sum(axis=1, keepdims=True), (block, LANES))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        o_ref[0, 0] = (acc_ref[...] * lanes(jnp.where(some, 1 / total, 0.0), V)).astype(dtype)
        lse_ref[0, 0] = jnp.where(some, top_ref[...] * (1 / LOG2E) + jnp.log(total), -jnp.inf).T[:1]

    of_head = functools.partial(
        pl.BlockSpec, index_map=lambda b, k, g, i: (b, k, 0, 0), pipeline_mode=pl.Buffered(buffers)
    )
    of_block = functools.partial(pl.BlockSpec, index_map=lambda b, k, g, i: (b, k * G + g, i, 0))
    arrays, mask_specs = _of_mask(
        mask,
        queries=(block, pl.BlockSpec((1, 1, block), lambda b, k, g, i: (b, 0, i))),
        keys=(chunk, pl.BlockSpec((1, 1, keys), lambda b, k, g, i: (b, 0, 0))),
    )
    o_BNTV, lse_BN1T = _call(
        kernel,
        f"tpu_attention_fwd:block_q={block}:block_kv={chunk}",
        None if static else todo, extras, lambda b, k, g, i: k * G + g, arrays, q_BNTH, k_BKSH, v_BKSV,
        grid=(B, K, G, length // block),
        in_specs=[mask_specs, of_block((1, 1, block, H)), of_head((1, 1, keys, H)), of_head((1, 1, keys, V))],
        out_shape=[
            jax.ShapeDtypeStruct((B, N, length, V), dtype), jax.ShapeDtypeStruct((B, N, 1, length), jnp.float32)
        ],
        out_specs=[
            of_block((1, 1, block, V)), pl.BlockSpec((1, 1, 1, block), lambda b, k, g, i: (b, k * G + g, 0, i))
        ],
        scratch=[(block, LANES), (block, LANES), (block, V)],
        memory=memory,
        interpret=interpret,
    )  # fmt: skip
    return o_BNTV.swapaxes(1, 2)[:, :T], lse_BN1T[:, :, 0, :T]


def _of_mask(mask: Mask, **roles: tuple[int, pl.BlockSpec]) -> tuple[Mask, Mask]:
    """The mask's arrays as kernels take them, in whole blocks, and their specs; of each role the block and the spec."""

    def array(x: jax.Array, role: Role) -> jax.Array:
        return x if role == "row" else rows(x, roles[role][0])

    def spec(x: jax.Array, role: Role) -> pl.BlockSpec:
        return SCALARS if role == "row" else roles[role][1]

    return mask.mapped(array), mask.mapped(spec)


def _call(
    kernel: Callable, name: str, todo: Work | None, extras: Extras, head: Callable, *args, grid, in_specs, out_shape,
    out_specs, scratch, memory: int, interpret: bool,
):  # fmt: skip
    """`pallas_call` of a kernel whose first arguments are work to read, in scalar memory, and extras, if there are.

    Args:
      head: the query head of a step of the grid.
    """
    todo = None if todo is None else jax.tree.map(jnp.asarray, todo)
    specs = Extras(*(None if x is None else SCALARS for x in extras))
    if extras.values is not None:
        specs = specs._replace(values=pl.BlockSpec((1, *extras.values.shape[1:]), lambda *at: (head(*at), 0, 0)))
    run = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=[jax.tree.map(lambda _: SCALARS, todo), specs, *in_specs],
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=None if interpret else pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=memory
        ),
        interpret=interpret,
    )  # fmt: skip
    with jax.named_scope(name):
        return run(todo, extras, *args)


# --- backward ---------------------------------------------------------------------------------------------------


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, o_BTNV: jax.Array, lse_BNT: jax.Array, do_BTNV: jax.Array,
    mask: Mask, *, scale: float, softcap: float | None = None, slopes_N: jax.Array | None = None,
    values_NX: jax.Array | None = None, shift: int = 0, rate: float = 0.0, seed: jax.Array | None = None,
    memory: int = 64 * MIB, tuning: Tuning | None = None, interpret: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Gradients of q, k, v, and of values if there are: logits are asked for once, 5 products in place of the 7 of two
    kernels.

    Args:
      memory: bytes of the chip's vector memory; queries that have no room there go by sections.
    """
    (T, N, H), (S, K), V, dtype = q_BTNH.shape[1:], k_BSKH.shape[1:3], v_BSKV.shape[3], q_BTNH.dtype
    tuning = tuning or BACKWARD
    top_BNT, delta_BNT = of_queries(o_BTNV, do_BTNV, lse_BNT)
    q_BTNH, k_BSKH, v_BSKV, do_BTNV = map(taken, (q_BTNH, k_BSKH, v_BSKV, do_BTNV))
    length, keys = (-(-n // block) * block for n, block in ((T, tuning.chunk), (S, tuning.block)))
    turned = None if values_NX is None else values_NX[:, ::-1]  # by query less key
    extras = _extras(slopes_N, seed, turned, keys - S + 1, keys + length)
    how = dict(extras=extras, scale=scale, softcap=softcap, shift=shift, rate=rate, tuning=tuning, interpret=interpret)
    G, item = N // K, q_BTNH.dtype.itemsize
    a_query = (_wide(H) + _wide(V) + G * _wide(H)) * item + 64
    values = 0 if values_NX is None else (1 + G) * (length + keys)
    size, buffers, memory = _sections(T, a_query, G * _wide(H) * 4, memory, tuning.chunk, values)
    found = []
    for begin in range(0, T, size):
        cut = slice(begin, begin + size)
        found.append(_backward(
            q_BTNH[:, cut], k_BSKH, v_BSKV, do_BTNV[:, cut], top_BNT[:, :, cut], delta_BNT[:, :, cut],
            _cut(mask, "queries", cut), begin=begin, buffers=buffers, memory=memory, **how,
        ))  # fmt: skip
    dq, dk, dv, *of_values = zip(*found, strict=True)
    total = lambda parts: sum(x.astype(jnp.float32) for x in parts) if len(parts) > 1 else parts[0]
    gradients = jnp.concatenate(dq, 1).astype(dtype), total(dk).astype(dtype), total(dv).astype(dtype)
    if values_NX is None:
        return gradients
    turned_NX = total(of_values[0]).sum(0)[:, 0, keys - S + 1 :][:, : values_NX.shape[1]]
    return *gradients, turned_NX[:, ::-1].astype(values_NX.dtype)


def _backward(
    q_BTNH, k_BSKH, v_BSKV, do_BTNV, top_BNT, delta_BNT, mask, *, extras, scale, softcap, shift, rate, begin, buffers,
    memory, tuning, interpret,
):  # fmt: skip
    """Of a section of queries that begins at `begin`."""
    (B, T, N, H), (S, K), V, dtype = q_BTNH.shape, k_BSKH.shape[1:3], v_BSKV.shape[3], q_BTNH.dtype
    G, block, chunk = N // K, tuning.block, tuning.chunk
    logits = Logits(extras, scale, softcap, shift, rate, S if S % block else None)
    q_BNTH, do_BNTV = (whole(x, chunk, 1).swapaxes(1, 2) for x in (q_BTNH, do_BTNV))
    k_BKSH, v_BKSV = (whole(x, block, 1).swapaxes(1, 2) for x in (k_BSKH, v_BSKV))
    top_BN1T, delta_BN1T = rows(top_BNT, chunk, jnp.inf), rows(delta_BNT, chunk)
    length, keys = q_BNTH.shape[2], k_BKSH.shape[2]
    todo = work(mask, chunk, block, T, S, by="keys", q_begin=begin)
    static = closed(todo)

    def kernel(todo_refs, extra_refs, mask_refs, q_ref, do_ref, top_ref, delta_ref, k_ref, v_ref, *rest):
        dq_ref, dk_ref, dv_ref, dvalues_ref, dq_acc, dk_acc, dv_acc = rest
        b, j, g = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        n = pl.program_id(1) * G + g
        of = logits._replace(extras=extra_refs)
        k, v = k_ref[0, 0], v_ref[0, 0]

        @pl.when(g == 0)
        def _new_keys():
            dk_acc[...], dv_acc[...] = jnp.zeros_like(dk_acc), jnp.zeros_like(dv_acc)

        @pl.when(j == 0)
        def _new_queries():
            dq_acc[g] = jnp.zeros(dq_acc.shape[1:], jnp.float32)
            if dvalues_ref is not None:
                dvalues_ref[0, g] = jnp.zeros(dvalues_ref.shape[2:], jnp.float32)

        def at(i):
            return pl.ds(pl.multiple_of(i * chunk, chunk), chunk)

        def ask(i):
            """Products of keys and queries, and of values and what is given to their sums: keys are rows."""
            return dot(k, q_ref[0, 0, at(i)], 1, 1), dot(v, do_ref[0, 0, at(i)], 1, 1)

        def add(asked, i, masked: bool):
            s, dp = asked
            k_index = lax.broadcasted_iota(jnp.int32, (block, 1), 0) + j * block
            q_index = lax.broadcasted_iota(jnp.int32, (1, chunk), 1) + (begin + i * chunk)
            beside = dict(row=lambda x: x[b], queries=lambda x: x[0, :, at(i)], keys=lambda x: column(x[0])[:, :1])
            first = keys + begin + i * chunk - (j + 1) * block
            by_distance = lambda size: pl.ds(pl.multiple_of(first, LANES), size)
            seen = mask_refs.mapped(lambda x, r: beside[r](x)) if masked else None
            s, slope = of.of(s, n, q_index, k_index, seen, by_distance)
            p = jnp.exp2(s * of.unit - top_ref[0, 0, :, at(i)])
            kept = of.kept(b * N + n, q_index, k_index) if rate else 1.0
            ds = p * (dp * kept - delta_ref[0, 0, :, at(i)])
            p = p * kept
            if dvalues_ref is not None:
                dvalues_ref[0, g, :, by_distance(block + chunk)] += gathered(ds)
            ds = ds if slope is None else ds * slope
            dv_acc[...] += dot(p.astype(dtype), do_ref[0, 0, at(i)], 1, 0)
            dk_acc[...] += dot(ds.astype(dtype), q_ref[0, 0, at(i)], 1, 0)
            dq_acc[g, at(i)] += dot(ds.T.astype(dtype), k, 1, 0)

        through(static or read(todo_refs, b), j, tuning.unroll, ask, add)

        @pl.when(g == G - 1)
        def _keys_are_done():
            dk_ref[0, 0], dv_ref[0, 0] = (dk_acc[...] * scale).astype(dtype), dv_acc[...].astype(dtype)

        @pl.when(j == keys // block - 1)
        def _queries_are_done():
            dq_ref[0, g] = (dq_acc[g] * scale).astype(dtype)

    buffered = pl.Buffered(buffers)
    of_queries = functools.partial(
        pl.BlockSpec, index_map=lambda b, k, j, g: (b, k * G + g, 0, 0), pipeline_mode=buffered
    )
    of_keys = functools.partial(pl.BlockSpec, index_map=lambda b, k, j, g: (b, k, j, 0))
    arrays, mask_specs = _of_mask(
        mask,
        queries=(chunk, pl.BlockSpec((1, 1, length), lambda b, k, j, g: (b, 0, 0))),
        keys=(block, pl.BlockSpec((1, 1, block), lambda b, k, j, g: (b, 0, j))),
    )
    gradients = _call(
        kernel,
        f"tpu_attention_bwd:block_q_dkv={chunk}:block_kv_dkv={block}",
        None if static else todo, extras, lambda b, k, j, g: k * G + g,
        arrays, q_BNTH, do_BNTV, top_BN1T, delta_BN1T, k_BKSH, v_BKSV,
        grid=(B, K, keys // block, G),
        in_specs=[
            mask_specs, of_queries((1, 1, length, H)), of_queries((1, 1, length, V)), of_queries((1, 1, 1, length)),
            of_queries((1, 1, 1, length)), of_keys((1, 1, block, H)), of_keys((1, 1, block, V)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in (q_BNTH, k_BKSH, v_BKSV)),
            None if extras.values is None else jax.ShapeDtypeStruct((B, *extras.values.shape), jnp.float32),
        ],
        out_specs=[
            pl.BlockSpec((1, G, length, H), lambda b, k, j, g: (b, k, 0, 0), pipeline_mode=buffered),
            of_keys((1, 1, block, H)), of_keys((1, 1, block, V)),
            None if extras.values is None else pl.BlockSpec(
                (1, G, *extras.values.shape[1:]), lambda b, k, j, g: (b, k, 0, 0)
            ),
        ],
        scratch=[(G, length, H), (block, H), (block, V)],
        memory=memory,
        interpret=interpret,
    )  # fmt: skip
    dq, dk, dv = (x.swapaxes(1, 2) for x in gradients[:3])
    return dq[:, :T], dk[:, :S], dv[:, :S], *([] if extras.values is None else gradients[3:])
