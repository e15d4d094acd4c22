"""Flash attention for Hopper GPUs, in Pallas Mosaic GPU.

After Dao 2023, arXiv:2307.08691, and Shah et al. 2024, arXiv:2407.08608: one warpgroup copies blocks into shared memory
ahead of two that compute, each 64 rows. Going forward, these ask for the logits of a block before they gather the
values of the one before, so that a softmax runs beside products; where it takes longest they take turns at these.

Each works through the blocks that its mask leaves (`masks.work`): first those that are partly visible, then those that
are wholly visible and need no mask. All sums have an order, so that the same arguments give the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.logits import LOG2E, bent, of_queries, padded, unit, whole
from pallas_kernels.attention.masks import Mask, Role, Work, work

ROWS = 64  # of one warpgroup's products
GROUPS = 2  # warpgroups that compute
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
COMPILE = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Keys or queries of a block, blocks in shared memory, and whether warpgroups take turns at the tensor cores."""

    block: int
    stages: int
    turns: bool = False


# Best of those tried on an H200, where turns cost a few percent if heads are of 128 and gain more than ten if of 64.
FORWARD = {64: Tuning(128, 2, turns=True), 128: Tuning(128, 2)}
OF_QUERIES, OF_KEYS = Tuning(128, 2), Tuning(64, 3)

EXTRAS = {"slopes_N"}  # of `api.EXTRAS`, those that there are


def why_not(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array) -> str | None:
    """What of these arrays the kernels cannot take; None if they can."""
    H, V = q_BTNH.shape[3], v_BSKV.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q_BTNH.dtype}"
    if H not in (64, 128) or V != H:
        return f"it takes heads of 64 and 128, not of {H} with values of {V}"
    return None


# --- logits -------------------------------------------------------------------------------------------------------


class Logits(NamedTuple):
    """What makes logits of products; inside a kernel the mask's arrays and the slopes are refs."""

    mask: Mask
    slopes: jax.Array | None  # [N]
    scale: float
    softcap: float | None
    shift: int
    S: int
    interpret: bool

    @property
    def unit(self) -> float:
        """What turns `of` into exponents of 2."""
        return unit(self.scale, self.softcap, self.slopes is not None)

    def placed(self, masked: bool) -> bool:
        """Whether `of` looks at where queries and keys stand."""
        return masked or self.slopes is not None

    def of(self, s, b, n, q_low, k_low, *, q_axis: int, masked: bool):
        """Logits of products of queries from `q_low` and keys from `k_low`, and their derivatives: see `bent`."""
        s, slope = bent(s, self.scale, self.softcap, self.slopes is not None, tanh)
        if not self.placed(masked):
            return s, slope
        index = [lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (q_axis, 1 - q_axis)]
        q, k = index[0] + q_low, index[1] + k_low
        if self.slopes is not None:
            s = s - self.slopes[n] * jnp.abs(q + self.shift - k).astype(jnp.float32)

        def beside(ref, role: Role):
            if role == "row":
                return ref[b]
            axis, low = (q_axis, q_low) if role == "queries" else (1 - q_axis, k_low)
            x = loaded(ref, b, pl.ds(low, s.shape[axis]), interpret=self.interpret)
            return over_rows(x, s.shape, axis)

        if masked:
            seen = self.mask.mapped(beside).visible(q, k) & (k < self.S)
            s = jnp.where(seen, s, -jnp.inf)
        return s, slope


def _logits(mask, slopes_N, scale, softcap, shift, interpret, S: int, q_block: int, k_block: int) -> Logits:
    """With arrays of the mask in whole blocks."""
    slopes_N = None if slopes_N is None else slopes_N.astype(jnp.float32)
    return Logits(padded(mask, q_block, k_block), slopes_N, scale, softcap, shift, S, interpret)


# --- what all kernels do --------------------------------------------------------------------------------------------


class Sum:
    """A sum of products: registers that tensor cores add to, or a plain array where a kernel is interpreted."""

    def __init__(self, start: jax.Array | tuple[int, int], ref=None):
        self.ref = ref
        if ref is None:
            self.value = jnp.zeros(start, jnp.float32) if isinstance(start, tuple) else start
        elif not isinstance(start, tuple):
            ref[...] = start

    def add(self, a, b, *, transposed: bool = False) -> None:
        """Begins to add a b or, transposed, a b^T; `a` is in registers or shared memory, `b` in shared memory."""
        if self.ref is not None:
            plgpu.wgmma(self.ref, a, b.transpose((1, 0)) if transposed else b)
        else:
            b = b[...].T if transposed else b[...]
            self.value += jnp.dot(a[...], b, preferred_element_type=jnp.float32)

    def get(self, but: int = 0) -> jax.Array:
        """The sum, when all but so many of the last products are done."""
        return self.value if self.ref is None else plgpu.wgmma_accumulator_load(self.ref, wait_n=but)


