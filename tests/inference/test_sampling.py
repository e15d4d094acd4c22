import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.inference.config import Greedy, Sample
from jaxllm.inference.sampling import draw, filtered, row_keys, sample

V = 23


def logits_of(seed, rows=3, spread=3.0, ties=False):
    x = np.random.default_rng(seed).normal(scale=spread, size=(rows, V)).astype(np.float32)
    return np.round(x) if ties else x


def slow(cfg, row):
    """Probabilities of one row by the definitions, with a sort."""
    probs = np.exp((row - row.max()).astype(np.float64) / cfg.temperature)
    if cfg.top_k is not None:
        probs[probs < np.sort(probs)[::-1][min(cfg.top_k, V) - 1]] = 0
    probs /= probs.sum()
    if cfg.top_p is not None:
        ordered = np.sort(probs)[::-1]
        last = np.flatnonzero(np.cumsum(ordered) >= cfg.top_p - 1e-7)
        probs[probs < ordered[last[0] if len(last) else -1]] = 0
    if cfg.min_p is not None:
        probs[probs < cfg.min_p * probs.max() * (1 - 1e-6)] = 0
    return probs / probs.sum()


@settings(derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 10_000), ties=st.booleans(), temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 2 * V), top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.01, 1.0),
)  # fmt: skip
def test_filters_leave_the_distribution_that_their_definitions_say(seed, ties, temperature, top_k, top_p, min_p):
    cfg = Sample(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed, ties=ties)
    got = jax.nn.softmax(filtered(cfg, jnp.array(logits)))
    np.testing.assert_allclose(got, [slow(cfg, row) for row in logits], atol=2e-5)


@pytest.mark.parametrize(
    "cfg",
    [Sample(), Sample(temperature=0.5), Sample(top_k=4), Sample(top_p=0.8), Sample(min_p=0.1, temperature=2.0)],
    ids=repr,
)
def test_tokens_are_drawn_as_often_as_they_are_probable(cfg):
    scipy_stats = pytest.importorskip("scipy.stats")
    n, row = 20_000, logits_of(1, rows=1, spread=1.0)[0]
    tokens = draw(filtered(cfg, jnp.tile(row, (n, 1))), jax.random.split(jax.random.key(0), n))
    expected, counts = n * slow(cfg, row), np.bincount(tokens, minlength=V)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert scipy_stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_no_filter_lets_a_draw_miss_what_is_possible():
    logits = jnp.full((200, 50_000), -jnp.inf).at[:, 777].set(0.0).at[:, 49_998].set(-1.0)
    assert set(draw(logits, jax.random.split(jax.random.key(3), 200)).tolist()) == {777, 49_998}


def test_the_smallest_temperature_is_greedy():
    logits = jnp.array(logits_of(2))
    keys = jax.random.split(jax.random.key(0), 3)
    seen = jnp.zeros(logits.shape, bool)
    cold = sample(Sample(temperature=1e-30), logits, seen, keys)
    assert cold.tolist() == sample(Greedy(), logits, seen, keys).tolist() == logits.argmax(-1).tolist()


def test_a_penalty_makes_greedy_avoid_what_it_has_seen():
    logits = jnp.array([[2.0, 1.5, -1.0], [-1.0, -1.2, -9.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(Greedy(), logits, seen, keys).tolist() == [0, 0]
    assert sample(Greedy(repetition_penalty=1.5), logits, seen, keys).tolist() == [1, 1]


def test_a_row_key_depends_on_seed_prompt_and_repetition_and_on_nothing_else():
    a, b = [1, 2, 3], [1, 2]
    keys = lambda *prompts, seed=0: [tuple(k) for k in jax.random.key_data(row_keys(seed, prompts)).tolist()]
    assert keys(a, b) == [*keys(a), *keys(b)] == keys(b, a)[::-1]
    assert len(set(keys(a, a, b, a))) == 4 and keys(a, a, b)[:2] == keys(a, a)
    assert not set(keys(a, b)) & set(keys(a, b, seed=1))


@pytest.mark.parametrize("cfg", [
    Sample(temperature=0.6), Sample(top_k=5), Sample(top_p=0.7), Sample(min_p=0.2), Sample(repetition_penalty=1.7),
    Sample(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
], ids=repr)  # fmt: skip
def test_processed_logits_are_those_of_transformers(cfg):
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    from jaxllm.inference.sampling import repetition_penalty

    logits = logits_of(4)
    seen_tokens = np.random.default_rng(5).integers(0, V, (3, 7))
    theirs = process.RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty)(
        torch.tensor(seen_tokens), torch.tensor(logits)
    )
    theirs = process.TemperatureLogitsWarper(cfg.temperature)(None, theirs)
    if cfg.top_k:
        theirs = process.TopKLogitsWarper(cfg.top_k)(None, theirs)
    if cfg.top_p:
        theirs = process.TopPLogitsWarper(cfg.top_p)(None, theirs)
    if cfg.min_p:
        theirs = process.MinPLogitsWarper(cfg.min_p)(None, theirs)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, seen_tokens, True, 1)
    ours = filtered(cfg, repetition_penalty(jnp.array(logits), jnp.array(seen), cfg.repetition_penalty))
    np.testing.assert_allclose(jax.nn.softmax(ours), torch.softmax(theirs, -1), atol=1e-6)
