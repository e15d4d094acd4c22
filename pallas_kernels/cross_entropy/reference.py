"""Cross-entropy of a projection onto the vocabulary as it is defined, with all logits at once."""

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.terms import Terms


def cross_entropy(
    x_RD: jax.Array,
    w_VD: jax.Array,
    targets_R: jax.Array,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Terms:
    """What `api.cross_entropy` gives."""
    logits_RV = jnp.einsum("RD,VD->RV", x_RD, w_VD, preferred_element_type=jnp.float32, precision="highest")
    if softcap is not None:
        logits_RV = softcap * jnp.tanh(logits_RV / softcap)
    log_z_R = jax.nn.logsumexp(logits_RV, axis=-1)
    is_target_RV = targets_R[:, None] == jnp.arange(w_VD.shape[0])
    target_R = jnp.where(is_target_RV, logits_RV, 0).sum(-1)
    xent_R = log_z_R - target_R
    loss_R = (1 - label_smoothing) * xent_R + label_smoothing * (log_z_R - logits_RV.mean(-1)) + z_loss * log_z_R**2
    return Terms(loss_R, *map(jax.lax.stop_gradient, (xent_R, log_z_R)), target_R >= logits_RV.max(-1))
