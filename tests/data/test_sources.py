import contextlib
import gzip
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import tokenize
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import DataError, UserError
from jaxllm.data import config, sources

MB = 1_000_000
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(cfg, max_bytes=MB, on_error="stop", counts=None):
    counts = Counter() if counts is None else counts
    return list(sources.documents(cfg, max_bytes=max_bytes, on_error=on_error, counts=counts))


def texts(cfg, **kw):
    return [d.text for d in read(cfg, **kw)]


def text_files(*patterns, **kw):
    return config.TextFiles(files=tuple(map(str, patterns)), **kw)


def jsonl(*patterns, **kw):
    return config.Jsonl(files=tuple(map(str, patterns)), **kw)


# --- names and order ---------------------------------------------------------------------------------------------


def test_the_same_corpus_elsewhere_gives_the_same_documents_and_fingerprint(tmp_path):
    for name, text in {"b.txt": "bee", "a/z.txt": "zed", "a/b/c.txt": "sea"}.items():
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text(text)
    shutil.copytree(tmp_path / "one", tmp_path / "deep/er/two")
    one, two = text_files(tmp_path / "one/**/*.txt"), text_files(tmp_path / "deep/er/two/**/*.txt")
    assert read(one) == read(two) and sources.inputs(one) == sources.inputs(two)
    assert [d.id for d in read(one)] == ["a/b/c.txt", "a/z.txt", "b.txt"]


def test_overlapping_patterns_name_a_file_once_and_equal_names_stay_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    cfg = text_files(tmp_path / "y/*.txt", tmp_path / "x/same.txt", tmp_path / "x/*")
    assert [(f.name, f.path.read_text()) for f in sources.files(cfg)] == [("x/same.txt", "x"), ("y/same.txt", "y")]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts(text_files(tmp_path / "a[1].txt")) == ["brackets"]


def test_inputs_notice_one_changed_byte(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    before = sources.inputs(text_files(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("hellp")
    after = sources.inputs(text_files(tmp_path / "a.txt"))
    assert before[0]["size"] == after[0]["size"] == 5 and before != after


# --- text and JSONL ----------------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.sampled_from(["a", "b c", "é中", " x ", "", "  ", "\t"]), max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_paragraphs_and_lines_are_what_splitting_the_whole_text_gives(lines, end):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.txt")
        path.write_bytes(end.join([*lines, "last"]).encode())
        lines = [*lines, "last"]
        blank = "".join("." if line.strip() else " " for line in lines)
        starts = [i for i in range(len(lines)) if blank[i] == "." and (i == 0 or blank[i - 1] == " ")]
        expected = []
        for start in starts:
            stop = next((i for i in range(start, len(lines)) if blank[i] == " "), len(lines))
            expected.append((f"t.txt:{start + 1}", "\n".join(lines[start:stop])))
        paragraphs, alone = read(text_files(path, document="paragraph")), read(text_files(path, document="line"))
    assert [(d.id, d.text) for d in paragraphs] == expected
    assert [(d.id, d.text) for d in alone] == [(f"t.txt:{n}", t) for n, t in enumerate(lines, 1) if t.strip()]
    assert all(d.held_out_key == d.id for d in paragraphs + alone)


def test_a_file_document_is_the_file_to_the_byte_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n ")
    assert read(text_files(tmp_path / "a.txt")) == [sources.Document("a.txt", "one\r\n\ntwo\n ", "a.txt")]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_jsonl_reads_as_plain(tmp_path, suffix):
    rows = [{"text": t, "n": n} for n, t in enumerate(["one", "two\nlines", "中 \u2028 ü", "\U0001f600"])]
    data = b"\xef\xbb\xbf" + "\n".join([json.dumps(rows[0]), "", *(json.dumps(r) for r in rows[1:])]).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](data))
    name = f"a.jsonl{suffix}"
    expected = [(f"{name}:{n}", r["text"]) for n, r in zip((1, 3, 4, 5), rows, strict=True)]
    assert [(d.id, d.text) for d in read(jsonl(tmp_path / name))] == expected


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_compressed_text_reads_as_plain_and_damaged_text_is_refused(tmp_path, document, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](b"\xef\xbb\xbf" + "one\nzwei ü\n".encode()))
    cfg = text_files(path, document=document)
    assert texts(cfg) == {"file": ["one\nzwei ü\n"], "line": ["one", "zwei ü"], "paragraph": ["one\nzwei ü"]}[document]
    path.write_bytes(PACK[suffix](b"x" * 5 * MB))
    with pytest.raises(DataError, match=r"a\.txt.*longer than max_document_mb"):
        read(cfg)
    if suffix:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"a\.txt.*truncated or damaged"):
            read(cfg, max_bytes=10 * MB)


