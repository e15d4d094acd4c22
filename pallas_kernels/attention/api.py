"""Attention by whatever is best where it runs: one definition, a reference and kernels that come close to it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Full, Mask

IMPLEMENTATIONS = ("gpu", "reference")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


class _Static(NamedTuple):
    """What does not change within a compiled program."""

    scale: float
    softcap: float | None
    shift: int
    name: str | None
    interpret: bool

    def how(self, slopes_N: jax.Array | None) -> dict[str, Any]:
        told = {name: value for name, value in self._asdict().items() if name != "name"}
        return told | {"slopes_N": slopes_N}


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
    chip: str | None = None,
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
      chip: `device_kind` of what this is compiled for; None: the default device.
      interpret: runs the kernel on any platform, slowly: for tests.

    Raises:
      ValueError: shapes that do not match, or what a given implementation cannot take.
    """
    (B, T, N, H), (_, S, K, _) = _shapes(q_BTNH, k_BSKH, v_BSKV)
    scale = scale_of(scale, H)
    if slopes_N is not None and slopes_N.shape != (N,):
        raise ValueError(f"slopes of shape {slopes_N.shape} must be one of each of {N} query heads")
    _check(mask, B, T, S)
    why_not = functools.partial(_why_not, q_BTNH, k_BSKH, v_BSKV)
    implementation = chosen(implementation, why_not, chip=chip, interpret=interpret)
    if implementation == "reference":
        how = dict(scale=scale, softcap=softcap, slopes_N=slopes_N, shift=shift)
        o_BTNV, _ = reference.attention(q_BTNH, k_BSKH, v_BSKV, mask, **how)
        return o_BTNV if name is None else checkpoint_name(o_BTNV, name)
    static = _Static(float(scale), softcap, shift, name, interpret)
    return _attention(static, q_BTNH, k_BSKH, v_BSKV, mask, slopes_N)


def applies(chip: str, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether a kernel takes arrays of these shapes and dtypes on a chip of this kind."""
    return on_hopper(chip) and _why_not(q_BTNH, k_BSKH, k_BSKH) is None


def on_hopper(chip: str | None = None) -> bool:
    """Whether a chip of this `device_kind` (None: the default device) is one that the GPU kernels are written for."""
    return any(word.startswith(HOPPER) for word in (chip or _default()).split())


def _default() -> str:
    """The kind of the default device."""
    said = jax.config.jax_default_device
    return (said if isinstance(said, jax.Device) else jax.devices(said)[0]).device_kind


def chosen(
    implementation: str | None, why_not: Callable[[], str | None], *, chip: str | None = None, interpret: bool = False
) -> str:
    """The implementation that was asked for or, of None, the best that applies.

    Args:
      why_not: what of the arrays the GPU's kernel cannot take.
      chip: `device_kind` of what is compiled for; None: the default device.

    Raises:
      ValueError: no such implementation, or one that does not apply.
    """
    elsewhere = None if interpret or on_hopper(chip) else f"it needs a Hopper GPU, this is {chip or _default()}"
    if implementation is None:
        return "reference" if elsewhere or why_not() else "gpu"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "gpu" and (why := why_not() or elsewhere):
        raise ValueError(f"implementation={implementation!r}: {why}")
    return implementation


def scale_of(scale: float | None, H: int) -> float:
    """What products of heads of H are multiplied with: H ** -0.5 unless told.

    Raises:
      ValueError: it is not positive.
    """
    scale = H**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    return scale


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
            raise ValueError(f"a mask's array of {role} has shape {x.shape}, wanted {wanted}")
        return x

    mask.mapped(check)


def _why_not(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    from pallas_kernels.attention import gpu  # late: slow to load, and of no use elsewhere

    return gpu.why_not(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, mask, slopes_N):
    return _forward(static, q, k, v, mask, slopes_N)[0]


def _forward(static: _Static, q, k, v, mask, slopes_N):
    from pallas_kernels.attention import gpu

    o, lse = gpu.forward(q, k, v, mask, **static.how(slopes_N))
    if static.name is not None:
        o, lse = checkpoint_name(o, static.name), checkpoint_name(lse, static.name)
    return o, (q, k, v, o, lse, mask, slopes_N)


def _backward(static: _Static, kept, do):
    from pallas_kernels.attention import gpu

    q, k, v, o, lse, mask, slopes_N = kept
    gradients = gpu.backward(q, k, v, o, lse, do, mask, **static.how(slopes_N))
    return *gradients, None, None if slopes_N is None else jnp.zeros_like(slopes_N)


_attention.defvjp(_forward, _backward)
