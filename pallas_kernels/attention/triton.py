"""Flash attention for NVIDIA GPUs since Ampere, in Pallas Triton.

After Dao 2023, arXiv:2307.08691: a block of queries goes through the keys that it sees, block by block, while Triton
copies the next ones into shared memory. Going back, queries go through keys, and in another kernel keys through the
queries that see them, of all heads that share them: each asks for the logits anew, and none adds to another's sum.

Which blocks these are is `masks.work`'s to say: first those that are partly visible, then those that are wholly visible
and need no mask. All sums have an order, so that the same arguments give the same bits.

JAX 0.11 warns that it means to drop Pallas' Triton; 0.11.2 still has it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.logits import LOG2E, any_head, bent, of_queries, padded, unit, whole
from pallas_kernels.attention.masks import Mask, Role, Work, work


class Tuning(NamedTuple):
    """Tokens of a block that stays, tokens of those it goes through, warps, and how far copies run ahead."""

    rows: int
    block: int
    warps: int
    stages: int


# By bytes of a number and width of a head: forward, and back. GPUs of compute capability 8.6 and 8.9 let a block of
# threads have 99 KB of shared memory, an A100 163 (CUDA C++ Programming Guide, technical specifications). Compiled for
# 8.9, these take at most 96.5; of those tried they are the largest whose registers do not spill, or, going back, hardly
# do: 152 bytes at most, of float32. None was timed.
TUNED = {
    (2, 64): (Tuning(128, 64, 4, 3), Tuning(128, 64, 8, 3)),
    (2, 128): (Tuning(128, 64, 8, 3), Tuning(64, 64, 8, 2)),
    (2, 256): (Tuning(64, 32, 8, 2), Tuning(64, 16, 8, 2)),
    (4, 64): (Tuning(64, 32, 4, 3), Tuning(32, 32, 4, 2)),
    (4, 128): (Tuning(32, 32, 4, 2), Tuning(32, 16, 8, 2)),
    (4, 256): (Tuning(16, 16, 4, 2), Tuning(16, 16, 8, 2)),
}
EXTRAS = {"slopes_N"}  # of `api.EXTRAS`, those that there are


def why_not(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array) -> str | None:
    """What of these arrays the kernels cannot take; None if they can."""
    return any_head(q_BTNH, v_BSKV)


# --- blocks -------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Those of a block, from `low`, along an axis of its logits."""

    low: jax.Array
    size: int
    axis: int

    @property
    def index(self) -> jax.Array:
        shape = (self.size, 1) if self.axis == 0 else (1, self.size)
        return lax.broadcasted_iota(jnp.int32, shape, self.axis) + self.low

    def of(self, ref, *at) -> jax.Array:
        """Theirs of an array [.., L], beside logits."""
        return jnp.expand_dims(ref[*at, pl.ds(self.low, self.size)], 1 - self.axis)


class Blocks(NamedTuple):
    """An array [B, L, N, H] as kernels take it: tokens of one head by blocks, which are powers of 2 both ways.

    What a block has beyond the array is 0, and is not written.
    """

    array: jax.Array | jax.ShapeDtypeStruct
    size: int

    @property
    def width(self) -> int:
        return pl.next_power_of_2(self.array.shape[3])

    @property
    def spec(self) -> pl.BlockSpec:
        B, L, N, _ = self.array.shape
        return pl.BlockSpec((B, pl.cdiv(L, self.size) * self.size, N, self.width))

    def like(self) -> "Blocks":
        """An array to be written."""
        return self._replace(array=jax.ShapeDtypeStruct(self.array.shape, self.array.dtype))

    def load(self, ref, b, tokens: Tokens, n) -> jax.Array:
        inside = self._inside(tokens.low)
        return plt.load(ref.at[b, pl.ds(tokens.low, self.size), n], mask=inside, other=None if inside is None else 0.0)

    def store(self, ref, b, tokens: Tokens, n, value) -> None:
        plt.store(ref.at[b, pl.ds(tokens.low, self.size), n], value.astype(ref.dtype), mask=self._inside(tokens.low))

    def _inside(self, low) -> jax.Array | None:
        """Which elements of a block the array has; None: all."""
        _, length, _, width = self.array.shape
        rows = Tokens(low, self.size, 0).index < length if length % self.size else None
        columns = Tokens(0, self.width, 1).index < width if width < self.width else None
        some = [x for x in (rows, columns) if x is not None]
        return jnp.broadcast_to(functools.reduce(operator.and_, some), (self.size, self.width)) if some else None