def test_concatenated_zstd_frames_and_skippable_ones_are_one_file(tmp_path):
    first, second = PACK[".zst"](b'{"text": "one"}\n'), PACK[".zst"](b'{"text": "two"}\n')
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    (tmp_path / "a.jsonl.zst").write_bytes(first + skippable + second)
    assert texts(jsonl(tmp_path / "a.jsonl.zst")) == ["one", "two"]


# --- bad input: every fault stops with its message, or is counted and passed over ---------------------------------

GOOD = b'{"text": "good"}\n'
NOISE = json.dumps({"text": random.Random(0).randbytes(150_000).hex()}).encode() + b"\n"  # several zstd blocks

FAULTS = {  # reason -> file name, bytes, what the message must say
    "json": ("broken_json", b'{"text": "cut of', r"a\.jsonl, line 2: not JSON"),
    "nesting": ("broken_json", b"[" * 100_000, r"line 2: not JSON"),
    "huge number": ("broken_json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"line 2: not JSON"),
    "not an object": ("no_text", b'["text"]', r"line 2: a JSON list"),
    "missing field": ("no_text", b'{"body": "x"}', r"line 2: no field 'text', only \['body'\]"),
    "not a string": ("no_text", b'{"text": 7}', r"line 2: 'text' is int, must be a string"),
    "null": ("no_text", b'{"text": null}', r"line 2: 'text' is NoneType"),
    "half a pair": ("invalid_utf8", rb'{"text": "a\ud83d"}', r"line 2: 'text' holds half a surrogate pair"),
    "not UTF-8": ("invalid_utf8", b'{"text": "\xe9"}', r"line 2: not UTF-8 at byte 27 \(0xe9"),
    "too long": ("too_long", b'{"text": "' + b"x" * MB + b'"}', r"line 2: longer than max_document_mb \(1 MB\)"),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_record_stops_with_its_line_or_is_counted(tmp_path, fault, suffix):
    reason, line, message = FAULTS[fault]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](GOOD + line + b"\n" + GOOD))
    cfg, counts = jsonl(tmp_path / "a*"), Counter()
    with pytest.raises(DataError, match=message.replace("jsonl", f"jsonl{suffix}")):
        read(cfg)
    assert texts(cfg, on_error="skip", counts=counts) == ["good", "good"] and counts == {reason: 1}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [*list(PACK.items())[1:], (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)],
    ids=["gz", "xz", "zst", "zst with checksum"],
)
def test_a_compressed_file_cut_anywhere_is_noticed(tmp_path, suffix, pack):
    whole = pack(GOOD + NOISE)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole)
    assert len(read(jsonl(path))) == 2
    blocks = [at for at in _zstd_block_ends(whole) if at < len(whole)] if suffix == ".zst" else []
    assert suffix != ".zst" or len(blocks) >= 2
    for cut in {*range(1, 24), *blocks, *(len(whole) - n for n in range(1, 12)), len(whole) // 2}:
        path.write_bytes(whole[:cut])
        counts = Counter()
        with pytest.raises(DataError, match="truncated or damaged after line"):
            read(jsonl(path))
        nothing_read = pytest.raises(DataError, match="gives no text: 1 damaged")
        with nothing_read if cut < 24 or suffix == ".zst" else contextlib.nullcontext():
            read(jsonl(path), on_error="skip", counts=counts)
        assert counts["damaged"] == 1, cut


def _zstd_block_ends(frame):
    at = zstandard.frame_header_size(frame)
    while True:
        header = int.from_bytes(frame[at : at + 3], "little")
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        yield at
        if header & 1:
            return


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_is_none_is_damaged(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"this is plain text, not compressed at all\n" * 3)
    with pytest.raises(DataError, match=r"a\.jsonl.*truncated or damaged"):
        read(jsonl(tmp_path / f"a.jsonl{suffix}"))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("suffix", PACK)
def test_a_50_mb_line_is_refused_within_a_few_megabytes(tmp_path, suffix, on_error):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "' + b"x" * 50 * MB + b'"}\n' + GOOD))
    tracemalloc.start()
    if on_error == "stop":
        with pytest.raises(DataError, match="line 1: longer than max_document_mb"):
            read(jsonl(path))
    else:
        assert texts(jsonl(path), on_error="skip") == ["good"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MB  # the dictionary of xz alone is 8


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_a_50_mb_text_is_refused_within_a_few_megabytes(tmp_path, document):
    (tmp_path / "a.txt").write_bytes(b"x" * 50 * MB if document != "paragraph" else (b"x" * 99_999 + b"\n") * 500)
    (tmp_path / "b.txt").write_text("good")
    tracemalloc.start()
    counts = Counter()
    assert texts(text_files(tmp_path / "*", document=document), on_error="skip", counts=counts) == ["good"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MB and counts == {"too_long": 1}


def test_a_document_of_exactly_the_limit_is_kept_and_one_byte_more_is_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\r\nabcd\r\nab\n\nab\na\n")
    counts = Counter()
    assert texts(text_files(tmp_path / "a.txt", document="line"), max_bytes=3, on_error="skip", counts=counts) == [
        "abc", "ab", "ab", "a"
    ]  # fmt: skip
    assert counts == {"too_long": 1}
    cfg = text_files(tmp_path / "a.txt", document="paragraph")
    assert texts(cfg, max_bytes=4, on_error="skip") == ["ab\na"]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_invalid_utf8_names_file_and_byte(tmp_path, document):
    (tmp_path / "a.txt").write_bytes("é\nabc".encode() + b"\xff\n")
    with pytest.raises(DataError, match=r"a\.txt.*not UTF-8 at byte 6 \(0xff.*convert the file to UTF-8"):
        read(text_files(tmp_path / "a.txt", document=document))


def test_empty_files_are_counted_and_an_empty_source_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\n ")
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=r"gives no text: 2 empty"):
            read(text_files(tmp_path / "*.txt"), on_error=on_error)
    (tmp_path / "c.txt").write_text("text")
    for document in ("file", "line", "paragraph"):
        counts = Counter()
        assert texts(text_files(tmp_path / "*.txt", document=document), counts=counts) == ["text"]
        assert counts == {"empty": 2}
    (tmp_path / "d.jsonl").write_bytes(b'{"text": ""}\n' + GOOD)
    counts = Counter()
    assert texts(jsonl(tmp_path / "d.jsonl"), counts=counts) == ["good"] and counts == {"empty": 1}


def test_paths_that_name_no_file_say_so(tmp_path):
    for pattern, message in {
        "none*.txt": r"no file matches \(looked below",
        "none.txt": "no such file",
        "": r"a folder, where a file is needed; write .*\*\*/\*",
    }.items():
        with pytest.raises(DataError, match=message):
            sources.files(text_files(f"{tmp_path}/{pattern}"))


@pytest.fixture
def forbidden(tmp_path_factory):
    """A folder of one readable file and one that may not be read, also by root, who is nobody for the while."""
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "a.txt").write_text("secret")
    (folder / "a.txt").chmod(0o000)
    (folder / "b.txt").write_text("good")
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("document", ["file", "line"])
def test_an_unreadable_file_stops_or_is_counted(forbidden, document):
    cfg, counts = text_files(forbidden / "*.txt", document=document), Counter()
    for reader in (read, sources.inputs):
        with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)"):
            reader(cfg)
    assert texts(cfg, on_error="skip", counts=counts) == ["good"] and counts == {"unreadable": 1}
    assert [i["sha256"] is None for i in sources.inputs(cfg, on_error="skip")] == [True, False]


