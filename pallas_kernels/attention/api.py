"""Attention by whatever is best where it runs: one definition, a reference and kernels that come close to it."""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference
from pallas_kernels.attention.bias import Bias, Distances, Slopes
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
    rate: float  # of dropout

    def how(self, extras: dict[str, jax.Array]) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("scale", "softcap", "shift", "interpret")}
        told |= {"memory": vector_memory(self.chip)} if self.kernel == "tpu" else {}
        return told | ({"rate": self.rate} if self.rate else {}) | extras


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    *,
    mask: Mask = Full(),
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    shift: int = 0,
    implementation: str | None = None,
    name: str | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T * scale) v over the keys that each query sees, [B, T, N, V] of v's dtype; 0 where it sees none.

    N query heads share K key heads, N a multiple of K, which are not repeated. Differentiable in q, k and v, and in a
    bias of `Distances`.

    Args:
      mask: see `masks`.
      bias: see `bias`; added to the logits after the soft cap.
      scale: H ** -0.5 if None; positive.
      softcap: logits become softcap * tanh(logits / softcap).
      dropout: share of the weights that are dropped; the others grow in return. All implementations that have it
        drop the same ones.
      key: of dropout. Inside `jax.shard_map` each device counts its own rows and heads: fold its place into the key.
      shift: query i stands at place i + shift of the keys, for slopes; masks have their own.
      implementation: `gpu`, `tpu`, `triton` or `reference`; None takes the best that applies, but for `triton`.
      name: what rematerialisation policies know the result and the log-sum-exp by.
      chip: `device_kind` of what this is compiled for; None: the default device.
      interpret: runs the kernel on any platform, slowly: for tests.

    Raises:
      ValueError: shapes that do not match, or what a given implementation cannot take.
    """
    (B, T, N, H), (_, S, K, _) = _shapes(q_BTNH, k_BSKH, v_BSKV)
    scale = scale_of(scale, H)
    extras = _extras(bias, dropout, key, N, T + S - 1)
    _check(mask, B, T, S)
    kernels = {name: functools.partial(_why_not, name, q_BTNH, k_BSKH, v_BSKV, tuple(extras)) for name in CHIPS}
    implementation = chosen(implementation, kernels, chip=chip, interpret=interpret)
    if implementation == "reference":
        how = dict(scale=scale, softcap=softcap, shift=shift, rate=dropout)
        o_BTNV, _ = reference.attention(q_BTNH, k_BSKH, v_BSKV, mask, **how, **extras)
        return o_BTNV if name is None else checkpoint_name(o_BTNV, name)
    static = _Static(
        float(scale), softcap, shift, interpret, implementation, name, chip or device_kind(), float(dropout)
    )
    return _attention(static, q_BTNH, k_BSKH, v_BSKV, mask, extras)


def applies(chip: str, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether a kernel takes arrays of these shapes and dtypes, unasked, on a chip of this kind."""
    return any(
        kind.unasked and kind.has(chip) and _why_not(name, q_BTNH, k_BSKH, k_BSKH, ()) is None
        for name, kind in CHIPS.items()
    )


class Chips(NamedTuple):
    """What a kernel is written for: what it is called, and whether a chip of some `device_kind` is one."""

    name: str
    has: Callable[[str], bool]
    unasked: bool = True  # whether it is taken without being asked for by name


# And what came after.
AMPERE = re.compile(r"^NVIDIA.*\b(A\d+[GX]?|L\d+S?|[HB]\d\d+|G[HB]\d+|RTX (A\d+|[345]0[5-9]0|PRO)|Ada)\b")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
CHIPS = {
    "gpu": Chips("a Hopper GPU", lambda chip: any(word.startswith(HOPPER) for word in chip.split())),
    # The vector memory of those before v5 is too small.
    "tpu": Chips("a TPU since v5", lambda chip: chip.startswith("TPU") and re.match("TPU v[234]", chip) is None),
    # It has run on none of them yet.
    "triton": Chips("an NVIDIA GPU since Ampere", lambda chip: AMPERE.search(chip) is not None, unasked=False),
}


def on_hopper() -> bool:
    """Whether the default device is one that the GPU kernels are written for."""
    return CHIPS["gpu"].has(device_kind())


