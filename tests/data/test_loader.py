"""The loader: batch k is a function of (manifest, seed, k), whoever asks, in whatever order."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data.config import PrepareConfig
from jaxllm.data.loader import Rows, batches, open_prepared, validation_rows
from jaxllm.data.prepare import prepare

ROOT = Path(__file__).parents[2]
LETTERS = {"few": "f", "many": "m", "some": "s"}  # the text of each task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks of about 8, 32 and 72 training rows, each of one letter, in shards of 20 documents."""
    root = tmp_path_factory.mktemp("loader")
    for name, lines in (("few", 20), ("some", 80), ("many", 180)):
        text = "".join(f"{LETTERS[name] * (i % 7 + 1)}{i}{LETTERS[name]}\n" for i in range(lines))
        (root / f"{name}.txt").write_text(text)
    tasks = [
        {
            "name": name,
            "weight": weight,
            "source": {"kind": "text", "files": [f"{root}/{name}.txt"], "document": "line"},
        }
        for name, weight in (("few", 1.0), ("some", 2.0), ("many", 5.0))
    ]
    cfg = PrepareConfig.model_validate(
        {"out": str(root / "out"), "tasks": tasks, "length": 16, "validation": 0.2, "shard_documents": 20}
    )
    prepare(cfg, lambda *line, **how: None)
    return root / "out"


@pytest.fixture(scope="module")
def prepared(folder):
    return open_prepared(folder)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def plan(k):
    """Batches of 8 rows that grow to 12 after the fifth."""
    return (8 * k, 8) if k < 5 else (40 + 12 * (k - 5), 12)


def task_of(row):
    letters = {ord(letter): task for task, letter in LETTERS.items()}
    return next(letters[i] for i in [*row["targets"], *row["tokens"]] if i in letters)


def test_a_row_is_the_same_in_any_order_and_after_opening_again(folder, prepared):
    indices = [0, 10**12, 7, 3, 10**6, 200]
    one, two = Rows(prepared, 5), Rows(open_prepared(folder), 5)
    first = {r: one[r] for r in indices}
    for r in reversed(indices):
        assert_same(two[r], first[r])
        assert_same(one[r], first[r])


def test_a_batch_is_the_same_wherever_one_starts(prepared):
    rows = Rows(prepared, 0)
    stream = batches(rows, 0, plan)
    straight = dict(next(stream) for _ in range(9))
    stream.close()
    assert list(straight) == list(range(9))
    for first in (8, 3, 5):
        resumed = batches(rows, first, plan, prefetch=1)
        k, batch = next(resumed)
        resumed.close()
        assert k == first
        assert_same(batch, straight[k])


def test_a_batch_has_the_shapes_and_types_of_the_convention(prepared):
    stream = batches(Rows(prepared, 0), 5, plan)
    _, batch = next(stream)
    stream.close()
    expected = {n: ((12, 16), np.int32) for n in ("tokens", "targets", "positions", "documents")}
    expected |= {"weights": ((12, 16), np.float32), "bytes": ((12,), np.int32)}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected


