"""What the backward pass keeps and what it computes again, by name."""

from collections.abc import Callable
from typing import Any

import jax

from jaxllm.models.config import Keep, Remat


def recomputed(elementwise: Callable) -> Callable:
    """`elementwise` with only its inputs (and matrix products, if there are any) kept for the backward pass.

    Automatic differentiation keeps each intermediate value of a norm or an activation; to compute them again is
    cheaper than to write and read them.
    """
    return jax.checkpoint(elementwise, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)


def remat(layer: Callable, policy: Remat, *, scanned: bool) -> Callable:
    """`layer` under a rematerialisation policy (Chen et al. 2016, arXiv:1604.06174).

    none: everything is kept. full: only the layer's input. dots: results of weight matmuls. save_attention: queries,
    keys, values and attention output (Korthikanti et al. 2022, arXiv:2205.05198, section 5, the cheap rest is
    computed again). offload: like save_attention, kept in host memory. Or the names of what is kept: input (of the
    layer), q, k, v (rotated), attention (its output before the projection), residual (the stream between attention and
    feed-forward), gate, up (of the feed-forward, before the activation).
    """
    if policy == "none":
        return layer
    # XLA merges equal computations, which would undo it; those of two loops (a scan's) it cannot merge.
    return jax.checkpoint(layer, policy=_saveable(policy), prevent_cse=not scanned)


def _saveable(policy: Remat) -> Callable[..., Any]:
    policies, attention = jax.checkpoint_policies, ("q", "k", "v", "attention")
    match policy:
        case "full":
            return policies.nothing_saveable
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "save_attention":
            keep = Keep(device=attention)
        case "offload":
            keep = Keep(host=attention)
        case _:
            keep = policy
    if not keep.host:
        return policies.save_only_these_names(*keep.device)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=keep.device, names_which_can_be_offloaded=keep.host,
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip
