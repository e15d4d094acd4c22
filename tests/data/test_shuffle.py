"""The computed shuffle: a permutation for every key, and an even one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxllm.data.shuffle import shuffled


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_every_key_permutes_every_range(n, key):
    assert sorted(shuffled(i, n, key) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17])
def test_every_place_gets_every_item_equally_often(n):
    """Also of keys in a row, such as counters would be."""
    keys = 100 * n
    counts = np.zeros((n, n))
    for key in range(keys):
        for i in range(n):
            counts[i, shuffled(i, n, key)] += 1
    assert stats.chisquare(counts.ravel(), ddof=2 * n - 2).pvalue > 1e-4


def test_all_orders_of_four_are_equally_frequent():
    orders = [tuple(shuffled(i, 4, key) for i in range(4)) for key in range(12_000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_do_not_stay_neighbours():
    order = [shuffled(i, 10_000, 1) for i in range(10_000)]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # 4 deviations of 1 / sqrt(n)
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 10  # 2 are expected


def test_neighbouring_keys_give_unrelated_orders():
    one, two = ([shuffled(i, 10_000, key) for i in range(10_000)] for key in (7, 8))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.04


@pytest.mark.parametrize("n", [10**9, 2**40 + 1])
def test_ranges_too_large_to_store_are_no_matter(n):
    assert len({shuffled(i, n, 3) for i in range(1000)}) == 1000
    assert all(0 <= shuffled(n - 1 - i, n, 3) < n for i in range(1000))


def test_the_order_never_changes():
    """Golden: a run that is resumed under a later version must meet the rows it would have met."""
    assert [shuffled(i, 10, 0) for i in range(10)] == [0, 7, 8, 6, 2, 4, 3, 5, 9, 1]
    assert [shuffled(i, 10**12, 2**63) for i in range(2)] == [973163427539, 967861770094]
