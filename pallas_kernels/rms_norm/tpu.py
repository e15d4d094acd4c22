"""RMSNorm for TPUs, in Pallas Mosaic: each way reads and writes once what it must.

Blocks of whole rows pass through the chip's vector memory. Chunks of such a block are gone through twice, by parts that
registers have room for: for the sums over rows, and for what these divide. Going back, each block gives its share of
the weight's gradient; these are added up in the order of the blocks, so that the same arguments give the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.logits import whole
from pallas_kernels.attention.tpu import LANES, MIB, column, taken

ROWS, SUBLANES = 16, 8  # of tiles of bfloat16 and of float32
PART = 64 * 1024  # numbers worked on at a time: as float32 they fill all registers
BLOCKS = 8 * MIB  # for all of a kernel: half of what any chip lends one of its vector memory unasked
TALL = 256  # rows of a chunk at least, if there are two in a block


class Cut(NamedTuple):
    """Into how many blocks rows are cut, of how many, how many of these are worked on at a time, and by which parts."""

    blocks: int
    block: int
    chunk: int
    parts: list[slice]


def cut(R: int, D: int, itemsize: int, arrays: int) -> Cut:
    """For so many arrays of R rows, at least `ROWS`, each with two buffers."""
    width = -(-D // LANES) * LANES
    most = min(R, BLOCKS // (2 * arrays * width * itemsize))
    chunk = max(ROWS, 2 ** (min(max(TALL, 2 * PART // width), most // 2).bit_length() - 1))
    block = max(1, most // chunk) * chunk
    part = max(LANES, PART // chunk // LANES * LANES)
    return Cut(-(-R // block), block, chunk, [slice(i, min(i + part, D)) for i in range(0, D, part)])


def forward(
    x_RD: jax.Array, scale_D: jax.Array | None, residual_RD: jax.Array | None, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The sum normalised, the sum (None without a residual), and 1 / rms of each row; `scale_D` is float32."""
    (R, D), dtype = x_RD.shape, x_RD.dtype
    if dtype == jnp.float16 and residual_RD is not None:  # rounded to what float32 then is exact in
        total_RD = x_RD + residual_RD
        y_RD, _, rstd_R = forward(total_RD, scale_D, None, eps=eps, interpret=interpret)
        return y_RD, total_RD, rstd_R
    x_RD, residual_RD = _rows(x_RD), _rows(residual_RD)
    blocks, block, chunk, parts = cut(*x_RD.shape, x_RD.dtype.itemsize, 2 if residual_RD is None else 4)

    def kernel(x_ref, residual_ref, scale_ref, y_ref, total_ref, rstd_ref, column_ref):
        def some(at):
            square = 0.0
            for part in parts:
                x = x_ref[at, part].astype(jnp.float32)
                if residual_ref is not None:
                    total = (x + residual_ref[at, part].astype(jnp.float32)).astype(x_ref.dtype)
                    total_ref[at, part] = total
                    x = total.astype(jnp.float32)
                square += jnp.sum(x * x, axis=1, keepdims=True)
            rstd = lax.rsqrt(square / D + eps)
            column_ref[at] = jnp.broadcast_to(rstd, (chunk, LANES))
            for part in parts:
                y = (x_ref if residual_ref is None else total_ref)[at, part].astype(jnp.float32) * rstd
                y_ref[at, part] = (y if scale_ref is None else y * scale_ref[:, part]).astype(y_ref.dtype)

        _through(block, chunk, some)
        rstd_ref[0] = column_ref[...].T[:1]

    y_RD, total_RD, rstd_B1L = _call(
        kernel, "fwd", (blocks, block, D), interpret,
        x_RD, residual_RD, None if scale_D is None else scale_D[None],
        out=[x_RD, residual_RD, jax.ShapeDtypeStruct((blocks, 1, block), jnp.float32)],
        scratch=[(block, LANES)],
    )  # fmt: skip
    return y_RD[:R].astype(dtype), None if total_RD is None else total_RD[:R], rstd_B1L.reshape(-1)[:R]


