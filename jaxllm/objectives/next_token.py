"""Next-token prediction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.shapes import Array, Float, Key
from jaxllm.objectives.config import NextToken, Routers


class Loss(NamedTuple):
    """What every objective returns. Sum and weight stay apart so that microbatches and hosts of
    unequal length add up to exactly the loss of the whole batch."""

    total: Float[Array, ""]  # nats, summed over weighted tokens
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (sum, weight)


def next_token(cfg: NextToken, model, batch: dict, key: Key[Array, ""] | None = None) -> Loss:
    """Cross-entropy of batch["targets"] under batch["weights"], plus z_loss * log(Z)^2.

    Metrics: `loss` (what is minimised), `xent` (cross-entropy alone, nats a token), `accuracy`; of models with mixtures
    those of `router_losses`, of which a model tells the `watch` it is called with. The reductions over the
    vocabulary are elementwise followed by a sum, so that logits sharded over the vocabulary are never gathered
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """
    routings = []
    logits_BTV = model(
        batch["tokens"], batch["positions"], batch["documents"], prefix_BT=batch.get("prefix"),
        index_BT=batch.get("index"), block_BT=batch.get("block"), key=key, watch=routings.append,
    )  # fmt: skip
    w_BT, targets_BT = batch["weights"], batch["targets"]
    top_BT = jax.lax.stop_gradient(jnp.max(logits_BTV, -1))
    log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), -1)) + top_BT
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), -1)
    xent_BT = log_z_BT - target_BT
    loss_BT = xent_BT
    if cfg.label_smoothing:  # Szegedy et al. 2015, arXiv:1512.00567, section 7: the uniform share of the target
        loss_BT = (1 - cfg.label_smoothing) * xent_BT + cfg.label_smoothing * (log_z_BT - jnp.mean(logits_BTV, -1))
    if cfg.z_loss:
        loss_BT = loss_BT + cfg.z_loss * jnp.square(log_z_BT)
    weight = jnp.sum(w_BT)
    total = jnp.sum(w_BT * loss_BT)
    hits = jnp.sum(w_BT * (target_BT >= top_BT))
    metrics = {"xent": (jnp.sum(w_BT * xent_BT), weight), "accuracy": (hits, weight)}
    for routing in routings:
        more, means = router_losses(cfg.routers, routing)
        total = total + weight * more
        metrics |= {f"router_{name}": (weight * mean, weight) for name, mean in means.items()}
    return Loss(total, weight, {"loss": (total, weight)} | metrics)


def router_losses(cfg: Routers, routing: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is added to the loss of a token, and the means of what routers did (the model's `Routing`) by its names.

    `balance`, `z`, `dropped` (share of choices over capacity), `busiest` (use of the most used expert, 1 if even).
    """
    means = {name: jnp.mean(values) for name, values in routing._asdict().items()}
    return cfg.balance * means["balance"] + cfg.z_loss * means["z"], means
