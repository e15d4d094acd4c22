"""Vectors of texts: what a model says of the tokens of a text, pooled (Reimers & Gurevych 2019, arXiv:1908.10084)."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.shapes import Array, Float, Int
from jaxllm.inference.config import Pool
from jaxllm.inference.generate import bucket, check_vocabulary
from jaxllm.models.config import AnyModel
from jaxllm.models.module import Model, Params, merge, split


@runtime_checkable
class Tokenizer(Protocol):
    """What embedding needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def embed(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    start: Sequence[int] = (),
    end: Sequence[int] = (),
    pool: Pool = "mean",
    normalise: bool = True,
    max_tokens: int | None = None,
    batch: int = 32,
    cut: Callable[[list[int]], None] | None = None,
) -> np.ndarray:
    """A vector of each text, float32 [N, D]; each is what it would be alone, but where experts have a `capacity`.

    Args:
      start, end: ids that stand before and after every text, such as [CLS] and [SEP].
      pool: the `mean` over all tokens, `start` and `end` too (section 3); that of the first token (`cls`), or the `last`.
      normalise: to length 1, so that the product of two vectors is their cosine.
      max_tokens: what is beyond it is cut, and `end` kept; None: the model's context.
      batch: texts computed at once.
      cut: called with the places of texts that were cut, if there are any.

    Raises:
      ConfigError: no texts; a text without tokens or of another vocabulary; a model without such vectors.
      CheckpointError: weights that give NaN.
    """
    rows, long = rows_of(tokenizer, texts, start, end, _room(model.cfg, pool, max_tokens, len(start) + len(end)))
    for row in rows:
        check_vocabulary(model.cfg, "a text", row)
    if cut and long:
        cut(long)
    graphdef, params = split(model)
    vectors_ND = np.empty((len(rows), model.cfg.embed), np.float32)
    by_length = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for first in range(0, len(rows), batch):
        here = by_length[first : first + batch]
        # Few sizes to compile for, as in generation.
        B, T = min(batch, 1 << (len(here) - 1).bit_length()), min(bucket(len(rows[here[-1]])), model.cfg.context)
        tokens_BT, length_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for b, n in enumerate(here):
            length_B[b] = len(rows[n])
            tokens_BT[b, : length_B[b]] = rows[n]
        vectors_ND[here] = _vectors(graphdef, pool, normalise, params, tokens_BT, length_B)[: len(here)]
    if np.isnan(vectors_ND).any():
        raise CheckpointError("the model's vectors are not numbers (NaN): its weights are damaged, or diverged")
    return vectors_ND


def rows_of(
    tokenizer: Tokenizer, texts: Sequence[str], start: Sequence[int], end: Sequence[int], room: int
) -> tuple[list[list[int]], list[int]]:
    """The tokens of each text, at most `room` of its own, and the places of the texts that had more."""
    if not texts:
        raise ConfigError("no texts: there is nothing to embed")
    tokens = tokenizer.encode_batch(texts)
    if empty := [n for n, ids in enumerate(tokens) if not ids]:
        raise ConfigError(
            f"text {empty[0]} has no tokens ({texts[empty[0]]!r}): there is nothing to embed; leave it out"
        )
    return [[*start, *ids[:room], *end] for ids in tokens], [n for n, ids in enumerate(tokens) if len(ids) > room]


def _room(cfg: AnyModel, pool: Pool, max_tokens: int | None, around: int) -> int:
    """How many tokens of its own a text may have."""
    if cfg.kind == "encoder_decoder":
        raise ConfigError("model.kind=encoder_decoder has no vectors of texts here: an encoder or a decoder is needed")
    if cfg.kind == "decoder" and pool == "cls":
        raise ConfigError("pool=cls: the first token of a decoder sees nothing of the text; use mean or last")
    longest = cfg.context if max_tokens is None else max_tokens
    if not around < longest <= cfg.context:
        raise ConfigError(
            f"max_tokens={longest}: the model's context is {cfg.context}, and {around} tokens stand around a text; give "
            f"{around + 1} to {cfg.context}"
        )
    return longest - around


@functools.partial(jax.jit, static_argnames=("graphdef", "pool", "normalise"))
def _vectors(
    graphdef: nnx.GraphDef,
    pool: Pool,
    normalise: bool,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
) -> Float[Array, "B D"]:
    """Vectors of rows padded on the right."""
    B, T = tokens_BT.shape
    real_BT = jnp.arange(T) < length_B[:, None]
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD = merge(graphdef, params).hidden(tokens_BT, positions_BT, real_BT.astype(jnp.int32)).astype(jnp.float32)
    match pool:
        case "mean":
            x_BD = jnp.sum(jnp.where(real_BT[..., None], x_BTD, 0), 1) / length_B[:, None]
        case "cls":
            x_BD = x_BTD[:, 0]
        case "last":
            x_BD = x_BTD[jnp.arange(B), length_B - 1]
    if normalise:
        x_BD = x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)
    return x_BD