def sums(f: Callable, *starts: jax.Array | tuple[int, int], interpret: bool):
    """`f` of sums that start as they are given, or at 0 if a shape is."""
    if interpret:
        return f(*map(Sum, starts))
    types = (plgpu.ACC(s if isinstance(s, tuple) else s.shape, jnp.float32) for s in starts)
    return pl.run_scoped(lambda *refs: f(*map(Sum, starts, refs)), *types)


def interpreted(interpret: bool):
    """What `plgpu.kernel` is to be told."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def slot(step, stages: int):
    """Where in shared memory a step's block stands."""
    return lax.rem(step, jnp.int32(stages))


def copy_ahead(steps, stages: int, *streams) -> None:
    """The copying warpgroup's work: each stream's `copy(step, slot)` as soon as its `free` barrier allows."""
    plgpu.set_max_registers(24, action="decrease")

    def run(step, _):
        for free, copy in streams:
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot(step, stages)]))
            copy(step, slot(step, stages))
        return ()

    def drain(step, _):
        for free, _copy in streams:
            plgpu.barrier_wait(free.at[slot(step, stages)])
        return ()

    lax.fori_loop(0, steps, run, ())
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, ())


def loaded(ref, *at, interpret: bool) -> jax.Array:
    """In registers, laid out as its use asks for."""
    return ref[at] if interpret else plgpu.load(ref, at, optimized=False)


