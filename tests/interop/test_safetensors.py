"""jaxllm.interop.safetensors, with the reference library as oracle where it is installed."""

import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from jaxllm.core.errors import CheckpointError
from jaxllm.interop import safetensors
from jaxllm.interop.safetensors import DTYPES, INDEX, SINGLE, Entry, Spec, open_tensors, verify, write, write_folder

PACKED = ("F4", "F6_E2M3", "F6_E3M2")
WHOLE = {code: dtype for code, dtype in DTYPES.items() if code not in PACKED}
NUMPY = [dtype for dtype in WHOLE.values() if dtype.isbuiltin == 1]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.fixture
def oracle():
    return pytest.importorskip("safetensors.numpy")


def filled(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bytes at all, NaNs among them; booleans are 0 or 1."""
    high = 2 if dtype == bool else 256
    data = np.random.default_rng(seed).integers(0, high, math.prod(shape) * dtype.itemsize, np.uint8)
    return data.view(dtype).reshape(shape)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def assert_holds(path: Path, want: dict[str, np.ndarray]) -> None:
    with open_tensors(path) as tensors:
        assert tensors.keys() == want.keys()
        for name, array in want.items():
            assert_same(tensors.read(name), array)


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header, JSON or bytes, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int = 0, end: int = 8, *, dtype: object = "F32", shape: object = (2,), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


THREE = {name: filled(np.dtype("<f4"), (5, 2), seed) for seed, name in enumerate(("z", "y", "x"))}  # 40 bytes each


# Round trips


@hypothesis.given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(WHOLE.values())), SHAPES), max_size=6))
def test_what_was_written_is_read_in_every_dtype_and_shape(tmp_path_factory, specs):
    tensors = {name: filled(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(specs.items())}
    path = tmp_path_factory.mktemp("round") / "trip.safetensors"
    write(path, tensors, metadata={"a": "b"})
    assert_holds(path, tensors)
    opened = open_tensors(path)
    assert opened.metadata == {"a": "b"}
    for name, array in tensors.items():
        entry = opened[name]
        assert entry == Entry(array.dtype, array.shape, path, entry.offset, array.nbytes)
        assert path.read_bytes()[entry.offset :][: entry.size] == array.tobytes()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}], ids=str)
@hypothesis.given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(WHOLE.values())), SHAPES), max_size=6))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_file_is_that_of_the_reference_library_to_the_byte(tmp_path, oracle, metadata, specs):
    hypothesis.assume(specs or metadata != {})  # of which the reference library 0.8 makes a file that it cannot read
    tensors = {name: filled(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(specs.items())}
    write(tmp_path / "ours", tensors, metadata=metadata)
    oracle.save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_holds(tmp_path / "theirs", tensors)


def test_the_layout_of_all_dtypes_together_is_the_reference_librarys(tmp_path, oracle):
    tensors = {f"{seed}{code}": filled(dtype, (3,), seed) for seed in (1, 0) for code, dtype in WHOLE.items()}
    write(tmp_path / "ours", tensors)
    oracle.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_reference_library_reads_what_is_written(tmp_path, oracle):
    tensors = {dtype.name: filled(dtype, (2, 3)) for dtype in NUMPY}
    assert len(tensors) == 13
    write(tmp_path / "f.safetensors", tensors, metadata={"k": "v", "a": "é"})
    theirs = oracle.load_file(tmp_path / "f.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert_same(theirs[name], array)


@pytest.mark.parametrize("dtype", WHOLE.values(), ids=str)
def test_transposed_strided_and_big_endian_arrays_are_written_by_value(tmp_path, dtype):
    base = filled(np.dtype("u1"), (4, 6)).astype(dtype)
    swapped = base.astype(dtype.newbyteorder(">"))
    assert dtype.itemsize == 1 or swapped.tobytes() != base.tobytes()
    write(tmp_path / "f", {"t": base.T, "s": base[::2, ::-1], "big": swapped, "0d": swapped[1, 2, ...]})
    want = {"t": base.T, "s": base[::2, ::-1], "big": base, "0d": base[1, 2, ...]}
    assert_holds(tmp_path / "f", {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in want.items()})


def test_integers_of_another_c_type_are_written_by_their_width(tmp_path):
    write(tmp_path / "f", {"q": np.arange(3, dtype=np.longlong), "Q": np.arange(3, dtype=np.ulonglong)})
    assert [entry.dtype for entry in open_tensors(tmp_path / "f").values()] == [np.uint64, np.int64]


# Views


def test_read_gives_views_of_one_map_that_cannot_be_written(tmp_path):
    write(tmp_path / "f", THREE)
    with open_tensors(tmp_path / "f") as tensors:
        first = tensors.read("x")
        assert np.shares_memory(first, tensors.read("x"))
        with pytest.raises(ValueError, match="read-only"):
            first[0] = 1
    assert_same(first, THREE["x"])  # outlives the closing
    assert_same(tensors.read("x"), THREE["x"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are listed on Linux only")
def test_closing_unmaps_what_is_not_in_use(tmp_path):
    def mapped() -> bool:
        return str(tmp_path / "f") in Path("/proc/self/maps").read_text()

    write(tmp_path / "f", THREE)
    with open_tensors(tmp_path / "f") as tensors:
        assert not mapped()  # until the first is read
        tensors.read("x")
        assert mapped()
    assert not mapped()


def test_reading_a_large_tensor_takes_no_memory(tmp_path):
    (tmp_path / "f").write_bytes(raw({"w": tensor(0, 2**30, shape=[2**28])}))
    os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size + 2**30)  # a hole: takes no disk either
    with open_tensors(tmp_path / "f") as tensors:
        tracemalloc.start()
        assert tensors.read("w")[2**27] == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_a_header_of_odd_length_leaves_tensors_readable(tmp_path):
    values = np.float32([1.5, -2])
    for pad in range(4):
        (tmp_path / "f").write_bytes(raw(json.dumps({"w": tensor()}).encode() + b" " * pad, values.tobytes()))
        assert_same(open_tensors(tmp_path / "f").read("w"), values)


def test_tensors_come_in_the_order_of_their_bytes_however_the_header_orders_them(tmp_path):
    (tmp_path / "f").write_bytes(raw({"b": tensor(8, 16), "a": tensor(), "e": tensor(8, 8, shape=[0])}, bytes(16)))
    assert list(open_tensors(tmp_path / "f")) == ["a", "e", "b"]


def test_a_file_written_again_after_opening_is_refused(tmp_path):
    write(tmp_path / "f", THREE)
    tensors = open_tensors(tmp_path / "f")
    write(tmp_path / "f", {"x": filled(np.dtype("<f4"), (100,))})
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        tensors.read("x")


@pytest.mark.parametrize(("code", "size"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_packed_types_are_listed_but_refused_when_read(tmp_path, code, size):
    header = {"q": tensor(0, size, dtype=code, shape=[2, 4]), "w": tensor(size, size + 8)}
    (tmp_path / "f").write_bytes(raw(header, bytes(size + 8)))
    tensors = open_tensors(tmp_path / "f")
    assert (tensors["q"].shape, tensors["q"].size) == ((2, 4), size)
    assert_same(tensors.read("w"), np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match=f"'q' is {code}"):
        tensors.read("q")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "g", {"q": np.zeros(2, DTYPES[code])})


# Files that lie

TENSOR = json.dumps(tensor()).encode()
MALFORMED = {
    "empty": (b"", "has 0 bytes of the 8"),
    "seven bytes": (b"\2" + bytes(6), "has 7 bytes of the 8"),
    "header beyond the file": (raw({}, length=3), "header of 3 bytes: 2 follow"),
    "header of 2^64 bytes": (raw({}, length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "no header": (raw(b""), r"no JSON object.*begins with \{"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "no JSON object in UTF-8.*0xff"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "no JSON object"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "no JSON object"),
    "not JSON": (raw(b"{'a': 1}"), "no JSON object"),
    "JSON and more": (raw(b"{}{}"), "no JSON object.*Extra data"),
    "NUL padding": (raw(b"{}\0\0"), "no JSON object.*Extra data"),
    "list": (raw([1]), r"no JSON object.*begins with \{"),
    "half a surrogate pair": (raw(b'{"\\ud800": 1}'), "no JSON object.*surrogates"),
    "integer of 5000 digits": (raw(b'{"a": ' + b"1" * 5000 + b"}"), "no JSON object.*5000 digits"),
    "twice a tensor": (raw(b'{"a": %b, "a": %b}' % (TENSOR, TENSOR), bytes(8)), "twice the same key: 'a'"),
    "twice a field": (raw(b'{"a": {"dtype": "F32", "dtype": "I32"}}'), "twice the same key: 'dtype'"),
    "nested objects": (raw(b'{"a":' * 100_000), "no JSON object.*while decoding a JSON"),
    "nested lists": (raw(b'{"a":' + b"[" * 100_000), "no JSON object.*while decoding a JSON"),
    "metadata is null": (raw({"__metadata__": None}), "__metadata__ None must be an object of strings"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__ {'a': 1} must be an object of strings"),
    "metadata of objects": (raw({"__metadata__": {"a": {}}}), "__metadata__ .* must be an object of strings"),
    "tensor is a number": (raw({"a": 1}), "'a': 1 must be an object with dtype, shape and data_offsets"),
    "no dtype": (raw({"a": {"shape": [], "data_offsets": [0, 0]}}), "'a': .* must be an object with dtype"),
    "unknown dtype": (raw({"a": tensor(dtype="F31")}, bytes(8)), "dtype 'F31' is none of U64, .*BF16.*, BOOL"),
    "dtype in lower case": (raw({"a": tensor(dtype="f32")}, bytes(8)), "dtype 'f32' is none of"),
    "dtype is a list": (raw({"a": tensor(dtype=["F32"])}, bytes(8)), "dtype .* is none of"),
    "shape is a number": (raw({"a": tensor(shape=2)}, bytes(8)), "shape 2 must be a list"),
    "shape is null": (raw({"a": tensor(shape=None)}, bytes(8)), "shape None must be a list"),
    "negative size": (raw({"a": tensor(shape=[-1, -2])}, bytes(8)), r"shape \[-1, -2\] must be .*integers from 0"),
    "size is true": (raw({"a": tensor(shape=[True, 2])}, bytes(8)), r"shape \[True, 2\] must be .*integers"),
    "size is a float": (raw({"a": tensor(shape=[2.0])}, bytes(8)), r"shape \[2.0\] must be .*integers"),
    "65 dimensions": (raw({"a": tensor(shape=[1] * 64 + [2])}, bytes(8)), "must be a list of at most 64"),
    "shape times dtype is 2^64 + 8": (raw({"a": tensor(shape=[2**62 + 2])}, bytes(8)), r"is beyond 2\^63 bytes"),
    "product overflows": (raw({"a": tensor(shape=[2**32, 2**32, 2])}, bytes(8)), r"is beyond 2\^63 bytes"),
    "overflow hidden by 0": (raw({"a": tensor(0, 0, shape=[2**62, 0, 2**62])}), r"is beyond 2\^63 bytes"),
    "more than its span": (raw({"a": tensor(shape=[3])}, bytes(8)), r"F32 of shape \[3\] is 12 bytes, .*span 8"),
    "less than its span": (raw({"a": tensor(shape=[])}, bytes(8)), r"F32 of shape \[\] is 4 bytes, .*span 8"),
    "half a byte": (raw({"a": tensor(0, 1, dtype="F4", shape=[3])}, bytes(1)), r"is 1.5 bytes, .*span 1"),
    "one offset": (raw({"a": tensor() | {"data_offsets": [0]}}, bytes(8)), r"data_offsets \[0\] must be two"),
    "three offsets": (raw({"a": tensor() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets .* must be two"),
    "offset is a string": (raw({"a": tensor() | {"data_offsets": [0, "8"]}}, bytes(8)), "data_offsets .* must be two"),
    "offset is false": (raw({"a": tensor() | {"data_offsets": [False, 8]}}, bytes(8)), "data_offsets .* must be two"),
    "negative offset": (raw({"a": tensor(-8, 0)}, bytes(8)), r"data_offsets \[-8, 0\] must be .* 0 <= begin <= end"),
    "reversed offsets": (raw({"a": tensor(8, 0)}, bytes(8)), r"data_offsets \[8, 0\] must be .* 0 <= begin <= end"),
    "beyond the file": (raw({"a": tensor(8, 16)}, bytes(8)), "'a': ends at byte 16 of the data; .* 8 are there"),
    "cut short": (raw({"a": tensor()}, bytes(7)), "'a': ends at byte 8 of the data; cut short, 7 are there"),
    "first not at 0": (raw({"a": tensor(4, 12)}, bytes(12)), "4 bytes before tensor 'a' belong to none"),
    "gap": (raw({"a": tensor(), "b": tensor(9, 17)}, bytes(17)), "1 bytes before tensor 'b' belong to none"),
    "overlap": (raw({"a": tensor(), "b": tensor(4, 12)}, bytes(12)), "'b' overlaps the one before by 4 bytes"),
    "twice the same bytes": (raw({"a": tensor(), "b": tensor()}, bytes(8)), "'b' overlaps the one before by 8 bytes"),
    "empty inside another": (
        raw({"a": tensor(), "b": tensor(4, 4, shape=[0])}, bytes(8)),
        "'b' overlaps the one before by 4 bytes",
    ),
    "bytes at the end": (raw({"a": tensor()}, bytes(9)), "1 bytes follow the last tensor"),
    "bytes and no tensor": (raw({}, bytes(8)), "8 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name_with_what_is_wrong(tmp_path, case):
    data, message = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^\S*bad.safetensors: .*" + message) as caught:
        open_tensors(path)
    assert len(str(caught.value)) < 1000


def test_the_reference_library_refuses_the_malformed_too_but_for_these(oracle):
    from safetensors import SafetensorError, deserialize

    accepted = set()
    for case, (data, _) in MALFORMED.items():
        try:
            deserialize(data)
            accepted.add(case)
        except SafetensorError:
            pass
    assert accepted <= {"twice a tensor", "twice a field", "metadata is null", "65 dimensions", "overflow hidden by 0"}


def test_a_good_header_passes_every_check_that_the_malformed_fail(tmp_path):
    header = {"__metadata__": {"a": "b"}, "a": tensor(note=None), "é\n": tensor(8, 8, shape=[3, 0]), "": tensor(8, 16)}
    (tmp_path / "f").write_bytes(raw(json.dumps(header).encode() + b" \n\t", bytes(16)))
    assert len(open_tensors(tmp_path / "f")) == 3


LYING = {
    "a header of 2^63 bytes": (raw({}, length=2**63), 0),
    "a header of 100 MB + 1, all there": (raw(b"", length=100_000_001), 100_000_001),
    "a tensor of 2^62 bytes": (raw({"a": tensor(0, 2**62, shape=[2**60])}, bytes(8)), 0),
    "a tensor of 4 GB where 1 GB is": (raw({"a": tensor(0, 2**32, shape=[2**30])}), 2**30),
    "4 GB of shape in 1 GB": (raw({"a": tensor(0, 2**30, shape=[2**30])}), 2**30),
    "a gap of 1 GB": (raw({"a": tensor(2**30, 2**30 + 8)}), 2**30 + 8),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_header_is_refused_before_memory_is_taken(tmp_path, case):
    data, hole = LYING[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    os.truncate(path, len(data) + hole)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_what_is_no_file_is_told_as_such(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "pipe": "no such file",
        "none": "no such file",
        ".": "holds neither",
        "a\0b": "no such",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_tensors(tmp_path / name)


# Mutations


def originals() -> list[bytes]:
    tensors = {
        "a.weight": ("F32", [2, 3]),
        "b": ("BF16", [4]),
        "c": ("U8", [3]),
        "d": ("F64", []),
        "e": ("I16", [0, 2]),
    }
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (code, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    small = {"w": tensor(0, 4, dtype="F4", shape=[8]), "v": tensor(4, 12, dtype="I64", shape=[1])}
    return [raw(header, bytes(range(end))), raw(small, bytes(12)), raw({})]


def edited(header: bytes, rng: np.random.Generator) -> bytes:
    """The header with one claim about one tensor changed: still JSON, seldom still true."""
    tree = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    if not names:
        return header
    one, other = (tree[names[i]] for i in rng.integers(len(names), size=2))
    odd = [-1, 0, 1, 3, 7, 2**31, 2**62, 2**64, 10**30, 0.5, 4.0, True, None, "4", [], {}][rng.integers(16)]
    match rng.integers(8):
        case 0:
            one["dtype"] = [*DTYPES, "F33", odd][rng.integers(len(DTYPES) + 2)]
        case 1 if one["shape"]:
            one["shape"][rng.integers(len(one["shape"]))] = odd
        case 2:
            one["shape"].extend([0, 1, odd][: rng.integers(1, 4)])
        case 3:
            one["shape"] = odd
        case 4:
            one["data_offsets"][rng.integers(2)] = odd
        case 5:
            shift = int(rng.integers(-8, 9))
            one["data_offsets"] = [n + shift for n in one["data_offsets"]]
        case 6:
            one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
        case _:
            del tree[names[rng.integers(len(names))]]
    return json.dumps(tree).encode()


def scrambled(header: bytes, rng: np.random.Generator) -> bytes:
    """The header with a bit flipped, bytes or pieces of JSON inserted, bytes deleted, or a number changed."""
    at = int(rng.integers(len(header)))
    match rng.integers(6):
        case 0:
            return header[:at] + bytes([header[at] ^ 1 << rng.integers(8)]) + header[at + 1 :]
        case 1:
            return header[:at] + rng.integers(0, 256, rng.integers(1, 9), np.uint8).tobytes() + header[at:]
        case 2:
            return header[:at] + header[at + rng.integers(1, 9) :]
        case 3:
            pieces = [b"[", b"{", b'"', b",", b"-1", b"1e3", b"true", b"null", b"NaN", b"\\ud800", b" "]
            return header[:at] + pieces[rng.integers(len(pieces))] + header[at:]
        case 4:
            start = int(rng.integers(len(header)))
            return header[:at] + header[start : start + rng.integers(40)] + header[at:]
        case _:
            digits = [i for i, c in enumerate(header) if chr(c).isdigit()] or [at]
            at = int(rng.choice(digits))
            return header[:at] + b"%d" % rng.integers(20) + header[at + 1 :]


def mutants(count: int) -> Iterator[bytes]:
    """Files that began as whole ones."""
    rng = np.random.default_rng(20)
    whole = originals()
    for _ in range(count):
        data = whole[rng.choice(3, p=[0.7, 0.25, 0.05])]
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + length], data[8 + length :]
        change = rng.random()
        if change < 0.5:
            header = edited(header, rng)
        elif change < 0.9:
            header = scrambled(header, rng)
        chance = rng.random()
        if chance < 0.05:
            length ^= 1 << int(rng.integers(64))  # and a length that did not follow the change
        elif chance > 0.1:
            length = len(header)
        if rng.random() < 0.1:
            rest = rest[: rng.integers(len(rest) + 1)] + bytes(rng.integers(3))
        out = raw(header, rest, length=length)
        if rng.random() < 0.1:
            at = int(rng.integers(len(out)))
            out = out[:at] + bytes([out[at] ^ 1 << rng.integers(8)]) + out[at + 1 :]
        yield out[: rng.integers(len(out) + 1)] if rng.random() < 0.05 else out


@pytest.fixture(scope="module")
def mutated(tmp_path_factory) -> list[tuple[bytes, dict[str, bytes] | CheckpointError]]:
    """10,000 mutated files, each with the bytes of all its tensors or the refusal; anything else that is raised fails."""
    path = tmp_path_factory.mktemp("mutated") / "f"
    outcomes = []
    with path.open("wb") as f:
        for data in mutants(10_000):
            f.seek(0)
            f.write(data)
            f.truncate()
            f.flush()
            try:
                with open_tensors(path) as tensors:
                    outcomes.append((data, {name: tensors.read(name).tobytes() for name in tensors}))
            except CheckpointError as e:
                outcomes.append((data, e))
    return outcomes


def test_ten_thousand_mutated_files_are_read_whole_or_refused(mutated):
    read = sum(isinstance(outcome, dict) for _, outcome in mutated)
    assert len(mutated) == 10_000 and 400 < read < 5000
    refusals = " ".join(str(outcome) for _, outcome in mutated if isinstance(outcome, CheckpointError))
    checks = [
        "of the 8 that", "claims a header", "no JSON object", "twice the same key", "__metadata__", "an object with dtype",
        "is none of", "must be a list", "must be two", "beyond 2^63", "cut short", "data_offsets span", "overlaps",
        "belong to none", "follow the last", "viewed as bytes",
    ]  # fmt: skip
    assert not [check for check in checks if check not in refusals]  # each has had its turn


def test_a_mutated_file_that_opens_opens_in_the_reference_library_with_the_same_bytes(mutated, oracle):
    from safetensors import deserialize

    for data, outcome in mutated:
        if isinstance(outcome, dict):
            assert {name: bytes(info["data"]) for name, info in deserialize(data)} == outcome


# Folders


def test_a_folder_is_cut_where_the_next_tensor_would_pass_the_limit(tmp_path):
    files = write_folder(tmp_path, THREE, shard_bytes=80)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert files == [tmp_path / first, tmp_path / second, tmp_path / INDEX]
    assert sorted(contents(tmp_path)) == sorted(file.name for file in files)
    assert (tmp_path / INDEX).read_text() == (
        '{\n  "metadata": {\n    "total_size": 120\n  },\n  "weight_map": {\n'
        f'    "x": "{second}",\n    "y": "{first}",\n    "z": "{first}"\n  }}\n}}\n'
    )
    for path in (tmp_path, tmp_path / INDEX):
        assert_holds(path, THREE)
        assert open_tensors(path).metadata == {"format": "pt"}
    assert list(open_tensors(tmp_path)) == ["y", "z", "x"]
    assert len(write_folder(tmp_path, THREE, shard_bytes=79)) == 4
    assert_holds(tmp_path, THREE)


def test_a_tensor_above_the_limit_has_a_shard_to_itself(tmp_path):
    small = THREE["x"][:1]  # 8 bytes
    write_folder(tmp_path, {"big": THREE["y"], "a": small, "b": small, "c": small}, shard_bytes=16)
    shards = [tmp_path / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [list(open_tensors(shard)) for shard in shards] == [["big"], ["a", "b"], ["c"]]


@pytest.mark.parametrize("tensors", [THREE, {}], ids=len)
def test_what_fits_one_file_has_no_index(tmp_path, tensors):
    assert write_folder(tmp_path / "new" / "folder", tensors, shard_bytes=120) == [tmp_path / "new/folder" / SINGLE]
    assert_holds(tmp_path / "new" / "folder", tensors)


@pytest.mark.parametrize("before", [40, 80, 5000])
@pytest.mark.parametrize("after", [40, 80, 5000])
def test_a_save_over_another_leaves_only_the_new(tmp_path, before, after):
    write_folder(tmp_path, {name: array + 1 for name, array in THREE.items()}, shard_bytes=before)
    kept = {"config.json": b"{}", "model.safetensors.bak": b"", "other-00001-of-00002.safetensors": b""}
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model-00001-of-00009.safetensors.part").write_bytes(b"of a save that was killed")
    files = write_folder(tmp_path, THREE, shard_bytes=after)
    assert contents(tmp_path).keys() == {file.name for file in files} | kept.keys()
    assert_holds(tmp_path, THREE)


def test_a_folder_is_opened_by_its_single_file_before_its_index(tmp_path):
    write_folder(tmp_path, THREE, shard_bytes=40)
    write(tmp_path / SINGLE, {"one": THREE["x"]})
    assert list(open_tensors(tmp_path)) == ["one"]


def test_the_metadata_of_a_folder_is_that_of_its_first_file(tmp_path):
    write_folder(tmp_path, THREE, shard_bytes=40, metadata={"n": "all"})
    write(tmp_path / "model-00001-of-00003.safetensors", {"z": THREE["z"]}, metadata={"n": "first"})
    assert open_tensors(tmp_path).metadata == {"n": "first"}


# An index that lies


def sharded(folder: Path, **changes: object) -> Path:
    """Shards s0 (a0..a11) and s1 (b0..b11) with an index that names them, but for the changes to its weight map."""
    for i, letter in enumerate("ab"):
        write(folder / f"s{i}", {f"{letter}{n}": np.zeros(1, np.int8) for n in range(12)})
    names = {f"{letter}{n}": f"s{i}" for i, letter in enumerate("ab") for n in range(12)} | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in names.items() if v is not None}}))
    return folder / INDEX


def test_an_index_that_fits_its_shards_opens(tmp_path):
    assert len(open_tensors(sharded(tmp_path))) == 24


@pytest.mark.parametrize(
    "name", ["../s0", "/etc/passwd", "sub/s0", "sub\\s0", "..", ".", "", "a\0b", "link", "loop", "s" * 300], ids=repr
)
def test_a_shard_that_is_no_file_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    index = sharded(folder, a0=name)
    for place in (tmp_path / "s0", folder / "sub" / "s0"):
        write(place, {"a0": np.zeros(1, np.int8)})
    (folder / "link").symlink_to(tmp_path / "s0")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(CheckpointError, match="must be plain names of files in the folder|are missing"):
        open_tensors(index)
    if name not in ("", "loop", "s" * 300):
        with pytest.raises(CheckpointError, match=r"must be plain names"):
            open_tensors(index)


def test_links_within_the_folder_and_those_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    index = sharded(snapshot)
    (snapshot / "s0").rename(blobs / "0123")
    (snapshot / "s0").symlink_to("../../blobs/0123")
    (snapshot / "s1").rename(snapshot / "there")
    (snapshot / "s1").symlink_to("there")
    assert len(open_tensors(index)) == 24
    (blobs / "0123").rename(tmp_path / "0123")
    (blobs / "0123").symlink_to("../0123")
    with pytest.raises(CheckpointError, match="'s0' must be plain names"):
        open_tensors(index)


def test_all_missing_shards_are_named_at_once(tmp_path):
    index = sharded(tmp_path, a0="t7", b0="t3")
    with pytest.raises(CheckpointError, match="shards that are missing: 't3', 't7';"):
        open_tensors(index)


def test_tensors_that_index_or_shards_lack_are_listed_up_to_ten(tmp_path):
    lacking = {f"c{n}": "s1" for n in range(13)} | {"a3": "s1"}
    unnamed = {f"b{n}": None for n in range(11)} | {"a7": None}
    with pytest.raises(CheckpointError) as caught:
        open_tensors(sharded(tmp_path, **lacking, **unnamed))
    message = str(caught.value)
    assert "in the shard that is named: 'a3 (s1)', 'c0 (s1)'," in message and "'c8 (s1)' and 4 more;" in message
    assert "in a shard, but not named: 'a7 (s0)', 'b0 (s1)'," in message and "'b7 (s1)' and 2 more;" in message
    assert "c9" not in message


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    index = sharded(tmp_path)
    write(tmp_path / "s2", {"a1": np.zeros(1, np.int8), "c": np.zeros(1, np.int8)})
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"c": "s2", '))
    with pytest.raises(CheckpointError, match="in two shards: 'a1';"):
        open_tensors(index)


def test_a_malformed_shard_is_named(tmp_path):
    index = sharded(tmp_path)
    os.truncate(tmp_path / "s1", 100)
    with pytest.raises(CheckpointError, match="/s1: "):
        open_tensors(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ("{}", "weight_map None must be an object of strings"),
        ('{"weight_map": ["a"]}', r"weight_map \['a'\] must be an object of strings"),
        ('{"weight_map": {"a": 1}}', "weight_map {'a': 1} must be an object of strings"),
        ('{"weight_map": {}}', "weight_map names no tensor"),
        ('{"weight_map": {"a": "s0", "a": "s1"}}', "no JSON object.*twice the same key: 'a'"),
        ('{"weight_map": ' + '{"a": ' * 100_000, "no JSON object.*while decoding a JSON"),
        ('{"metadata": ' + "[" * 100_000, "no JSON object.*while decoding a JSON"),
    ],
    ids=lambda text: text[:30],
)
def test_a_malformed_index_is_refused(tmp_path, text, message):
    index = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX}: {message}"):
        open_tensors(tmp_path)


def test_an_index_beyond_the_limit_is_refused(tmp_path):
    index = sharded(tmp_path)
    os.truncate(index, 100_000_001)
    with pytest.raises(CheckpointError, match="more than 100000000 bytes"):
        open_tensors(index)


# Checksums


def summed(folder: Path, mark: str = " ") -> Path:
    (folder / "sub").mkdir()
    lines = []
    for name in ("a.bin", "with space", "sub/c"):
        (folder / name).write_bytes(name.encode())
        lines.append(f"{hashlib.sha256(name.encode()).hexdigest()} {mark}{name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder / "SHA256SUMS"


@pytest.mark.parametrize("mark", " *")
@pytest.mark.parametrize("change", [str, str.upper], ids=["as is", "upper-case hex"])
def test_verify_counts_the_files_that_are_as_summed(tmp_path, mark, change):
    sums = summed(tmp_path, mark)
    sums.write_bytes(b"\r\n".join(change(x[:64]).encode() + x[64:].encode() for x in sums.read_text().splitlines()))
    assert verify(tmp_path) == 3


def test_a_folder_without_sums_has_nothing_to_verify(tmp_path):
    assert verify(str(tmp_path)) == 0


def test_verify_names_each_file_that_differs_or_is_missing(tmp_path):
    summed(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"a.bim")
    (tmp_path / "sub" / "c").unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: 'a.bin' differs, 'sub/c' is missing;"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "sub/../../out", "link"])
def test_sums_of_files_outside_the_folder_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_bytes(b"")
    (tmp_path / "in" / "link").symlink_to("../out")
    (tmp_path / "in" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    with pytest.raises(CheckpointError, match=f"'{name}' must be names of files in the folder"):
        verify(tmp_path / "in")


@pytest.mark.parametrize("line", ["abc  a.bin", "0" * 64 + " a.bin", "0" * 64 + "  ", "\\" + "0" * 64 + "  a"])
def test_sums_that_are_no_sums_are_refused(tmp_path, line):
    sums = summed(tmp_path)
    sums.write_text(sums.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match="must be 64 hex digits, two spaces and a name"):
        verify(tmp_path)


# Writing


def test_produce_is_asked_once_for_each_spec_in_the_order_of_the_file(tmp_path):
    asked = []

    def produce(name: str) -> np.ndarray:
        asked.append(name)
        return arrays[name]

    arrays = {"b": filled(np.dtype("<f4"), (2,)), "a": filled(np.dtype("<f4"), (3,)), "w": filled(np.dtype("<i8"), ())}
    given = {name: Spec(np.dtype(array.dtype), array.shape) for name, array in arrays.items()}
    write(tmp_path / "f", given | {"c": arrays["b"]}, produce=produce)
    assert asked == ["w", "a", "b"]
    assert_holds(tmp_path / "f", arrays | {"c": arrays["b"]})


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    specs = {str(i): Spec(np.dtype("u1"), (2**20,)) for i in range(16)}
    tracemalloc.start()
    write_folder(tmp_path, specs, produce=lambda name: np.full(2**20, int(name), np.uint8), shard_bytes=2**22)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20
    assert [open_tensors(tmp_path).read(str(i))[-1] for i in range(16)] == list(range(16))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("shard_bytes", [40, 80, 5000])
def test_a_save_that_dies_leaves_the_folder_as_it_was(tmp_path, number, error, shard_bytes):
    write_folder(tmp_path, {name: array + 1 for name, array in THREE.items()}, shard_bytes=40)
    before = contents(tmp_path)
    calls = iter(range(3))

    def produce(name: str) -> np.ndarray:
        if next(calls) == number:
            raise error("killed")
        return THREE[name]

    specs = {name: Spec(array.dtype, array.shape) for name, array in THREE.items()}
    with pytest.raises(error, match="killed"):
        write_folder(tmp_path, specs, produce=produce, shard_bytes=shard_bytes)
    assert contents(tmp_path) == before


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_index(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(safetensors.os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(safetensors.os, "replace", lambda a, b: (events.append(b.name), replace(a, b)))
    files = write_folder(tmp_path, THREE, shard_bytes=80)
    first, second, index = (file.stat().st_ino for file in files)
    folder = tmp_path.stat().st_ino
    assert events == [first, second, files[0].name, files[1].name, folder, index, INDEX, folder]


def test_a_file_that_dies_leaves_nothing_or_the_old(tmp_path):
    def dies(name: str) -> np.ndarray:
        assert len(contents(tmp_path)) == 1 + (tmp_path / "f").exists()  # the temporary, beside the target
        raise RuntimeError("killed")

    specs = {"a": np.ones(3), "b": Spec(np.dtype("<f4"), (2,))}
    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path / "f", specs, produce=dies)
    assert not contents(tmp_path)
    write(tmp_path / "f", THREE)
    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path / "f", specs, produce=dies)
    assert contents(tmp_path).keys() == {"f"}
    assert_holds(tmp_path / "f", THREE)


@pytest.mark.parametrize("fails", range(1, 5))
def test_a_crash_at_any_rename_leaves_one_save_or_none_that_opens(tmp_path, monkeypatch, fails):
    """Three shards and the index take their names; whichever is the last to do so, no mixture is read."""
    old = {name: array + 1 for name, array in THREE.items()}
    write_folder(tmp_path, old, shard_bytes=40)
    replace, calls = os.replace, iter(range(1, 10))

    def crash(source, target):
        if next(calls) == fails:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(safetensors.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_folder(tmp_path, THREE, shard_bytes=40)
    with pytest.raises(CheckpointError, match="holds neither"):
        open_tensors(tmp_path)
    monkeypatch.undo()
    write_folder(tmp_path, THREE, shard_bytes=40)
    assert_holds(tmp_path, THREE)


@pytest.mark.parametrize("before", [40, 5000])
def test_a_crash_before_the_new_index_leaves_a_save_of_other_names_readable(tmp_path, monkeypatch, before):
    old = {name: array + 1 for name, array in THREE.items()}
    write_folder(tmp_path, old, shard_bytes=before)
    replace = os.replace

    def crash(source, target):
        if target.name == INDEX:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(safetensors.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_folder(tmp_path, THREE, shard_bytes=80)
    assert_holds(tmp_path, old)


@pytest.mark.parametrize(
    "data", [np.zeros(3, np.float32), np.zeros((2, 1), np.float32), np.zeros(2, np.int32)], ids=["3", "2x1", "int32"]
)
def test_data_that_is_not_as_announced_is_refused(tmp_path, data):
    with pytest.raises(CheckpointError, match="'w': Spec.* was announced, produce gave Spec"):
        write(tmp_path / "f", {"w": Spec(np.dtype("<f4"), (2,))}, produce=lambda name: data)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "value", [np.zeros(2, "U3"), np.zeros(2, object), np.zeros(2, "c16"), np.zeros(2, ml_dtypes.int4)], ids=str
)
def test_a_dtype_that_the_format_lacks_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="'w': .* cannot be written; known: uint64, .*bfloat16"):
        write_folder(tmp_path, {"a": np.zeros(1), "w": value})
    assert not contents(tmp_path)


def test_equal_content_gives_equal_files_whatever_the_order(tmp_path):
    write(tmp_path / "f", THREE, metadata={"a": "1", "b": "2"})
    write(tmp_path / "g", dict(reversed(THREE.items())), metadata={"b": "2", "a": "1"})
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


def test_the_name_of_the_metadata_is_no_name_for_a_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="__metadata__"):
        write(tmp_path / "f", {"__metadata__": np.zeros(1)})


def test_a_folder_may_be_rewritten_from_its_own_tensors(tmp_path):
    write_folder(tmp_path, THREE, shard_bytes=40)
    with open_tensors(tmp_path) as old:
        specs = {name: Spec(entry.dtype, entry.shape) for name, entry in old.items()}
        write_folder(tmp_path, specs, produce=lambda name: old.read(name) * 2, shard_bytes=40)
    assert_holds(tmp_path, {name: array * 2 for name, array in THREE.items()})


def test_a_header_padded_to_eight_bytes_aligns_every_tensor(tmp_path):
    for n in range(1, 9):
        write(tmp_path / "f", {"x" * n: np.zeros(2), "b": np.zeros(3, np.int8), "c": np.zeros(3, np.float32)})
        assert all(entry.offset % entry.dtype.itemsize == 0 for entry in open_tensors(tmp_path / "f").values())


def test_files_are_read_and_written_without_jax():
    code = "import sys, jaxllm.interop.safetensors; sys.exit(bool({'jax', 'safetensors'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
