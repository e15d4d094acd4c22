import gc
import math
import os
import random
import struct
import time
import tracemalloc

import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_weights import SMOLLM2

from jaxllm.core.errors import CheckpointError
from jaxllm.interop import ggml, gguf
from jaxllm.interop.gguf import Spec, open_gguf, write_gguf

QUANTISED = [kind for kind in ggml.READABLE if kind not in ggml.PLAIN]
INTEGERS = ["I8", "I16", "I32", "I64"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="session")
def oracle():
    return pytest.importorskip("gguf")


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def text(data):
    data = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(data)) + data


def u32(key, value):
    return text(key) + struct.pack("<II", 4, value)


def array(key, kind, count, data=b""):
    return text(key) + struct.pack("<IIQ", 9, kind, count) + data


def tensor(name, dims, number, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def model(metadata=(), tensors=(), size=0, *, version=3, counts=None, alignment=32):
    """The bytes of a file, of parts that nothing has checked; dims as the format lists them."""
    num_tensors, num_values = counts or (len(tensors), len(metadata))
    head = b"".join([struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_values), *metadata, *tensors])
    return head + bytes(-len(head) % alignment) + bytes(i * 37 % 251 for i in range(size))


@pytest.fixture
def opened(tmp_path):
    """`opened(data)`: the model in those bytes."""

    def write_and_open(data):
        file = tmp_path / "model.gguf"
        file.write_bytes(data)
        return open_gguf(file)

    return write_and_open


def random_model(kind, shape, seed):
    """A file with one tensor of random bytes, and these."""
    _, block, size = ggml.KINDS[kind]
    data = np.random.default_rng(seed).integers(0, 256, math.prod(shape) // block * size, np.uint8)
    return model([], [tensor("x", shape[::-1], ggml.KINDS[kind].number, 0)]) + data.tobytes(), data


def test_the_kinds_are_the_oracles(oracle):
    theirs = {kind.name: (kind.value, *size) for kind, size in oracle.GGML_QUANT_SIZES.items()}
    # Its Q8_1, which no file holds, has the 40 bytes of older ggml; ggml-common.h has 36.
    assert {**theirs, "Q8_1": (9, 32, 36)} == ggml.KINDS


@pytest.mark.parametrize("kind", [*QUANTISED, "F32", "F16", "BF16"])
def test_every_kind_is_dequantised_to_the_bits_of_the_oracle(kind, oracle, opened):
    draw = random.Random(kind)
    for seed in range(8):
        rows = [draw.randint(1, 9) for _ in range(draw.randint(0, 3))]
        shape = (*rows, ggml.KINDS[kind].block * draw.randint(1, 40))
        file, data = random_model(kind, shape, seed)
        with np.errstate(all="ignore"):
            expected = oracle.quants.dequantize(data.reshape(*rows, -1), oracle.GGMLQuantizationType[kind])
        weights = opened(file).read("x", np.float32)
        assert weights.shape == shape
        assert (bits(weights) == bits(expected)).all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_rounded_to_the_dtype_asked_for(kind, opened):
    found = opened(random_model(kind, (300, 512), 0)[0])  # longer than a chunk
    with np.errstate(all="ignore"):
        for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
            rounded = found.read("x", dtype)
            assert rounded.dtype == dtype
            np.testing.assert_array_equal(rounded.astype(float), found.read("x").astype(dtype).astype(float))


@pytest.mark.parametrize("kind", ggml.PLAIN)
def test_weights_that_are_not_quantised_come_as_they_are_stored_without_a_copy(kind, opened):
    file, data = random_model(kind, (3, 16), 1)
    found = opened(file)
    weights = found.read("x")
    assert weights.dtype == ggml.PLAIN[kind] and not weights.flags.writeable
    assert (bits(weights) == data).all() and (found.raw("x") == data).all()
    assert np.shares_memory(found.read("x", ggml.PLAIN[kind]), weights)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found.read("x", np.float64), weights.astype(np.float64))


