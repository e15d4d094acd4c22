"""Simulated cycles of the TPU kernels beside those of JAX's flash and splash attention: see `bench.py --static`.

One head, bfloat16, causal unless said.
"""

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import tpu
from pallas_kernels.attention.masks import Causal, Documents, Window
from pallas_kernels.static import CHIPS, simulated

Made = tuple[Any, list[jax.ShapeDtypeStruct]]  # a function, and shapes of what it takes

TUNINGS = {  # tried for each chip
    "forward": [(512, 512, 4), (512, 512, 2), (1024, 512, 2), (512, 1024, 2), (256, 512, 4)],
    "backward": [(512, 512, 2), (512, 512, 1), (1024, 512, 1), (512, 1024, 1), (256, 512, 2)],
}
FLASH, SPLASH = (256, 512, 1024), ((512, 512), (1024, 512), (1024, 1024))  # blocks; and keys of a step within one


def arrays(T: int, H: int, heads: int = 1) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16)] * 3


def gradients(f):
    def both(q, k, v, do):
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do)

    return both


def made(f, T: int, H: int, backward: bool) -> Made:
    """A function of q, k and v, alone or with its gradients."""
    shapes = arrays(T, H)
    return (gradients(f), [*shapes, shapes[0]]) if backward else (f, shapes)


def ours(T: int, H: int, which: str, tuning: list[int], mask: str = "causal") -> Made:
    """Our `forward` or `backward` kernel."""
    # No argument of the function: the simulator knows of their blocks.
    documents = np.repeat(np.arange(8, dtype=np.int32), T // 8)[None]
    seen = {
        "causal": Causal(), "window of 1024": Causal() & Window(1023),
        "8 documents": Causal() & Documents(documents, documents),
    }[mask]  # fmt: skip
    how = dict(scale=H**-0.5, memory=64 * tpu.MIB, tuning=tpu.Tuning(*tuning))
    q, k, v = arrays(T, H)
    if which == "forward":
        return lambda q, k, v: tpu.forward(q, k, v, seen, **how), [q, k, v]
    lse = jax.ShapeDtypeStruct((1, 1, T), jnp.float32)
    return lambda q, k, v, o, lse, do: tpu.backward(q, k, v, o, lse, do, seen, **how), [q, k, v, q, lse, q]


def flash(T: int, H: int, block: int, backward: bool) -> Made:
    """JAX's flash attention, which takes [B, N, T, H]."""
    from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

    names = [name for name in jax_flash.BlockSizes.__dataclass_fields__ if name != "block_b"]
    sizes = jax_flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))

    def f(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax_flash.flash_attention(q, k, v, causal=True, sm_scale=H**-0.5, block_sizes=sizes).swapaxes(1, 2)

    return made(f, T, H, backward)


def splash(T: int, H: int, block: int, step: int, backward: bool) -> Made:
    """JAX's splash attention, its table of blocks written as arithmetic.

    The table stands in scalar memory, of which the simulator knows nothing: it would take nearly every block as empty.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def looked_up(h, i, j, data_next, block_mask, mask_next, next_i=False):
        return (jnp.maximum(i, j) if next_i else jnp.minimum(i, j)), None, j <= i, False

    kernel._next_nonzero = looked_up  # in a process of its own
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=step, block_q_dkv=512, block_kv_dkv=512,
        block_kv_dkv_compute=512, block_q_dq=512, block_kv_dq=512,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))])
    full = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    infos = (
        info._replace(data_next=None, mask_next=None, block_mask=None)
        for info in (full.fwd_mask_info, full.dq_mask_info, full.dkv_mask_info)
    )
    bare = kernel.SplashAttentionKernel(*infos, **full.kwargs)

    def f(q, k, v):
        q = q * jnp.asarray(H**-0.5, q.dtype)
        return jax.vmap(bare)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return made(f, T, H, backward)


def best(chip: str, make: str, tried: Iterable[dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """The fewest cycles of what is tried, and all of them; what does not compile says why."""
    runs = []
    for how in tried:
        try:
            found = simulated(chip, f"{__name__}:{make}", **arguments, **how)
        except (RuntimeError, subprocess.TimeoutExpired) as e:
            runs.append(how | {"failed": str(e)[-200:]})
        else:
            runs.append(how | {"cycles": found["cycles"]})
        print(f"{chip} {make} {arguments} {runs[-1]}", file=sys.stderr, flush=True)
    done = [run for run in runs if "cycles" in run]
    if not done:
        raise RuntimeError(f"{make} compiles for {chip} with nothing that was tried: {runs}")
    return min(done, key=lambda run: run["cycles"]) | {"tried": runs}


def case(chip: str, T: int, H: int, *, tune: bool) -> dict[str, Any]:
    """Causal attention to T keys: ours and its peers, forward and with gradients."""
    ours_of = {
        which: best(chip, "ours", [{"tuning": t} for t in (tried if tune else tried[:1])], T=T, H=H, which=which)
        for which, tried in TUNINGS.items()
    }
    found: dict[str, Any] = {"T": T, "H": H}
    forward = ours_of["forward"]["cycles"]
    for name, backward, cycles in (
        ("forward", False, forward), ("forward and backward", True, forward + ours_of["backward"]["cycles"])
    ):  # fmt: skip
        peers = {
            "flash": best(chip, "flash", [{"block": b} for b in FLASH], T=T, H=H, backward=backward),
            "splash": best(chip, "splash", [{"block": b, "step": s} for b, s in SPLASH], T=T, H=H, backward=backward),
        }
        flops = (4 + 10 * backward) * T * T * H / 2
        found[name] = {
            "ours": cycles, **peers, "ratio": min(p["cycles"] for p in peers.values()) / cycles,
            "of peak": flops / (cycles / CHIPS[chip].hz) / CHIPS[chip].flops * _cores(chip),
        }  # fmt: skip
    return found | {"tuning": ours_of}


def _cores(chip: str) -> int:
    """Cores that share what a chip can do; one head runs on one of them."""
    return 2 if chip == "v5p" else 1


def measured(chip: str, lengths: Iterable[int] = (4096, 8192), *, tune: bool = False) -> dict[str, Any]:
    """What `bench.py --static` writes; `ratio` is the smallest of (the best peer's cycles / ours)."""
    cases = [case(chip, T, 128, tune=tune) for T in lengths]

    def ours_of(which: str, **how: Any) -> dict[str, Any]:
        return simulated(chip, f"{__name__}:ours", T=8192, H=128, which=which, tuning=TUNINGS[which][0], **how)

    whole = {which: ours_of(which, bundles=True) for which in TUNINGS}
    masks = {
        mask: {which: ours_of(which, mask=mask)["cycles"] / whole[which]["cycles"] for which in TUNINGS}
        for mask in ("window of 1024", "8 documents")
    }
    kernels = {which: found["kernels"] for which, found in whole.items()}
    ratio = min(c[name]["ratio"] for c in cases for name in ("forward", "forward and backward"))
    return {"ratio": ratio, "chip": chip, "cases": cases, "masks": masks, "kernels": kernels}
