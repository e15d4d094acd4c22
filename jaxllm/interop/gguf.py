"""GGUF, the file format of llama.cpp: typed metadata, a table of tensors, and the tensors (ggml/docs/gguf.md).

Versions 2 and 3 in little-endian order are read, version 3 is written. Text other than names may hold any bytes (the
tokens of some vocabularies are not whole UTF-8): what is not UTF-8 stands in a string as lone surrogates, Python's
`surrogateescape`, and is written back as the bytes it was.
"""

import contextlib
import difflib
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jaxllm.core.errors import CheckpointError
from jaxllm.data.manifest import publish
from jaxllm.interop import ggml
from jaxllm.interop.safetensors import let_go

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # unless `general.alignment` says another
_DIMS = 4
_DEPTH = 4  # of arrays in arrays
_NAME = 65535  # bytes
_HEADER = 1 << 28  # bytes: ten times the header of a model with half a million tokens and as many merges
_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
_CODES = {number: code for code, number in _TYPES.items()}
_STRING, _ARRAY = 8, 9
_DAMAGED = "the file is truncated or damaged; copy it again"
_OTHER = "a part belongs to another model; copy them again"
_CHUNK = 1 << 22  # weights converted before they are written
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Entry(NamedTuple):
    """Where a tensor lies and how it is stored.

    `shape` is in NumPy's order, the contiguous dimension last (GGUF lists it first). `offset` counts bytes from the
    start of `file`. For a kind whose block size is not known, `size` reaches to the next tensor.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int
    file: Path


class GGUF(Mapping[str, Entry]):
    """The tensors of an open model by name, and its `metadata`; made by `open_gguf`.

    Files are mapped, not read: they must stay as they are while this or an array of theirs is in use.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], entries: dict[str, Entry], maps: dict[Path, mmap.mmap]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._entries = entries
        self._maps = maps

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, flat: a read-only view of the file.

        Raises:
          CheckpointError: no such tensor.
        """
        if name not in self:
            near = ", ".join(difflib.get_close_matches(name, self, 3, 0))
            raise CheckpointError(f"{self.path}: no tensor {name!r} among its {len(self)}; nearest: {near}")
        for pages in self._maps.values():
            let_go(pages)
        entry = self[name]
        return np.frombuffer(self._maps[entry.file], np.uint8, entry.size, entry.offset)

    def read(self, name: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """A tensor's weights. Quantised ones become float32, others come as they are stored, or either as `dtype`.

        A read-only view of the file where nothing has to be converted.

        Raises:
          CheckpointError: no such tensor, or one of a kind that cannot be dequantised.
        """
        data = self.raw(name)
        entry = self[name]
        if entry.kind not in ggml.READABLE:
            known = ", ".join(ggml.READABLE)
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {entry.kind}, which cannot be read; known: {known}"
            )
        stored = ggml.PLAIN.get(entry.kind)
        if stored is not None and (dtype is None or np.dtype(dtype) == stored):
            return data.view(stored).reshape(entry.shape)
        return ggml.dequantise(data, entry.kind, np.float32 if dtype is None else dtype).reshape(entry.shape)


def open_gguf(path: str | Path) -> GGUF:
    """The model in a file, its header read and checked; given the first part of a split model, that of all parts.

    No tensor is read, and no memory taken that a wrong count or length asks for.

    Raises:
      CheckpointError: not such a file, of another version, truncated, damaged, or a part is missing.
    """
    path = Path(path)
    first = _open_file(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return GGUF(path, first.metadata, first.entries, {path: first.map})
    entries, maps = {}, {}
    for number, file in enumerate(_parts(path, first.metadata)):
        part = _open_file(file) if number else first
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (number, count):
            raise CheckpointError(
                f"{file}: says split.no, split.count = {found}, and should {(number, count)}: {_OTHER}"
            )
        if both := entries.keys() & part.entries:
            raise CheckpointError(f"{file}: tensor {min(both)!r} is in {entries[min(both)].file.name} too: {_OTHER}")
        entries |= part.entries
        maps[file] = part.map
    total = first.metadata.get("split.tensors.count", len(entries))
    if total != len(entries):
        raise CheckpointError(
            f"{path}: its {count} parts hold {len(entries)} tensors and should hold {total}: {_OTHER}"
        )
    whole = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return GGUF(path, whole, entries, maps)


def _parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a split model, which are all there, given its first."""
    number, count = metadata.get("split.no"), metadata["split.count"]
    match = _PART.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is part of {count}, and its name should end in -{1:05}-of-{count:05}.gguf as the others' names do"
        )
    names = [f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf" for i in range(count)]
    if number != 0 or path.name != names[0]:
        raise CheckpointError(f"{path}: is part {match[2]} of {count}; open the first, {names[0]}")
    if missing := [name for name in names if not (path.parent / name).exists()]:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CheckpointError(f"{path.parent / missing[0]}{others}: missing of the {count} parts of the model")
    return [path.parent / name for name in names]


class _File(NamedTuple):
    metadata: dict[str, Any]
    entries: dict[str, Entry]
    map: mmap.mmap


def _open_file(path: Path) -> _File:
    try:
        with path.open("rb") as f:
            if os.fstat(f.fileno()).st_size < 24:
                raise CheckpointError(f"{path}: is no GGUF file: it is shorter than a header of 24 bytes")
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be opened ({e.strerror or e})") from None
    head = _Header(path, data)
    num_tensors, num_values = head.start()
    metadata = {}
    for _ in range(num_values):
        key = head.name("a metadata key", metadata)
        what = f"metadata {key!r}"
        metadata[key] = head.value(head.unpack("<I", what)[0], what)
    tensors = {}
    for _ in range(num_tensors):
        name = head.name("a tensor's name", tensors)
        tensors[name] = head.tensor(name)
    alignment = _alignment(path, metadata)
    entries = _placed(path, tensors, _aligned(head.at, alignment), alignment, len(data))
    return _File(metadata, entries, data)


class _Header:
    """The start of a file, read from front to back; every size in it is held against the bytes that are left."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.at = 0
        self.end = min(len(data), _HEADER)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {text}")

    def take(self, size: int, what: str) -> int:
        """Where the next `size` bytes begin; they count as read."""
        self.need(size, what)
        self.at += size
        return self.at - size

    def need(self, size: int, what: str) -> None:
        """Returns if `size` bytes are left."""
        left = self.end - self.at
        if size > left:
            of = "" if self.end == len(self.data) else f" of the {_HEADER >> 20} MiB that a header may have"
            raise self.error(f"{what} needs {size} bytes at byte {self.at} and {left} are left{of}: {_DAMAGED}")

    def unpack(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))

    def start(self) -> tuple[int, int]:
        """How many tensors and how many metadata entries there are."""
        if (magic := self.data[self.take(4, "the magic") : self.at]) != _MAGIC:
            raise self.error(f"is no GGUF file: it begins with {magic!r} in place of {_MAGIC!r}")
        version, num_tensors, num_values = self.unpack("<IQQ", "the header")
        if version in (2 << 24, 3 << 24):
            raise self.error("is big-endian, and only little-endian files can be read: convert the model again")
        if version not in (2, 3):
            raise self.error(f"is of GGUF version {version}; versions 2 and 3 can be read: convert the model again")
        least = 14 * num_values + 25 * num_tensors  # names of one byte; values of one, tensors of no dimension
        self.need(least, f"a list of {num_values} metadata and {num_tensors} tensors")
        return num_tensors, num_values

    def name(self, what: str, known: Mapping[str, Any]) -> str:
        """A string that is not empty, is UTF-8 and not yet known."""
        (size,) = self.unpack("<Q", what)
        if size > _NAME:
            raise self.error(f"{what} of {size} bytes at byte {self.at} is longer than {_NAME}: {_DAMAGED}")
        at = self.take(size, what)
        text = self.data[at : self.at]
        try:
            name = text.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {at}, {text[:64]!r}, is not UTF-8: {_DAMAGED}") from None
        if not name or name in known:
            raise self.error(f"{what} at byte {at}, {name!r}, is {'not unique' if name else 'empty'}: {_DAMAGED}")
        return name

    def value(self, number: int, what: str, depth: int = 0) -> Any:
        """A value of the type of that number."""
        if number != _ARRAY:
            return self.values(number, 1, what)[0]
        if depth == _DEPTH:
            raise self.error(f"{what} holds arrays nested deeper than {_DEPTH}: {_DAMAGED}")
        number, count = self.unpack("<IQ", what)
        if number != _ARRAY:
            return self.values(number, count, what)
        self.need(12 * count, f"{what}, an array of {count} arrays,")
        return [self.value(number, what, depth + 1) for _ in range(count)]

    def values(self, number: int, count: int, what: str) -> list[Any]:
        """`count` values of the type of that number, which is not an array."""
        if number == _STRING:
            return self.strings(count, what)
        if number not in _CODES:
            raise self.error(f"{what} is of type {number}; known are 0 to 12: {_DAMAGED}")
        dtype = np.dtype(_CODES[number])
        at = self.take(count * dtype.itemsize, what)
        if dtype == np.bool_ and set(self.data[at : self.at]) - {0, 1}:
            raise self.error(f"{what} at byte {at} is neither true (1) nor false (0): {_DAMAGED}")
        return np.frombuffer(self.data, dtype, count, at).tolist()

    def strings(self, count: int, what: str) -> list[str]:
        self.need(8 * count, f"{what}, {count} strings,")
        data, at, end, size_at = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):  # a vocabulary has a hundred thousand: no call of a method here
            size = size_at(data, at)[0] if at + 8 <= end else 0
            stop = at + 8 + size
            if stop > end:
                self.at = at
                self.need(8 + size, f"{what}, string {len(texts)} of {count},")
            texts.append(str(data[at + 8 : stop], "utf-8", "surrogateescape"))
            at = stop
        self.at = at
        return texts

    def tensor(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """Kind, shape, and offset in the data of the tensor whose name was just read."""
        (num_dims,) = self.unpack("<I", name)
        if num_dims > _DIMS:
            raise self.error(f"tensor {name!r} has {num_dims} dimensions; a tensor has at most {_DIMS}: {_DAMAGED}")
        *dims, number, offset = self.unpack(f"<{num_dims}QIQ", name)
        shape = tuple(reversed(dims))
        if not 0 < math.prod(shape) < 1 << 63:
            raise self.error(f"tensor {name!r} has shape {shape}; dimensions are positive, products < 2^63: {_DAMAGED}")
        return ggml.NAMES.get(number, f"kind {number}"), shape, offset


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(value, int | np.integer) or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise CheckpointError(f"{path}: general.alignment is {value!r}, and should be a power of two from 8 to 2^20")
    return int(value)


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _placed(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]], start: int, alignment: int, end: int
) -> dict[str, Entry]:
    """The entries of a file whose data begins at `start` and ends at `end`, each apart from the others."""
    entries = {}
    behind, what = end, "the end of the file"
    for name, (kind, shape, offset) in sorted(tensors.items(), key=lambda item: -item[1][2]):
        if offset % alignment:
            raise CheckpointError(f"{path}: tensor {name!r} begins at {offset} in the data, no multiple of {alignment}")
        at = start + offset
        size = _size(kind, shape) if kind in ggml.KINDS else max(behind - at, 1)
        if size is None:
            raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} is stored as {_rows(kind)}: {_DAMAGED}")
        if at + size > behind:
            raise CheckpointError(
                f"{path}: tensor {name!r}, {size} bytes at byte {at}, reaches past {what} at byte {behind}: {_DAMAGED}"
            )
        behind, what = at, f"the start of {name!r}"
        entries[name] = Entry(kind, shape, at, size, path)
    return {name: entries[name] for name in tensors}


def _size(kind: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None if its rows are not whole blocks."""
    _, block, size = ggml.KINDS[kind]
    row = shape[-1] if shape else 1
    return None if row % block else math.prod(shape) // block * size


def _rows(kind: str) -> str:
    return f"{kind}, whose rows are multiples of {ggml.KINDS[kind].block}"


class Spec(NamedTuple):
    """Stands for a tensor whose values come when it is their turn to be written."""

    shape: tuple[int, ...]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | Spec],
    *,
    kinds: Mapping[str, str] | str,
    produce: Callable[[str], Any] | None = None,
) -> None:
    """Writes a model, one tensor in memory at a time; `path` holds all of it in the end, or is as it was.

    Tensors of one dimension (norms, biases) are written as F32 whatever `kinds` says, as llama.cpp's converters do.
    A Python int in the metadata becomes UINT32, or where it does not fit INT32, UINT64 or INT64; a float FLOAT32; a
    list, whose values are of one type, likewise, but ints in it INT32 where they fit, again as the converters do; a
    NumPy scalar or array keeps its type. Where blocks are written, `general.quantization_version`, which the format
    then asks for, is 2 unless the metadata holds another.

    Args:
      kinds: one kind for all, or tensor name -> kind: F32, F16, BF16, Q8_0 or Q4_0.
      produce: tensor name -> its array, called in order for each `Spec`.

    Raises:
      CheckpointError: metadata or tensors that the format cannot hold, or the file cannot be written.
    """
    assert produce or not any(isinstance(tensor, Spec) for tensor in tensors.values())
    path = Path(path)
    plan = {name: _planned(path, name, tuple(tensor.shape), kinds) for name, tensor in tensors.items()}
    alignment = _alignment(path, metadata)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as f:
            f.write(_head(path, metadata, plan, alignment))
            for name, planned in plan.items():
                f.write(bytes(-f.tell() % alignment))
                tensor = tensors[name]
                _write_tensor(f, path, name, produce(name) if isinstance(tensor, Spec) else tensor, planned)
            f.write(bytes(-f.tell() % alignment))  # after the last one too: llama.cpp reads whole multiples
        publish(part, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(e, OSError):
            raise CheckpointError(f"{path}: cannot be written ({e})") from e
        raise


class _Planned(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    size: int


def _planned(path: Path, name: str, shape: tuple[int, ...], kinds: Mapping[str, str] | str) -> _Planned:
    """How a tensor will be stored."""
    if not 1 <= len(shape) <= _DIMS or 0 in shape:
        raise CheckpointError(f"{path}: {name} has shape {shape}; a tensor has 1 to {_DIMS} dimensions, none of them 0")
    kind = "F32" if len(shape) == 1 else kinds if isinstance(kinds, str) else kinds.get(name)
    if kind not in ggml.WRITABLE:
        raise CheckpointError(f"{path}: {name} cannot be written as {kind}; known: {', '.join(ggml.WRITABLE)}")
    size = _size(kind, shape)
    if size is None:
        raise CheckpointError(f"{path}: {name} of shape {shape} cannot be written as {_rows(kind)}; choose F16 for it")
    return _Planned(kind, shape, size)


def _head(path: Path, metadata: Mapping[str, Any], plan: Mapping[str, _Planned], alignment: int) -> bytes:
    """All that stands before the padding to the data."""
    if any(ggml.KINDS[planned.kind].block > 1 for planned in plan.values()):
        metadata = {"general.quantization_version": 2, **metadata}
    head = [_MAGIC, struct.pack("<IQQ", 3, len(plan), len(metadata))]
    for key, value in metadata.items():
        number, data = _typed(value, f"{path}: metadata {key!r}")
        head += [_name(key, _NAME, f"{path}: metadata"), struct.pack("<I", number), data]
    offset = 0
    for name, (kind, shape, size) in plan.items():
        head.append(_name(name, 63, f"{path}: tensor"))
        head.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], ggml.KINDS[kind].number, offset))
        offset = _aligned(offset + size, alignment)
    return b"".join(head)


