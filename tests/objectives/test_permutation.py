"""Orders of factorisation: what is drawn, and that a model of any order is a model of the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.models.config import EncoderConfig
from jaxllm.models.module import abstract, create, merge
from jaxllm.objectives.permutation import factorised, sample_permutation

T, V = 9, 30
CFG = EncoderConfig.model_validate({
    "vocab": V, "embed": 16, "num_layers": 2, "position": "none", "relative": {"kind": "xl", "segments": True},
    "query_stream": True, "heads": ["lm"],
    "block": {"norm": "layernorm", "placement": "post", "attention": {"num_heads": 2}, "ffn": {"mlp": 20}},
})  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 5), st.integers(1, 7), st.integers(0, 2**31 - 1)
)
def test_an_order_is_one_of_each_row_and_its_last_tokens_are_predicted(lengths, padding, one_in, seed):
    row = np.repeat(range(1, len(lengths) + 1), lengths).tolist() + [0] * padding
    documents = jnp.array([row, row[::-1]])
    visible, targets, weights = map(np.asarray, sample_permutation(jax.random.key(seed), documents, one_in=one_in))
    n, real = len(row), sum(lengths)
    order = visible.sum(-1)  # a token sees all that come before it, so this is its rank
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    assert (visible == (order[:, None] < order[:, :, None])).all()
    assert targets.shape == weights.shape == (2, n // one_in)
    for b in range(2):
        predicted = targets[b][weights[b] > 0]
        assert len(predicted) == real // one_in
        assert sorted(order[b, predicted]) == list(range(n - len(predicted), n))
        assert (documents[b, predicted] > 0).all()


def test_every_order_is_as_likely():
    documents = jnp.ones((6000, 3), jnp.int32)
    visible, targets, _ = sample_permutation(jax.random.key(0), documents, one_in=3)
    orders, count = np.unique(np.asarray(visible.sum(-1)), axis=0, return_counts=True)
    assert len(orders) == 6 and count.min() > 900
    assert set(np.asarray(targets).ravel()) == {0, 1, 2}


def test_fewer_than_one_in_one_is_refused():
    with pytest.raises(ValueError, match="one_in=0 must be at least 1"):
        sample_permutation(jax.random.key(0), jnp.ones((1, 3), jnp.int32), one_in=0)


@pytest.fixture(scope="module")
def logits():
    params = create(CFG, jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), len(params))
    params = {n: x + 0.3 * jax.random.normal(k, x.shape) for (n, x), k in zip(params.items(), noise, strict=True)}
    graphdef = abstract(CFG)[0]

    @jax.jit
    def run(tokens, documents, visible, targets):
        at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        return merge(graphdef, params)(tokens, at, documents, visible_BTT=visible, targets_BP=targets)["lm"]

    def of(tokens: np.ndarray, order: np.ndarray, length: int = T) -> np.ndarray:
        """Of all tokens in this order; what stands behind `length` is padding."""
        told = factorised(jnp.asarray(order)[None], jnp.array([T]), T)
        documents = (jnp.arange(T)[None] < length).astype(jnp.int32)
        return np.asarray(run(jnp.asarray(tokens)[None], documents, told.visible_BTT, jnp.arange(T)[None]))[0]

    return of


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, T)


def test_what_is_predicted_depends_on_the_tokens_before_it_in_the_order_and_on_no_other(logits):
    """Not on the token itself either; the first of the order sees nothing at all."""
    order = np.random.default_rng(1).permutation(T)
    before = logits(text(), order)
    for j in range(T):
        changed = text()
        changed[j] = (changed[j] + 1) % V
        moved = np.abs(logits(changed, order) - before).max(-1) > 1e-6
        assert moved.tolist() == (order > order[j]).tolist()


def test_in_the_order_of_the_text_it_is_an_autoregressive_model(logits):
    """Each token is predicted as by a model that is given the text before it alone."""
    whole = logits(text(), np.arange(T))
    for i in range(T):
        prefix = text()
        prefix[i:] = 0
        np.testing.assert_allclose(logits(prefix, np.arange(T), length=i + 1)[i], whole[i], atol=2e-5)
