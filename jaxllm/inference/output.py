"""What is settled of a model's output before it says anything: how it begins and ends, what it never holds."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxllm.core.shapes import Array, Bool, Float, Int
from jaxllm.models.decoder import Cache
from jaxllm.models.module import Model

NEVER = -1  # a token that no model says, in place of one that is not given


class Output(NamedTuple):
    """Ids that a `generation_config.json` of transformers settles; log-probabilities stay those of the model."""

    start: int | None = None  # what an encoder-decoder's outputs begin with, before what is said; None: the config's
    first: int | None = None  # said first: mBART's token of a language (forced_bos_token_id)
    last: int | None = None  # said where `max_new_tokens` are reached (forced_eos_token_id)
    never: tuple[int, ...] = ()  # never said: Marian's padding (bad_words_ids, suppress_tokens)


def allowed(may_V: Bool[Array, " V"], forced: Int[Array, ""]) -> Bool[Array, " V"]:
    """What may be chosen: what `may_V` says, or `forced` alone unless it is `NEVER`."""
    return jnp.where(forced == NEVER, may_V, jnp.arange(len(may_V)) == forced)


def prefill(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    pad_B: Int[Array, " B"],
    capacity: int,
    prefix_B: Int[Array, " B"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "B V"], Cache]:
    """The model's `prefill`; `start` is for one that writes something else than it reads."""
    more = {"start": start} if model.cfg.kind == "encoder_decoder" else {}
    return model.prefill(tokens_BT, pad_B, capacity=capacity, prefix_len_B=prefix_B, **more)
