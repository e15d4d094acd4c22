"""Folders of sentence-transformers: what they say, beside a model, of how texts become vectors.

    modules.json                       what is applied in turn: Transformer, Pooling, and Normalize or not
    sentence_bert_config.json          of the Transformer: max_seq_length, do_lower_case
    1_Pooling/config.json              of the Pooling: its mode
    config_sentence_transformers.json  texts to put before every text

`modules.json` also says in which folder the files of each lie.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.core.errors import CheckpointError


class Sentences(NamedTuple):
    """How a folder wants texts made into vectors."""

    folder: Path  # of the model
    pool: str = "mean"  # of `inference.embed`
    normalise: bool = True
    max_tokens: int | None = None  # None: the model's context
    lower: bool = False  # texts are put in lower case
    prompt: str = ""  # what stands before every text


MODES = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}  # theirs: ours


def read(folder: str | Path) -> Sentences:
    """What a folder says; where it has no `modules.json`, what is usual.

    Raises:
      CheckpointError: naming what is applied that is not known here.
    """
    folder = Path(folder)
    listed = folder / "modules.json"
    if not listed.is_file():
        return Sentences(folder)
    modules = _json(listed)
    try:
        named = [(module["type"].rpartition(".")[2], _inside(folder, module["path"])) for module in modules]
    except (LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{listed}: must be a list of objects with `type` and `path`") from None
    kinds = [kind for kind, _ in named]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(f"{listed}: {', '.join(kinds)}; known: Transformer, Pooling, and Normalize or not")
    model = named[0][1]
    config = next(model.glob("sentence_*_config.json"), None)
    said = _object(config) if config else {}
    pooling = _object(named[1][1] / "config.json")
    prompt = _prompt(folder / "config_sentence_transformers.json")
    if prompt and not pooling.get("include_prompt", True):
        raise CheckpointError(f"{named[1][1] / 'config.json'}: include_prompt=false; only prompts that count are known")
    length = said.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"{config}: max_seq_length={json.dumps(length)}; a whole number is needed")
    mode = _mode(pooling, named[1][1] / "config.json")
    return Sentences(model, mode, "Normalize" in kinds, length, bool(said.get("do_lower_case")), prompt)


def _mode(pooling: dict[str, Any], path: Path) -> str:
    """One mode, by name or, as before version 5.4, by the one of several keys that is true."""
    modes = pooling.get("pooling_mode")
    if modes is None:
        told = pooling | {"pooling_mode_mean_tokens": pooling.get("pooling_mode_mean_tokens", True)}
        modes = [
            key.removeprefix("pooling_mode_") for key, on in told.items() if key.startswith("pooling_mode_") and on
        ]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in list(MODES):
        raise CheckpointError(f"{path}: the mode of pooling is {json.dumps(modes)}; known: one of {', '.join(MODES)}")
    return MODES[modes[0]]


def _prompt(path: Path) -> str:
    """What the folder puts before texts if nothing else is asked for."""
    said = _object(path) if path.is_file() else {}
    name, prompts = said.get("default_prompt_name"), said.get("prompts")
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(name, str) or not isinstance(prompts.get(name), str):
        raise CheckpointError(f"{path}: default_prompt_name={json.dumps(name)} is none of its prompts")
    return prompts[name]


def _inside(folder: Path, path: str) -> Path:
    found = folder / path
    if not found.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / 'modules.json'}: path={json.dumps(path)} leads out of the folder")
    return found


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must be an object, got {type(found).__name__}")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON that can be read ({e})") from None
