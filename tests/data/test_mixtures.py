"""How often each task comes: the formulas of the papers, and an order that keeps to them everywhere."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.config import Languages, Proportional, Rates, Task, TextFiles
from jaxllm.data.mixtures import rates, schedule

TOKENS = {"a": 1_000, "b": 8_000, "c": 27_000}


def tasks(**more):
    return [Task(name=n, source=TextFiles(files=("x",)), **{k: v[n] for k, v in more.items()}) for n in TOKENS]


def normalised(values):
    return dict(zip(TOKENS, np.array(values) / np.sum(values), strict=True))


def test_rates_are_the_weights():
    found = rates(Rates(), tasks(weight={"a": 1.0, "b": 2.0, "c": 5.0}), TOKENS)
    assert found == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8})


@pytest.mark.parametrize(
    ("mixture", "values"),
    [
        (Proportional(), [1, 8, 27]),
        (Proportional(maximum=9_000), [1, 8, 9]),  # min(tokens, K)
        (Proportional(temperature=3.0), [1, 2, 3]),  # cube roots
        (Proportional(temperature=1e9), [1, 1, 1]),
        (Proportional(temperature=1e-3), [0, 0, 1]),
    ],
)
def test_proportional_rates_are_those_of_t5(mixture, values):
    assert rates(mixture, tasks(), TOKENS) == pytest.approx(normalised(values), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_language_rates_are_those_of_xlm(alpha):
    found = rates(Languages(alpha=alpha), tasks(language={"a": "sw", "b": "en", "c": "en"}), TOKENS)
    share = np.array([1_000, 35_000]) / 36_000
    q = share**alpha / (share**alpha).sum()
    assert found == pytest.approx({"a": q[0], "b": q[1] * 8 / 35, "c": q[1] * 27 / 35})


WEIGHTS = st.lists(st.integers(1, 10**6) | st.integers(1, 20), min_size=1, max_size=60)


@given(WEIGHTS, st.integers(0, 10**15))
def test_every_window_of_1000_rows_holds_the_proportions_within_1_percent(weights, start):
    locate = schedule(weights)
    parts = np.array([locate(r)[0] for r in range(start, start + 1300)])
    share = np.array(weights) / sum(weights)
    came = np.cumsum(np.eye(len(weights))[parts], axis=0)
    windows = np.diff(came[::10], axis=0, n=1).reshape(-1, len(weights))
    windows = np.lib.stride_tricks.sliding_window_view(windows, 100, axis=0).sum(-1)
    assert np.abs(windows / 1000 - share).max() <= 0.01


def test_many_rare_tasks_do_not_crowd_the_start():
    """Taking floors one task after the other would start with all 50 rare ones."""
    locate = schedule([1] * 50 + [10**6])
    assert sum(locate(r)[0] < 50 for r in range(1000)) <= 10


@given(WEIGHTS, st.integers(0, 2000))
def test_a_part_counts_its_rows_one_by_one(weights, rows):
    locate, came = schedule(weights), Counter()
    for r in range(rows):
        part, n = locate(r)
        assert n == came[part]
        came[part] += 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_after_the_sum_of_weights_each_part_had_its_weight(weights):
    locate = schedule(weights)
    came = Counter(locate(r)[0] for r in range(sum(weights)))
    assert [came[i] for i in range(len(weights))] == weights
