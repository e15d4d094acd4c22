"""Sources give documents: a stable id, text, and the key that the validation split hashes.

Ids depend on names relative to the corpus, never on where it lies, and files come in the order of those names:
the same corpus gives the same documents anywhere. Files are streamed; whatever is over `max_bytes` is refused
before it is read whole.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxllm.core.errors import DataError, UserError
from jaxllm.data import config


class File(NamedTuple):
    """A file of a source; `name` is its path relative to the corpus, with forward slashes."""

    path: Path
    name: str


class Document(NamedTuple):
    """One document; `held_out_key` is the file's name where a file is a document, else the document's id."""

    id: str
    text: str
    held_out_key: str


Refuse = Callable[[str, str], None]  # (reason, message): raises, or counts and returns


def documents(
    cfg: config.Source, *, max_bytes: int, on_error: Literal["stop", "skip"], counts: Counter
) -> Iterator[Document]:
    """The documents of a source, file by file; memory is bounded by a few times `max_bytes`.

    `counts` grows by one for each thing left out, by reason: `empty` in any case, and under `on_error="skip"` also
    `unreadable`, `damaged` (a compressed or columnar file), `invalid_utf8`, `too_long`, `broken_json`, `no_text`.

    Raises:
      DataError: for the first of those under `on_error="stop"`; always for a source that names no file, gives no text
        or has no such column.
    """

    def refuse(reason: str, message: str) -> None:
        if on_error == "stop" and reason != "empty":
            raise DataError(f"{message}. `on_error: skip` would count it and go on")
        counts[reason] += 1

    found = False
    for file in files(cfg):
        left_out, given = counts.total(), False
        for document in _READERS[cfg.kind](cfg, file, max_bytes, refuse):
            if document.text.strip():
                given = True
                yield document
            else:
                refuse("empty", f"{document.id}: no text")
        if not given and counts.total() == left_out:
            refuse("empty", f"{file.path}: no text")
        found = found or given
    if not found:
        raise DataError(f"source {_said(cfg)} gives no text: {_reasons(counts)}; name files that hold text")


def inputs(cfg: config.Source, on_error: Literal["stop", "skip"] = "stop") -> list[dict[str, Any]]:
    """Name, size in bytes and SHA-256 of each file of a source; nulls for an unreadable one under `skip`."""
    found = []
    for file in files(cfg):
        try:
            with open(file.path, "rb") as f:
                sha256, size = hashlib.file_digest(f, "sha256").hexdigest(), f.tell()
        except OSError as e:
            if on_error == "stop":
                raise DataError(_unreadable(file.path, e)) from None
            sha256 = size = None
        found.append({"name": file.name, "size": size, "sha256": sha256})
    return found


# --- files -------------------------------------------------------------------------------------------------------


def files(cfg: config.Source) -> list[File]:
    """The files of a source, sorted by name, none twice.

    Raises:
      DataError: for a path that is missing or a folder, a glob or folder without files, a package that is not there.
    """
    match cfg:
        case config.TextFiles() | config.Jsonl():
            found = _globbed(cfg.files)
        case config.PythonSource():
            found = _python_files(cfg.package)
        case config.HuggingFace():
            found = _columnar_files(Path(cfg.path), cfg.split)
    return sorted(set(found), key=lambda file: file.name)


def _globbed(patterns: tuple[str, ...]) -> list[File]:
    paths, roots = [], []
    for pattern in patterns:
        path = Path(os.path.abspath(os.path.expanduser(pattern)))
        if path.is_dir():
            raise DataError(f"{pattern}: a folder, where a file is needed; write {pattern.rstrip('/')}/**/*.SUFFIX")
        if path.exists() or not glob.has_magic(pattern):
            if not path.exists():
                raise DataError(f"{pattern}: no such file (looked in {path.parent})")
            matched, root = [path], path.parent
        else:
            matched = [Path(p) for p in glob.glob(str(path), recursive=True) if not os.path.isdir(p)]
            root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            if not matched:
                raise DataError(f"{pattern}: no file matches (looked below {root})")
        paths += matched
        roots.append(root)
    root = os.path.commonpath(roots)  # of the patterns, not of the matches: a new file renames no other
    return [File(path, path.relative_to(root).as_posix()) for path in paths]


_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _python_files(package: str) -> list[File]:
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [(path, root) for path in _python_tree(root)]
    else:
        found = [(path, top.parent) for top in _package_roots(package) for path in _python_tree(top)]
    if not found:
        raise DataError(f"python source {package!r} holds no .py file; name a package that is written in Python")
    return [File(path, path.relative_to(root).as_posix()) for path, root in found]


def _package_roots(package: str) -> list[Path]:
    """The folders (or the one file) of a package, found without importing it: of `a.b` not even `a`."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(f"python source: no package {package!r} is installed here; `stdlib` always is")
    roots = [Path(p, *rest) for p in spec.submodule_search_locations or ()] or [Path(spec.origin or "")]
    return [r if r.exists() else r.with_suffix(".py") for r in roots if r.exists() or r.with_suffix(".py").exists()]


