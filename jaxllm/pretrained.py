"""A model from where it lies: a run or one of its checkpoints, a folder as Hugging Face has them, a GGUF file."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.config import read_tree
from jaxllm.core.errors import CheckpointError
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers.beside import read_object
from jaxllm.data.tokenizers.files import read_folder
from jaxllm.inference.output import Output
from jaxllm.interop import folder as hugging_face
from jaxllm.interop import gguf, llamacpp, vocabulary
from jaxllm.interop.family import differences, resolved
from jaxllm.interop.weights import Weights, commonest
from jaxllm.interop.weights import load as load_weights
from jaxllm.models.config import AnyModel, DecoderConfig
from jaxllm.models.module import Model, abstract, merge
from jaxllm.train.checkpoint import load_params, steps
from jaxllm.train.initial import SOURCE, Initial, of_checkpoint

TEXTS = "texts.json"  # beside a saved tokenizer: how texts begin and end, and the chat templates


class Texts(NamedTuple):
    """What turns texts into a model's tokens, and back."""

    tokenizer: tokenizers.Tokenizer
    start: tuple[int, ...]  # ids that every text begins with
    ends: tuple[int, ...] = ()  # ids that end a completion, besides the tokenizer's own
    chat_templates: Mapping[str, str] = {}  # jinja2, by name; `default` is the model's own
    output: Output = Output()  # how all that is said begins and ends

    def save(self, folder: Path) -> None:
        """Writes the tokenizer and what belongs to it, for `texts_of_checkpoint` to read."""
        self.tokenizer.save(folder)
        said = {"start": self.start, "ends": self.ends, "chat_templates": dict(self.chat_templates)}
        said |= {"output": self.output._asdict()} if self.output != Output() else {}
        (folder / TEXTS).write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")


class Pretrained(NamedTuple):
    """A model and what turns texts into its tokens: fields as of `Texts`; `source` holds what came with a checkpoint."""

    model: Model
    tokenizer: tokenizers.Tokenizer
    start: tuple[int, ...]
    ends: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = {}
    output: Output = Output()
    source: Path | None = None

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")


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
    model, source = merge(abstract(weights.model_cfg)[0], params), weights.folder / SOURCE
    return Pretrained(model, *texts_of_checkpoint(weights.folder), source if source.is_dir() else None)


def texts_of_checkpoint(folder: Path) -> Texts:
    """What a checkpoint says of texts: as `Texts.save` wrote it, or as its run began documents and its source ends them."""
    tokenizer = tokenizers.load(folder / "tokenizer")
    if said := read_object(folder / "tokenizer" / TEXTS):
        kept = {key: tuple(x) if key == "never" else x for key, x in said.get("output", {}).items()}
        ids = (tuple(said[key]) for key in ("start", "ends"))
        return Texts(tokenizer, *ids, said["chat_templates"], Output(**kept))
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    source = _said_of_texts(folder / SOURCE)
    return Texts(
        tokenizer, () if first is None else (first,), end_ids(source), chat_templates(source), output_of(source)
    )


def initial(path: Path, wanted: DecoderConfig) -> Initial:
    """The model at a path for a run of the model `wanted` to start from.

    Raises:
      CheckpointError: none lies there, or it is damaged.
    """
    if path.suffix == ".gguf":
        _, cfg, weights, _ = llamacpp.open_model(path)
        found = Initial(cfg, functools.partial(load_weights, weights), None)
    elif (path / "config.json").is_file():
        read = hugging_face.open_folder(path)
        keep = functools.partial(hugging_face.write_source, read.source)
        found = Initial(read.cfg, functools.partial(load_weights, read.weights), keep)
    else:
        found = of_checkpoint(path, wanted)
    alike = wanted.model_copy(update={"vocab": found.cfg.vocab, "context": found.cfg.context})
    # The same model may be described with fields left out or written down.
    same = not differences(resolved(alike), resolved(found.cfg))
    return found._replace(cfg=alike) if same else found


def load_model(path: str | Path, precision: str | None = None) -> Model:
    """The model of a folder as Hugging Face has them, without a tokenizer, which the folder need not have.

    Raises:
      CheckpointError: as `load`.
    """
    return _of_folder(hugging_face.open_folder(path), precision)


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
    texts = texts_of_folder(folder)  # before the weights: what is wrong is said at once
    return Pretrained(_of_folder(read, precision), *texts)