def tuned(q_BTNH: jax.Array, v_BSKV: jax.Array) -> tuple[Tuning, Tuning]:
    """Those of `TUNED`: forward, and back."""
    width = pl.next_power_of_2(max(q_BTNH.shape[3], v_BSKV.shape[3]))
    return TUNED[q_BTNH.dtype.itemsize, max(width, 64)]


# --- logits -------------------------------------------------------------------------------------------------------


class Beside(NamedTuple):
    """What kernels read besides blocks of heads; inside a kernel all are refs."""

    mask: Mask  # its arrays in whole blocks
    slopes: Any  # [N], or None
    top: Any = None  # going back, what `of_queries` gives in whole blocks, [B, N, T]
    delta: Any = None


class Logits(NamedTuple):
    """What makes logits of products."""

    beside: Beside
    scale: float
    softcap: float | None
    shift: int
    S: int | None  # where keys end, if they do within a block

    @property
    def unit(self) -> float:
        """What turns `of` into exponents of 2."""
        return unit(self.scale, self.softcap, self.beside.slopes is not None)

    def of(self, s, b, n, queries: Tokens, keys: Tokens, masked: bool):
        """Logits of products, and their derivatives: see `bent`."""
        s, slope = bent(s, self.scale, self.softcap, self.beside.slopes is not None)
        q, k = queries.index, keys.index
        if self.beside.slopes is not None:
            s = s - self.beside.slopes[n] * jnp.abs(q + self.shift - k).astype(jnp.float32)

        def place(ref, role: Role):
            return ref[b] if role == "row" else (queries if role == "queries" else keys).of(ref, b)

        if masked:
            seen = self.beside.mask.mapped(place).visible(q, k)
            s = jnp.where(seen if self.S is None else seen & (k < self.S), s, -jnp.inf)
        return s, slope

    def back(self, s, dp, b, n, queries: Tokens, keys: Tokens, masked: bool):
        """Weights, and gradients of products but for `scale`, of products and the gradients of weights."""
        s, slope = self.of(s, b, n, queries, keys, masked)
        p = jnp.exp2(s * self.unit - queries.of(self.beside.top, b, n))
        ds = p * (dp - queries.of(self.beside.delta, b, n))
        return p, ds if slope is None else ds * slope


def _logits(mask, slopes_N, scale, softcap, shift, S: int, q_block: int, k_block: int, top=None, delta=None) -> Logits:
    slopes_N = None if slopes_N is None else slopes_N.astype(jnp.float32)
    if top is not None:
        top, delta = whole(top, q_block, 2, jnp.inf), whole(delta, q_block, 2)
    beside = Beside(padded(mask, q_block, k_block), slopes_N, top, delta)
    return Logits(beside, scale, softcap, shift, S if S % k_block else None)


def dotted(dtype, interpret: bool) -> Callable:
    """Products of matrices along an axis of each, summed in float32.

    Those of float32 are three of tf32 (Ootomo & Yokota 2022, arXiv:2203.03341), about as exact and on tensor cores.
    """
    exact = "highest" if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = exact if dtype == jnp.float32 else None

    def dot(a, b, a_axis: int, b_axis: int):
        axes = ((a_axis,), (b_axis,)), ((), ())
        return lax.dot_general(a.astype(dtype), b, axes, precision=precision, preferred_element_type=jnp.float32)

    return dot


# --- what all kernels do ------------------------------------------------------------------------------------------


class Todo(NamedTuple):
    """Refs of `Work`, and which of its blocks this is."""

    work: Work
    row: int | jax.Array
    block: jax.Array

    def last_first(self) -> "Todo":
        """Of a causal mask the blocks with most work first, so that none is left over in the end."""
        return self._replace(block=self.work.partial.shape[1] - 1 - self.block)

    def through(self, body: Callable, carry):
        """`body(index of a block, carry, masked)` of all: those partly visible, then the others."""
        partial = self.work.partial[self.row, self.block]
        total = partial + self.work.full[self.row, self.block]

        def steps(masked: bool) -> Callable:
            return lambda step, carry: body(self.work.order[self.row, self.block, step], carry, masked)

        return lax.fori_loop(partial, total, steps(False), lax.fori_loop(0, partial, steps(True), carry))