def _write_tensor(f: BinaryIO, path: Path, name: str, tensor: Any, planned: _Planned) -> None:
    tensor = np.asarray(tensor)
    if tensor.shape != planned.shape:
        raise CheckpointError(f"{path}: {name} was produced with shape {tensor.shape} in place of {planned.shape}")
    if tensor.dtype.kind != "f" and tensor.dtype != ml_dtypes.bfloat16:
        raise CheckpointError(f"{path}: {name} holds {tensor.dtype}; only floats can be written as {planned.kind}")
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        try:
            f.write(ggml.quantise(flat[start : start + _CHUNK], planned.kind))
        except ValueError as e:
            raise CheckpointError(f"{path}: {name}: {e}") from None


def _typed(value: Any, what: str, depth: int = 0) -> tuple[int, bytes]:
    """The number of a value's type, and its bytes."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, list | tuple | np.ndarray):
        return _packed([value], ("u4", "i4", "u8", "i8"), what)
    if depth == _DEPTH:
        raise CheckpointError(f"{what} nests lists deeper than {_DEPTH}")
    if isinstance(value, np.ndarray) and value.ndim == 1 and (code := value.dtype.str[1:]) in _TYPES:
        number, data = _TYPES[code], value.astype(code).tobytes()
    elif any(isinstance(v, list | tuple | np.ndarray) for v in value):
        items = [_typed(v, what, depth + 1) for v in value]
        if {number for number, _ in items} != {_ARRAY}:
            raise CheckpointError(f"{what} is a list of lists and of other values; a list is of one type")
        number, data = _ARRAY, b"".join(data for _, data in items)
    else:
        number, data = _packed(list(value), ("i4", "u4", "i8", "u8"), what)
    return _ARRAY, struct.pack("<IQ", number, len(value)) + data


def _packed(values: list[Any], ints: tuple[str, ...], what: str) -> tuple[int, bytes]:
    """Type number and bytes of values that are no lists; Python's ints take the first of `ints` to fit."""
    if values and all(isinstance(v, str) for v in values):
        return _STRING, b"".join(_string(v, "surrogateescape", what) for v in values)
    types = {type(v) for v in values} or {int}
    kind = types.pop()
    if types:
        raise CheckpointError(f"{what} is a list of {kind.__name__} and {types.pop().__name__}; a list is of one type")
    code = {bool: "b1", float: "f4"}.get(kind)
    if kind is int:
        low, high = min(values, default=0), max(values, default=0)
        code = next((c for c in ints if np.iinfo(c).min <= low and high <= np.iinfo(c).max), None)
    elif issubclass(kind, np.generic):
        code = np.dtype(kind).str[1:]
    if code not in _TYPES:
        known = "an int of 64 bits, a float, bool or str, a NumPy scalar of such a type, or a list of one of them"
        raise CheckpointError(f"{what} is of type {kind.__name__} ({str(values[0])[:40]}); it can be {known}")
    with np.errstate(over="ignore"):
        data = np.array(values, code)
    if kind is float and (np.isinf(data) & np.isfinite(values)).any():
        raise CheckpointError(f"{what} is too large for FLOAT32; give it as np.float64")
    return _TYPES[code], data.tobytes()


def _string(text: str, errors: str, what: str) -> bytes:
    try:
        data = text.encode("utf-8", errors)
    except UnicodeEncodeError:
        raise CheckpointError(f"{what} holds text that is not UTF-8: {text[:64]!r}") from None
    return struct.pack("<Q", len(data)) + data


def _name(name: str, most: int, what: str) -> bytes:
    data = _string(name, "strict", what)
    if not 8 < len(data) <= 8 + most:
        raise CheckpointError(f"{what}: the name {name[:80]!r} has {len(data) - 8} bytes; it can have 1 to {most}")
    return data
