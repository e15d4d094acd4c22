"""The `convert` verb: a model from one of its forms to another, tensor by tensor.

A run or checkpoint becomes a folder as Hugging Face has them; such a folder or a GGUF file becomes a checkpoint. What a
folder holds besides weights travels with a checkpoint, as `source/`, so that a model goes back as it came.
"""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.interop import folder as hugging_face
from jaxllm.interop import llamacpp
from jaxllm.interop.weights import commonest
from jaxllm.models.config import DecoderConfig
from jaxllm.pretrained import TOKENIZERS, tokenizer_of_folder
from jaxllm.train.checkpoint import Checkpointer, Extra, Unread, open_params
from jaxllm.train.config import Checkpoints
from jaxllm.train.initial import SOURCE

TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt")  # fmt: skip


class Found(NamedTuple):
    """A model to be written, its weights read when their turn comes."""

    cfg: DecoderConfig
    shapes: Mapping[str, tuple[int, ...]]  # by logical name
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    source: hugging_face.Source | None
    save_tokenizer: Callable[[Path], Any] | None  # None: it has none


def run(source: str | Path, destination: str | Path, *, dtype: str | None = None, family: str | None = None) -> Path:
    """Writes the model that lies at `source` to `destination`; returns that.

    Args:
      dtype: of floating-point weights; None: as they are, and float32 for blocks in a GGUF file.
      family: of a Hugging Face folder that is written; None: the one it came from, or the first that has such a model.

    Raises:
      UserError: nothing there to be read; a destination that holds something; a family that has no such model.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise UserError(f"{destination} is there already; name a place that is not, or take it away")
    if family is not None and family not in hugging_face.BY_KIND:
        raise ConfigError(f"family={family!r} is not known; known: {', '.join(sorted(hugging_face.BY_KIND))}")
    found, is_checkpoint = open_model(source)
    if dtype is not None:
        to = np.dtype(dtype)
        found = found._replace(
            dtypes=dict.fromkeys(found.dtypes, to), read=lambda name, read=found.read: read(name).astype(to, copy=False)
        )
    try:
        if is_checkpoint:
            save_folder(found, destination, family)
        else:
            save_checkpoint(found, destination)
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)  # nothing is left half written
        raise
    return destination


def open_model(path: Path) -> tuple[Found, bool]:
    """The model at a path, and whether it is a run or checkpoint of ours."""
    if path.suffix == ".gguf":
        _, cfg, weights, file = llamacpp.open_model(path)
        tokenizer, _ = llamacpp.tokenizer(file)
        dtypes = dict.fromkeys(weights, np.dtype("float32"))
        return Found(cfg, weights.shapes, dtypes, weights.__getitem__, None, tokenizer.save), False
    if (path / "config.json").is_file():
        read = hugging_face.open_folder(path)
        dtypes = {
            n: np.result_type(*(read.tensors[t].dtype for t in row.theirs)) for n, row in read.weights.row.items()
        }
        has_one = any((path / name).is_file() for name in TOKENIZERS)
        save = tokenizer_of_folder(path)[0].save if has_one else None
        return Found(read.cfg, read.weights.shapes, dtypes, read.weights.__getitem__, read.source, save), False
    stored = open_params(path)
    shapes, dtypes = ({n: getattr(x, what) for n, x in stored.leaves.items()} for what in ("shape", "dtype"))
    has_one = (stored.folder / "tokenizer").is_dir()
    save = (lambda to: shutil.copytree(stored.folder / "tokenizer", to, dirs_exist_ok=True)) if has_one else None
    read = lambda name: stored.leaves[name].read()
    return Found(stored.model_cfg, shapes, dtypes, read, _source(stored.folder), save), True


def _source(checkpoint: Path) -> hugging_face.Source | None:
    """What came with a model, its tokenizer replaced by that of the checkpoint if it was trained with another."""
    source, ours = hugging_face.read_source(checkpoint / SOURCE), checkpoint / "tokenizer"
    if source is None or not ours.is_dir():
        return source
    files = {p.name: p.read_bytes() for p in ours.iterdir()}
    if any(files.get(name, b"") == source.files.get(name) for name in TOKENIZERS):
        return source
    others = {name: data for name, data in source.files.items() if name not in TOKENIZER_FILES}
    return source._replace(files=others | files)


def save_folder(found: Found, folder: Path, family: str | None) -> None:
    """A folder as Hugging Face has them."""
    wanted = hugging_face.BY_KIND[family] if family else None
    hugging_face.save_folder(
        folder, found.cfg, found.shapes, found.read, found.dtypes, family=wanted, source=found.source
    )
    if found.source is None and found.save_tokenizer is not None:
        found.save_tokenizer(folder)


def save_checkpoint(found: Found, run_folder: Path) -> None:
    """A run whose one checkpoint, of step 0, holds the model; its weights go through memory a few at a time."""
    params = {n: Unread(found.dtypes[n], shape, functools.partial(found.read, n)) for n, shape in found.shapes.items()}
    kind = commonest(found.dtypes.values()).name
    files: dict[str, Extra] = {"config.yaml": f"precision: {{kind: {kind}}}\n"}
    if found.save_tokenizer is not None:
        files["tokenizer"] = found.save_tokenizer
    if found.source is not None:
        files[SOURCE] = functools.partial(hugging_face.write_source, found.source)
    with Checkpointer(run_folder / "checkpoints", Checkpoints(), found.cfg, extra_files=files) as checkpoints:
        checkpoints.save(0, {"step": jax.numpy.int32(0), "params": params}, {})
