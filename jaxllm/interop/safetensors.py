"""Safetensors files: read through memory maps once every claim of a header is proven, written whole or not at all.

A file is 8 bytes (little-endian) that say how long the header is, the header in JSON with each tensor's dtype, shape
and `data_offsets` (first byte and end, counted from the end of the header), then the tensors, little-endian, row by
row, without holes (https://github.com/huggingface/safetensors). Nothing here imports JAX.
"""

import json
import math
import mmap
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.core.errors import CheckpointError
from jaxllm.data.manifest import sha256, sync

# In the order in which the reference library lays tensors out: wide ones first, which keeps all of them aligned.
_TYPES = {
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
    "BF16": ml_dtypes.bfloat16, "F16": "<f2", "U16": "<u2", "I16": "<i2",
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": "i1", "U8": "u1", "F6_E3M2": ml_dtypes.float6_e3m2fn, "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F4": ml_dtypes.float4_e2m1fn, "BOOL": "?",
}  # fmt: skip
DTYPES = {code: np.dtype(t) for code, t in _TYPES.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}
_BITS = {"F6_E3M2": 6, "F6_E2M3": 6, "F4": 4}  # numpy gives each value a byte, the format does not

MAX_HEADER = 100_000_000  # bytes, the reference library's limit
MAX_DIMS = 64  # numpy's limit
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAVED = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?(\.part)?")  # what write_folder leaves
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Entry(NamedTuple):
    """Where a tensor lies: `size` bytes of `file` from its byte `offset` on."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


class Spec(NamedTuple):
    """A tensor to write whose data comes later."""

    dtype: np.dtype
    shape: tuple[int, ...]


class _Header(NamedTuple):
    entries: dict[str, Entry]
    metadata: dict[str, str]
    stamp: tuple[int, int]


class Tensors(Mapping[str, Entry]):
    """The tensors of a file or a folder by name, file by file, in the order of their bytes.

    `metadata` is that of the first file. As a context manager it closes itself.
    """

    def __init__(self, headers: Mapping[Path, _Header]):
        self.metadata: dict[str, str] = next(iter(headers.values())).metadata
        self._entries = {name: entry for header in headers.values() for name, entry in header.entries.items()}
        self._stamps = {file: header.stamp for file, header in headers.items()}
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> "Tensors":  # noqa: PYI034 (beartype refuses Self here)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the memory maps; one that arrays still view goes with the last of them."""
        self._maps.clear()

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of its file: the disk is read where the array is looked at.

        Pages that earlier ones were looked at in no longer count as memory of this process; they come back if need be.

        Raises:
          KeyError: no tensor has that name.
          CheckpointError: a type that packs values closer than bytes, or the file was changed since it was opened.
        """
        entry = self[name]
        if (code := _CODES[entry.dtype]) in _BITS:
            raise CheckpointError(
                f"{entry.file}: {name!r} is {code}: {_BITS[code]} bits a value cannot be viewed as bytes"
            )
        for pages in self._maps.values():
            let_go(pages)
        if entry.file not in self._maps:
            self._maps[entry.file] = self._map(entry.file)
        data = np.frombuffer(self._maps[entry.file], np.uint8, entry.size, entry.offset)
        return data.view(entry.dtype).reshape(entry.shape)

    def _map(self, file: Path) -> mmap.mmap:
        with _about(file), file.open("rb") as f:
            if _stamp(f.fileno()) != self._stamps[file]:
                raise ValueError("was changed after its header was read; open it again")
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def let_go(pages: mmap.mmap) -> None:
    """Takes the pages of a mapped file out of this process's memory: one that is read again is mapped again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors file, of an index file and its shards, or of a folder with either.

    Reads headers only. A folder's `model.safetensors` goes before its index, as in transformers.

    Raises:
      CheckpointError: nothing there; a file whose header does not describe exactly the bytes that it has; an index
        that does not name exactly the tensors of its shards.
    """
    path = Path(path)
    if os.path.isdir(path):
        here = [path / name for name in (SINGLE, INDEX) if os.path.isfile(path / name)]
        if not here:
            raise CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}; name the file if it has another name")
        path = here[0]
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; name a safetensors file, its index, or their folder")
    if path.suffix != ".json":
        return Tensors({path: _read_header(path)})
    weight_map = _read_weight_map(path)
    headers = {file: _read_header(file) for file in (path.parent / shard for shard in sorted(set(weight_map.values())))}
    if wrong := _disagreements(weight_map, headers):
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; get index and shards again, from one save")
    return Tensors(headers)


def _read_header(file: Path) -> _Header:
    with _about(file):
        with file.open("rb") as f:
            stamp = _stamp(f.fileno())
            size = stamp[0]
            length = int.from_bytes(f.read(8), "little")
            if size < 8:
                raise ValueError(f"has {size} bytes of the 8 that a safetensors file begins with")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"claims a header of {length} bytes: {size - 8} follow, {MAX_HEADER} are the most")
            header = _parse(f.read(length))
        metadata = _strings("__metadata__", header.pop("__metadata__", {}))
        entries = [(name, _entry(name, info, file, 8 + length, size)) for name, info in header.items()]
        entries.sort(key=lambda item: (item[1].offset, item[1].size))
        end = 8 + length
        for name, entry in entries:
            if entry.offset < end:
                raise ValueError(f"tensor {_brief(name)} overlaps the one before by {end - entry.offset} bytes")
            if entry.offset > end:
                raise ValueError(f"{entry.offset - end} bytes before tensor {_brief(name)} belong to none")
            end += entry.size
        if end < size:
            raise ValueError(f"{size - end} bytes follow the last tensor, where the file must end")
    return _Header(dict(entries), metadata, stamp)


def _entry(name: str, info: Any, file: Path, start: int, size: int) -> Entry:
    """What a header says of a tensor, in a file of `size` bytes with data from `start`; ValueError if it cannot be."""
    tensor = f"tensor {_brief(name)}:"
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise ValueError(f"{tensor} {_brief(info)} must be an object with dtype, shape and data_offsets")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{tensor} dtype {_brief(code)} is none of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{tensor} shape {_brief(shape)} must be a list of at most {MAX_DIMS} integers from 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} data_offsets {_brief(offsets)} must be two integers, 0 <= begin <= end")
    dtype, (begin, end) = DTYPES[code], offsets
    if math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:  # what numpy can address, a dimension of 0 or not
        raise ValueError(f"{tensor} shape {_brief(shape)} is beyond 2^63 bytes")
    if start + end > size:
        raise ValueError(f"{tensor} ends at byte {_brief(end)} of the data; cut short, {size - start} are there")
    bits = math.prod(shape) * _BITS.get(code, 8 * dtype.itemsize)
    if bits != 8 * (end - begin):
        raise ValueError(f"{tensor} {code} of shape {shape} is {bits / 8:.20g} bytes, data_offsets span {end - begin}")
    return Entry(dtype, tuple(shape), file, start + begin, end - begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # type: True is an int to Python


def _strings(what: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(s, str) for pair in value.items() for s in pair):
        raise ValueError(f"{what} {_brief(value)} must be an object of strings")
    return value


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        if raw.lstrip()[:1] != b"{":
            raise ValueError("an object begins with {")
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"no JSON object in UTF-8 where it must be ({e})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        raise ValueError(f"twice the same key: {_some(twice)}")
    "".join(s for pair in pairs for s in pair if isinstance(s, str)).encode()  # raises at half a surrogate pair
    return tree


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, every shard a file in the folder of the index."""
    with _about(index):
        with index.open("rb") as f:
            raw = f.read(MAX_HEADER + 1)
        if len(raw) > MAX_HEADER:
            raise ValueError(f"has more than {MAX_HEADER} bytes, the most for an index")
        weight_map = _strings("weight_map", _parse(raw).get("weight_map"))
        if not weight_map:
            raise ValueError("weight_map names no tensor")
        shards = sorted(set(weight_map.values()))
        if wrong := [s for s in shards if s in (".", "..") or re.search(r"[/\\]", s) or not _within(index.parent, s)]:
            raise ValueError(f"{_some(wrong)} must be plain names of files in the folder of the index")
        if missing := [s for s in shards if not os.path.isfile(index.parent / s)]:
            raise ValueError(f"names shards that are missing: {_some(missing)}; get them too")
        return weight_map