@pytest.mark.parametrize("mine", [range, lambda n: range(n // 2), lambda n: [0, 3, n - 1]], ids=["all", "half", "some"])
def test_of_a_batch_the_rows_asked_for_are_read_and_no_others(mine, prepared):
    rows, read = Rows(prepared, 1), []

    class Noted:
        def __getitem__(self, r):
            read.append(r)
            return rows[r]

    stream, wanted = batches(Noted(), 0, plan, mine), []
    for k in range(7):
        batch = next(stream)[1]
        start, count = plan(k)
        wanted += [start + i for i in mine(count)]
        for i, r in enumerate(wanted[-len(batch["bytes"]) :]):
            assert_same({name: array[i] for name, array in batch.items()}, rows[r])
    stream.close()
    assert set(wanted) <= set(read) and {r for r in read if r < sum(plan(6))} == set(wanted)


@pytest.mark.parametrize("task", ["few", "many"])
def test_an_epoch_holds_each_row_once_in_an_order_of_its_own(task, prepared):
    n = prepared.manifest["tasks"][task]["train"]["rows"]
    orders = []
    for seed in range(4):
        rows = Rows(prepared, seed, {task: 1.0})
        for epoch in (0, 1, 2, 1000):
            orders.append(tuple(rows.locate(epoch * n + i)[1] for i in range(n)))
            assert sorted(orders[-1]) == list(range(n))
    assert len(set(orders)) == len(orders)


def test_the_order_of_rows_does_not_change_between_versions(prepared):
    """Golden: a run that is resumed under a later version must meet the rows it would have met."""
    rows = Rows(prepared, 0)
    many, some, few = ([rows.locate(r)[1] for r in range(8) if rows.locate(r)[0] == t] for t in ("many", "some", "few"))
    assert [rows.locate(r)[0][0] for r in range(8)] == list("msmfmmsm")
    assert (many, some, few) == ([34, 79, 69, 67, 17], [30, 19], [5])


def test_any_1000_rows_hold_the_mixture_and_any_task_passes_its_rows_evenly(prepared):
    assert prepared.manifest["mixture"] == {"few": 1 / 8, "some": 2 / 8, "many": 5 / 8}
    rows = Rows(prepared, 0)
    for start in (0, 777, 10**9):
        found = [rows.locate(r) for r in range(start, start + 1000)]
        share = {task: n / 1000 for task, n in Counter(task for task, _ in found).items()}
        assert share == pytest.approx(prepared.manifest["mixture"], abs=0.01)
        for task in LETTERS:
            times = Counter(i for t, i in found if t == task)
            assert max(times.values()) - min(times.values()) <= 2  # whole epochs, and parts of two


def test_rows_come_from_the_task_that_locate_names(prepared):
    rows = Rows(prepared, 3)
    assert all(task_of(rows[r]) == rows.locate(r)[0] for r in range(64))


def test_weights_replace_the_mixture_in_any_order_of_naming(prepared):
    one, two = Rows(prepared, 0, {"many": 1.0, "few": 3.0}), Rows(prepared, 0, (("few", 3.0), ("many", 1.0)))
    found = [one.locate(r) for r in range(400)]
    assert Counter(task for task, _ in found) == {"few": 300, "many": 100}
    assert [two.locate(r) for r in range(400)] == found


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"fwe": 1.0}, "no task 'fwe' in .*; its tasks: few, many, some"),
        ({"few": 0.0, "many": 1.0}, "few=0.0 must be above 0; leave the task out"),
        ({"few": -1.0}, "few=-1.0 must be above 0"),
        ({"few": float("nan")}, "few=nan must be above 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, said, prepared):
    with pytest.raises(ConfigError, match=said):
        Rows(prepared, 0, weights)


def test_held_out_rows_are_all_there_in_order_and_the_first_are_of_all_tasks_in_proportion(prepared):
    rows = validation_rows(prepared)
    counted = {name: task["validation"] for name, task in prepared.manifest["tasks"].items()}
    assert len(rows) == sum(c["rows"] for c in counted.values())
    assert Counter(task_of(row) for row in rows) == {name: c["rows"] for name, c in counted.items()}
    assert sum(int(row["bytes"]) for row in rows) == sum(c["bytes"] for c in counted.values())
    first = validation_rows(prepared, 10)
    assert len(first) == 10
    for a, b in zip(first, rows, strict=False):
        assert_same(a, b)
    came = Counter(task_of(row) for row in first)
    assert all(abs(came[name] - 10 * c["rows"] / len(rows)) <= 1 for name, c in counted.items())
    assert len(validation_rows(prepared, 10**6)) == len(rows)


def test_an_error_in_reading_comes_out_where_the_batch_is_asked_for(prepared):
    class Broken:
        def __getitem__(self, r):
            if r >= 16:
                raise DataError(f"row {r} is gone")
            return Rows(prepared, 0)[r]

    stream = batches(Broken(), 0, lambda k: (8 * k, 8))
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    with pytest.raises(DataError, match="row 16 is gone"):
        next(stream)


def test_waiting_is_measured_and_closing_ends_the_threads(prepared):
    class Slow:
        def __getitem__(self, r):
            time.sleep(0.02)
            return rows[r]

    rows = Rows(prepared, 0)
    before = set(threading.enumerate())
    stream = batches(Slow(), 0, lambda k: (4 * k, 4), prefetch=1)
    next(stream)
    assert stream.waited >= 0.08
    time.sleep(0.3)  # the next batch is made meanwhile
    waited = stream.waited
    next(stream)
    assert stream.waited - waited < 0.08
    stream.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


# --- opening -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_moved_folder_opens_with_its_tokenizer(copy, prepared):
    moved = open_prepared(str(copy))
    moved.verify()
    assert (moved.hash, moved.length, moved.vocab) == (prepared.hash, 16, 259)
    assert moved.tokenizer().decode(moved.tokenizer().encode("naïve")) == "naïve"


def test_a_folder_without_prepared_data_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="no prepared data .*run `jaxllm prepare"):
        open_prepared(tmp_path / "nowhere")


def edit_manifest(copy, **changes):
    file = copy / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_changed_manifest_is_noticed(copy):
    edit_manifest(copy, length=32)
    with pytest.raises(DataError, match="manifest.json: was changed after it was written"):
        open_prepared(copy)


def test_a_manifest_of_a_newer_version_is_refused(copy):
    edit_manifest(copy, version=99)
    with pytest.raises(DataError, match="version 99; this jaxllm reads version 1"):
        open_prepared(copy)


def test_a_manifest_cut_short_is_refused(copy):
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:-30])
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_prepared(copy)


