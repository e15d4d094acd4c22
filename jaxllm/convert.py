"""The `convert` verb: a model from one of its forms to another, tensor by tensor.

A run or checkpoint becomes a folder as Hugging Face has them; such a folder or a GGUF file becomes a checkpoint. Where
the destination is named `*.gguf`, each of them becomes a GGUF file, and where a family is named, a folder. What a
folder holds besides weights travels with a checkpoint, as `source/`, so that a model goes back as it came.
"""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.data.tokenizers.beside import BESIDE
from jaxllm.data.tokenizers.export import save_hugging_face
from jaxllm.data.tokenizers.files import has_tokenizer, is_tokenizer
from jaxllm.interop import folder as hugging_face
from jaxllm.interop import llamacpp, vocabulary
from jaxllm.interop.gguf import open_gguf
from jaxllm.interop.weights import commonest
from jaxllm.models.config import AnyModel
from jaxllm.pretrained import TEXTS, Texts, texts_of_checkpoint, texts_of_folder, texts_of_gguf
from jaxllm.train.checkpoint import Checkpointer, Extra, Unread, open_params
from jaxllm.train.config import Checkpoints
from jaxllm.train.initial import SOURCE

BLOCKS = ("q8_0", "q4_0")  # dtypes that only GGUF files have
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what GGUF calls the others


class Found(NamedTuple):
    """A model to be written, its weights read when their turn comes."""

    cfg: AnyModel
    shapes: Mapping[str, tuple[int, ...]]  # by logical name
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    source: hugging_face.Source | None
    texts: Callable[[], Texts] | None  # None: it has no tokenizer


