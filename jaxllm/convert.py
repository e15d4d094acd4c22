"""The `convert` verb: a model from one of its forms to another, tensor by tensor.

A run or checkpoint becomes a folder as Hugging Face has them; such a folder or a GGUF file becomes a checkpoint. Where
the destination is named `*.gguf`, each of them becomes a GGUF file, and where a family is named, a folder. What a folder
holds besides weights travels with a checkpoint, as `source/`, so that a model goes back as it came.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.data import tokenizers
from jaxllm.interop import folder as hugging_face
from jaxllm.interop import llamacpp, vocabulary
from jaxllm.interop.gguf import open_gguf
from jaxllm.interop.weights import Kept, commonest
from jaxllm.models import layout
from jaxllm.models.config import DecoderConfig
from jaxllm.pretrained import TOKENIZERS, tokenizer_of_folder
from jaxllm.train.checkpoint import Checkpointer, load_params
from jaxllm.train.config import Checkpoints

BLOCKS = ("q8_0", "q4_0")  # dtypes that only GGUF files have
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what GGUF calls the others
SOURCE, KEPT = "source", "weights.json"  # in a checkpoint: what came with the model; how its tensors were named


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
    if is_checkpoint or family is not None:
        wanted = hugging_face.BY_KIND[family] if family else None
        hugging_face.save_folder(
            destination, found.cfg, found.shapes, found.read, found.dtypes, family=wanted, source=found.source
        )
        if found.source is None and found.save_tokenizer is not None:
            found.save_tokenizer(destination)
    else:
        save_checkpoint(found, destination)
    return destination


def open_model(path: Path) -> tuple[Found, bool]:
    """The model at a path, and whether it is a run or checkpoint of ours."""
    if path.suffix == ".gguf":
        _, cfg, weights, file = llamacpp.open_model(path)
        has_one = file.metadata.get("tokenizer.ggml.model", "none") != "none"
        save = llamacpp.tokenizer(file)[0].save if has_one else None
        dtypes = dict.fromkeys(weights, np.dtype("float32"))
        return Found(cfg, weights.shapes, dtypes, weights.__getitem__, None, save), False
    if (path / "config.json").is_file():
        read = hugging_face.open_folder(path)
        dtypes = {
            n: np.result_type(*(read.tensors[t].dtype for t in row.theirs)) for n, row in read.weights.row.items()
        }
        has_one = any((path / name).is_file() for name in TOKENIZERS)
        save = tokenizer_of_folder(path)[0].save if has_one else None
        return Found(read.cfg, read.weights.shapes, dtypes, read.weights.__getitem__, read.source, save), False
    stored = load_params(path)
    logical = layout.unstack(stored.params, stored.model_cfg)
    shapes, dtypes = ({n: getattr(x, what) for n, x in logical.items()} for what in ("shape", "dtype"))
    has_one = (stored.folder / "tokenizer").is_dir()
    save = (lambda to: shutil.copytree(stored.folder / "tokenizer", to, dirs_exist_ok=True)) if has_one else None
    read = lambda name: np.asarray(logical[name])
    return Found(stored.model_cfg, shapes, dtypes, read, read_source(stored.folder), save), True


def save_gguf(found: Found, source: Path, path: Path, dtype: str | None, family: str | None) -> None:
    """A GGUF file, with the tokenizer that came with the model."""
    dtype = dtype or commonest(found.dtypes.values()).name
    kind = dtype.upper() if dtype in BLOCKS else KINDS.get(dtype)
    if kind is None:
        raise ConfigError(f"weights of {dtype} have no form in GGUF; give --dtype: {', '.join([*KINDS, *BLOCKS])}")
    if source.suffix == ".gguf":
        metadata = open_gguf(source).metadata
        words = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    else:
        rows = found.shapes["embedding"][0]
        files = found.source.files if found.source is not None else {}
        words = vocabulary.metadata(*tokenizer_of(found), rows, chat_templates(files), end_ids(files))
    family = family or found.source and found.source.family
    llamacpp.save_model(path, found.cfg, found.shapes, found.read, kind, family=family, vocabulary=words)


def tokenizer_of(found: Found) -> tuple[tokenizers.Tokenizer | None, tuple[int, ...]]:
    """The tokenizer of a model that is no GGUF file, and the ids that it puts before every text."""
    if found.save_tokenizer is None:
        return None, ()
    with tempfile.TemporaryDirectory() as folder:
        found.save_tokenizer(Path(folder))
        tokenizer = tokenizers.load(folder)
    if found.source is not None and tokenizer.spec.kind == "hf":
        return tokenizer, tokenizer.prefix()
    first = tokenizer.eos_id if found.source is None and tokenizer.bos_id is None else tokenizer.bos_id
    return tokenizer, () if first is None else (first,)


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"].decode()}
    said = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    return {"default": said} if isinstance(said, str) else {}


def end_ids(files: Mapping[str, bytes]) -> tuple[int, ...]:
    said = json.loads(files.get("config.json", b"{}")) | json.loads(files.get("generation_config.json", b"{}"))
    ends = said.get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def save_checkpoint(found: Found, run_folder: Path) -> None:
    """A run whose one checkpoint, of step 0, holds the model."""
    leaves = dict.fromkeys(layout.stacked_name(name, found.cfg) for name in found.shapes)
    names = {key: layout.logical_names(key, found.cfg) for key in leaves}
    params = {
        key: jax.numpy.asarray(
            np.stack([found.read(n) for n in parts]) if layout.is_stacked(key) else found.read(parts[0])
        )
        for key, parts in names.items()
    }
    kind = commonest(found.dtypes.values()).name
    files: dict[str, Path | str] = {"config.yaml": f"precision: {{kind: {kind}}}\n"}
    beside = run_folder / "files"
    run_folder.mkdir(parents=True, exist_ok=True)
    if found.save_tokenizer is not None:
        found.save_tokenizer(beside / "tokenizer")
        files["tokenizer"] = beside / "tokenizer"
    if found.source is not None:
        write_source(found.source, beside / SOURCE)
        files[SOURCE] = beside / SOURCE
    with Checkpointer(run_folder / "checkpoints", Checkpoints(), found.cfg, extra_files=files) as checkpoints:
        checkpoints.save(0, {"step": jax.numpy.int32(0), "params": params}, {})


def write_source(source: hugging_face.Source, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data in source.files.items():
        (folder / name).write_bytes(data)
    (folder / KEPT).write_text(json.dumps({"family": source.family, **source.kept._asdict()}), encoding="utf-8")


def read_source(checkpoint: Path) -> hugging_face.Source | None:
    """What came with the model of a checkpoint; None for one that began here."""
    folder = checkpoint / SOURCE
    if not (folder / KEPT).is_file():
        return None
    said: dict[str, Any] = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != KEPT}
    kept = Kept(said["bare"], tuple(said["tied"]))
    return hugging_face.Source(said["family"], json.loads(files["config.json"]), files, kept)