def tanh(x) -> jax.Array:
    """By exp2: what the hardware has for it, and approximate arithmetic takes, is right to 5e-4 only."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


def over_rows(x, shape, axis: int = 0):
    """A value of each row (of each column, with axis 1) beside all of its elements."""
    return lax.broadcast_in_dim(x, shape, [axis])


def tiles(count: int, rows: int, width: int, dtype):
    return plgpu.SMEM((count, rows, width), dtype, transforms=TILED)


def barrier(count: int, arrivals: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


class Todo(NamedTuple):
    """Refs of `Work`, and which of its blocks this is."""

    work: Work
    row: int | jax.Array
    block: jax.Array

    @property
    def partial(self):
        return self.work.partial[self.row, self.block]

    @property
    def total(self):
        return self.partial + self.work.full[self.row, self.block]

    def at(self, step):
        """The block of a step."""
        return self.work.order[self.row, self.block, step]


def _launch(
    name: str, body: Callable, out_type, scratch_types, grid: tuple[int, int, int], todo: Work, interpret: bool, *args
):
    """`body(todo, head, row, group, refs)` for every head, block, row of the batch and warpgroup.

    The name stands in the compiled program's metadata, for profiles and for `jaxllm plan`.
    """
    shared = todo.order.shape[0] == 1

    def kernel(todo_ref, *refs):
        b = lax.axis_index("row")
        mine = Todo(todo_ref, 0 if shared else b, lax.axis_index("block"))
        body(mine, lax.axis_index("head"), b, lax.axis_index("group"), *refs)

    run = plgpu.kernel(
        kernel, out_type=out_type, scratch_types=scratch_types, grid=grid, grid_names=("head", "block", "row"),
        num_threads=GROUPS + 1, thread_name="group", compiler_params=COMPILE, interpret=interpreted(interpret),
    )  # fmt: skip
    with jax.named_scope(f"hopper_attention_{name}"):
        return run(jax.tree.map(jnp.asarray, todo), *args)


def copy_keys(todo: Todo, steps, tuning: Tuning, b, head, *streams) -> None:
    """`copy_ahead` of blocks of keys and values: for each a ref, its room, and the barriers `ready` and `free`."""

    def copy(ref, smem, ready, step, here):
        at = b, pl.ds(todo.at(step) * tuning.block, tuning.block), head
        plgpu.copy_gmem_to_smem(ref.at[at], smem.at[here], ready.at[here])

    copies = ((free, functools.partial(copy, ref, smem, ready)) for ref, smem, ready, free in streams)
    copy_ahead(steps, tuning.stages, *copies)


def through(body: Callable, partial, total, carry, *, begin: int = 0):
    """`body(step, carry, masked=...)` of all steps from `begin`: those of partly visible blocks, then the others."""
    carry = lax.fori_loop(begin, partial, functools.partial(body, masked=True), carry)
    rest = jnp.maximum(partial, begin) if begin else partial
    return lax.fori_loop(rest, total, functools.partial(body, masked=False), carry)


def _last_first(todo: Todo) -> Todo:
    """Of a causal mask the blocks with most work first, so that none is left over in the end."""
    return todo._replace(block=todo.work.partial.shape[1] - 1 - todo.block)


# --- forward --------------------------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """Of rows, so far, in exponents of 2: largest logit and sum; of a block: weights, and what shrinks those before."""

    top: jax.Array
    total: jax.Array
    p: jax.Array
    shrink: jax.Array


def softmax(s, unit: float, top, total, *, masked: bool) -> Softmax:
    """The next block of an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) of logits s * unit."""
    new = jnp.maximum(top, s.max(axis=1) * unit)
    safe = jnp.where(new == -jnp.inf, 0.0, new) if masked else new  # of a row that has seen nothing yet
    p = jnp.exp2(s * unit - over_rows(safe, s.shape))
    shrink = jnp.exp2(top - safe)
    return Softmax(new, total * shrink + p.sum(axis=1), p, shrink)


def divided(o, top, total) -> tuple[jax.Array, jax.Array]:
    """Sums over all keys: divided by that of the weights, and its log2; 0 and -inf of what has seen nothing."""
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o *= over_rows(jnp.where(some, 1 / total, 0.0), o.shape)
    return o, jnp.where(some, top + jnp.log(total) * LOG2E, -jnp.inf)


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, scale: float, softcap: float | None = None,
    slopes_N: jax.Array | None = None, shift: int = 0, tuning: Tuning | None = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What `reference.attention` gives."""
    (B, T, N, H), (S, K), dtype = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.dtype
    tuning = tuning or FORWARD[H]
    block, stages, rows = tuning.block, tuning.stages, ROWS * GROUPS
    logits = _logits(mask, slopes_N, scale, softcap, shift, interpret, S, rows, block)
    q_BTNH, k_BSKH, v_BSKH = whole(q_BTNH, rows), whole(k_BSKH, block), whole(v_BSKH, block)
    add_up = functools.partial(sums, interpret=interpret)

    def kernel(todo, n, b, group, q_ref, k_ref, v_ref, mask_refs, slopes_ref, o_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
        todo = _last_first(todo)
        partial, total = todo.partial, jnp.maximum(todo.total, 1)  # one, that nobody sees, where there is none

        @pl.when(group == GROUPS)
        def _copy():
            head = lax.div(n, jnp.int32(N // K))
            streams = (k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)
            copy_keys(todo, total, tuning, b, head, *streams)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            low = todo.block * rows + group * ROWS
            mine = b, pl.ds(low, ROWS), n
            of = logits._replace(mask=mask_refs, slopes=slopes_ref)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[group], q_ready.at[group])
            plgpu.barrier_wait(q_ready.at[group])

            def in_turn(issue, more: bool = True):
                if not tuning.turns:
                    return issue()
                plgpu.barrier_wait(turn.at[group])
                issue()
                pl.when(more | (group == 0))(lambda: plgpu.barrier_arrive(turn.at[1 - group]))

            def ask(s, step):
                plgpu.barrier_wait(k_ready.at[slot(step, stages)])
                s.add(q_smem.at[group], k_smem.at[slot(step, stages)], transposed=True)

            def gather(o, p, step):
                plgpu.barrier_wait(v_ready.at[slot(step, stages)])
                o.add(p, v_smem.at[slot(step, stages)])

            def weigh(s, top, sum_, step, masked):
                k_low = todo.at(step) * block if of.placed(masked) else 0
                s, _ = of.of(s, b, n, low, k_low, q_axis=0, masked=masked)
                return softmax(s, of.unit, top, sum_, masked=masked)

            def first():
                def run(s):
                    in_turn(lambda: ask(s, 0))
                    return s.get()

                s = add_up(run, (ROWS, block))
                plgpu.barrier_arrive(k_free.at[0])
                return s

            def both(step, carry, *, masked):
                """Logits of this block, beside values of the one before."""
                o, top, sum_, p = carry

                def issue(s, o):
                    ask(s, step)
                    gather(o, p, step - 1)

                def run(s, o):
                    in_turn(lambda: issue(s, o))
                    new = weigh(s.get(but=1), top, sum_, step, masked)
                    plgpu.barrier_arrive(k_free.at[slot(step, stages)])
                    # Rounded no earlier: the registers are those of `p`, which the products above read until here.
                    new_o, new_p = lax.optimization_barrier((o.get(), new.p))
                    plgpu.barrier_arrive(v_free.at[slot(step - 1, stages)])
                    return new_o * over_rows(new.shrink, new_o.shape), new.top, new.total, new_p.astype(dtype)

                return add_up(run, (ROWS, block), o)

            def last(o, p):
                def run(o):
                    in_turn(lambda: gather(o, p, total - 1), more=False)
                    return o.get()

                o = add_up(run, o)
                plgpu.barrier_arrive(v_free.at[slot(total - 1, stages)])
                return o

            if tuning.turns:
                pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            none = jnp.full(ROWS, -jnp.inf, jnp.float32)
            begun = weigh(first(), none, jnp.zeros(ROWS, jnp.float32), 0, True)
            carry = jnp.zeros((ROWS, H), jnp.float32), begun.top, begun.total, begun.p.astype(dtype)
            o, top, sum_, p = through(both, partial, total, carry, begin=1)
            o, log2 = divided(last(o, p), top, sum_)
            q_smem[group], lse_smem[group] = o.astype(dtype), log2 * (1 / LOG2E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[group], o_ref.at[mine])
            plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[b, n, pl.ds(low, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    length = q_BTNH.shape[1]
    o_BTNH, lse_BNT = _launch(
        f"fwd:block_q={rows}:block_kv={block}",
        kernel,
        [jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, length), jnp.float32)],
        [
            tiles(GROUPS, ROWS, H, dtype), tiles(stages, block, H, dtype), tiles(stages, block, H, dtype),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32), barrier(GROUPS), barrier(stages), barrier(stages),
            barrier(stages, GROUPS), barrier(stages, GROUPS), barrier(GROUPS),
        ],
        (N, length // rows, B), work(mask, rows, block, T, S), interpret,
        q_BTNH, k_BSKH, v_BSKH, logits.mask, logits.slopes,
    )  # fmt: skip
    return o_BTNH[:, :T], lse_BNT[:, :, :T]


# --- backward -------------------------------------------------------------------------------------------------------


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, o_BTNH: jax.Array, lse_BNT: jax.Array, do_BTNH: jax.Array,
    mask: Mask, *, scale: float, softcap: float | None = None, slopes_N: jax.Array | None = None, shift: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of q, k and v; those of queries by one kernel, those of keys and values by another.

    Each asks for the logits anew, so that none waits for a sum that others add to: 7 products in place of 5.
    """
    top_BNT, delta_BNT = of_queries(o_BTNH, do_BTNH, lse_BNT)
    args = q_BTNH, k_BSKH, v_BSKH, do_BTNH, top_BNT, delta_BNT, mask
    how = dict(scale=scale, softcap=softcap, slopes_N=slopes_N, shift=shift, interpret=interpret)
    return for_queries(*args, **how), *for_keys(*args, **how)


def for_queries(
    q_BTNH, k_BSKH, v_BSKH, do_BTNH, top_BNT, delta_BNT, mask, *, scale, softcap, slopes_N, shift, interpret,
    tuning: Tuning = OF_QUERIES,
) -> jax.Array:  # fmt: skip
    """Gradients of queries: one block of them after another goes through the keys that it sees."""
    (B, T, N, H), (S, K), dtype = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.dtype
    block, stages, rows = tuning.block, tuning.stages, ROWS * GROUPS
    logits = _logits(mask, slopes_N, scale, softcap, shift, interpret, S, rows, block)
    q_BTNH, do_BTNH = whole(q_BTNH, rows), whole(do_BTNH, rows)
    k_BSKH, v_BSKH = whole(k_BSKH, block), whole(v_BSKH, block)
    top_BNT, delta_BNT = whole(top_BNT, rows, 2, jnp.inf), whole(delta_BNT, rows, 2)
    add_up = functools.partial(sums, interpret=interpret)

    def kernel(
        todo, n, b, group, q_ref, do_ref, top_ref, delta_ref, k_ref, v_ref, mask_refs, slopes_ref, dq_ref, *scratch
    ):
        q_smem, do_smem, k_smem, v_smem, mine_ready, k_ready, v_ready, k_free, v_free = scratch
        todo = _last_first(todo)
        partial, total = todo.partial, todo.total

        @pl.when(group == GROUPS)
        def _copy():
            head = lax.div(n, jnp.int32(N // K))
            streams = (k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)
            copy_keys(todo, total, tuning, b, head, *streams)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            low = todo.block * rows + group * ROWS
            mine, of_mine = (b, pl.ds(low, ROWS), n), (b, n, pl.ds(low, ROWS))
            of = logits._replace(mask=mask_refs, slopes=slopes_ref)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[group], mine_ready.at[group])
            plgpu.copy_gmem_to_smem(do_ref.at[mine], do_smem.at[group], mine_ready.at[group])
            top = loaded(top_ref, *of_mine, interpret=interpret)
            delta = loaded(delta_ref, *of_mine, interpret=interpret)
            plgpu.barrier_wait(mine_ready.at[group])

            def one(step, dq, *, masked):
                here = slot(step, stages)

                def ask(s, dp):
                    plgpu.barrier_wait(k_ready.at[here])
                    s.add(q_smem.at[group], k_smem.at[here], transposed=True)
                    plgpu.barrier_wait(v_ready.at[here])
                    dp.add(do_smem.at[group], v_smem.at[here], transposed=True)
                    k_low = todo.at(step) * block if of.placed(masked) else 0
                    s, slope = of.of(s.get(but=1), b, n, low, k_low, q_axis=0, masked=masked)
                    p = jnp.exp2(s * of.unit - over_rows(top, s.shape))
                    ds = p * (dp.get() - over_rows(delta, s.shape))
                    plgpu.barrier_arrive(v_free.at[here])
                    return (ds if slope is None else ds * slope).astype(dtype)

                def add(dq):
                    dq.add(ds, k_smem.at[here])
                    return dq.get()

                ds, dq = lax.optimization_barrier((add_up(ask, (ROWS, block), (ROWS, block)), dq))
                dq = add_up(add, dq)
                plgpu.barrier_arrive(k_free.at[here])
                return dq

            dq = through(one, partial, total, jnp.zeros((ROWS, H), jnp.float32))
            q_smem[group] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[group], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

    dq_BTNH = _launch(
        f"dq:block_q_dq={rows}:block_kv_dq={block}",
        kernel,
        jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
        [
            tiles(GROUPS, ROWS, H, dtype), tiles(GROUPS, ROWS, H, dtype), tiles(stages, block, H, dtype),
            tiles(stages, block, H, dtype), barrier(GROUPS, 2), barrier(stages), barrier(stages),
            barrier(stages, GROUPS), barrier(stages, GROUPS),
        ],
        (N, q_BTNH.shape[1] // rows, B), work(mask, rows, block, T, S), interpret,
        q_BTNH, do_BTNH, top_BNT, delta_BNT, k_BSKH, v_BSKH, logits.mask, logits.slopes,
    )  # fmt: skip
    return dq_BTNH[:, :T]


def for_keys(
    q_BTNH, k_BSKH, v_BSKH, do_BTNH, top_BNT, delta_BNT, mask, *, scale, softcap, slopes_N, shift, interpret,
    tuning: Tuning = OF_KEYS,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Gradients of keys and values: a block of them goes through the queries that see it, of all heads that share it.

    Products are those of `for_queries` the other way round: rows are keys and columns queries.
    """
    (B, T, N, H), (S, K), dtype = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.dtype
    block, stages, rows, heads = tuning.block, tuning.stages, ROWS * GROUPS, N // K
    logits = _logits(mask, slopes_N, scale, softcap, shift, interpret, S, block, rows)
    q_BTNH, do_BTNH = whole(q_BTNH, block), whole(do_BTNH, block)
    k_BSKH, v_BSKH = whole(k_BSKH, rows), whole(v_BSKH, rows)
    top_BNT, delta_BNT = whole(top_BNT, block, 2, jnp.inf), whole(delta_BNT, block, 2)
    add_up = functools.partial(sums, interpret=interpret)

    def kernel(todo, head, b, group, q_ref, do_ref, top_ref, delta_ref, k_ref, v_ref, mask_refs, slopes_ref, *rest):
        dk_ref, dv_ref, *scratch = rest
        k_smem, v_smem, q_smem, do_smem, top_smem, delta_smem, mine_ready, q_ready, do_ready, q_free, do_free = scratch
        partial, total = todo.partial, todo.total

        @pl.when(group == GROUPS)
        def _copy():
            def copy(ref, smem, by_head_ref, by_head_smem, ready, flat, here):
                n, queries = head * heads + lax.div(flat, total), pl.ds(todo.at(lax.rem(flat, total)) * block, block)
                plgpu.copy_gmem_to_smem(ref.at[b, queries, n], smem.at[here], ready.at[here])
                plgpu.copy_gmem_to_smem(by_head_ref.at[b, n, queries], by_head_smem.at[here], ready.at[here])

            queries, given = (
                (q_ref, q_smem, top_ref, top_smem, q_ready),
                (do_ref, do_smem, delta_ref, delta_smem, do_ready),
            )
            streams = (q_free, functools.partial(copy, *queries)), (do_free, functools.partial(copy, *given))
            copy_ahead(heads * total, stages, *streams)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            low = todo.block * rows + group * ROWS
            mine = b, pl.ds(low, ROWS), head
            of = logits._replace(mask=mask_refs, slopes=slopes_ref)
            plgpu.copy_gmem_to_smem(k_ref.at[mine], k_smem.at[group], mine_ready.at[group])
            plgpu.copy_gmem_to_smem(v_ref.at[mine], v_smem.at[group], mine_ready.at[group])
            plgpu.barrier_wait(mine_ready.at[group])

            def one(step, carry, *, head_of_group, masked):
                dk, dv = carry
                n, here = head * heads + head_of_group, slot(head_of_group * total + step, stages)

                def ask(s, dp, dv):
                    plgpu.barrier_wait(q_ready.at[here])
                    s.add(k_smem.at[group], q_smem.at[here], transposed=True)
                    plgpu.barrier_wait(do_ready.at[here])
                    dp.add(v_smem.at[group], do_smem.at[here], transposed=True)
                    top, delta = (
                        over_rows(loaded(x, here, interpret=interpret), (ROWS, block), 1)
                        for x in (top_smem, delta_smem)
                    )
                    q_low = todo.at(step) * block if of.placed(masked) else 0
                    s, slope = of.of(s.get(but=1), b, n, q_low, low, q_axis=1, masked=masked)
                    p = jnp.exp2(s * of.unit - top)
                    dp, p16 = lax.optimization_barrier((dp.get(), p.astype(dtype)))
                    dv.add(p16, do_smem.at[here])
                    ds = p * (dp - delta)
                    ds = ds if slope is None else ds * slope
                    dv, ds = lax.optimization_barrier((dv.get(), ds.astype(dtype)))
                    plgpu.barrier_arrive(do_free.at[here])
                    return dv, ds

                def add(dk):
                    dk.add(ds, q_smem.at[here])
                    return dk.get()

                dv, ds = add_up(ask, (ROWS, block), (ROWS, block), dv)
                dk = add_up(add, dk)
                plgpu.barrier_arrive(q_free.at[here])
                return dk, dv

            def of_head(head_of_group, carry):
                return through(functools.partial(one, head_of_group=head_of_group), partial, total, carry)

            nothing = jnp.zeros((ROWS, H), jnp.float32)
            dk, dv = lax.fori_loop(0, heads, of_head, (nothing, nothing))
            k_smem[group], v_smem[group] = (dk * scale).astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[group], dk_ref.at[mine])
            plgpu.copy_smem_to_gmem(v_smem.at[group], dv_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

    dk_BSKH, dv_BSKH = _launch(
        f"dkv:block_q_dkv={block}:block_kv_dkv={rows}",
        kernel,
        [jax.ShapeDtypeStruct(k_BSKH.shape, dtype)] * 2,
        [
            tiles(GROUPS, ROWS, H, dtype), tiles(GROUPS, ROWS, H, dtype), tiles(stages, block, H, dtype),
            tiles(stages, block, H, dtype), plgpu.SMEM((stages, block), jnp.float32),
            plgpu.SMEM((stages, block), jnp.float32), barrier(GROUPS, 2), barrier(stages, 2), barrier(stages, 2),
            barrier(stages, GROUPS), barrier(stages, GROUPS),
        ],
        (K, k_BSKH.shape[1] // rows, B), work(mask, block, rows, T, S, by="keys"), interpret,
        q_BTNH, do_BTNH, top_BNT, delta_BNT, k_BSKH, v_BSKH, logits.mask, logits.slopes,
    )  # fmt: skip
    return dk_BSKH[:, :S], dv_BSKH[:, :S]
