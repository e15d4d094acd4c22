"""Attention by whatever is best where it runs; one definition, several implementations with equal results."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Full, Mask

IMPLEMENTATIONS = ("gpu", "reference")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


class _Static(NamedTuple):
    """What does not change within a compiled program."""

    implementation: str
    scale: float
    softcap: float | None
    shift: int
    name: str | None
    interpret: bool


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    *,
    mask: Mask = Full(),
    scale: float | None = None,
    softcap: float | None = None,
    slopes_N: jax.Array | None = None,
    shift: int = 0,
    implementation: str | None = None,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T * scale) v over the keys that each query sees, [B, T, N, V] of v's dtype; 0 where it sees none.

    N query heads share K key heads, N a multiple of K, which are not repeated. Differentiable in q, k and v.

    Args:
      mask: see `masks`.
      scale: H ** -0.5 if None; positive.
      softcap: logits become softcap * tanh(logits / softcap).
      slopes_N: ALiBi's; slope * distance is taken off the logits. Not differentiated.
      shift: query i stands at place i + shift of the keys, for distances; masks have their own.
      implementation: one of IMPLEMENTATIONS; None takes the best that applies.
      name: what rematerialisation policies know the result and the log-sum-exp by.
      interpret: runs the kernel on any platform, slowly: for tests.

    Raises:
      ValueError: shapes that do not match, or arrays that a given implementation cannot take.
    """
    (B, T, N, H), (_, S, K, _) = _shapes(q_BTNH, k_BSKH, v_BSKV)
    scale = H**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    if slopes_N is not None and slopes_N.shape != (N,):
        raise ValueError(f"slopes of shape {slopes_N.shape} must be one of each of {N} query heads")
    _check(mask, B, T, S)
    if implementation is None:
        implementation = "gpu" if on_hopper() and _why_not("gpu", q_BTNH, k_BSKH, v_BSKV) is None else "reference"
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    elif why := _why_not(implementation, q_BTNH, k_BSKH, v_BSKV):
        raise ValueError(f"implementation={implementation!r}: {why}")
    static = _Static(implementation, float(scale), softcap, shift, name, interpret)
    return _attention(static, q_BTNH, k_BSKH, v_BSKV, mask, slopes_N)


def applies(chip: str, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether a kernel takes arrays of these shapes and dtypes on a chip of this kind."""
    return on_hopper(chip) and _why_not("gpu", q_BTNH, k_BSKH, k_BSKH) is None


def on_hopper(chip: str | None = None) -> bool:
    """Whether a chip of this kind (None: the default device) is one that the GPU kernels are written for."""
    if chip is None:
        device = jax.devices()[0]
        chip = device.device_kind if device.platform == "gpu" else ""
    return any(word in HOPPER for word in chip.split())


def _shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {q.shape}, {k.shape} and {v.shape}")
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K) or N % K:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B, T, N, H], [B, S, K, H] and [B, S, K, V] with N a "
            "multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return q.shape, k.shape


def _check(mask: Mask, B: int, T: int, S: int) -> None:
    def check(x: jax.Array, role: str) -> jax.Array:
        wanted = {"queries": (B, T), "keys": (B, S), "row": (B,)}[role]
        if x.shape != wanted:
            raise ValueError(f"an array of {role} in {type(mask).__name__} has shape {x.shape}, wanted {wanted}")
        return x

    mask.mapped(check)


def _why_not(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    if implementation == "reference":
        return None
    from pallas_kernels.attention import gpu  # late: slow to load, and of no use elsewhere

    return gpu.why_not(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, mask, slopes_N):
    return _forward(static, q, k, v, mask, slopes_N)[0]


def _forward(static: _Static, q, k, v, mask, slopes_N):
    how = dict(scale=static.scale, softcap=static.softcap, slopes_N=slopes_N, shift=static.shift)
    if static.implementation == "reference":
        o, lse = reference.attention(q, k, v, mask, **how)
    else:
        from pallas_kernels.attention import gpu

        o, lse = gpu.forward(q, k, v, mask, **how, interpret=static.interpret)
    if static.name is not None:
        o, lse = checkpoint_name(o, static.name), checkpoint_name(lse, static.name)
    return o, (q, k, v, o, lse, mask, slopes_N)


def _backward(static: _Static, kept, do):
    q, k, v, o, lse, mask, slopes_N = kept
    how = dict(scale=static.scale, softcap=static.softcap, slopes_N=slopes_N, shift=static.shift)
    if static.implementation == "reference":
        dq, dk, dv = jax.vjp(lambda q, k, v: reference.attention(q, k, v, mask, **how)[0], q, k, v)[1](do)
    else:
        from pallas_kernels.attention import gpu

        dq, dk, dv = gpu.backward(q, k, v, o, lse, do, mask, **how, interpret=static.interpret)
    return dq, dk, dv, None, None if slopes_N is None else jnp.zeros_like(slopes_N)


_attention.defvjp(_forward, _backward)
