"""Attention over a paged cache by whatever is best where it runs."""

import functools

import jax

from pallas_kernels.attention.api import chosen, device_kind, loaded, scale_of
from pallas_kernels.paged_attention import reference


def paged_attention(
    q_BTNH: jax.Array,
    k_PKLH: jax.Array,
    v_PKLH: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    k_scale_PKL: jax.Array | None = None,
    v_scale_PKL: jax.Array | None = None,
    implementation: str | None = None,
    chip: str | None = None,
    parts: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `reference.paged_attention` says: the last T tokens of each sequence over its pages, [B, T, N, H].

    Pages must hold finite numbers, also behind the end of a sequence, and a sequence must be no longer than its pages.
    On a TPU arrays whose last axis is of less than 128 should lie row by row: see `tpu.paged_attention`.

    Args:
      scale: H ** -0.5 if None; positive.
      implementation: `gpu`, `tpu` or `reference`; None takes the best that applies.
      chip: `device_kind` of what this is compiled for; None: the default device.
      parts: of a sequence that the GPU's kernel works on at the same time; None: by the sizes.
      interpret: runs the kernel on any platform, slowly: for tests.

    Raises:
      ValueError: shapes that do not match, or arrays that a given implementation cannot take.
    """
    (B, _, N, H), (P, K, L, _) = q_BTNH.shape, k_PKLH.shape
    if k_PKLH.shape != (P, K, L, H) or v_PKLH.shape != k_PKLH.shape or v_PKLH.dtype != k_PKLH.dtype or N % K:
        raise ValueError(
            f"q {q_BTNH.shape} and pages {k_PKLH.shape} of {k_PKLH.dtype} and {v_PKLH.shape} of {v_PKLH.dtype} must be "
            "[B, T, N, H] and [P, K, L, H] of one dtype with N a multiple of K"
        )
    if table_BM.ndim != 2 or len(table_BM) != B or length_B.shape != (B,):
        raise ValueError(f"table {table_BM.shape} and lengths {length_B.shape} must be [{B}, M] and [{B}]")
    scales = [x for x in (k_scale_PKL, v_scale_PKL) if x is not None]
    if len(scales) == 1 or any(x.shape != (P, K, L) for x in scales):
        shapes = ", ".join(str(x.shape) for x in scales)
        raise ValueError(f"k_scale_PKL and v_scale_PKL must be given both, {(P, K, L)} each, or neither; got {shapes}")
    scale = scale_of(scale, H)
    if parts is not None and parts < 1:
        raise ValueError(f"parts={parts} must be at least 1")
    how = dict(
        scale=scale, window=window, sinks=sinks, softcap=softcap, k_scale_PKL=k_scale_PKL, v_scale_PKL=v_scale_PKL
    )  # fmt: skip
    args = q_BTNH, k_PKLH, v_PKLH, table_BM, length_B
    kernels = {name: functools.partial(_why_not, name, q_BTNH, k_PKLH, scaled=bool(scales)) for name in ("gpu", "tpu")}
    implementation = chosen(implementation, kernels, chip=chip, interpret=interpret)
    if implementation == "reference":
        return reference.paged_attention(*args, **how)
    kernel = _kernel(implementation)
    if implementation == "gpu":
        return kernel.paged_attention(*args, **how, parts=parts, interpret=interpret)
    cores = kernel.cores_of(chip or device_kind())
    return kernel.paged_attention(*args, **how, cores=cores, interpret=interpret)


_kernel = functools.partial(loaded, "paged_attention")


def _why_not(name: str, q_BTNH: jax.Array, k_PKLH: jax.Array, *, scaled: bool) -> str | None:
    return _kernel(name).why_not(q_BTNH, k_PKLH, scaled=scaled)
