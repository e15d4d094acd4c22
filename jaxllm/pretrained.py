"""A model from where it lies: a run or one of its checkpoints, a folder as Hugging Face has them, a GGUF file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.config import read_tree
from jaxllm.core.errors import CheckpointError
from jaxllm.data import tokenizers
from jaxllm.data.config import HfTokenizer, SentencePieceTokenizer
from jaxllm.interop import folder as hugging_face
from jaxllm.interop import llamacpp, vocabulary
from jaxllm.interop.weights import Weights, commonest
from jaxllm.interop.weights import load as load_weights
from jaxllm.models.config import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.module import abstract, merge
from jaxllm.train.checkpoint import load_params, steps

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # files of a folder that a tokenizer is read from


class Pretrained(NamedTuple):
    """A model and what turns texts into its tokens."""

    model: Decoder
    tokenizer: tokenizers.Tokenizer
    start: tuple[int, ...]  # ids that every text begins with
    ends: tuple[int, ...] = ()  # ids that end a completion, besides the tokenizer's own
    chat_template: str | None = None  # jinja2


def load(path: str | Path, step: int | None = None, precision: str | None = None) -> Pretrained:
    """Model and tokenizer of a run (its checkpoint of `step`, or the newest that is whole) or of what else `path` is.

    The weights are in `precision`; None: in what the run computed with, so that log-probabilities are the trainer's, or
    as they are stored; those of blocks in a GGUF file are float32.

    Raises:
      CheckpointError: none of these lies there, or it is damaged.
      DataError: its tokenizer cannot be read.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _gguf(path, precision)
    if (path / "config.json").is_file():
        return _hugging_face(path, precision)
    weights = load_params(checkpoint_of(path, step))
    trained = read_tree(weights.folder / "config.yaml")["precision"]["kind"]
    params = {name: weights.params.pop(name).astype(precision or trained) for name in list(weights.params)}
    tokenizer = tokenizers.load(weights.folder / "tokenizer")
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id  # as documents begin in training
    return Pretrained(merge(abstract(weights.model_cfg)[0], params), tokenizer, () if first is None else (first,))


def checkpoint_of(folder: Path, step: int | None) -> Path:
    """The folder of a run's checkpoint of `step`; None: `folder` itself. Raises CheckpointError if there is none."""
    if step is None:
        return folder
    checkpoint = folder / "checkpoints" / f"{step:08d}"
    if not checkpoint.is_dir():
        found = ", ".join(map(str, steps(folder)))
        there = f"there are those of {found}" if found else "it has no checkpoints"
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; {there}")
    return checkpoint


def _hugging_face(folder: Path, precision: str | None) -> Pretrained:
    read = hugging_face.open_folder(folder)
    dtype = np.dtype(precision) if precision else commonest(entry.dtype for entry in read.tensors.values())
    tokenizer, start = tokenizer_of_folder(folder)
    said = {**read.source.config, **_json(read.source.files.get("generation_config.json"))}
    ends = said.get("eos_token_id")
    ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    template = read.source.files.get("chat_template.jinja")
    template = (
        template.decode() if template else _json(read.source.files.get("tokenizer_config.json")).get("chat_template")
    )
    return Pretrained(_model(read.cfg, read.weights, dtype), tokenizer, start, ends, template)


def tokenizer_of_folder(folder: Path) -> tuple[tokenizers.Tokenizer, tuple[int, ...]]:
    """The tokenizer of a folder, and the ids that it puts before every text."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = tokenizers.build(HfTokenizer(file=str(folder)))
        return tokenizer, tokenizer.prefix()
    if (folder / "tokenizer.model").is_file():
        tokenizer = tokenizers.build(SentencePieceTokenizer(file=str(folder / "tokenizer.model")))
        return tokenizer, () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    raise CheckpointError(f"{folder}: none of {', '.join(TOKENIZERS)} in it, so no text can be read")


def _gguf(path: Path, precision: str | None) -> Pretrained:
    _, cfg, weights, file = llamacpp.open_model(path)
    tokenizer, start = llamacpp.tokenizer(file)
    template = file.metadata.get("tokenizer.chat_template")
    return Pretrained(
        _model(cfg, weights, np.dtype(precision or "float32")), tokenizer, start, vocabulary.ends(file), template
    )


def _model(cfg: DecoderConfig, weights: Weights, dtype: np.dtype) -> Decoder:
    graphdef, shapes, _ = abstract(cfg)
    like = {name: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding) for name, x in shapes.items()}
    return merge(graphdef, load_weights(weights, cfg, like))


def _json(data: bytes | None) -> dict[str, Any]:
    """An object in a file that may be missing or be none."""
    try:
        tree = json.loads(data or b"{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
