"""The prepared folder: `manifest.json`, `tokenizer/` and `shards/`, and what makes it whole.

The manifest's `hash` is the SHA-256 of its content without where the inputs lay: equal data, equal hash, on every
machine. Nothing here imports JAX or TensorFlow.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.core.errors import DataError

VERSION = 1
SPLITS = ("train", "validation")
_LOCATIONS = ("out", "files", "file", "path")  # settings that say where things lie; their content is in `inputs`


@dataclass(frozen=True)
class Prepared:
    """A folder that `jaxllm prepare` wrote, opened."""

    path: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) that names this data: batches are a function of it, the seed and the step."""
        return self.manifest["hash"]

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.manifest["length"]

    @property
    def vocab(self) -> int:
        """Ids of the tokenizer, special tokens included."""
        return self.manifest["vocab"]

    def tokenizer(self):
        """The tokenizer that made the ids."""
        from jaxllm.data import tokenizers

        return tokenizers.load(self.path / "tokenizer")

    def shards(self, task: str, split: str) -> list[dict[str, Any]]:
        """The manifest's entries of the shards of a task's split, in order."""
        return self.manifest["tasks"][task][split]["shards"]

    def verify(self) -> None:
        """Returns if every shard and every file of the tokenizer has the SHA-256 it was written with.

        Raises:
          DataError: naming each that has not.
        """
        bad = [f["file"] for f in _all_files(self.manifest) if sha256(self.path / f["file"]) != f["sha256"]]
        if bad:
            raise DataError(f"{self.path}: damaged: {', '.join(bad)} (SHA-256 differs from the manifest's); {AGAIN}")


AGAIN = "delete the folder and run `jaxllm prepare` again, or copy it again"


def open_prepared(path: str | Path) -> Prepared:
    """The prepared data in a folder, its manifest checked and every shard and tokenizer file there in full size.

    Raises:
      DataError: no prepared data there, unfinished, changed, of a newer version, or files missing or cut short.
    """
    path = Path(path)
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = "is not finished" if (path / "prepare.json").exists() else "holds no prepared data (no manifest.json)"
        raise DataError(f"{path}: {state}; run `jaxllm prepare CONFIG` with out: {path}") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{file}: cannot be read as JSON ({e}); {AGAIN}") from None
    if manifest.get("version") != VERSION:
        raise DataError(f"{file}: data of version {manifest.get('version')}; this jaxllm reads version {VERSION}")
    if manifest.get("hash") != content_hash(manifest):
        raise DataError(f"{file}: was changed after it was written (its hash does not fit its content); {AGAIN}")
    wrong = [w for entry in _all_files(manifest) if (w := _wrong(path, entry))]
    if wrong:
        raise DataError(f"{path}: {'; '.join(wrong)}; {AGAIN}")
    return Prepared(path, manifest)


def _wrong(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = (path / entry["file"]).stat().st_size
    except OSError:
        return f"{entry['file']} is missing"
    return f"{entry['file']} has {size} bytes in place of {entry['size']}" if size != entry["size"] else None


def all_shards(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of all shards, task by task, split by split."""
    for task in manifest["tasks"].values():
        for split in SPLITS:
            yield from task[split]["shards"]


def tokenizer_files(path: Path) -> list[dict[str, Any]]:
    """The manifest's entries of the files of the tokenizer saved in a prepared folder, by name."""
    files = sorted((path / "tokenizer").iterdir())
    return [{"file": f"tokenizer/{f.name}", "size": f.stat().st_size, "sha256": sha256(f)} for f in files]


def _all_files(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from manifest["tokenizer"].get("files", ())  # the first manifests did not list them
    yield from all_shards(manifest)


def portable(tree: Any) -> Any:
    """A tree of plain values without the places of files: what the result depends on, wherever the files lie."""
    if isinstance(tree, dict):
        return {k: portable(v) for k, v in tree.items() if k not in _LOCATIONS}
    return [portable(v) for v in tree] if isinstance(tree, list | tuple) else tree


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The manifest of this content: with its version and hash."""
    manifest = content | {"version": VERSION}
    return manifest | {"hash": content_hash(manifest)}


def content_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without its hash and without the places of the inputs."""
    content = {k: v for k, v in manifest.items() if k not in ("hash", "settings", "inputs")}
    content |= {"settings": portable(manifest["settings"]), "inputs": portable(manifest["inputs"])}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(file: Path, tree: Any) -> None:
    """Writes `tree` so that `file` holds all of it or is as it was, even if the machine stops."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    publish(part, file)


def publish(part: Path, file: Path) -> None:
    """Gives a finished file or folder its name: content on the disk first, then the name."""
    for f in [*part.rglob("*"), part] if part.is_dir() else [part]:
        sync(f)
    os.replace(part, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Returns when a file's or folder's bytes are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
