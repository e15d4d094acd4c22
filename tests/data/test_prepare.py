"""`prepare`: the same input gives the same bytes, however often it is killed on the way."""

import gzip
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data.config import PrepareConfig
from jaxllm.data.loader import open_prepared, validation_rows
from jaxllm.data.manifest import seal
from jaxllm.data.prepare import prepare

ROOT = Path(__file__).parents[2]


def corpus(folder, files=12, seed=0):
    """Text files of different sizes; some are longer than a row, one has no ASCII."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        words = random.choice(["alpha", "beta", "gamma", "delta", "naïve", "日本"], random.integers(3, 60))
        (folder / f"{i:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    (folder / "99.txt").write_text("шёпот " * 9, encoding="utf-8")
    return folder


def config(out, texts, **more):
    task = {"name": "words", "source": {"kind": "text", "files": [f"{texts}/*.txt"]}}
    return PrepareConfig.model_validate(
        {"out": str(out), "tasks": [task], "length": 32, "validation": 0.3, "shard_documents": 3} | more
    )


def quiet(*line, **how):
    pass


def tree(folder):
    """Every file of a folder and the SHA-256 of its bytes."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts_of(prepared, split):
    """The documents of all rows of a split, decoded again."""
    from array_record.python.array_record_module import ArrayRecordReader

    from jaxllm.data.rows import decode

    tokenizer, ids = prepared.tokenizer(), []
    for task in prepared.manifest["tasks"]:
        for shard in prepared.shards(task, split):
            for record in ArrayRecordReader(str(prepared.path / shard["file"])).read_all():
                row = decode(record, prepared.length)
                ids += row["targets"][row["documents"] > 0].tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    return prepare(config(tmp_path_factory.mktemp("done") / "out", words), quiet)


def test_the_rows_are_the_documents_each_in_one_split(words, done):
    found = {split: texts_of(done, split) for split in ("train", "validation")}
    every = [p.read_text(encoding="utf-8") for p in sorted(words.glob("*.txt"))]
    assert sorted(found["train"] + found["validation"]) == sorted(every)
    assert found["train"] == [t for t in every if t in found["train"]]  # in the order of the files
    for split, texts in found.items():
        counted = done.manifest["tasks"]["words"][split]
        size = sum(len(t.encode()) for t in texts)
        assert (counted["documents"], counted["bytes"], counted["tokens"]) == (len(texts), size, size + len(texts))


def test_the_same_input_gives_the_same_bytes_from_anywhere(words, done, tmp_path):
    moved = corpus(tmp_path / "moved")
    again = prepare(config(tmp_path / "again", words), quiet)
    assert tree(again.path) == tree(done.path)
    assert not list(done.path.rglob("*.part")) and not (done.path / "prepare.json").exists()
    elsewhere = prepare(config(tmp_path / "elsewhere", moved), quiet)
    assert elsewhere.hash == done.hash
    assert str(words) not in json.dumps(elsewhere.manifest)


def test_what_is_up_to_date_is_left_alone(words, done):
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*")}
    said = []
    prepare(config(done.path, words), lambda line, **_: said.append(line))
    assert "up to date" in said[-1]
    assert {p: p.stat().st_mtime_ns for p in done.path.rglob("*")} == before