def _python_tree(root: Path) -> Iterator[Path]:
    if root.is_file() and root.suffix == ".py":
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_SOURCE]
        yield from (Path(folder, n) for n in names if n.endswith(".py"))


def _columnar_files(root: Path, split: str | None) -> list[File]:
    """The Arrow files of a `save_to_disk` folder (a DatasetDict has a folder for each split), or Parquet files."""
    folder = root
    if (root / "dataset_dict.json").is_file():
        splits = _listed(root / "dataset_dict.json", lambda tree: [Path(name).name for name in tree["splits"]])
        if split not in splits and not (split is None and len(splits) == 1):
            raise DataError(f"{root}: split={split!r} is not one of its splits {splits}; set `split` to one of them")
        folder = root / (split or splits[0])
    if (folder / "state.json").is_file():
        if split is not None and folder == root:
            raise DataError(f"{root}: split={split!r}, but it holds one dataset without splits; leave `split` out")
        entries = _listed(folder / "state.json", lambda tree: [f["filename"] for f in tree["_data_files"]])
        found = [folder / Path(entry).name for entry in entries]  # only the name: the file is not ours to trust
    else:
        found = [p for p in root.rglob("*.parquet") if split is None or _in_split(p.relative_to(root), split)]
    missing = [p for p in found if not p.is_file()]
    if missing or not found:
        wanted = f"{missing[0].name} is missing" if missing else "no state.json, dataset_dict.json or fitting *.parquet"
        raise DataError(f"{root}: {wanted}; give a folder of `Dataset.save_to_disk` or of Parquet files")
    return [File(path, path.relative_to(root).as_posix()) for path in found]


def _in_split(path: Path, split: str) -> bool:
    """`train.parquet`, `train-00000-of-00002.parquet`, `train/0.parquet`: as dataset hubs lay splits out."""
    return split in path.parts[:-1] or path.stem == split or path.name.startswith(f"{split}-")


