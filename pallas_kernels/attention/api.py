"""Attention by whatever is best where it runs: one definition, a reference and kernels that come close to it."""

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Full, Mask


class _Static(NamedTuple):
    """What does not change within a compiled program."""

    scale: float
    softcap: float | None
    shift: int
    interpret: bool
    kernel: str
    name: str | None
    chip: str

    def how(self, slopes_N: jax.Array | None) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("scale", "softcap", "shift", "interpret")}
        memory = {"memory": vector_memory(self.chip)} if self.kernel == "tpu" else {}
        return told | memory | {"slopes_N": slopes_N}


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
      implementation: `gpu`, `tpu` or `reference`; None takes the best that applies.
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
    kernels = {name: functools.partial(_why_not, name, q_BTNH, k_BSKH, v_BSKV) for name in CHIPS}
    implementation = chosen(implementation, kernels, chip=chip, interpret=interpret)
    if implementation == "reference":
        how = dict(scale=scale, softcap=softcap, slopes_N=slopes_N, shift=shift)
        o_BTNV, _ = reference.attention(q_BTNH, k_BSKH, v_BSKV, mask, **how)
        return o_BTNV if name is None else checkpoint_name(o_BTNV, name)
    static = _Static(float(scale), softcap, shift, interpret, implementation, name, chip or _default())
    return _attention(static, q_BTNH, k_BSKH, v_BSKV, mask, slopes_N)


def applies(chip: str, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether a kernel takes arrays of these shapes and dtypes on a chip of this kind."""
    return any(CHIPS[name].has(chip) and _why_not(name, q_BTNH, k_BSKH, k_BSKH) is None for name in CHIPS)


class Chips(NamedTuple):
    """What a kernel is written for: what it is called, and whether a chip of some `device_kind` is one."""

    name: str
    has: Callable[[str], bool]


HOPPER = ("H100", "H200", "H800", "H20", "GH200")
CHIPS = {
    "gpu": Chips("a Hopper GPU", lambda chip: any(word.startswith(HOPPER) for word in chip.split())),
    "tpu": Chips("a TPU", lambda chip: chip.startswith("TPU")),
}


def on_hopper() -> bool:
    """Whether the default device is one that the GPU kernels are written for."""
    return CHIPS["gpu"].has(_default())


def vector_memory(chip: str) -> int:
    """Bytes of a TPU core's VMEM: that of v5e and v6e, or 64 MiB as others from v5p on have."""
    return (128 if chip.endswith("lite") else 64) * 2**20


def _default() -> str:
    """The kind of the default device."""
    said = jax.config.jax_default_device
    return (said if isinstance(said, jax.Device) else jax.devices(said)[0]).device_kind


def chosen(
    implementation: str | None, kernels: Mapping[str, Callable[[], str | None]], *, chip: str | None = None,
    interpret: bool = False,
) -> str:  # fmt: skip
    """The implementation that was asked for or, of None, the best that applies.

    Args:
      kernels: by their names in CHIPS; each says what of the arrays it cannot take.
      chip: `device_kind` of what is compiled for; None: the default device.

    Raises:
      ValueError: no such implementation, or one that does not apply.
    """
    here = chip or _default()
    at_home = [name for name in kernels if interpret or CHIPS[name].has(here)]
    if implementation is None:  # only a kernel that could run is loaded to be asked
        return next((name for name in at_home if kernels[name]() is None), "reference")
    if implementation not in (known := (*kernels, "reference")):
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(known)}")
    if implementation in kernels:
        elsewhere = None if implementation in at_home else f"it needs {CHIPS[implementation].name}, this is {here}"
        if why := kernels[implementation]() or elsewhere:
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


def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.attention.{name}")  # late: slow to load, and of no use elsewhere


def _why_not(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    return _kernel(name).why_not(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, mask, slopes_N):
    return _forward(static, q, k, v, mask, slopes_N)[0]


def _forward(static: _Static, q, k, v, mask, slopes_N):
    o, lse = _kernel(static.kernel).forward(q, k, v, mask, **static.how(slopes_N))
    if static.name is not None:
        o, lse = checkpoint_name(o, static.name), checkpoint_name(lse, static.name)
    return o, (q, k, v, o, lse, mask, slopes_N)


def _backward(static: _Static, kept, do):
    q, k, v, o, lse, mask, slopes_N = kept
    gradients = _kernel(static.kernel).backward(q, k, v, o, lse, do, mask, **static.how(slopes_N))
    return *gradients, None, None if slopes_N is None else jnp.zeros_like(slopes_N)


_attention.defvjp(_forward, _backward)