KILLED = """
import glob, os, random, signal, sys, time
sys.path.insert(0, {root!r})
from jaxllm.data import tasks  # imports TensorFlow once; each prepare runs in a fork of this process
from jaxllm.data.config import PrepareConfig
from jaxllm.data.prepare import prepare

def start(out):
    pid = os.fork()
    if pid == 0:
        prepare(PrepareConfig.model_validate_json({config!r}).model_copy(update=dict(out=out)), lambda *a, **k: None)
        os._exit(0)
    return pid

assert os.waitpid(start({whole!r}), 0)[1] == 0
random.seed(0)
for shards in (0, 5, 12, 20):  # some moment after so many are there, of 31
    pid = start({broken!r})
    while len(glob.glob({broken!r} + "/shards/*.json")) < shards:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert os.waitpid(start({broken!r}), 0)[1] == 0
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    texts = corpus(tmp_path / "texts", files=30)
    cfg = config("", texts, tokenizer={"kind": "train_bpe", "vocab": 300}, shard_documents=1)
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    code = KILLED.format(root=str(ROOT), config=cfg.model_dump_json(), whole=whole, broken=broken)
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(tree(whole)) > 30
    assert tree(broken) == tree(whole)


class Stopped(Exception):
    pass


def stopped_before_the_manifest(cfg):
    """Runs `prepare` until all shards are there."""

    def stop(line, **_):
        if line.startswith("prepared"):
            raise Stopped

    with pytest.raises(Stopped):
        prepare(cfg, stop)


def test_a_stopped_run_keeps_its_finished_shards(words, done, tmp_path):
    cfg = config(tmp_path / "out", words)
    stopped_before_the_manifest(cfg)
    shards = sorted((tmp_path / "out/shards").glob("*.array_record"))
    last = shards.pop()
    last.with_suffix(".json").unlink()
    written = [p.stat().st_mtime_ns for p in shards]
    with pytest.raises(DataError, match="is not finished; run `jaxllm prepare"):
        open_prepared(tmp_path / "out")
    assert tree(prepare(cfg, quiet).path) == tree(done.path)
    assert [p.stat().st_mtime_ns for p in shards] == written


@pytest.mark.parametrize("finished", [True, False])
def test_changed_input_and_settings_are_noticed(finished, tmp_path):
    texts, out = corpus(tmp_path / "texts"), tmp_path / "out"
    cfg = config(out, texts)
    prepare(cfg, quiet) if finished else stopped_before_the_manifest(cfg)
    before = tree(out)
    with pytest.raises(DataError, match=r"length was 32, is 64; seed was 0, is 1\. Set another `out`, or delete"):
        prepare(config(out, texts, length=64, seed=1), quiet)
    with pytest.raises(DataError, match=r'tokenizer.kind was "byte", is "train_bpe"'):
        prepare(config(out, texts, tokenizer={"kind": "train_bpe", "vocab": 300}), quiet)
    (texts / "03.txt").write_text("something else")
    (texts / "04.txt").unlink()
    (texts / "zz.txt").write_text("one more")
    with pytest.raises(DataError, match=r"new: zz.txt; input of words: gone: 04.txt; input of words: changed: 03.txt"):
        prepare(cfg, quiet)
    assert tree(out) == before


def test_a_second_prepare_at_the_same_time_is_refused(words, tmp_path):
    cfg, refused = config(tmp_path / "out", words), []

    def try_too(line, **_):
        if not refused:
            with pytest.raises(DataError, match="another `jaxllm prepare` is at work") as e:
                prepare(cfg, quiet)
            refused.append(e)

    prepare(cfg, try_too)
    assert refused


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path):
    texts = corpus(tmp_path / "texts")
    bpe = {"tokenizer": {"kind": "train_bpe", "vocab": 300}}
    one = prepare(config(tmp_path / "one", texts, **bpe), quiet)
    held_out = set(texts_of(one, "validation"))
    for file in texts.glob("*.txt"):
        if file.read_text(encoding="utf-8") in held_out:
            file.write_text("zyzzyva " * 50)
    two = prepare(config(tmp_path / "two", texts, **bpe), quiet)
    assert set(texts_of(two, "validation")) == {"zyzzyva " * 50}
    assert two.tokenizer().fingerprint() == one.tokenizer().fingerprint()
    assert two.hash != one.hash


@pytest.mark.parametrize(
    ("validation", "files", "held_out"), [(1e-9, 5, 1), (0.999999, 5, 4), (0.0, 5, 0), (0.5, 0, 0)]
)
def test_of_two_files_or_more_one_is_held_out_and_one_is_not(validation, files, held_out, tmp_path):
    texts = corpus(tmp_path / "texts", files=files - 1 if files else 0)  # and 99.txt
    prepared = prepare(config(tmp_path / "out", texts, validation=validation), quiet)
    counted = {split: prepared.manifest["tasks"]["words"][split]["documents"] for split in ("train", "validation")}
    assert counted == {"train": max(files, 1) - held_out, "validation": held_out}


def test_the_seed_chooses_what_is_held_out_and_a_new_file_moves_no_other(tmp_path):
    texts = corpus(tmp_path / "texts", files=40)
    held_out = {
        s: set(texts_of(prepare(config(tmp_path / f"{s}", texts, seed=s), quiet), "validation")) for s in (0, 1)
    }
    assert held_out[0] != held_out[1]
    (texts / "new.txt").write_text("quite new")
    grown = set(texts_of(prepare(config(tmp_path / "grown", texts), quiet), "validation"))
    assert grown - {"quite new"} == held_out[0]


def test_whole_documents_are_cut_at_the_row_and_counted(words, done, tmp_path):
    prepared = prepare(config(tmp_path / "out", words, split_long=False), quiet)
    sizes = [len(p.read_bytes()) + 1 for p in words.glob("*.txt")]
    counts, splits = prepared.manifest["counts"]["words"], prepared.manifest["tasks"]["words"].values()
    assert counts["cut_documents"] == sum(n > 32 for n in sizes)
    assert counts["cut_tokens"] == sum(max(n - 32, 0) for n in sizes)
    assert sum(s["tokens"] for s in splits) == sum(min(n, 32) for n in sizes)
    assert sum(s["bytes"] for s in splits) + counts["cut_bytes"] == sum(n - 1 for n in sizes)


def test_bad_records_are_counted_by_reason_and_the_rest_is_kept(tmp_path):
    lines = [json.dumps({"text": "good"}), "{not json", json.dumps({"body": "?"}), json.dumps({"text": "better"}), ""]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as f:
        f.write("\n".join(lines).encode() + b'{"text": "\xff"}\n')
    task = {"name": "lines", "source": {"kind": "jsonl", "files": [str(tmp_path / "a.jsonl.gz")]}}
    with pytest.raises(DataError, match="a.jsonl.gz, line 2"):
        prepare(config(tmp_path / "out", "", tasks=[task]), quiet)
    assert not (tmp_path / "out").exists()
    prepared = prepare(config(tmp_path / "out", "", tasks=[task], on_error="skip", validation=0.0), quiet)
    assert texts_of(prepared, "train") == ["good", "better"]
    assert prepared.manifest["counts"]["lines"] == {"broken_json": 1, "invalid_utf8": 1, "no_text": 1}


def test_the_last_line_says_what_was_left_out_by_task_and_reason(tmp_path):
    corpus(tmp_path / "whole")
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 100 + '"}\n[1]\n{"text": " "}\n{"text": "ok"}\n')
    tasks = [
        {"name": "lines", "source": {"kind": "jsonl", "files": [str(tmp_path / "a.jsonl")]}, "weight": 1.0},
        {"name": "words", "source": {"kind": "text", "files": [f"{tmp_path}/whole/*.txt"]}, "weight": 1.0},
    ]
    more = {"tasks": tasks, "on_error": "skip", "validation": 0.0, "length": 1024, "max_document_mb": 0.0002}
    (tmp_path / "whole/98.txt").write_text("x" * 1000)
    said = []
    prepare(config(tmp_path / "out", "", **more), lambda line, **_: said.append(line))
    prepare(config(tmp_path / "two", "", **more | {"tasks": tasks[:1]}), lambda line, **_: said.append(line))
    left_out = [line for line in said if line.startswith("left out")]
    assert left_out[0].startswith("left out: lines: 1 empty, 1 no text; words: ") and "too long" in left_out[0]
    assert left_out[1] == said[-1] == "left out: lines: 1 empty, 1 no text"
    said.clear()
    prepare(config(tmp_path / "all", tmp_path / "whole", length=1024), lambda line, **_: said.append(line))
    assert not any("left out" in line for line in said)


def test_tasks_get_the_rates_of_their_training_tokens(words, tmp_path):
    corpus(tmp_path / "more", files=30, seed=1)
    tasks = [
        {"name": name, "source": {"kind": "text", "files": [f"{folder}/*.txt"]}}
        for name, folder in (("words", words), ("more", tmp_path / "more"))
    ]
    mixture = {"kind": "proportional", "temperature": 2.0}
    prepared = prepare(config(tmp_path / "out", "", tasks=tasks, mixture=mixture), quiet)
    roots = {name: task["train"]["tokens"] ** 0.5 for name, task in prepared.manifest["tasks"].items()}
    assert prepared.manifest["mixture"] == pytest.approx({n: r / sum(roots.values()) for n, r in roots.items()})
    assert len(validation_rows(prepared)) == sum(t["validation"]["rows"] for t in prepared.manifest["tasks"].values())


def test_a_full_disk_ends_with_a_message_and_no_half_shard_and_later_goes_on(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        (folder / f"{i}.txt").write_text("".join(map(chr, random.integers(32, 0x2000, 60_000))), encoding="utf-8")
    cfg = config(tmp_path / "out", folder, length=1024, validation=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(
            DataError, match=r"words-train-00000.array_record: cannot be written: .*File too large.*run again"
        ):
            prepare(cfg, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out/shards").iterdir())
    prepare(cfg, quiet).verify()
    assert tree(tmp_path / "out") == tree(prepare(cfg.model_copy(update={"out": str(tmp_path / "two")}), quiet).path)


def bad_utf8(folder):
    (folder / "bad.txt").write_bytes(b"fine\xff\xfe")
    return {}


def only_blank(folder):
    for file in folder.glob("*.txt"):
        file.write_text(" \n")
    return {}


def no_file(folder):
    for file in folder.glob("*.txt"):
        file.unlink()
    return {}


def long_line(folder):
    (folder / "long.txt").write_text("x" * 2_000_000)
    return {"max_document_mb": 1.0}


def small_vocabulary(folder):
    return {"tokenizer": {"kind": "train_bpe", "vocab": 100}}


def too_many_characters(folder):
    return {"tokenizer": {"kind": "train_wordpiece", "vocab": 9}}


def added_special_token(folder):
    return {"tokenizer": {"kind": "train_bpe", "vocab": 300, "add": ["<eos>"]}}


def added_byte(folder):
    return {"tokenizer": {"kind": "train_bpe", "vocab": 300, "add": ["a"]}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bad_utf8, "bad.txt.*byte 4"),
        (only_blank, "no text"),
        (no_file, "no file"),
        (long_line, "long.txt.*max_document_mb"),
        (small_vocabulary, "vocab=100 is too small"),
        (too_many_characters, "vocab=9 is too small for 5 special tokens and [0-9]+ characters"),
        (added_special_token, "'<eos>' is already token 2"),
        (added_byte, "'a' is already token"),
    ],
)
def test_bad_input_ends_with_one_message_and_no_folder_and_once_corrected_it_runs(spoil, said, tmp_path):
    texts = corpus(tmp_path / "texts")
    more = spoil(texts)
    with pytest.raises((DataError, ConfigError), match=said):
        prepare(config(tmp_path / "out", texts, **more), quiet)
    assert not (tmp_path / "out").exists()
    for file in texts.iterdir():
        file.unlink()
    prepare(config(tmp_path / "out", corpus(texts)), quiet).verify()


@pytest.mark.parametrize("fault", [small_vocabulary, added_special_token])
def test_a_tokenizer_that_its_config_rules_out_is_refused_before_the_input_is_looked_at(fault, tmp_path):
    with pytest.raises(ConfigError, match="vocab=100|<eos>"):
        prepare(config(tmp_path / "out", tmp_path / "nowhere", **fault(tmp_path)), quiet)


def test_a_run_stopped_before_its_tokenizer_may_be_followed_by_another_config(words, done, tmp_path):
    (tmp_path / "out").mkdir()
    survey = {"settings": {}, "inputs": {}, "tokenizer": None, "survey": {}}
    (tmp_path / "out/prepare.json").write_text(json.dumps(survey))
    assert tree(prepare(config(tmp_path / "out", words), quiet).path) == tree(done.path)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_single_line_of_50_mb_is_refused_by_default_in_bounded_memory(kind, tmp_path):
    line = b"x" * 50_000_000
    (tmp_path / "a").write_bytes(line if kind == "text" else b'{"text": "' + line + b'"}\n{"text": "good"}\n')
    del line
    task = {"name": "long", "source": {"kind": kind, "files": [str(tmp_path / "a")]}}
    cfg = PrepareConfig.model_validate({"out": str(tmp_path / "out"), "tasks": [task]})
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a(, line 1)?: longer than max_document_mb \(32 MB\); split it or raise"):
        prepare(cfg, quiet)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", ["train_bpe", "train_wordpiece"])
def test_a_tokenizer_learns_from_a_megabyte_without_a_space(tokenizer, tmp_path):
    letters = np.random.default_rng(0).integers(ord("a"), ord("k"), 1_000_000, dtype=np.uint8)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/run.txt").write_bytes(letters.tobytes())
    cfg = {"kind": tokenizer, "vocab": 300, "sample_mb": 1.0}
    prepared = prepare(config(tmp_path / "out", tmp_path / "texts", tokenizer=cfg, length=1024), quiet)
    assert prepared.vocab == 300


@pytest.mark.parametrize("finished", [True, False])
def test_a_setting_that_is_new_since_counts_with_its_default(finished, words, tmp_path):
    cfg = config(tmp_path / "out", words)
    prepare(cfg, quiet) if finished else stopped_before_the_manifest(cfg)
    file = tmp_path / "out" / ("manifest.json" if finished else "prepare.json")
    old = json.loads(file.read_text())
    del old["settings"]["split_long"], old["settings"]["tokenizer"]["add"]
    file.write_text(json.dumps(seal(old) if finished else old))
    with pytest.raises(DataError, match=r"something else: split_long was true, is false\. Set"):
        prepare(config(tmp_path / "out", words, split_long=False), quiet)
    said = []
    prepare(cfg, lambda line, **_: said.append(line)).verify()
    assert ("up to date" if finished else "going on where it stopped") in said[0]


def test_a_setting_that_is_no_more_is_named(words, tmp_path):
    cfg = config(tmp_path / "out", words)
    stopped_before_the_manifest(cfg)
    file = tmp_path / "out/prepare.json"
    old = json.loads(file.read_text())
    old["settings"]["folded"] = True
    file.write_text(json.dumps(old))
    with pytest.raises(DataError, match="something else: folded was true, is null"):
        prepare(cfg, quiet)


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_compressed_text_gives_the_rows_of_plain_text(document, tmp_path):
    text = "one naïve line\n\nand another\n"
    rows = []
    for name, data in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        task = {"name": "t", "source": {"kind": "text", "files": [str(tmp_path / name)], "document": document}}
        rows.append(
            texts_of(prepare(config(tmp_path / f"{name}-out", "", tasks=[task], validation=0.0), quiet), "train")
        )
    assert rows[0] == rows[1] and "".join(rows[0]).startswith("one naïve line")


def test_a_folder_with_other_things_in_it_is_refused(words, tmp_path):
    (tmp_path / "thesis.doc").write_text("ten years")
    with pytest.raises(DataError, match="holds 'thesis.doc' and no prepared data"):
        prepare(config(tmp_path, words), quiet)
    assert os.listdir(tmp_path) == ["thesis.doc"]


def test_progress_counts_documents_and_time_left(words, tmp_path, monkeypatch):
    said, clock = [], itertools.count(0.0, 6.0)  # 6 s pass from one look to the next
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    prepare(config(tmp_path / "out", words), lambda line, **how: said.append((line, how)))
    assert any("words train" in line and "documents" in line and "MB/s" in line and " left" in line for line, _ in said)
    assert "13 documents" in said[-1][0] and "training tokens" in said[-1][0]