def _listed(path: Path, names: Callable[[Any], list[str]]) -> list[str]:
    try:
        return names(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not as `Dataset.save_to_disk` writes it ({e!r}); save the dataset again") from None


# --- readers: the documents of one file ----------------------------------------------------------------------------


def _text_documents(cfg: config.TextFiles, file: File, max_bytes: int, refuse: Refuse) -> Iterator[Document]:
    if cfg.document == "file":
        data = _bounded(file, max_bytes, refuse)
        text = None if data is None else _utf8(data.removeprefix(codecs.BOM_UTF8), str(file.path), 0, refuse)
        if text is not None:
            yield Document(file.name, text, file.name)
        return
    units = _lines if cfg.document == "line" else _paragraphs
    for number, text in units(file, max_bytes, refuse):
        if text.strip():
            yield Document(f"{file.name}:{number}", text, f"{file.name}:{number}")


def _jsonl_documents(cfg: config.Jsonl, file: File, max_bytes: int, refuse: Refuse) -> Iterator[Document]:
    for number, line in _lines(file, max_bytes, refuse):
        where = f"{file.path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            refuse("broken_json", f"{where}: not JSON ({e}); a line must hold one JSON object")
            continue
        text = record.get(cfg.text) if isinstance(record, dict) else None
        if not isinstance(text, str):
            refuse("no_text", f"{where}: {_no_text(record, cfg.text)}")
        elif (at := _lone_surrogate(text)) is not None:
            refuse("invalid_utf8", f"{where}: {cfg.text!r} holds half a surrogate pair, {text[at]!a}, which is no text")
        else:
            yield Document(f"{file.name}:{number}", text, f"{file.name}:{number}")


def _no_text(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}; a line must hold one JSON object with the text in {field!r}"
    if field in record:
        return f"{field!r} is {type(record[field]).__name__}, must be a string"
    return f"no field {field!r}, only {sorted(record)[:10]}; set the source's `text` to the one that holds the text"


def _python_documents(cfg: config.PythonSource, file: File, max_bytes: int, refuse: Refuse) -> Iterator[Document]:
    """The file as `tokenize.open` reads it: its PEP 263 coding cookie is obeyed, line ends become newlines."""
    data = _bounded(file, max_bytes, refuse)
    if data is None:
        return
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
        text.encode()
    except (SyntaxError, UnicodeError, LookupError) as e:
        refuse("invalid_utf8", f"{file.path}: cannot be decoded ({e}); write it in UTF-8 or declare its coding")
        return
    yield Document(file.name, text, file.name)


def _columnar_documents(cfg: config.HuggingFace, file: File, max_bytes: int, refuse: Refuse) -> Iterator[Document]:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"{cfg.path}: Arrow and Parquet files need pyarrow: pip install 'jaxllm[datasets]'") from None
    number = 0
    try:
        for column in _columns(file.path, cfg.text):
            for value in column:
                number += 1
                where = f"{file.path}, row {number}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    refuse("invalid_utf8", f"{where}: {cfg.text!r} is not UTF-8; save it again as text")
                    continue
                if text is None:
                    refuse("no_text", f"{where}: {cfg.text!r} is null, must be a string")
                elif len(text.encode()) > max_bytes:
                    refuse("too_long", f"{where}: {_too_long(max_bytes)}")
                else:
                    yield Document(f"{file.name}:{number}", text, f"{file.name}:{number}")
    except (pa.ArrowException, OSError) as e:
        refuse("damaged", f"{file.path}: not a whole Arrow or Parquet file ({_first_line(e)}); save it again")


def _columns(path: Path, name: str) -> Iterator[Any]:
    """Column `name` of an Arrow stream or Parquet file, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def check(schema: pa.Schema) -> None:
        kind = schema.field(name).type if name in schema.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            got = f"column {name!r} holds {kind}" if kind else f"no column {name!r}"
            raise DataError(f"{path}: {got}; set `text` to a column of strings among {schema.names}")

    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as parquet:
            check(parquet.schema_arrow)
            for batch in parquet.iter_batches(batch_size=64, columns=[name]):
                yield batch.column(0)
    else:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            check(stream.schema)
            for batch in stream:
                yield batch.column(name)


_READERS = {
    "text": _text_documents,
    "jsonl": _jsonl_documents,
    "python": _python_documents,
    "huggingface": _columnar_documents,
}


# --- bytes, lines, paragraphs ------------------------------------------------------------------------------------


_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # how decompression fails


def _bounded(file: File, max_bytes: int, refuse: Refuse) -> bytes | None:
    """The whole file, decompressed, unless it is over `max_bytes` or cannot be read."""
    try:
        with _opened(file.path) as stream:
            data = stream.read(max_bytes + 1)
    except _DAMAGED as e:
        return refuse("damaged", f"{file.path}: truncated or damaged ({e}); fetch or compress it again")
    except OSError as e:
        return refuse("unreadable", _unreadable(file.path, e))
    return data if len(data) <= max_bytes else refuse("too_long", f"{file.path}: {_too_long(max_bytes)}")


def _lines(file: File, max_bytes: int, refuse: Refuse) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends; a line over `max_bytes` is not read further than that."""
    number = offset = 0
    try:
        with _opened(file.path) as stream:
            while line := stream.readline(max_bytes + 2):  # 2: its end may be \r\n
                number, start, offset = number + 1, offset, offset + len(line)
                if len(line.rstrip(b"\r\n")) > max_bytes:
                    refuse("too_long", f"{file.path}, line {number}: {_too_long(max_bytes)}")
                    while not line.endswith(b"\n") and (line := stream.readline(1 << 16)):
                        offset += len(line)
                    continue
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                text = _utf8(line.rstrip(b"\r\n"), f"{file.path}, line {number}", start, refuse)
                if text is not None:
                    yield number, text
    except _DAMAGED as e:
        refuse("damaged", f"{file.path}: truncated or damaged after line {number} ({e}); fetch or compress it again")
    except OSError as e:
        refuse("unreadable", _unreadable(file.path, e))


