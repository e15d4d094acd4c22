"""Folders as Hugging Face has them: `config.json`, weights in safetensors, tokenizer files and what else belongs to them.

What lies in a folder beside its weights is kept as it is and goes back with them (`Source`): a model that is read and
written without a change has the same files again, to the byte, and the same tensors.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.interop import decoders, encoder_decoders, encoders, mixtures, remote, safetensors, xlnet
from jaxllm.interop.family import Family, differences, resolved
from jaxllm.interop.names import Row
from jaxllm.interop.weights import Kept, Weights, commonest, tensors_of
from jaxllm.models.config import AnyModel

FAMILIES: tuple[Family, ...] = (
    *decoders.FAMILIES, *mixtures.FAMILIES, *remote.FAMILIES, *encoders.FAMILIES, *xlnet.FAMILIES,
    *encoder_decoders.FAMILIES,
)  # fmt: skip
BY_KIND = {kind: family for family in FAMILIES for kind in (family.kind, *family.also)}

_KEPT = "weights.json"  # among the files of a source: how its tensors were named

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# Copied as they are; weights are written anew.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
DEEPER = ("[0-9]*_*/config.json", "additional_chat_templates/*.jinja")  # files in folders of their own
LARGE = 64 << 20  # no file beside weights is larger


class Source(NamedTuple):
    """Where a model came from, as far as it matters when it goes back."""

    family: str
    config: dict[str, Any]  # config.json
    files: dict[str, bytes]  # what else there is, by name; config.json too, as it was written
    kept: Kept = Kept()


class Pretrained(NamedTuple):
    """A model in a folder, its weights not read yet."""

    family: Family
    cfg: AnyModel
    weights: Weights
    source: Source
    tensors: safetensors.Tensors


def open_folder(folder: str | Path) -> Pretrained:
    """The model of a folder.

    Raises:
      CheckpointError: no such folder; a family that is not known; a config and weights that do not fit; files that are
        damaged; weights that are pickled.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    family = family_of(config, str(folder / "config.json"))
    cfg = family.ours(config, str(folder / "config.json"))
    if not any(folder.glob("*.safetensors*")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise CheckpointError(
            f"{folder}: no *.safetensors"
            + (f"; {pickled[0]} is pickled and could run anything when it is read: " if pickled else "; ")
            + "write them with transformers, where the files are trusted: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    safetensors.verify(folder)
    tensors = safetensors.open_tensors(folder)
    weights = Weights(family, cfg, tensors, tensors.read, str(folder))
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted([*folder.iterdir(), *(p for pattern in DEEPER for p in folder.glob(pattern))])
        if p.is_file() and p.suffix not in WEIGHTS and not p.name.endswith(".index.json") and p.stat().st_size <= LARGE
        and p.name != "SHA256SUMS"
    }  # fmt: skip
    return Pretrained(family, cfg, weights, Source(family.kind, config, files, weights.kept), tensors)


def read_config(path: Path) -> dict[str, Any]:
    """What a `config.json` says."""
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no config.json in it, so no folder of a model") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must be an object, got {type(config).__name__}")
    return config


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The family of a `config.json`."""
    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise CheckpointError(f"{name}: quantization_config is set; only weights that are not quantised can be read")
    found = [family for family in FAMILIES if isinstance(kind, str) and kind in family.model_types]
    if fits := [family for family in found if family.when(config)]:
        return fits[0]
    if found:
        which = ", ".join(family.kind for family in found)
        raise CheckpointError(f"{name}: model_type={json.dumps(kind)} with keys of none of {which}")
    known = ", ".join(sorted({kind for family in FAMILIES for kind in family.model_types}))
    raise CheckpointError(f"{name}: model_type={json.dumps(kind)} is no family that is known here: {known}")


def save_folder(
    folder: str | Path,
    cfg: AnyModel,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtypes: Mapping[str, np.dtype],
    *,
    family: Family | None = None,
    source: Source | None = None,
    special: Mapping[str, Any] = {},
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes a model as its family has it; the files written.

    Args:
      shapes, dtypes: of the weights by logical name; `read(name)` gives the array when its turn comes.
      family: None: that of the source, or the first that has such a model.
      source: where the model came from. Its config.json stays as it is, if the model is still the one it describes.
      special: ids of special tokens (`SPECIAL`) of a model without a source.

    Raises:
      ConfigError: the family has no such model.
    """
    folder = Path(folder)
    family = family or (BY_KIND[source.family] if source else fitting(cfg))
    # Without a source nothing is known of special tokens; the ids that classes have by default are other models'.
    said = family.theirs(cfg)
    config, files = dict.fromkeys(SPECIAL) | said | dict(special), {}
    if source is not None and source.family == family.kind:
        files = {n: data for n, data in source.files.items() if n != "config.json"}
        before = family.ours(source.config)
        if not special and not differences(resolved(before), resolved(cfg)):
            config = source.config
            files["config.json"] = source.files["config.json"]
        else:
            config = {**source.config, **said, **special}
    kept = source.kept if source is not None and source.family == family.kind else Kept()
    made = tensors_of(family, cfg, shapes, kept)
    types = {n: np.result_type(*(dtypes[o] for o in row.ours)) for n, (_, row, _) in made.items()}
    if "config.json" not in files:
        config |= {"dtype": commonest(types.values()).name}
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)

    def of(row: Row) -> list[np.ndarray]:
        return row.form.theirs([np.asarray(read(o)) for o in row.ours])

    # Tensors are asked for by name: of an expert after those of the one before, of all matrices of a layer in turn.
    together = functools.lru_cache(maxsize=3)(of)

    def produce(name: str) -> np.ndarray:
        _, row, i = made[name]
        theirs = (of if len(row.theirs) == 1 else together)(row)
        return np.ascontiguousarray(theirs[i]).astype(types[name], copy=False)

    specs = {n: safetensors.Spec(types[n], shape) for n, (shape, _, _) in made.items()}
    written = safetensors.write_folder(folder, specs, produce=produce, shard_bytes=shard_bytes)
    _write(files, folder)
    return [*written, *(folder / n for n in files)]


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def write_source(source: Source, folder: Path) -> None:
    """Keeps what came with a model in a folder of its own."""
    folder.mkdir(parents=True)
    _write(source.files, folder)
    kept = json.dumps({"family": source.family, **source.kept._asdict()})
    (folder / _KEPT).write_text(kept, encoding="utf-8")


def read_source(folder: Path) -> Source | None:
    """What `write_source` has kept; None where there is nothing."""
    if not (folder / _KEPT).is_file():
        return None
    said: dict[str, Any] = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / _KEPT)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
    kept = Kept(said["bare"], tuple(said["tied"]))
    return Source(said["family"], json.loads(files["config.json"]), files, kept)


def fitting(cfg: AnyModel) -> Family:
    """The first family that has this model."""
    why = []
    for family in (family for family in FAMILIES if isinstance(cfg, family.model)):
        try:
            family.theirs(cfg)
        except ConfigError as e:
            why.append(str(e))
        else:
            return family
    raise ConfigError("no family that is known here has such a model; closest:\n  " + min(why, key=len))
