"""The byte-bigram baseline against a slow, obvious one."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.evaluation.bigram import START, count, probabilities, spans

TEXTS = st.lists(st.binary(max_size=12), min_size=1, max_size=6)


def slow_probability(texts: list[bytes], a: int, b: int) -> float:
    """Witten-Bell interpolation written from its definition, with dictionaries."""
    after, everywhere = defaultdict(Counter), Counter()
    for text in texts:
        for before, byte in zip([START, *text], text, strict=False):
            after[before][byte] += 1
            everywhere[byte] += 1

    def mixed(seen: Counter, lower: float) -> float:
        return (seen[b] + max(len(seen), 1) * lower) / (seen.total() + max(len(seen), 1))

    return mixed(after[a], mixed(everywhere, 1 / 256))


@given(TEXTS, st.sampled_from([START, 0, 65, 255]), st.integers(0, 255))
def test_the_table_equals_the_definition(texts, a, b):
    table = probabilities(count((START, text) for text in texts))
    assert math.isclose(table[a, b], slow_probability(texts, a, b), rel_tol=1e-12)


@given(TEXTS)
def test_every_context_has_a_distribution_without_zeros(texts):
    table = probabilities(count((START, text) for text in texts))
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-12)
    assert table.min() > 0


@given(st.binary(min_size=1, max_size=50), st.lists(st.integers(0, 50)))
def test_cutting_a_text_into_spans_counts_the_same(text, cuts):
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [(text[lo - 1] if lo else START, text[lo:hi]) for lo, hi in itertools.pairwise(edges)]
    np.testing.assert_array_equal(count(iter(parts)), count(iter([(START, text)])))


def test_spans_of_packed_rows_know_the_byte_before_them():
    text_of = [bytes([i, 100 + i]) for i in range(8)] + [b"", b""]  # 8 is BOS, 9 EOS
    row = {
        "tokens": np.array([8, 1, 2, 8, 3, 0]),  # a whole document, then the start of another, then padding
        "targets": np.array([1, 2, 9, 3, 4, 0]),
        "documents": np.array([1, 1, 1, 2, 2, 0]),
    }
    goes_on = {"tokens": np.array([4, 5]), "targets": np.array([5, 9]), "documents": np.array([1, 1])}
    assert list(spans(text_of, [row, goes_on])) == [
        (START, bytes([1, 101, 2, 102])),
        (START, bytes([3, 103, 4, 104])),
        (104, bytes([5, 105])),
    ]


def test_a_text_that_alternates_is_almost_free():
    table = probabilities(count(iter([(START, b"ab" * 5000)])))
    assert -math.log2(table[ord("a"), ord("b")]) < 0.01
    assert -math.log2(table[ord("a"), ord("z")]) == pytest.approx(-math.log2(1 / 5001 * (2 / 10002 / 256)), rel=1e-6)
