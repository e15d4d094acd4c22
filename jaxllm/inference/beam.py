"""Beam search: the best sequence among those that a few hypotheses at a time lead to."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.shapes import Array, Bool, Float, Int
from jaxllm.inference.config import Beam
from jaxllm.inference.output import NEVER, allowed, prefill
from jaxllm.models.module import Params, merge


class Hypotheses(NamedTuple):
    """Token sequences of each row, W to a row: W beams, or 1 in the finished best."""

    tokens_BWS: Int[Array, "B W S"]
    logprobs_BWS: Float[Array, "B W S"]  # of each token
    score_BW: Float[Array, "B W"]  # running: sum of log-probabilities; finished: over length^length_penalty

    def gather(self, at_BW: Int[Array, "B X"]) -> "Hypotheses":
        """Hypotheses `at_BW` of each row, in that order."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, at_BW.reshape(at_BW.shape + (1,) * (x.ndim - 2)), 1), self)


@functools.partial(jax.jit, static_argnames=("graphdef", "cfg", "size", "capacity"))
def beam_search(
    graphdef: nnx.GraphDef,
    cfg: Beam,
    size: int,
    capacity: int,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    pad_B: Int[Array, " B"],
    prefix_B: Int[Array, " B"],
    may_V: Bool[Array, " V"],
    eos: Int[Array, ""],
    max_new_tokens: Int[Array, ""],
    start: Int[Array, ""],
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> tuple[Int[Array, "S B"], Float[Array, "S B"]]:
    """Tokens of the best sequence of each left-padded row, end token included, and their log-probabilities.

    A step weighs all continuations of the `width` beams. Among the best `width`, those that end are finished and
    compete with score log p / length^length_penalty, the end token counted; the best `width` of the others go on.
    At `max_new_tokens` all are finished. The search of a row is over when no beam can come to beat its best, whatever
    follows: log p can only fall, and no length is greater than `max_new_tokens`.

    Args:
      size: S, at least `max_new_tokens`; what stands after the end of a sequence means nothing.
      may_V: which tokens are chosen at all.
      start: what an encoder-decoder's outputs begin with.
      first, last: what the first token is, and the one at `max_new_tokens`, at no cost; `NEVER`: what is chosen.
    """
    model, W, B = merge(graphdef, params), cfg.width, len(tokens_BT)
    logits_BV, cache = prefill(model, tokens_BT, pad_B, capacity, prefix_B, start)
    V = logits_BV.shape[-1]
    empty = jnp.zeros((B, W, size), jnp.int32), jnp.zeros((B, W, size))
    # All beams of a row are alike before the first token: only the first has continuations that count.
    beams = Hypotheses(*empty, jnp.where(jnp.arange(W) == 0, 0.0, -jnp.inf) * jnp.ones((B, 1)))
    best = Hypotheses(*empty, jnp.full((B, W), -jnp.inf)).gather(jnp.zeros((B, 1), jnp.int32))

    def choose(
        beams: Hypotheses, best: Hypotheses, logits_RV: Array, now: Array
    ) -> tuple[Hypotheses, Hypotheses, Array]:
        """The beams one token later, the best finished sequences, and which beam each beam goes on from."""
        begun = jnp.where(now == 0, first, NEVER)
        forced = jnp.where((now + 1 == max_new_tokens) & (last != NEVER), last, begun)
        logprobs_RV = jax.nn.log_softmax(logits_RV)
        logprobs_BWV = logprobs_RV.reshape(B, W, V)
        cost_BWV = jnp.where(forced == NEVER, logprobs_BWV, 0)
        total_BWV = beams.score_BW[:, :, None] + jnp.where(allowed(may_V, forced), cost_BWV, -jnp.inf)
        # 2 W of them: should the W best all end, there are still W to go on with.
        total_BX, at_BX = jax.lax.top_k(total_BWV.reshape(B, W * V), 2 * W)
        from_BX, token_BX = at_BX // V, at_BX % V
        logprob_BX = jnp.take_along_axis(logprobs_BWV.reshape(B, W * V), at_BX, 1)
        longer = beams.gather(from_BX)
        longer = Hypotheses(
            longer.tokens_BWS.at[:, :, now].set(token_BX), longer.logprobs_BWS.at[:, :, now].set(logprob_BX), total_BX
        )
        ends_BX = (token_BX == eos) | (now + 1 == max_new_tokens)
        counts_BX = ends_BX & (jnp.arange(2 * W) < W)
        scores_BX = jnp.where(counts_BX, total_BX / (now + 1.0) ** cfg.length_penalty, -jnp.inf)
        rivals = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), best, longer._replace(score_BW=scores_BX))
        best = rivals.gather(jnp.argmax(rivals.score_BW, 1, keepdims=True))
        total_BW, goes_on_BW = jax.lax.top_k(jnp.where(ends_BX, -jnp.inf, total_BX), W)
        return longer.gather(goes_on_BW)._replace(score_BW=total_BW), best, jnp.take_along_axis(from_BX, goes_on_BW, 1)

    def hopeful(carry) -> Bool[Array, ""]:
        now, beams, best, _ = carry
        bound_B = jnp.max(beams.score_BW, 1) / max_new_tokens.astype(jnp.float32) ** cfg.length_penalty
        return (now < max_new_tokens) & jnp.any(bound_B > best.score_BW[:, 0])

    def step(carry):
        now, beams, best, cache = carry
        last_BW = jax.lax.dynamic_index_in_dim(beams.tokens_BWS, now - 1, 2, keepdims=False)
        logits_RV, cache = model.decode(last_BW.reshape(B * W), cache)
        beams, best, from_BW = choose(beams, best, logits_RV, now)
        return now + 1, beams, best, cache.reorder((jnp.arange(B)[:, None] * W + from_BW).reshape(B * W))

    rows_R = jnp.repeat(jnp.arange(B), W)
    beams, best, _ = choose(beams, best, logits_BV[rows_R], jnp.int32(0))
    _, _, best, _ = jax.lax.while_loop(hopeful, step, (jnp.int32(1), beams, best, cache.reorder(rows_R)))
    return best.tokens_BWS[:, 0].T, best.logprobs_BWS[:, 0].T
