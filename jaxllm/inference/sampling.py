"""How the next token is chosen from logits: pure functions of rows, all jittable.

A filter keeps or drops a token by its probability alone: tokens as probable as the least probable one kept are kept
too, so no result hangs on the order in which equal values happen to be sorted.
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.shapes import Array, Bool, Float, Int, Key
from jaxllm.inference.config import Greedy, Sample

Logits = Float[Array, "B V"]  # -inf: never chosen


def sample(
    cfg: Greedy | Sample, logits_BV: Logits, seen_BV: Bool[Array, "B V"], keys_B: Key[Array, " B"]
) -> Int[Array, " B"]:
    """A token for each row; row b depends on nothing but its own logits, seen tokens and key."""
    if cfg.repetition_penalty != 1.0:
        logits_BV = repetition_penalty(logits_BV, seen_BV, cfg.repetition_penalty)
    if isinstance(cfg, Greedy):
        return jnp.argmax(logits_BV, -1)
    return draw(filtered(cfg, logits_BV), keys_B)


def filtered(cfg: Sample, logits_BV: Logits) -> Logits:
    """The logits that are drawn from: temperature, then top-k, top-p of what is left, and min-p."""
    logits_BV = temperature(logits_BV, cfg.temperature)
    if cfg.top_k is not None:
        logits_BV = top_k(logits_BV, cfg.top_k)
    if cfg.top_p is not None:
        logits_BV = top_p(logits_BV, cfg.top_p)
    return logits_BV if cfg.min_p is None else min_p(logits_BV, cfg.min_p)


def repetition_penalty(logits_BV: Logits, seen_BV: Bool[Array, "B V"], penalty: float) -> Logits:
    """Positive logits of seen tokens divided, negative ones multiplied (CTRL, Keskar et al. 2019, arXiv:1909.05858).

    The paper divides both; the sign is looked at since, so that a penalty > 1 always makes a token less probable.
    """
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def temperature(logits_BV: Logits, temperature: float) -> Logits:
    """(logits - max) / temperature: with the maximum at 0, no temperature is too small for float32."""
    return (logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / temperature


def top_k(logits_BV: Logits, k: int) -> Logits:
    """The k most probable tokens (Fan et al. 2018, arXiv:1805.04833)."""
    greatest_BK, _ = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
    # min, not [:, -1:]: XLA turns a slice of top_k into a sort of the whole vocabulary, 100 times slower on CPU
    return jnp.where(logits_BV >= jnp.min(greatest_BK, -1, keepdims=True), logits_BV, -jnp.inf)


def top_p(logits_BV: Logits, p: float) -> Logits:
    """The nucleus: the fewest most probable tokens that have probability p together (Holtzman et al. 2019, 1904.09751).

    The least probability kept is found by bisection on the bits of floats, which order non-negative floats as their
    values do: 30 sums over the vocabulary instead of a sort of it.
    """
    probs_BV = jax.nn.softmax(logits_BV)
    bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = bounds  # tokens of at least `low` have probability p together, those of at least `high` less
        middle_B1 = (low_B1 + high_B1) // 2
        enough_B1 = jnp.sum(jnp.where(bits_BV >= middle_B1, probs_BV, 0), -1, keepdims=True) >= p
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1)

    low_B1 = jnp.zeros((len(probs_BV), 1), jnp.int32)
    one = int(np.float32(1).view(np.int32))  # < 2^30, hence 30 halvings
    low_B1, _ = jax.lax.fori_loop(0, 30, halve, (low_B1, low_B1 + one + 1))
    return jnp.where(bits_BV >= low_B1, logits_BV, -jnp.inf)


def min_p(logits_BV: Logits, p: float) -> Logits:
    """Tokens at least p times as probable as the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    return jnp.where(logits_BV >= jnp.max(logits_BV, -1, keepdims=True) + np.log(p), logits_BV, -jnp.inf)


def draw(logits_BV: Logits, keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """A token of each row, by inversion of its cumulative distribution: one random number a row, not one a token."""
    probs_BV = jax.nn.softmax(logits_BV)
    possible_BV = probs_BV > 0
    # A parallel sum need not be monotonic to the last bit: the impossible are left out by name, not by their width.
    below_BV = jnp.where(possible_BV, jnp.cumsum(probs_BV, -1), 0)
    point_B = jax.vmap(jax.random.uniform)(keys_B) * jnp.max(below_BV, -1)
    V = logits_BV.shape[-1]
    return jnp.min(jnp.where(below_BV > point_B[:, None], jnp.arange(V), V), -1)


def row_keys(seed: int, prompts: Sequence[Sequence[int]]) -> Key[Array, " B"]:
    """A key for each row of a batch, made of the seed, the prompt and how many equal prompts stand before it.

    So a prompt's completion depends neither on what it is batched with nor on its place there, and the same prompt
    given twice is continued twice differently.
    """
    before: Counter[tuple[int, ...]] = Counter()
    words = []
    for prompt in map(tuple, prompts):
        digest = sha256(repr((*prompt, "before", before[prompt])).encode()).digest()
        words.append(int.from_bytes(digest[:4], "little"))
        before[prompt] += 1
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.array(words, jnp.uint32))