def _launch(
    name: str, body: Callable, arrays: list[Blocks], logits: Logits, todo: Work, heads: int,
    outs: list[Blocks | jax.ShapeDtypeStruct], tuning: Tuning, interpret: bool,
):  # fmt: skip
    """`body(todo, b, head, logits, refs)` of every block, head and row of the batch.

    The name stands in the compiled program's metadata, for profiles and for `jaxllm plan`.
    """
    count, batch = todo.partial.shape[1], arrays[0].array.shape[0]
    shared = todo.order.shape[0] == 1

    def attention(refs, *blocks):
        block, head, b = (pl.program_id(i) for i in range(3))
        mine = Todo(refs[0], 0 if shared else b, block)
        body(mine, b, head, logits._replace(beside=refs[1]), *blocks)

    others = jax.tree.map(jnp.asarray, (todo, logits.beside))
    run = pl.pallas_call(
        attention,
        grid=(count, heads, batch),
        in_specs=[jax.tree.map(lambda _: pl.BlockSpec(), others), *(x.spec for x in arrays)],
        out_shape=[x.array if isinstance(x, Blocks) else x for x in outs],
        out_specs=[x.spec if isinstance(x, Blocks) else pl.BlockSpec() for x in outs],
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=interpret,
    )
    with jax.named_scope(f"triton_attention_{name}"):
        return run(others, *(x.array for x in arrays))


# --- forward ------------------------------------------------------------------------------------------------------


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, mask: Mask, *, scale: float, softcap: float | None = None,
    slopes_N: jax.Array | None = None, shift: int = 0, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What `reference.attention` gives."""
    (B, T, N, _), (S, K), V, dtype = q_BTNH.shape, k_BSKH.shape[1:3], v_BSKV.shape[3], q_BTNH.dtype
    tuning, _ = tuned(q_BTNH, v_BSKV)
    rows, block = tuning.rows, tuning.block
    q_blocks, k_blocks, v_blocks = Blocks(q_BTNH, rows), Blocks(k_BSKH, block), Blocks(v_BSKV, block)
    o_blocks = Blocks(jax.ShapeDtypeStruct((B, T, N, V), dtype), rows)
    logits, dot = _logits(mask, slopes_N, scale, softcap, shift, S, rows, block), dotted(dtype, interpret)

    def body(todo: Todo, b, n, of: Logits, q_ref, k_ref, v_ref, o_ref, lse_ref):
        todo, head = todo.last_first(), lax.div(n, jnp.int32(N // K))
        queries = Tokens(todo.block * rows, rows, 0)
        q = q_blocks.load(q_ref, b, queries, n)

        def one(j, carry, masked: bool):
            """Of an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), in exponents of 2."""
            o, top, total = carry
            keys = Tokens(j * block, block, 1)
            s, _ = of.of(dot(q, k_blocks.load(k_ref, b, keys, head), 1, 1), b, n, queries, keys, masked)
            new = jnp.maximum(top, s.max(axis=1) * of.unit)
            safe = jnp.where(new == -jnp.inf, 0.0, new) if masked else new  # of a row that has seen nothing yet
            p = jnp.exp2(s * of.unit - safe[:, None])
            shrink = jnp.exp2(top - safe)
            o = o * shrink[:, None] + dot(p, v_blocks.load(v_ref, b, keys, head), 1, 0)
            return o, new, total * shrink + p.sum(axis=1)

        none = jnp.full(rows, -jnp.inf, jnp.float32)
        carry = jnp.zeros((rows, v_blocks.width), jnp.float32), none, jnp.zeros(rows, jnp.float32)
        o, top, total = todo.through(one, carry)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        o_blocks.store(o_ref, b, queries, n, o * jnp.where(some, 1 / total, 0.0)[:, None])
        lse_ref[b, n, pl.ds(queries.low, rows)] = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)

    o_BTNV, lse_BNT = _launch(
        f"fwd:block_q={rows}:block_kv={block}",
        body, [q_blocks, k_blocks, v_blocks], logits, work(mask, rows, block, T, S), N,
        [o_blocks, jax.ShapeDtypeStruct((B, N, pl.cdiv(T, rows) * rows), jnp.float32)], tuning, interpret,
    )  # fmt: skip
    return o_BTNV, lse_BNT[:, :, :T]


# --- backward -----------------------------------------------------------------------------------------------------


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, o_BTNV: jax.Array, lse_BNT: jax.Array, do_BTNV: jax.Array,
    mask: Mask, *, scale: float, softcap: float | None = None, slopes_N: jax.Array | None = None, shift: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of q, k and v; those of queries by one kernel, those of keys and values by another."""
    args = q_BTNH, k_BSKH, v_BSKV, do_BTNV, *of_queries(o_BTNV, do_BTNV, lse_BNT), mask
    how = dict(scale=scale, softcap=softcap, slopes_N=slopes_N, shift=shift, interpret=interpret)
    return for_queries(*args, **how), *for_keys(*args, **how)


