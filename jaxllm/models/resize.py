"""A larger vocabulary for weights that exist."""

import jax.numpy as jnp

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.module import Params

VOCAB_AXIS = {"embedding": 0, "head": 1, "head_bias": 0}


def resize_vocabulary(params: Params, cfg: DecoderConfig, new_vocab: int) -> tuple[Params, DecoderConfig]:
    """Weights and config with `new_vocab` tokens: old ones to the bit as they were, new ones their mean.

    A new token with the mean head has a logit of at most the log-mean-exp of the old ones (Jensen), so it takes at
    most 1/V of their probability at any hidden state, where a random one may take nearly all (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models").

    Raises:
      ConfigError: if tokens would be lost.
    """
    old = params["embedding"].shape[0]
    if new_vocab < old:
        raise ConfigError(
            f"model.vocab={new_vocab} is fewer than the {old} tokens of the weights, and tokens in use cannot be "
            f"dropped; give {old} or more"
        )
    resized = {name: _grow(params[name], new_vocab, axis) for name, axis in VOCAB_AXIS.items() if name in params}
    return params | resized, cfg.model_copy(update={"vocab": new_vocab})


def _grow(weight, size: int, axis: int):
    added = size - weight.shape[axis]
    if not added:
        return weight
    mean = weight.astype(jnp.float32).mean(axis, keepdims=True).astype(weight.dtype)
    return jnp.concatenate([weight, jnp.repeat(mean, added, axis)], axis)
