"""Packing and the record codec: what goes in comes out, every token and every byte of it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.core.errors import DataError
from jaxllm.data import packing
from jaxllm.data.rows import decode, encode

FIRST = 99_999  # stands for BOS and occurs in no document

DOCUMENTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 70_000), max_size=40).map(lambda ids: np.array(ids, np.int32)), st.integers(0, 300)
    ),
    min_size=1,
    max_size=20,
)
LENGTHS = st.integers(2, 17)


def packed(documents, length, split_long=True, counts=None, block=23):
    """All rows, laid out in blocks and windows so small that documents cross them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        patch.setattr(packing, "WINDOW", 3 * block)
        blocks = list(packing.pack(documents, length, FIRST, split_long, counts))
    return [{k: v[i] for k, v in b.items()} for b in blocks for i in range(len(b["bytes"]))]


def segments(row):
    """(inputs, targets) of each document of a row."""
    ids = row["documents"]
    return [(row["tokens"][ids == d], row["targets"][ids == d]) for d in range(1, ids.max(initial=0) + 1)]


@given(DOCUMENTS, LENGTHS)
def test_joined_segments_are_the_documents(documents, length):
    found = []
    for inputs, targets in (s for row in packed(documents, length) for s in segments(row)):
        if inputs[0] == FIRST:
            found.append([])
        else:
            assert inputs[0] == found[-1][-1]  # goes on after the token it broke off at
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        found[-1] += targets.tolist()
    assert found == [ids.tolist() for ids, _ in documents if len(ids)]


@given(DOCUMENTS, LENGTHS)
def test_split_rows_are_full_but_the_last(documents, length):
    rows = packed(documents, length)
    assert sum(int(r["weights"].sum()) for r in rows) == sum(len(ids) for ids, _ in documents)
    assert all(r["documents"].all() for r in rows[:-1])


@given(DOCUMENTS, LENGTHS, st.booleans())
def test_positions_count_from_0_in_each_segment_and_padding_is_0(documents, length, split_long):
    for row in packed(documents, length, split_long):
        ids = row["documents"]
        n = np.count_nonzero(ids)
        assert not any(row[name][n:].any() for name in ("tokens", "targets", "positions", "documents", "weights"))
        assert (row["weights"][:n] == 1).all()
        assert set(np.diff(ids[:n], prepend=0)) <= {0, 1}
        for d in range(1, ids.max() + 1):
            np.testing.assert_array_equal(row["positions"][ids == d], np.arange((ids == d).sum()))


@given(DOCUMENTS, LENGTHS, st.booleans())
def test_bytes_of_rows_sum_to_the_text(documents, length, split_long):
    counts = Counter()
    rows = packed(documents, length, split_long, counts)
    size = sum(size for ids, size in documents if len(ids))
    assert sum(int(r["bytes"]) for r in rows) + counts["cut_bytes"] == size


@given(DOCUMENTS, LENGTHS, st.booleans())
def test_a_row_of_byte_tokens_has_as_many_bytes_as_targets(documents, length, split_long):
    documents = [(ids, len(ids)) for ids, _ in documents]
    assert all(r["bytes"] == r["weights"].sum() for r in packed(documents, length, split_long))


@given(DOCUMENTS, LENGTHS)
def test_whole_documents_stay_whole_and_what_is_cut_is_counted(documents, length):
    counts = Counter()
    rows = packed(documents, length, split_long=False, counts=counts)
    found = Counter(tuple(targets.tolist()) for row in rows for _, targets in segments(row))
    assert found == Counter(tuple(ids[:length].tolist()) for ids, _ in documents if len(ids))
    assert all(inputs[0] == FIRST for row in rows for inputs, _ in segments(row))
    long = [len(ids) - length for ids, _ in documents if len(ids) > length]
    assert (counts["cut_documents"], counts["cut_tokens"]) == (len(long), sum(long))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_opens_a_bin_only_for_what_fits_in_no_other(lengths):
    bins = packing.best_fit(lengths, 20)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    full = sorted(sum(lengths[i] for i in members) for members in bins)
    assert full[-1] <= 20
    assert all(a + b > 20 for a, b in pairwise(full))  # the two emptiest bins could not be one


def test_best_fit_prefers_the_fullest_bin():
    assert packing.best_fit([7, 5, 3, 4, 1], 10) == [[0, 2], [1, 3, 4]]  # 3 fills the 7; 1 goes to 5 + 4


def test_rows_of_whole_documents_come_in_the_order_of_their_first_document():
    documents = [(np.full(n, i, np.int32), 0) for i, n in enumerate([2, 8, 3, 8, 8, 2])]
    firsts = [row["targets"][0] for row in packed(documents, 8, split_long=False, block=1000)]
    assert firsts == sorted(firsts)


# --- records -----------------------------------------------------------------------------------------------------


@given(DOCUMENTS, LENGTHS, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_a_decoded_record_is_the_row(documents, length, weighted, started, random):
    for row in packed(documents, length):
        if weighted:
            row["weights"] = np.array([random.random() * (w > 0) for w in row["weights"]], np.float32)
        if started:
            row["positions"] = row["positions"] + np.where(row["documents"] > 0, row["documents"] * 3, 0).astype(
                np.int32
            )
        again = decode(encode(row), length)
        assert again.keys() == row.keys()
        for name, array in row.items():
            np.testing.assert_array_equal(again[name], array)
            assert again[name].dtype == array.dtype


@pytest.mark.parametrize(("vocab", "size"), [(65_536, 2), (200_000, 4)])
def test_a_token_takes_two_bytes_or_four(vocab, size):
    ids = np.random.default_rng(0).integers(vocab - 10, vocab, 4096).astype(np.int32)
    records = [encode(row) for row in packed([(ids, 4096)], 1024, block=10_000)]
    assert size <= sum(map(len, records)) / 4096 < size + 0.04


def test_a_damaged_record_is_refused_wherever_the_damage_is():
    (row,) = packed([(np.arange(12, dtype=np.int32), 30)], 16)
    record = encode(row)
    for i in range(len(record)):
        with pytest.raises(DataError, match="damaged"):
            decode(record[:i] + bytes([record[i] ^ 4]) + record[i + 1 :], 16)
        with pytest.raises(DataError, match="damaged"):
            decode(record[:i], 16)


def test_a_record_longer_than_the_row_is_refused():
    (row,) = packed([(np.arange(12, dtype=np.int32), 30)], 16)
    with pytest.raises(DataError, match="12 tokens where rows of 8"):
        decode(encode(row), 8)