def _within(folder: Path, name: str) -> bool:
    """Whether a file lies in the folder, links followed.

    In the cache of the Hugging Face Hub the files of `snapshots/X` are links to `blobs`, which count as its own.
    """
    home = Path(os.path.realpath(folder))
    homes = [home, *(up.parent / "blobs" for up in home.parents if up.name == "snapshots")]
    return "\0" not in name and any(Path(os.path.realpath(folder / name)).is_relative_to(h) for h in homes)


def _disagreements(weight_map: Mapping[str, str], headers: Mapping[Path, _Header]) -> list[str]:
    held = {file.name: header.entries.keys() for file, header in headers.items()}
    count = Counter(name for names in held.values() for name in names)
    found = {
        "in two shards": [name for name, n in count.items() if n > 1],
        "not in the shard that is named": [f"{name} ({s})" for name, s in weight_map.items() if name not in held[s]],
        "in a shard, but not named": [f"{n} ({s})" for s, names in held.items() for n in names if n not in weight_map],
    }
    return [f"{what}: {_some(names)}" for what, names in found.items() if names]


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Names the file when something is wrong with it: other errors become CheckpointErrors."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: {e}") from None


def _brief(value: Any) -> str:
    """As repr, but not at any length that a file may ask for."""
    brief = reprlib.Repr()
    brief.maxstring = 200
    return brief.repr(value)


def _some(names: list[str]) -> str:
    """The first ten, and how many more."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(_brief(name) for name in names[:10]) + more


def _stamp(fd: int) -> tuple[int, int]:
    """A file's size in bytes and the time of its last change, which tell whether it was written again."""
    stat = os.fstat(fd)
    return stat.st_size, stat.st_mtime_ns