def run(source: str | Path, destination: str | Path, *, dtype: str | None = None, family: str | None = None) -> Path:
    """Writes the model that lies at `source` to `destination`; returns that.

    Args:
      dtype: of floating-point weights, and q8_0 or q4_0 of a GGUF file that is written; None: as they are, and float32
        for blocks in a GGUF file that is read.
      family: of a Hugging Face folder that is written, or architecture of a GGUF file; None: the one it came from, or
        the first that has such a model.

    Raises:
      UserError: nothing there to be read; a destination that holds something; a family that has no such model.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise UserError(f"{destination} is there already; name a place that is not, or take it away")
    to_gguf = destination.suffix == ".gguf"
    families = llamacpp.ARCHITECTURES if to_gguf else hugging_face.BY_KIND
    if family is not None and family not in families:
        raise ConfigError(f"family={family!r} is not known; known: {', '.join(sorted(families))}")
    if dtype in BLOCKS and not to_gguf:
        raise ConfigError(f"dtype={dtype} is of GGUF files only: name the destination *.gguf, got {destination}")
    found, is_checkpoint = open_model(source)
    if to_gguf:
        save_gguf(found, source, destination, dtype, family)
        return destination
    if dtype is not None:
        to = np.dtype(dtype)
        found = found._replace(
            dtypes=dict.fromkeys(found.dtypes, to), read=lambda name, read=found.read: read(name).astype(to, copy=False)
        )
    try:
        if is_checkpoint or family is not None:
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
        texts = functools.partial(texts_of_gguf, file)
        has_one = file.metadata.get("tokenizer.ggml.model", "none") != "none"
        dtypes = dict.fromkeys(weights, np.dtype("float32"))
        return Found(cfg, weights.shapes, dtypes, weights.__getitem__, None, texts if has_one else None), False
    if (path / "config.json").is_file():
        read = hugging_face.open_folder(path)
        dtypes = {
            n: np.result_type(*(read.tensors[t].dtype for t in row.theirs)) for n, row in read.weights.row.items()
        }
        texts = functools.partial(texts_of_folder, path) if has_tokenizer(path) else None
        return Found(read.cfg, read.weights.shapes, dtypes, read.weights.__getitem__, read.source, texts), False
    stored = open_params(path)
    shapes, dtypes = ({n: getattr(x, what) for n, x in stored.leaves.items()} for what in ("shape", "dtype"))
    has_one = (stored.folder / "tokenizer").is_dir()
    texts = functools.partial(texts_of_checkpoint, stored.folder) if has_one else None
    read = lambda name: stored.leaves[name].read()
    return Found(stored.model_cfg, shapes, dtypes, read, _source(stored.folder), texts), True


def _source(checkpoint: Path) -> hugging_face.Source | None:
    """What came with a model, without its tokenizer if the checkpoint was trained with another."""
    source, ours = hugging_face.read_source(checkpoint / SOURCE), checkpoint / "tokenizer"
    if source is None or not ours.is_dir() or (ours / TEXTS).is_file():  # the tokenizer came with it
        return source
    if any((ours / name).is_file() and (ours / name).read_bytes() == data for name, data in source.files.items()):
        return source
    others = {n: data for n, data in source.files.items() if not is_tokenizer(n) and n not in BESIDE}
    return source._replace(files=others)


def save_folder(found: Found, folder: Path, family: str | None) -> None:
    """A folder as Hugging Face has them, with the tokenizer files that came with the model, or new ones."""
    wanted, source = hugging_face.BY_KIND[family] if family else None, found.source
    kept = source.files if source is not None and (wanted is None or wanted.kind == source.family) else {}
    texts = found.texts() if found.texts is not None and not any(map(is_tokenizer, kept)) else None
    hugging_face.save_folder(
        folder, found.cfg, found.shapes, found.read, found.dtypes, family=wanted, source=source,
        special=special_ids(texts) if texts else {},
    )  # fmt: skip
    if texts:
        save_hugging_face(
            texts.tokenizer, folder, start=texts.start, context=found.cfg.context, chat_templates=texts.chat_templates
        )


def special_ids(texts: Texts) -> dict[str, int | list[int] | None]:
    """What a config.json says of special tokens."""
    words = texts.tokenizer
    ends = list(dict.fromkeys(i for i in (words.eos_id, *texts.ends) if i is not None))
    return {
        "bos_token_id": words.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": words.pad_id,
    }  # fmt: skip


def save_gguf(found: Found, source: Path, path: Path, dtype: str | None, family: str | None) -> None:
    """A GGUF file, with the tokenizer that came with the model."""
    dtype = dtype or commonest(found.dtypes.values()).name
    kind = dtype.upper() if dtype in BLOCKS else KINDS.get(dtype)
    if kind is None:
        raise ConfigError(f"weights of {dtype} have no form in GGUF; give --dtype: {', '.join([*KINDS, *BLOCKS])}")
    before = open_gguf(source).metadata if source.suffix == ".gguf" else None
    family = family or (before["general.architecture"] if before else found.source and found.source.family)
    llamacpp.architecture(found.cfg, family)  # or refused, before the tokenizer is read
    if before:
        words = {key: value for key, value in before.items() if key.startswith("tokenizer.")}
    else:
        rows = found.shapes["embedding"][0]
        texts = found.texts() if found.texts is not None else None
        tokenizer, start = (texts.tokenizer, texts.start) if texts else (None, ())
        templates, ends = (texts.chat_templates, texts.ends) if texts else ({}, ())
        words = vocabulary.metadata(tokenizer, start, rows=rows, templates=templates, ends=ends)
    llamacpp.save_model(path, found.cfg, found.shapes, found.read, kind, family=family, vocabulary=words)


def save_checkpoint(found: Found, run_folder: Path) -> None:
    """A run whose one checkpoint, of step 0, holds the model; its weights go through memory a few at a time."""
    params = {n: Unread(found.dtypes[n], shape, functools.partial(found.read, n)) for n, shape in found.shapes.items()}
    kind = commonest(found.dtypes.values()).name
    files: dict[str, Extra] = {"config.yaml": f"precision: {{kind: {kind}}}\n"}
    if found.texts is not None:
        files["tokenizer"] = found.texts().save
    if found.source is not None:
        files[SOURCE] = functools.partial(hugging_face.write_source, found.source)
    with Checkpointer(run_folder / "checkpoints", Checkpoints(), found.cfg, extra_files=files) as checkpoints:
        checkpoints.save(0, {"step": jax.numpy.int32(0), "params": params}, {})
