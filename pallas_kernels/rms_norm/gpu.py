"""RMSNorm for NVIDIA GPUs since Ampere, in Pallas Triton: each way reads and writes once what it must.

A program has whole rows in registers, several if they are short. Going back it goes through a share of the rows and
sums its part of the weight's gradient; these parts are added up in their order, so that the same arguments give the
same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

SHARES = 512  # of the rows, going back


class Cut(NamedTuple):
    """Rows that are worked on at a time, what their numbers fill of a power of 2, and warps that share them."""

    rows: int
    width: int
    warps: int


def cut(x_RD: jax.Array) -> Cut:
    R, D = x_RD.shape
    width = max(16, pl.next_power_of_2(D))
    rows = min(max(1, 2048 // width), pl.next_power_of_2(R))
    return Cut(rows, width, min(16, max(4, rows * width // 512)))


def forward(
    x_RD: jax.Array, scale_D: jax.Array | None, residual_RD: jax.Array | None, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The sum normalised, the sum (None without a residual), and 1 / rms of each row; `scale_D` is float32."""
    (R, D), sizes = x_RD.shape, cut(x_RD)
    rows = sizes.rows

    def kernel(x_ref, residual_ref, scale_ref, y_ref, total_ref, rstd_ref):
        row, column = _there(pl.program_id(0) * rows, sizes, R, D)
        both = row[:, None] & column
        x = _loaded(x_ref, both)
        if residual_ref is not None:
            total = (x + _loaded(residual_ref, both)).astype(x_ref.dtype)
            plgpu.store(total_ref, total, mask=both)
            x = total.astype(jnp.float32)
        rstd = lax.rsqrt(jnp.sum(x * x, axis=1) / D + eps)
        plgpu.store(rstd_ref, rstd, mask=row)
        y = x * rstd[:, None]
        y = y if scale_ref is None else y * _loaded(scale_ref, column)
        plgpu.store(y_ref, y.astype(y_ref.dtype), mask=both)

    args = x_RD, residual_RD, None if scale_D is None else scale_D[None]
    out = x_RD, residual_RD, jax.ShapeDtypeStruct((R,), jnp.float32)
    return _call(kernel, "fwd", sizes, rows, interpret, *args, out=out)


def backward(
    x_RD: jax.Array, scale_D: jax.Array | None, rstd_R: jax.Array, dy_RD: jax.Array, dtotal_RD: jax.Array | None, *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Gradients of what was normalised, with that which reaches it otherwise (`dtotal_RD`) added, and of the scale."""
    (R, D), sizes = x_RD.shape, cut(x_RD)
    rows = sizes.rows
    steps = -(-R // (rows * SHARES))
    share = rows * steps

    def kernel(x_ref, dy_ref, dtotal_ref, scale_ref, rstd_ref, dx_ref, dscale_ref):
        first = pl.program_id(0) * share

        def some(step, dscale):
            at = pl.ds(step * rows, rows)
            row, column = _there(first + step * rows, sizes, R, D)
            both = row[:, None] & column
            rstd = _loaded(rstd_ref.at[at], row)[:, None]
            unit, dy = _loaded(x_ref.at[at], both) * rstd, _loaded(dy_ref.at[at], both)
            if scale_ref is not None:
                dscale += dy * unit
                dy *= _loaded(scale_ref, column)
            dx = (dy - unit * (jnp.sum(dy * unit, axis=1, keepdims=True) / D)) * rstd
            dx = dx if dtotal_ref is None else dx + _loaded(dtotal_ref.at[at], both)
            plgpu.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=both)
            return dscale

        none = None if scale_ref is None else jnp.zeros((rows, sizes.width), jnp.float32)
        dscale = lax.fori_loop(0, steps, some, none)
        if dscale is not None:
            _, column = _there(0, sizes, R, D)
            plgpu.store(dscale_ref, dscale.sum(axis=0)[None, None], mask=column[None])

    args = x_RD, dy_RD, dtotal_RD, None if scale_D is None else scale_D[None], rstd_R
    parts = jax.ShapeDtypeStruct((-(-R // share), 1, D), jnp.float32)
    out = x_RD, None if scale_D is None else parts
    dx_RD, dscale_B1D = _call(kernel, "bwd", sizes, share, interpret, *args, out=out)
    return dx_RD, None if dscale_B1D is None else dscale_B1D.sum(axis=(0, 1))


def _there(first, sizes: Cut, R: int, D: int) -> tuple[jax.Array, jax.Array]:
    """Which of the rows from `first` there are, and which columns, [1, width]."""
    row = lax.broadcasted_iota(jnp.int32, (sizes.rows,), 0) + first
    return row < R, lax.broadcasted_iota(jnp.int32, (1, sizes.width), 1) < D


def _loaded(ref, mask) -> jax.Array:
    """In float32; 0 where nothing is."""
    return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)


def _call(kernel: Callable, name: str, sizes: Cut, share: int, interpret: bool, *args, out):
    """`pallas_call`, of as many rows a program: of [R, D], of [R], its own of [programs, 1, D], all of [1, D]."""

    def spec(x) -> pl.BlockSpec:
        if x.ndim == 1:
            return pl.BlockSpec((share,), lambda i: (i,))
        if x.ndim == 3:
            return pl.BlockSpec((1, 1, sizes.width), lambda i: (i, 0, 0))
        of_all = len(x) == 1
        return pl.BlockSpec((1 if of_all else share, sizes.width), lambda i: (0 if of_all else i, 0))

    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
    run = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(-(-len(args[0]) // share),),
        in_specs=jax.tree.map(spec, args),
        out_specs=jax.tree.map(spec, out),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=sizes.warps),
        interpret=interpret,
    )
    with jax.named_scope(f"gpu_rms_norm_{name}"):
        return run(*args)