def backward(
    x_RD: jax.Array, scale_D: jax.Array | None, rstd_R: jax.Array, dy_RD: jax.Array, dtotal_RD: jax.Array | None, *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Gradients of what was normalised, with that which reaches it otherwise (`dtotal_RD`) added, and of the scale."""
    (R, D), dtype = x_RD.shape, x_RD.dtype
    x_RD, dy_RD, dtotal_RD = map(_rows, (x_RD, dy_RD, dtotal_RD))
    blocks, block, chunk, parts = cut(*x_RD.shape, x_RD.dtype.itemsize, 3 if dtotal_RD is None else 4)
    ragged = blocks * block > len(x_RD)  # then the last block ends with rows of whatever

    def kernel(x_ref, dy_ref, dtotal_ref, scale_ref, rstd_ref, dx_ref, dscale_ref, column_ref, sum_ref):
        first = pl.program_id(0) * block
        column_ref[...] = column(rstd_ref[0])
        sum_ref[...] = jnp.zeros_like(sum_ref)

        def some(at):
            rstd = column_ref[at][:, :1]

            def loaded(part):
                unit, dy = x_ref[at, part].astype(jnp.float32) * rstd, dy_ref[at, part].astype(jnp.float32)
                return unit, dy, dy if scale_ref is None else dy * scale_ref[:, part]

            along = 0.0
            for part in parts:
                unit, dy, dunit = loaded(part)
                along += jnp.sum(dunit * unit, axis=1, keepdims=True)
                if scale_ref is not None:
                    share = dy * unit
                    if ragged:
                        row = lax.broadcasted_iota(jnp.int32, (chunk, 1), 0) + (first + at.start)
                        share = jnp.where(row < R, share, 0.0)
                    sum_ref[:, part] += sum(share[i : i + SUBLANES] for i in range(0, chunk, SUBLANES))
            along /= D
            for part in parts:
                unit, _, dunit = loaded(part)
                dx = (dunit - unit * along) * rstd
                dx = dx if dtotal_ref is None else dx + dtotal_ref[at, part].astype(jnp.float32)
                dx_ref[at, part] = dx.astype(dx_ref.dtype)

        _through(block, chunk, some)
        if dscale_ref is not None:
            dscale_ref[0] = sum_ref[...].sum(axis=0, keepdims=True)

    rstd_B1L = jnp.pad(rstd_R, (0, blocks * block - R)).reshape(blocks, 1, block)
    dx_RD, dscale_B1D = _call(
        kernel, "bwd", (blocks, block, D), interpret,
        x_RD, dy_RD, dtotal_RD, None if scale_D is None else scale_D[None], rstd_B1L,
        out=[x_RD, None if scale_D is None else jax.ShapeDtypeStruct((blocks, 1, D), jnp.float32)],
        scratch=[(block, LANES), (SUBLANES, D)],
    )  # fmt: skip
    return dx_RD[:R].astype(dtype), None if dscale_B1D is None else dscale_B1D.sum(axis=(0, 1))


def _rows(x_RD: jax.Array | None) -> jax.Array | None:
    """As kernels take them: enough for a tile, and not in float16."""
    if x_RD is None:
        return None
    return taken(x_RD) if len(x_RD) >= ROWS else whole(taken(x_RD), ROWS, 0)


def _through(block: int, chunk: int, some: Callable) -> None:
    """`some(rows)` of all chunks of a block."""

    def step(i, _):
        some(pl.ds(pl.multiple_of(i * chunk, chunk), chunk))
        return ()

    lax.fori_loop(0, block // chunk, step, ())


def _call(kernel: Callable, name: str, sizes: tuple[int, int, int], interpret: bool, *args, out, scratch):
    """`pallas_call` over blocks of rows of [R, D], rows of [blocks, 1, ...], and the whole of [1, D]; None has none."""
    blocks, block, D = sizes

    def spec(x) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))
        return pl.BlockSpec((1, D), lambda i: (0, 0)) if len(x) == 1 else pl.BlockSpec((block, D), lambda i: (i, 0))

    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
    run = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(blocks,),
        in_specs=jax.tree.map(spec, args),
        out_specs=jax.tree.map(spec, out),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=None if interpret else pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )
    with jax.named_scope(f"tpu_rms_norm_{name}"):
        return run(*args)