# --- Python source -----------------------------------------------------------------------------------------------


def test_the_standard_library_is_megabytes_of_source_without_tests():
    docs = read(config.PythonSource(), max_bytes=64 * MB)
    names = [d.id for d in docs]
    assert sum(len(d.text.encode()) for d in docs) > 8 * MB and names == sorted(names)
    assert all(d.held_out_key == d.id and d.id.endswith(".py") for d in docs)
    banned = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [n for n in names if banned & set(n.split("/"))] and "json/decoder.py" in names
    paths = {f.name: f.path for f in sources.files(config.PythonSource())}
    for d in docs[::37]:
        with tokenize.open(paths[d.id]) as f:
            assert f.read() == d.text, d.id


def test_a_package_is_read_by_its_coding_cookies_and_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "never_run"
    for folder in ("", "sub", "tests"):
        (package / folder).mkdir(exist_ok=True)
        (package / folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nname = '\xe9'\r\n")
    (package / "bad.py").write_bytes(b"# coding: no-such-codec\n")
    (package / "worse.py").write_bytes(b"x = 1\n\nname = '\xe9'\n")
    monkeypatch.syspath_prepend(tmp_path)
    counts = Counter()
    docs = {d.id: d.text for d in read(config.PythonSource(package="never_run"), on_error="skip", counts=counts)}
    assert set(docs) == {f"never_run/{n}" for n in ("__init__.py", "sub/__init__.py", "latin.py")}
    assert docs["never_run/latin.py"] == "# -*- coding: latin-1 -*-\nname = 'é'\n" and counts == {"invalid_utf8": 2}
    assert [f.name for f in sources.files(config.PythonSource(package="never_run.sub"))] == ["sub/__init__.py"]
    assert [f.name for f in sources.files(config.PythonSource(package="never_run.latin"))] == ["latin.py"]
    assert "never_run" not in sys.modules
    with pytest.raises(DataError, match=r"bad\.py: cannot be decoded \(unknown encoding: no-such-codec\)"):
        read(config.PythonSource(package="never_run"))


def test_a_package_that_is_not_there_or_not_python_says_so():
    with pytest.raises(DataError, match="no package 'nosuchpackage' is installed"):
        sources.files(config.PythonSource(package="nosuchpackage"))
    with pytest.raises(DataError, match="'sys' holds no .py file"):
        sources.files(config.PythonSource(package="sys"))


# --- datasets folders --------------------------------------------------------------------------------------------


def saved_dataset(folder, *shards):
    """A folder as `Dataset.save_to_disk` writes it: Arrow streams and state.json."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, column in zip(names, shards, strict=True):
        table = pa.table({"text": pa.array(column, pa.string()), "n": list(range(len(column)))})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")


def huggingface(path, **kw):
    return config.HuggingFace(path=str(path), **kw)


def test_a_saved_dataset_gives_its_rows_in_order(tmp_path):
    saved_dataset(tmp_path / "d", ["a", "b"], ["c"])
    docs = read(huggingface(tmp_path / "d"))
    assert [d.text for d in docs] == ["a", "b", "c"]
    assert docs[1].id == docs[1].held_out_key == "data-00000-of-00002.arrow:2"
    with pytest.raises(DataError, match="one dataset without splits"):
        read(huggingface(tmp_path / "d", split="train"))


def test_a_dataset_dict_needs_one_of_its_splits(tmp_path):
    for split in ("train", "test"):
        saved_dataset(tmp_path / split, [f"of {split}"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(huggingface(tmp_path, split="test")) == ["of test"]
    for split in (None, "dev"):
        with pytest.raises(DataError, match=rf"split={split!r} is not one of its splits \['train', 'test'\]"):
            read(huggingface(tmp_path, split=split))


def test_parquet_folders_give_the_rows_of_a_split(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, rows in {"train-0.parquet": ["a", None, "bb"], "test/0.parquet": ["c"], "test.parquet": ["d"]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": rows, "n": list(range(len(rows)))}), tmp_path / name)
    counts = Counter()
    assert texts(huggingface(tmp_path), on_error="skip", max_bytes=1, counts=counts) == ["d", "c", "a"]
    assert counts == {"no_text": 1, "too_long": 1}
    assert texts(huggingface(tmp_path, split="test")) == ["d", "c"]
    with pytest.raises(DataError, match=r"column 'n' holds int64; set `text` to a column of strings among"):
        read(huggingface(tmp_path, text="n"))
    with pytest.raises(DataError, match="no column 'body'"):
        read(huggingface(tmp_path, text="body"))


def test_damaged_datasets_stop_or_are_counted(tmp_path):
    saved_dataset(tmp_path, ["a" * 1000], ["b"])
    first = tmp_path / "data-00000-of-00002.arrow"
    first.write_bytes(first.read_bytes()[:700])
    counts = Counter()
    with pytest.raises(DataError, match="00000-of-00002.arrow: not a whole Arrow or Parquet file"):
        read(huggingface(tmp_path))
    assert texts(huggingface(tmp_path), on_error="skip", counts=counts) == ["b"] and counts == {"damaged": 1}
    first.unlink()
    with pytest.raises(DataError, match="00000-of-00002.arrow is missing"):
        read(huggingface(tmp_path))
    (tmp_path / "state.json").write_text('{"_data')
    with pytest.raises(DataError, match=r"state\.json: not as `Dataset.save_to_disk` writes it"):
        read(huggingface(tmp_path))
    with pytest.raises(DataError, match="give a folder of `Dataset.save_to_disk` or of Parquet files"):
        read(huggingface(tmp_path / "nowhere"))


def test_a_row_that_is_not_utf8_is_left_out_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    data, ends = b"one\xff\xfethree", (0, 3, 5, 10)
    column = pa.StringArray.from_buffers(3, pa.py_buffer(struct.pack("<4i", *ends)), pa.py_buffer(data))
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as f:
        batch = pa.record_batch([column], names=["text"])
        with pa.ipc.new_stream(f, batch.schema) as stream:
            stream.write_batch(batch)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    counts = Counter()
    with pytest.raises(DataError, match=r"data\.arrow, row 2: 'text' is not UTF-8"):
        read(huggingface(tmp_path))
    assert texts(huggingface(tmp_path), on_error="skip", counts=counts) == ["one", "three"]
    assert counts == {"invalid_utf8": 1}


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    saved_dataset(tmp_path / "d", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'jaxllm\[datasets\]'"):
        read(huggingface(tmp_path / "d"))


def test_importing_sources_and_tokenizers_loads_no_library():
    heavy = "jax,pyarrow,datasets,zstandard,tokenizers,sentencepiece,tiktoken,tensorflow,seqio"
    code = (
        "import sys, jaxllm.data.sources, jaxllm.data.tokenizers;"
        f"print([m for m in {heavy!r}.split(',') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