def _of_folder(read: hugging_face.Pretrained, precision: str | None) -> Model:
    dtype = np.dtype(precision) if precision else commonest(entry.dtype for entry in read.tensors.values())
    return _model(read.cfg, read.weights, dtype)


def texts_of_folder(folder: Path) -> Texts:
    """What the files of a folder as Hugging Face has them say of texts. Raises DataError: no tokenizer in it."""
    files = _said_of_texts(folder)
    return Texts(*read_folder(folder), end_ids(files), chat_templates(files), output_of(files))


def _said_of_texts(folder: Path) -> dict[str, bytes]:
    """The files in which a folder says things of texts."""
    more = _files(folder / "additional_chat_templates", ".jinja")
    return _files(folder, ".json", ".jinja") | {f"additional_chat_templates/{name}": x for name, x in more.items()}


def end_ids(files: Mapping[str, bytes]) -> tuple[int, ...]:
    """Ids that end what a model says, by the files of its folder: generation_config.json, or else config.json."""
    said = _json(files.get("config.json")) | _json(files.get("generation_config.json"))
    return _ids(said.get("eos_token_id"))


def output_of(files: Mapping[str, bytes]) -> Output:
    """What is settled of outputs, by generation_config.json, or else config.json.

    Words of several tokens that are never to be said are texts, and none of ours; one that ends a text may be said.
    """
    said = _json(files.get("generation_config.json")) or _json(files.get("config.json"))
    keys = {"start": "decoder_start_token_id", "first": "forced_bos_token_id", "last": "forced_eos_token_id"}
    found = {role: min(ids) for role, key in keys.items() if (ids := _ids(said.get(key)))}
    words = said.get("bad_words_ids")
    words = [word[0] for word in words if isinstance(word, list) and len(word) == 1] if isinstance(words, list) else []
    ends = end_ids(files)
    never = dict.fromkeys([*(i for i in _ids(words) if i not in ends), *_ids(said.get("suppress_tokens"))])
    return Output(**found, never=tuple(never))


def _ids(said: Any) -> tuple[int, ...]:
    """One id, several or none."""
    return tuple(i for i in (said if isinstance(said, list) else [said]) if type(i) is int and i >= 0)


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Chat templates by name, `default` the model's own, out of the files of a folder.

    They are `chat_template.jinja` and files in `additional_chat_templates/`, or else `chat_template` of
    tokenizer_config.json: a text, or several with names.
    """
    said = _json(files.get("tokenizer_config.json")).get("chat_template")
    if isinstance(said, list):
        said = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
    named = said if isinstance(said, dict) else {"default": said}
    found = {str(name): text for name, text in named.items() if isinstance(text, str)}
    for name, data in files.items():
        if name == "chat_template.jinja":
            found["default"] = data.decode(errors="replace")
        elif name.startswith("additional_chat_templates/") and name.endswith(".jinja"):
            found[Path(name).stem] = data.decode(errors="replace")
    return found


def _files(folder: Path, *kinds: str) -> dict[str, bytes]:
    """The files of these kinds in a folder; none where there is no folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in kinds} if folder.is_dir() else {}


def _gguf(path: Path, precision: str | None) -> Pretrained:
    _, cfg, weights, file = llamacpp.open_model(path)
    texts = texts_of_gguf(file)
    return Pretrained(_model(cfg, weights, np.dtype(precision or "float32")), *texts)


def texts_of_gguf(file: gguf.GGUF) -> Texts:
    """What a GGUF file says of texts. Raises CheckpointError: its tokenizer is not known here."""
    prefix = "tokenizer.chat_template"
    templates = {k.removeprefix(prefix).lstrip("."): v for k, v in file.metadata.items() if k.startswith(prefix)}
    templates = {name or "default": text for name, text in templates.items() if isinstance(text, str)}
    return Texts(*llamacpp.tokenizer(file), vocabulary.ends(file), templates)


def _model(cfg: AnyModel, weights: Weights, dtype: np.dtype) -> Model:
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