def verify(folder: str | Path) -> int:
    """How many files have the SHA-256 that the folder's `SHA256SUMS` gives them; 0 where it has no such file.

    Raises:
      CheckpointError: naming each file that differs or is missing; lines that are not `hex  name`; names that leave
        the folder.
    """
    folder = Path(folder)
    sums = folder / "SHA256SUMS"
    if not os.path.isfile(sums):
        return 0
    with _about(sums):
        lines = [line for line in sums.read_text(encoding="utf-8").split("\n") if line]
        if odd := [line for line in lines if not _SUM.fullmatch(line)]:
            raise ValueError(f"{_some(odd)} must be 64 hex digits, two spaces and a name")
        wanted = [found.groups() for found in map(_SUM.fullmatch, lines) if found]
        if outside := [name for _, name in wanted if not _within(folder, name)]:
            raise ValueError(f"{_some(outside)} must be names of files in the folder")
        if wrong := [f"{name!r} {fault}" for digest, name in wanted if (fault := _fault(folder / name, digest))]:
            raise ValueError(f"{', '.join(wrong)}; get them again")
    return len(wanted)


def _fault(file: Path, digest: str) -> str | None:
    if not os.path.isfile(file):
        return "is missing"
    return None if sha256(file) == digest.lower() else "differs"


def write(
    path: str | Path,
    tensors: Mapping[str, np.ndarray | Spec],
    *,
    produce: Callable[[str], np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, tensor by tensor, laid out as by the reference library; what `path` was it stays until then.

    `produce` gives the data of each `Spec` when its turn comes: by descending width of dtype, then by name.

    Raises:
      CheckpointError: a dtype that the format lacks, or data that is not as its `Spec` says.
    """
    with _staged([Path(path)]) as (part,):
        _write(part, tensors, produce, metadata)


def write_folder(
    folder: str | Path,
    tensors: Mapping[str, np.ndarray | Spec],
    *,
    produce: Callable[[str], np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = {"format": "pt"},
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` of data (or one tensor), then their index.

    Tensors fill the shards in the order given. Returns the files, the index last. The folder stays as it was until
    all of them are whole; then what earlier saves left under other names goes.

    Raises:
      CheckpointError: as `write`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: _size(_spec(name, value)) for name, value in tensors.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    of = len(shards)
    files = [folder / (SINGLE if of == 1 else f"model-{i:05}-of-{of:05}.safetensors") for i in range(1, of + 1)]
    index = folder / INDEX
    with _staged(files) as parts:
        for part, names in zip(parts, shards, strict=True):
            _write(part, {name: tensors[name] for name in names}, produce, metadata)
        if of > 1 and any(file.exists() for file in files):
            index.unlink(missing_ok=True)  # a crash among the renames must not leave a mixture that opens
            sync(folder)
    if of > 1:
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        tree = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        with _staged([index]) as (part,):
            part.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            sync(part)
        files.append(index)
    for old in folder.iterdir():
        if _SAVED.fullmatch(old.name) and old not in files:
            old.unlink()
    return files


@contextmanager
def _staged(files: list[Path]) -> Iterator[list[Path]]:
    """Places beside the files to write to and sync; at the end they take the files' names, or go if it raised."""
    parts = [file.with_name(file.name + ".part") for file in files]
    try:
        yield parts
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
        sync(files[0].parent)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _write(
    part: Path,
    tensors: Mapping[str, np.ndarray | Spec],
    produce: Callable[[str], np.ndarray] | None,
    metadata: Mapping[str, str] | None,
) -> None:
    specs = {name: _spec(name, value) for name, value in tensors.items()}
    order = sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = _strings("metadata", dict(sorted(metadata.items())))
    end = 0
    for name in order:
        begin, end = end, end + _size(specs[name])
        header[name] = {"dtype": _CODES[specs[name].dtype], "shape": specs[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with part.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name]
            if isinstance(data, Spec):
                assert produce is not None, f"{name!r} is a Spec: produce must give its data"
                data = produce(name)
                if (got := _spec(name, data)) != specs[name]:
                    raise CheckpointError(f"{name!r}: {specs[name]} was announced, produce gave {got}")
            f.write(np.ascontiguousarray(data, specs[name].dtype).reshape(-1).view(np.uint8))
        f.flush()
        os.fsync(f.fileno())


def _spec(name: str, value: np.ndarray | Spec) -> Spec:
    """The dtype, little-endian, and the shape of a tensor that can be written."""
    dtype = np.dtype(value.dtype).newbyteorder("<")
    if name == "__metadata__":
        raise CheckpointError(f"no tensor can be named {name}: the format keeps that name for itself")
    if dtype not in _CODES or _CODES[dtype] in _BITS:
        known = ", ".join(str(d) for d, code in _CODES.items() if code not in _BITS)
        raise CheckpointError(f"{name!r}: {dtype} cannot be written; known: {known}")
    return Spec(dtype, tuple(int(n) for n in value.shape))


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