def vector_memory(chip: str) -> int:
    """Bytes of a TPU core's VMEM: that of v5e and v6e, or 64 MiB as others from v5p on have."""
    return (128 if chip.endswith("lite") else 64) * 2**20


def device_kind() -> str:
    """That of the default device."""
    said = jax.config.jax_default_device
    return (said if isinstance(said, jax.Device) else jax.devices(said)[0]).device_kind


def chosen(
    implementation: str | None, kernels: Mapping[str, Callable[[], str | None]], *,
    chips: Mapping[str, Chips] = CHIPS, chip: str | None = None, interpret: bool = False,
) -> str:  # fmt: skip
    """The implementation that was asked for or, of None, the best of those taken unasked that applies.

    Args:
      kernels: by their names in `chips`, which says what they are for; each says what of the arrays it cannot take.
      chip: `device_kind` of what is compiled for; None: the default device.

    Raises:
      ValueError: no such implementation, or one that does not apply.
    """
    here = chip or device_kind()
    at_home = [name for name in kernels if interpret or chips[name].has(here)]
    if implementation is None:  # only a kernel that could run is loaded to be asked
        unasked = (name for name in at_home if chips[name].unasked)
        return next((name for name in unasked if kernels[name]() is None), "reference")
    if implementation not in (known := (*kernels, "reference")):
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(known)}")
    if implementation in kernels:
        elsewhere = None if implementation in at_home else f"it needs {chips[implementation].name}, this is {here}"
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


EXTRAS = {"slopes_N": "slopes", "values_NX": "a bias of distances", "seed": "dropout"}  # what kernels may not have


def _extras(bias: Bias | None, dropout: float, key: jax.Array | None, N: int, X: int) -> dict[str, jax.Array]:
    """What not every kernel takes, by the names that they know it by."""
    extras = {}
    if isinstance(bias, Slopes):
        extras["slopes_N"] = jax.lax.stop_gradient(bias.slopes_N)
        if bias.slopes_N.shape != (N,):
            raise ValueError(f"slopes of shape {bias.slopes_N.shape} must be one of each of {N} query heads")
    if isinstance(bias, Distances):
        extras["values_NX"] = bias.values_NX
        if bias.values_NX.shape != (N, X):
            raise ValueError(f"values of shape {bias.values_NX.shape} must be of {N} query heads and {X} distances")
    if bias is not None and not isinstance(bias, Slopes | Distances):
        raise ValueError(f"bias must be Slopes or Distances, got {type(bias).__name__}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and less than 1")
    if dropout:
        if key is None:
            raise ValueError(f"dropout={dropout} needs a key")
        extras["seed"] = jax.random.bits(key, (), jnp.uint32).astype(jnp.int32)
    return extras


def loaded(op: str, name: str) -> ModuleType:
    """A kernel of an op, imported late: slow to load, and of no use elsewhere."""
    return importlib.import_module(f"pallas_kernels.{op}.{name}")


_kernel = functools.partial(loaded, "attention")


def _why_not(name: str, q: jax.Array, k: jax.Array, v: jax.Array, extras: tuple[str, ...]) -> str | None:
    kernel = _kernel(name)
    lacks = [EXTRAS[x] for x in extras if x not in kernel.EXTRAS]
    return f"it lacks {' and '.join(lacks)}" if lacks else kernel.why_not(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, mask, extras):
    return _forward(static, q, k, v, mask, extras)[0]


def _forward(static: _Static, q, k, v, mask, extras):
    o, lse = _kernel(static.kernel).forward(q, k, v, mask, **static.how(extras))
    if static.name is not None:
        o, lse = checkpoint_name(o, static.name), checkpoint_name(lse, static.name)
    return o, (q, k, v, o, lse, mask, extras)


def _backward(static: _Static, kept, do):
    q, k, v, o, lse, mask, extras = kept
    dq, dk, dv, *of_values = _kernel(static.kernel).backward(q, k, v, o, lse, do, mask, **static.how(extras))
    return dq, dk, dv, None, {name: of_values[0] if name == "values_NX" else None for name in extras}


_attention.defvjp(_forward, _backward)