def _paragraphs(file: File, max_bytes: int, refuse: Refuse) -> Iterator[tuple[int, str]]:
    """The number of the first line and the text of each paragraph; blank lines end them."""
    first, lines, size = 0, [], 0
    for number, line in _lines(file, max_bytes, refuse):
        if line.strip():
            first, size = first or number, size + len(line.encode()) + 1
            if size - 1 <= max_bytes:
                lines.append(line)
            elif lines:  # reported once; the rest of the paragraph is passed over
                refuse("too_long", f"{file.path}, paragraph at line {first}: {_too_long(max_bytes)}")
                lines = []
        else:
            if lines:
                yield first, "\n".join(lines)
            first, lines, size = 0, [], 0
    if lines:
        yield first, "\n".join(lines)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file, by its suffix."""
    match path.suffix:
        case ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream
        case ".xz":
            with lzma.open(path, "rb") as stream:
                yield stream
        case ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(f"{path}: .zst files need zstandard: pip install zstandard") from None
            with open(path, "rb") as raw:
                if not _whole_zstd(raw):
                    raise EOFError("the Zstandard frames in it are not complete")
                raw.seek(0)
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                try:
                    yield io.BufferedReader(reader)
                except zstandard.ZstdError as e:
                    raise EOFError(str(e)) from None
        case _:
            with open(path, "rb") as stream:
                yield stream


def _whole_zstd(raw: BinaryIO) -> bool:
    """Whether every frame is complete, by stepping over block headers (RFC 8878, section 3.1).

    The decompressor takes the end of a frame that was cut off for the end of the file.
    """
    import zstandard

    size = raw.seek(0, io.SEEK_END)
    at = 0
    while at < size:
        raw.seek(at)
        head = raw.read(18)  # the longest frame header
        if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a skippable frame: magic, length, content
            at += 8 + int.from_bytes(head[4:8], "little")
            continue
        try:
            has_checksum = zstandard.get_frame_parameters(head).has_checksum
        except zstandard.ZstdError:
            return False  # the header itself is cut, or this is no frame
        at += zstandard.frame_header_size(head)
        last = False
        while not last:
            raw.seek(at)
            header = int.from_bytes(raw.read(3).ljust(3, b"\0"), "little")
            last, kind = header & 1, header >> 1 & 3
            at += 3 + (1 if kind == 1 else header >> 3)  # a run-length block holds one byte
            if at > size:
                return False
        at += 4 * has_checksum
    return at == size


def _utf8(data: bytes, where: str, offset: int, refuse: Refuse) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        byte, at = data[e.start], offset + e.start
        refuse("invalid_utf8", f"{where}: not UTF-8 at byte {at} (0x{byte:02x}, {e.reason}); convert the file to UTF-8")
        return None


def _lone_surrogate(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return e.start
    return None


# --- messages ----------------------------------------------------------------------------------------------------


def _too_long(max_bytes: int) -> str:
    return f"longer than max_document_mb ({max_bytes / 1e6:g} MB); split it or raise max_document_mb"


def _unreadable(path: Path, e: OSError) -> str:
    return f"{path}: cannot be read ({e.strerror or _first_line(e)}); give a regular file that you may read"


def _first_line(e: Exception) -> str:
    return str(e).partition("\n")[0]


def _said(cfg: config.Source) -> str:
    return " ".join(f"{name}={value}" for name, value in cfg.model_dump(mode="json").items())


def _reasons(counts: Counter) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "no documents"
