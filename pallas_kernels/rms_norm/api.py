"""RMSNorm, with the residual's addition before it, by whatever is best where it runs."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import api as attention
from pallas_kernels.attention.api import chosen, loaded
from pallas_kernels.rms_norm import reference

CHIPS = {"tpu": attention.CHIPS["tpu"], "gpu": attention.CHIPS["triton"]}
WIDEST = 16384  # numbers of a row that registers of a GPU, and a TPU's vector memory, have room for


class _Static(NamedTuple):
    """What does not change within a compiled program."""

    eps: float
    kernel: str
    interpret: bool


def rms_norm(
    x: jax.Array,
    weight_D: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    implementation: str | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """What `reference.rms_norm` says: x [..., D] normalised; with a residual (that, x + residual), the sum normalised.

    Differentiable in x, weight and residual. Kernels go once through memory each way, and keep the sum and one float32
    of each row. They know nothing of meshes: on several devices call this inside `jax.shard_map`.

    Args:
      weight_D: None: of 1, and `offset` is not used.
      offset: added to the weight; 1 if it is stored less 1 (Gemma Team 2024, arXiv:2403.08295).
      implementation: `tpu`, `gpu` or `reference`; None: `tpu` on TPUs, where by the compiler's simulator it takes fewer
        cycles than XLA's programs for the same unless arrays are small enough for these to keep them in vector memory
        (`bench.py --static`), and elsewhere the reference, which XLA fuses too: on GPUs ours has not been timed yet.
      chip: `device_kind` of what this is compiled for; None: the default device.
      interpret: runs the kernel on any platform, slowly: for tests.

    Raises:
      ValueError: shapes or dtypes that do not match, or what a given implementation cannot take.
    """
    _check(x, weight_D, residual)
    kernels = dict.fromkeys(CHIPS, functools.partial(_why_not, x))
    kernel = chosen(implementation, kernels, chips=CHIPS, chip=chip, interpret=interpret)
    if kernel == "reference":
        return reference.rms_norm(x, weight_D, residual, eps=eps, offset=offset)
    scale_D = None if weight_D is None else offset + weight_D.astype(jnp.float32)
    rows = lambda x: x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    static = _Static(float(eps), kernel, interpret)
    y_RD, total_RD = _normed(static, rows(x), scale_D, None if residual is None else rows(residual))
    y = y_RD.reshape(x.shape)
    return y if residual is None else (y, total_RD.reshape(x.shape))


def _check(x: jax.Array, weight_D: jax.Array | None, residual: jax.Array | None) -> None:
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.shape} of {x.dtype} must be [..., D] of floats")
    if weight_D is not None and weight_D.shape != x.shape[-1:]:
        raise ValueError(f"weight of shape {weight_D.shape} must be {x.shape[-1:]}, as rows of x {x.shape} are long")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual {residual.shape} of {residual.dtype} must be {x.shape} of {x.dtype}, as x is")


_kernel = functools.partial(loaded, "rms_norm")


def _why_not(x: jax.Array) -> str | None:
    """What of this array the kernels, each of them, cannot take; None if they can."""
    if x.size == 0:
        return "it takes at least one number"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {x.dtype}"
    return None if x.shape[-1] <= WIDEST else f"it takes rows of at most {WIDEST} numbers, not of {x.shape[-1]}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(static: _Static, x_RD, scale_D, residual_RD):
    return _forward(static, x_RD, scale_D, residual_RD)[0]


def _forward(static: _Static, x_RD, scale_D, residual_RD):
    run = _kernel(static.kernel).forward
    y_RD, total_RD, rstd_R = run(x_RD, scale_D, residual_RD, eps=static.eps, interpret=static.interpret)
    return (y_RD, total_RD), (x_RD if total_RD is None else total_RD, scale_D, rstd_R)


def _backward(static: _Static, kept, gradients):
    dx_RD, dscale_D = _kernel(static.kernel).backward(*kept, *gradients, interpret=static.interpret)
    return dx_RD, dscale_D, None if gradients[1] is None else dx_RD


_normed.defvjp(_forward, _backward)