def test_dequantising_takes_little_memory_beside_its_result(opened):
    found = opened(random_model("Q5_K", (4096, 1024), 0)[0])
    tracemalloc.start()
    weights = found.read("x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - weights.nbytes < 4 << 20


@pytest.mark.parametrize(("number", "name"), [(20, "IQ4_NL"), (39, "MXFP4"), (99, "kind 99")])
def test_a_kind_that_cannot_be_read_is_listed_and_refused_by_name(number, name, opened):
    table = [tensor("strange", [32, 2], number, 0), tensor("known", [8], 0, 64)]
    found = opened(model([], table, 96))
    assert found["strange"].kind == name
    assert found["strange"].size == (64 if number == 99 else ggml.KINDS[name].size * 2)
    assert found.read("known").shape == (8,)
    with pytest.raises(CheckpointError, match=f"strange is stored as {name}, which cannot be read; known: F32"):
        found.read("strange")


def quantisable():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x[:16] *= np.float32(10) ** rng.integers(-30, 5, (16, 256)).astype(np.float32)
    x[16:32] = rng.integers(-8, 9, (16, 256))
    x[32:40] = rng.integers(-254, 255, (8, 256)) / 2  # halves, where the scale comes out as 1
    x[32:40, ::32] = 127
    x[40, :64] = 0
    x[41, :64] = -0.0
    return x


@pytest.mark.parametrize("kind", ggml.WRITABLE)
def test_quantising_gives_the_bits_of_the_oracle(kind, oracle):
    x = quantisable()
    expected = oracle.quants.quantize(x, oracle.GGMLQuantizationType[kind])
    assert (ggml.quantise(x, kind) == bits(expected)).all()


def test_bf16_rounds_nan_infinity_and_ties_as_the_oracle_does(oracle):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    x[:4096] = x[:4096] & 0xFFFF0000 | 0x8000
    x[4096:8192] |= 0x7F800000
    x[:2] = 0x7F800000, 0xFF800000
    x = x.view(np.float32).reshape(256, -1)
    assert (ggml.quantise(x, "BF16") == bits(oracle.quants.quantize(x, oracle.GGMLQuantizationType.BF16))).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_weights_too_small_for_a_scale_become_zero(kind):
    tiny = np.full(32, 1e-40, np.float32)
    assert not ggml.dequantise(ggml.quantise(tiny, kind), kind).any()


@pytest.mark.parametrize(("kind", "bad"), [("F16", 1e5), ("Q8_0", np.inf), ("Q8_0", np.nan), ("Q4_0", 1e8)])
def test_weights_that_a_kind_cannot_hold_are_refused(kind, bad, tmp_path):
    x = np.zeros((2, 64), np.float32)
    x[1, 5] = bad
    with pytest.raises(CheckpointError, match=f"w: a weight is not finite or too large for {kind}; F32 and BF16 hold"):
        write_gguf(tmp_path / "model.gguf", {}, {"w": x}, kinds=kind)
    assert not list(tmp_path.iterdir())


EVERY_TYPE = {
    "u8": np.uint8(200), "i8": np.int8(-3), "u16": np.uint16(60000), "i16": np.int16(-300), "u32": 7, "i32": -7,
    "u64": 1 << 63, "i64": -(1 << 40), "f32": 0.5, "f64": np.float64(0.1), "bool": True, "npbool": np.bool_(False),
    "str": "größe", "empty": "", "bytes": b"\xff\xc3(".decode("utf-8", "surrogateescape"), "ints": [1, -2, 3],
    "big": [1, 1 << 31], "bigger": [-1, 1 << 31], "biggest": [1 << 63], "floats": [0.5, -1.0, math.inf],
    "bools": [True, False], "strs": ["a", "", "\u2581b"], "nothing": [], "u8s": np.arange(3, dtype=np.uint8),
    "f64s": [np.float64(0.1)], "none": np.zeros(0, np.float32), "pairs": ("x", "y"), "nested": [[[1], []], [[2]]],
    "table": np.ones((2, 2), np.float64), "single": np.array(3, np.int16),
}  # fmt: skip
TYPES = {
    "u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "u64": "UINT64",
    "i64": "INT64", "f32": "FLOAT32", "f64": "FLOAT64", "bool": "BOOL", "npbool": "BOOL", "str": "STRING",
    "ints": "ARRAY INT32", "big": "ARRAY UINT32", "bigger": "ARRAY INT64", "biggest": "ARRAY UINT64",
    "floats": "ARRAY FLOAT32", "bools": "ARRAY BOOL", "strs": "ARRAY STRING", "u8s": "ARRAY UINT8",
    "f64s": "ARRAY FLOAT64", "pairs": "ARRAY STRING", "nested": "ARRAY ARRAY ARRAY INT32",
    "table": "ARRAY ARRAY FLOAT64", "single": "INT16",
}  # fmt: skip


def test_metadata_of_every_type_come_back_as_they_were(tmp_path):
    write_gguf(tmp_path / "model.gguf", EVERY_TYPE, {}, kinds="F32")
    found = open_gguf(tmp_path / "model.gguf").metadata
    plain = {k: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for k, v in EVERY_TYPE.items()}
    assert found == plain | {"pairs": ["x", "y"]}
    assert found["bytes"].encode("utf-8", "surrogateescape") == b"\xff\xc3("
    assert {type(v) for v in found.values()} == {int, float, bool, str, list}


def test_metadata_have_the_types_that_the_values_ask_for(tmp_path, oracle):
    write_gguf(tmp_path / "model.gguf", EVERY_TYPE, {}, kinds="F32")
    fields = oracle.GGUFReader(tmp_path / "model.gguf").fields
    assert {key: " ".join(t.name for t in fields[key].types) for key in TYPES} == TYPES


TEXT = st.text(st.characters(codec="utf-8"), max_size=9) | st.binary(max_size=9).map(
    lambda b: b.decode("utf-8", "surrogateescape")
)
VALUE = [st.integers(-(1 << 63), (1 << 64) - 1), st.floats(width=32, allow_nan=False), st.booleans(), TEXT]
LISTS = [st.lists(v, max_size=5) for v in [st.integers(-(1 << 63), (1 << 63) - 1), *VALUE[1:]]]


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), st.one_of(*VALUE, *LISTS)))
def test_any_metadata_come_back(tmp_path_factory, metadata):
    metadata = {f"k.{key}": value for key, value in metadata.items()}
    file = tmp_path_factory.mktemp("any") / "model.gguf"
    write_gguf(file, metadata, {}, kinds="F32")
    assert open_gguf(file).metadata == metadata


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "is of type NoneType"),
        (b"x", "is of type bytes"),
        ({"a": 1}, "is of type dict"),
        (1 << 64, "an int of 64 bits"),
        ([-1, 1 << 63], "an int of 64 bits"),
        (np.float16(1), "is of type float16"),
        (1e300, "too large for FLOAT32; give it as np.float64"),
        ([1, 2.0], "a list is of one type"),
        ([True, 1], "a list is of one type"),
        (["a", 1], "a list is of one type"),
        ([[1], 2], "a list of lists and of other values"),
        ([[[[[1]]]]], "nests lists deeper than 4"),
        ("\ud800", "not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_written_are_refused(value, why, tmp_path):
    with pytest.raises(CheckpointError, match=f"model.gguf: metadata 'some.key' .*{why}"):
        write_gguf(tmp_path / "model.gguf", {"some.key": value}, {}, kinds="F32")
    assert not list(tmp_path.iterdir())


def weights():
    rng = np.random.default_rng(1)
    return {
        "a.weight": rng.standard_normal((6, 64)).astype(np.float32),
        "b.bias": rng.standard_normal(7).astype(np.float16),
        "c.weight": rng.standard_normal((2, 3, 4, 32)).astype(BFLOAT16),
        "d.weight": rng.standard_normal((64, 5)).T,
    }


@pytest.mark.parametrize("alignment", [None, 8, 256])
@pytest.mark.parametrize("kind", ggml.WRITABLE)
def test_what_is_written_the_oracle_reads(kind, alignment, oracle, tmp_path):
    metadata = {"general.architecture": "llama"} | ({"general.alignment": alignment} if alignment else {})
    write_gguf(tmp_path / "model.gguf", metadata, weights(), kinds=kind)
    theirs = oracle.GGUFReader(tmp_path / "model.gguf")
    ours = open_gguf(tmp_path / "model.gguf")
    assert [t.name for t in theirs.tensors] == list(ours) == list(weights())
    assert theirs.get_field("general.architecture").contents() == "llama"
    blocks = kind in QUANTISED
    assert ours.metadata.get("general.quantization_version") == (2 if blocks else None)
    for t in theirs.tensors:
        x = weights()[t.name].astype(np.float32)
        stored = "F32" if x.ndim == 1 else kind
        assert t.tensor_type.name == ours[t.name].kind == stored
        assert tuple(t.shape[::-1]) == ours[t.name].shape == x.shape
        expected = oracle.quants.quantize(np.ascontiguousarray(x), oracle.GGMLQuantizationType[stored])
        assert (bits(t.data) == bits(expected)).all() and (ours.raw(t.name) == bits(expected)).all()


@pytest.mark.parametrize("alignment", [None, 64])
def test_what_the_oracle_writes_is_read(alignment, oracle, tmp_path):
    writer = oracle.GGUFWriter(tmp_path / "model.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "ä"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5])
    for name, x in weights().items():
        kind = oracle.GGMLQuantizationType.Q4_1 if name == "a.weight" else oracle.GGMLQuantizationType.F16
        data = oracle.quants.quantize(np.ascontiguousarray(x.astype(np.float32)), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_gguf(tmp_path / "model.gguf")
    assert ours.metadata == {
        "general.architecture": "llama", "llama.block_count": 3, "tokenizer.ggml.tokens": ["<s>", "ä"],
        "tokenizer.ggml.scores": [0.0, -1.5],
    } | ({"general.alignment": 64} if alignment else {})  # fmt: skip
    for t in oracle.GGUFReader(tmp_path / "model.gguf").tensors:
        assert (bits(ours.read(t.name, np.float32)) == bits(oracle.quants.dequantize(t.data, t.tensor_type))).all()
        assert ours[t.name].offset == t.data_offset and ours[t.name].size == t.n_bytes
        np.testing.assert_allclose(ours.read(t.name, np.float32), weights()[t.name].astype(np.float32), atol=0.2)


def test_tensors_are_produced_one_after_the_other_as_they_are_written(tmp_path):
    asked = []

    def produce(name):
        asked.append(name)
        return weights()[name]

    specs = {name: Spec(x.shape) for name, x in weights().items()}
    kinds = {"a.weight": "Q8_0", "c.weight": "BF16", "d.weight": "F16"}  # b.bias is F32 of itself
    write_gguf(tmp_path / "produced.gguf", {"n": 1}, specs, kinds=kinds, produce=produce)
    write_gguf(tmp_path / "given.gguf", {"n": 1}, weights(), kinds=kinds)
    assert asked == list(weights())
    assert (tmp_path / "produced.gguf").read_bytes() == (tmp_path / "given.gguf").read_bytes()
    found = open_gguf(tmp_path / "given.gguf")
    assert [found[name].kind for name in found] == ["Q8_0", "F32", "BF16", "F16"]
    assert (bits(found.read("c.weight")) == bits(weights()["c.weight"])).all()


@pytest.mark.parametrize(
    ("tensors", "kinds", "why"),
    [
        ({"w": np.zeros((2, 33))}, "Q8_0", "cannot be written as Q8_0, whose rows are multiples of 32; choose F16"),
        ({"w": np.zeros((2, 32))}, "Q4_K", "w cannot be written as Q4_K; known: F32, F16, BF16, Q8_0, Q4_0"),
        ({"w": np.zeros((2, 32))}, {"v": "F32"}, "w cannot be written as None"),
        ({"w": np.zeros((2, 2), np.int32)}, "F32", "w holds int32; only floats can be written"),
        ({"w": np.float32(1)}, "F32", "1 to 4 dimensions"),
        ({"w": np.zeros((2, 0))}, "F32", "none of them 0"),
        ({"w": np.zeros((1, 1, 1, 1, 1))}, "F32", "1 to 4 dimensions"),
        ({"w" * 64: np.zeros(1)}, "F32", "has 64 bytes; it can have 1 to 63"),
        ({"": np.zeros(1)}, "F32", "has 0 bytes"),
        ({"\udcff": np.zeros(1)}, "F32", "not UTF-8"),
    ],
)
def test_tensors_that_cannot_be_written_are_refused(tensors, kinds, why, tmp_path):
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    with pytest.raises(CheckpointError, match=why):
        write_gguf(tmp_path / "model.gguf", {}, tensors, kinds=kinds)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError, RuntimeError), (KeyboardInterrupt, KeyboardInterrupt), (OSError, CheckpointError)],
)
def test_a_write_that_fails_leaves_what_was_there(error, raised, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, {"n": 1}, weights(), kinds="F32")
    before = file.read_bytes()

    def produce(name):
        if name == "d.weight":
            raise error("no more")
        return weights()[name]

    with pytest.raises(raised, match="no more"):
        write_gguf(file, {"n": 2}, {n: Spec(x.shape) for n, x in weights().items()}, kinds="F16", produce=produce)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_tensor_of_another_shape_than_promised_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"w was produced with shape \(3, 2\) in place of \(2, 3\)"):
        write_gguf(tmp_path / "x.gguf", {}, {"w": Spec((2, 3))}, kinds="F32", produce=lambda _: np.zeros((3, 2)))
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_made_is_an_error_of_its_own_kind(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing/model.gguf: cannot be written"):
        write_gguf(tmp_path / "missing/model.gguf", {}, {}, kinds="F32")


def test_a_large_vocabulary_opens_in_half_a_second(tmp_path):
    tokens = [f"tökén {i}" for i in range(49152)]
    metadata = {"tokens": tokens, "merges": tokens, "types": [1] * 49152, "scores": [0.5] * 49152}
    write_gguf(tmp_path / "model.gguf", metadata, {}, kinds="F32")
    start = time.process_time()
    found = open_gguf(tmp_path / "model.gguf")
    assert time.process_time() - start < 0.5
    assert found.metadata == metadata


def test_version_2_opens_and_gaps_are_padding(opened):
    found = opened(model([u32("k", 5)], [tensor("b", [2, 3], 0, 96), tensor("a", [8], 0, 0)], 300, version=2))
    assert found.metadata == {"k": 5}
    assert list(found) == ["b", "a"]
    assert found["b"].shape == (3, 2) and found["b"].offset == found["a"].offset + 96
    assert found["b"].file.name == "model.gguf"


def nested(depth):
    return text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


F32 = [tensor("w", [8], 0, 0)]
WRONG = {
    "empty": (b"", "no GGUF file: it is shorter"),
    "magic": (b"GGML" + model()[4:], "begins with b'GGML' in place of b'GGUF'"),
    "version 1": (model(version=1), "GGUF version 1; versions 2 and 3 can be read"),
    "version 4": (model(version=4), "GGUF version 4"),
    "big-endian": (model(version=3 << 24), "is big-endian"),
    "tensor count": (model(counts=(1 << 60, 0)), "a list of 0 metadata and 1152921504606846976 tensors needs"),
    "value count": (model(counts=(0, 1 << 63)), "metadata and 0 tensors needs"),
    "key length": (model([struct.pack("<QQ", 1 << 40, 0)]), "1099511627776 bytes at byte 32 is longer than 65535"),
    "key": (model([text(b"\xff") + struct.pack("<II", 4, 1)]), "is not UTF-8"),
    "no key": (model([u32("", 1)]), "is empty"),
    "same keys": (model([u32("k", 1), u32("k", 2)]), "'k', is not unique"),
    "type": (model([text("k") + struct.pack("<II", 13, 1)]), "metadata 'k' is of type 13; known are 0 to 12"),
    "array type": (model([array("k", 77, 1)]), "metadata 'k' is of type 77"),
    "string length": (model([text("k") + struct.pack("<IQ", 8, 1 << 50)]), "metadata 'k', string 0 of 1, needs"),
    "array length": (model([array("k", 11, 1 << 61)]), "needs 18446744073709551616 bytes at byte 49 and 15 are left"),
    "strings": (model([array("k", 8, 1 << 62)]), "4611686018427387904 strings, needs"),
    "a string": (model([array("k", 8, 2, text("a") + b"\xff" * 8)]), "string 1 of 2, needs"),
    "arrays": (model([array("k", 9, 1 << 62)]), "array of 4611686018427387904 arrays, needs"),
    "depth": (model([nested(4)]), "nested deeper than 4"),
    "great depth": (model([nested(100_000)]), "nested deeper than 4"),
    "bool": (model([text("k") + struct.pack("<IB", 7, 2)]), "neither true"),
    "same tensors": (model([], F32 * 2, 64), "tensor's name at byte .*'w', is not unique"),
    "tensor's name": (model([], [tensor(b"\xc3", [8], 0, 0)], 32), "is not UTF-8"),
    "5 dims": (model([], [tensor("w", [1] * 5, 0, 0)], 32), "has 5 dimensions; a tensor has at most 4"),
    "many dims": (model([], [text("w") + struct.pack("<I", 1 << 31)], 64), "has 2147483648 dimensions"),
    "zero dim": (model([], [tensor("w", [8, 0], 0, 0)], 32), r"shape \(0, 8\); dimensions are positive"),
    "overflow": (model([], [tensor("w", [1 << 32, 1 << 32], 99, 0)], 32), "products < 2"),
    "row": (model([], [tensor("w", [48], 8, 0)], 64), r"\(48,\) is stored as Q8_0, whose rows are multiples of 32"),
    "size": (model([], [tensor("w", [1 << 40], 0, 0)], 32), "4398046511104 bytes at byte 64, reaches past the end"),
    "cut": (model([], F32, 31), "32 bytes at byte 64, reaches past the end of the file at byte 95"),
    "offset": (model([], [tensor("w", [8], 0, 8)], 64), "begins at 8 in the data, no multiple of 32"),
    "far offset": (model([], [tensor("w", [8], 0, 1 << 63)], 32), "reaches past the end of the file"),
    "far, of any kind": (model([], [tensor("w", [8], 99, 1 << 20)], 32), "reaches past the end of the file"),
    "overlap": (model([], [tensor("w", [9], 0, 0), tensor("v", [8], 0, 32)], 64), "'w', 36 .* past the start of 'v'"),
    "same place": (model([], [tensor("w", [8], 99, 0), tensor("v", [8], 99, 0)], 64), "past the start of"),
    "alignment 48": (model([u32("general.alignment", 48)], F32, 64), "alignment is 48, and should be a power of two"),
    "alignment 0": (model([u32("general.alignment", 0)], F32, 64), "alignment is 0"),
    "alignment 2^30": (model([u32("general.alignment", 1 << 30)], F32, 64), "alignment is 1073741824"),
    "alignment text": (model([text("general.alignment") + struct.pack("<I", 8) + text("32")], F32, 64), "is '32'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_with_what_is_wrong(case, opened):
    data, why = WRONG[case]
    with pytest.raises(CheckpointError, match=f"model.gguf: .*{why}"):
        opened(data)


@pytest.mark.parametrize("case", [case for case in WRONG if not case.startswith("alignment")])
def test_lying_sizes_take_no_memory(case, tmp_path):
    (tmp_path / "model.gguf").write_bytes(WRONG[case][0])
    with pytest.raises(CheckpointError):  # loads what an error's way needs
        open_gguf(tmp_path / "model.gguf")
    gc.collect()
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_gguf(tmp_path / "model.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_longer_than_any_model_has_is_refused(opened, monkeypatch):
    monkeypatch.setattr(gguf, "_HEADER", 1 << 20)
    with pytest.raises(CheckpointError, match="bytes at byte 49 and .* are left of the 1 MiB that a header may have"):
        opened(model([array("k", 0, 1 << 21, bytes(1 << 21))]))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none.gguf: cannot be opened .No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_gguf(str(tmp_path))


def test_a_misspelt_tensor_is_answered_with_the_nearest(opened):
    found = opened(model([], [tensor("token_embd.weight", [8], 0, 0)], 32))
    with pytest.raises(CheckpointError, match=r"no tensor 'tok_embd.weight' among its 1; nearest: token_embd.weight"):
        found.read("tok_embd.weight")
    assert "tok_embd.weight" not in found


def small_model(tmp_path):
    """A file with every type of value and every kind that can be written."""
    file = tmp_path / "small.gguf"
    tensors = {f"blk.{i}.weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32) for i in range(5)}
    kinds = dict(zip(tensors, ggml.WRITABLE, strict=True))
    write_gguf(file, EVERY_TYPE | {"general.alignment": 32}, tensors, kinds=kinds)
    return file


@pytest.fixture
def unchecked():
    """Functions run without the check of their annotations, which takes twenty times as long as opening a file."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_a_file_cut_at_any_byte_is_refused(tmp_path, unchecked):
    file = small_model(tmp_path)
    needed = max(e.offset + e.size for e in open_gguf(file).values())
    for size in reversed(range(needed)):
        os.truncate(file, size)
        with pytest.raises(CheckpointError):
            open_gguf(file)


def damaged(data, draw, head):
    """`data` with one to four wounds, most of them in the header."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(min(head, len(data)) if draw.random() < 0.95 else len(data))
        match draw.randrange(6):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.choice([0, 1, 8, 9, 127, 255])
            case 2:
                data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 16, 1 << 31, 1 << 63, (1 << 64) - 1]))
            case 3:
                del data[at + 1 : at + draw.randint(2, 16)]
            case 4:
                data[at:at] = draw.randbytes(draw.randint(1, 16))
            case 5:
                del data[at + 1 :]
    return bytes(data)


def test_ten_thousand_damaged_files_open_or_are_refused(tmp_path, unchecked):
    file = small_model(tmp_path)
    data = file.read_bytes()
    head = min(e.offset for e in open_gguf(file).values())
    draw = random.Random(0)
    start, read, refused = time.process_time(), 0, 0
    with file.open("r+b", buffering=0) as f:
        for _ in range(10_000):
            f.seek(0)
            f.truncate(f.write(damaged(data, draw, head)))
            try:
                found = open_gguf(file)
                for name in found:
                    assert found.read(name).shape == found[name].shape
                read += 1
            except CheckpointError:
                refused += 1
            found = None  # before the file under its map is written again
    assert time.process_time() - start < 15
    assert read > 500 and refused > 5000  # the damage is neither always fatal nor always harmless


@pytest.fixture
def parts(tmp_path, oracle):
    """The files of a model that the oracle wrote in three parts."""
    writer = oracle.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.weight", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.iterdir())


def test_a_split_model_opens_whole(parts):
    found = open_gguf(parts[0])
    assert [f.name for f in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert list(found) == [f"blk.{i}.weight" for i in range(5)]
    assert all((found.read(f"blk.{i}.weight") == i).all() for i in range(5))
    assert found["blk.4.weight"].file == parts[2]
    assert found.metadata == {"general.architecture": "llama"}


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.gguf: missing of the 3 parts"):
        open_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.gguf and 1 more: missing of the 3 parts"):
        open_gguf(parts[0])


def test_another_part_than_the_first_names_the_first(parts):
    with pytest.raises(CheckpointError, match="is part 00002 of 3; open the first, model-00001-of-00003.gguf"):
        open_gguf(parts[1])


def test_a_part_under_another_name_or_in_anothers_place_is_refused(parts):
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.gguf: says .* = \(2, 3\), and should \(1, 3\)"):
        open_gguf(parts[0])
    alone = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="is part of 3, and its name should end in -00001-of-00003.gguf"):
        open_gguf(alone)


def test_parts_that_hold_the_same_or_too_few_tensors_are_refused(parts):
    data = parts[2].read_bytes()
    parts[2].write_bytes(data.replace(b"blk.4.weight", b"blk.0.weight"))
    with pytest.raises(CheckpointError, match="'blk.0.weight' is in model-00001-of-00003.gguf too"):
        open_gguf(parts[0])
    parts[2].write_bytes(data)
    data = parts[0].read_bytes()
    parts[0].write_bytes(data.replace(struct.pack("<Ii", 5, 5), struct.pack("<Ii", 5, 6)))
    with pytest.raises(CheckpointError, match="its 3 parts hold 5 tensors and should hold 6"):
        open_gguf(parts[0])


def test_a_real_model_opens_and_its_first_layer_is_finite():
    if not SMOLLM2.is_file():
        pytest.skip(f"needs the weights of SmolLM2 at {SMOLLM2}: `make weights` fetches them (JAXLLM_WEIGHTS)")
    found = open_gguf(SMOLLM2)
    assert found.metadata["general.architecture"]
    first = [name for name in found if name.startswith("blk.0.") and found[name].kind in ggml.READABLE]
    assert first and all(np.isfinite(found.read(name, np.float32)).all() for name in first)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_keep_their_values(kind, opened):
    dtype = ggml.PLAIN[kind]
    data = model([], [tensor("x", [2], ggml.KINDS[kind].number, 0)])
    values = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    np.testing.assert_array_equal(opened(data + values.tobytes()).read("x"), values)