def for_queries(
    q_BTNH, k_BSKH, v_BSKV, do_BTNV, top_BNT, delta_BNT, mask, *, scale, softcap, slopes_N, shift, interpret
) -> jax.Array:
    """Gradients of queries: a block of them goes through the keys that it sees."""
    (T, N, _), (S, K), dtype = q_BTNH.shape[1:], k_BSKH.shape[1:3], q_BTNH.dtype
    _, tuning = tuned(q_BTNH, v_BSKV)
    rows, block = tuning.rows, tuning.block
    q_blocks, do_blocks = Blocks(q_BTNH, rows), Blocks(do_BTNV, rows)
    k_blocks, v_blocks = Blocks(k_BSKH, block), Blocks(v_BSKV, block)
    logits = _logits(mask, slopes_N, scale, softcap, shift, S, rows, block, top_BNT, delta_BNT)
    dot = dotted(dtype, interpret)

    def body(todo: Todo, b, n, of: Logits, q_ref, do_ref, k_ref, v_ref, dq_ref):
        todo, head = todo.last_first(), lax.div(n, jnp.int32(N // K))
        queries = Tokens(todo.block * rows, rows, 0)
        q, do = q_blocks.load(q_ref, b, queries, n), do_blocks.load(do_ref, b, queries, n)

        def one(j, dq, masked: bool):
            keys = Tokens(j * block, block, 1)
            k, v = k_blocks.load(k_ref, b, keys, head), v_blocks.load(v_ref, b, keys, head)
            _, ds = of.back(dot(q, k, 1, 1), dot(do, v, 1, 1), b, n, queries, keys, masked)
            return dq + dot(ds, k, 1, 0)

        dq = todo.through(one, jnp.zeros((rows, q_blocks.width), jnp.float32))
        q_blocks.store(dq_ref, b, queries, n, dq * scale)

    (dq_BTNH,) = _launch(
        f"dq:block_q_dq={rows}:block_kv_dq={block}",
        body, [q_blocks, do_blocks, k_blocks, v_blocks], logits, work(mask, rows, block, T, S), N, [q_blocks.like()],
        tuning, interpret,
    )  # fmt: skip
    return dq_BTNH


def for_keys(
    q_BTNH, k_BSKH, v_BSKV, do_BTNV, top_BNT, delta_BNT, mask, *, scale, softcap, slopes_N, shift, interpret
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values: a block of them goes through the queries that see it, of all heads that share it.

    Products are those of `for_queries` the other way round: rows are keys and columns queries.
    """
    (T, N, _), (S, K), dtype = q_BTNH.shape[1:], k_BSKH.shape[1:3], q_BTNH.dtype
    _, tuning = tuned(q_BTNH, v_BSKV)
    rows, block, heads = tuning.rows, tuning.block, N // K
    q_blocks, do_blocks = Blocks(q_BTNH, block), Blocks(do_BTNV, block)
    k_blocks, v_blocks = Blocks(k_BSKH, rows), Blocks(v_BSKV, rows)
    logits = _logits(mask, slopes_N, scale, softcap, shift, S, block, rows, top_BNT, delta_BNT)
    dot = dotted(dtype, interpret)

    def body(todo: Todo, b, head, of: Logits, q_ref, do_ref, k_ref, v_ref, dk_ref, dv_ref):
        keys = Tokens(todo.block * rows, rows, 0)
        k, v = k_blocks.load(k_ref, b, keys, head), v_blocks.load(v_ref, b, keys, head)

        def of_head(i, carry):
            n = head * heads + i

            def one(j, carry, masked: bool):
                dk, dv = carry
                queries = Tokens(j * block, block, 1)
                q, do = q_blocks.load(q_ref, b, queries, n), do_blocks.load(do_ref, b, queries, n)
                p, ds = of.back(dot(k, q, 1, 1), dot(v, do, 1, 1), b, n, queries, keys, masked)
                return dk + dot(ds, q, 1, 0), dv + dot(p, do, 1, 0)

            return todo.through(one, carry)

        nothing = tuple(jnp.zeros((rows, x.width), jnp.float32) for x in (k_blocks, v_blocks))
        dk, dv = lax.fori_loop(0, heads, of_head, nothing)
        k_blocks.store(dk_ref, b, keys, head, dk * scale)
        v_blocks.store(dv_ref, b, keys, head, dv)

    dk_BSKH, dv_BSKV = _launch(
        f"dkv:block_q_dkv={block}:block_kv_dkv={rows}",
        body, [q_blocks, do_blocks, k_blocks, v_blocks], logits, work(mask, block, rows, T, S, by="keys"), K,
        [k_blocks.like(), v_blocks.like()], tuning, interpret,
    )  # fmt: skip
    return dk_BSKH, dv_BSKV