def test_missing_and_short_shards_are_named(copy):
    (copy / "shards/few-train-00000.array_record").unlink()
    short = copy / "shards/many-train-00001.array_record"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"few-train-00000.array_record is missing; .*many-train-00001.* bytes in place of"
    ):
        open_prepared(copy)


def test_a_missing_or_short_tokenizer_file_is_named_with_what_to_do(copy):
    file = copy / "tokenizer/tokenizer.yaml"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"tokenizer/tokenizer.yaml has \d+ bytes in place of \d+; delete the folder and run"
    ):
        open_prepared(copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(
        DataError, match="tokenizer/tokenizer.yaml is missing; delete the folder and run `jaxllm prepare"
    ):
        open_prepared(copy)


def test_verify_names_a_changed_tokenizer_file(copy):
    file = copy / "tokenizer/tokenizer.yaml"
    file.write_bytes(file.read_bytes().replace(b"byte", b"etyb"))
    prepared = open_prepared(copy)
    with pytest.raises(DataError, match="damaged: tokenizer/tokenizer.yaml .*run `jaxllm prepare` again"):
        prepared.verify()


def test_verify_names_the_damaged_shard_and_so_does_reading_it(copy):
    shard = copy / "shards/few-train-00000.array_record"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    prepared = open_prepared(copy)
    with pytest.raises(DataError, match="damaged: shards/few-train-00000.array_record"):
        prepared.verify()
    rows = Rows(prepared, 0, {"few": 1.0})
    with pytest.raises(DataError, match="few-train-00000.array_record: row .* cannot be read"):
        for r in range(prepared.manifest["tasks"]["few"]["train"]["rows"]):
            rows[r]


def test_reading_loads_no_tensorflow_and_opening_no_jax(folder):
    code = f"""
import sys
from jaxllm.data.loader import Rows, batches, open_prepared
prepared = open_prepared({str(folder)!r})
assert not {{"jax", "grain"}} & sys.modules.keys()
next(batches(Rows(prepared, 0), 0, lambda k: (8 * k, 8)))
assert not {{"tensorflow", "seqio", "torch"}} & sys.modules.keys()
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
