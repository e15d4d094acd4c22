"""The model that a run starts from (`initial:`), wherever it comes from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import Places
from jaxllm.models.module import Params, abstract
from jaxllm.models.resize import resize_vocabulary
from jaxllm.parallel.sharding import placed, shardings
from jaxllm.train.checkpoint import load_params, stored_model
from jaxllm.train.config import RunConfig
from jaxllm.train.run_folder import differences
from jaxllm.train.step import Setup

SOURCE = "source"  # in a run and its checkpoints: what a model of others has besides weights, to go back with it
MAY_DIFFER = {"vocab", "context", "dropout", "init"}  # fields of the model and of the one it starts from


# Weights into shards: of this config, which says how layers are grouped; of these shapes, with layers at these places.
Load = Callable[[DecoderConfig, dict[str, jax.ShapeDtypeStruct], Places | None], Params]


class Initial(NamedTuple):
    """A model whose weights are not read yet."""

    cfg: DecoderConfig
    load: Load
    keep: Callable[[Path], Any] | None  # makes the folder `SOURCE` at a path


Find = Callable[[Path, DecoderConfig], Initial]  # what lies at a path, for a run of this model


def of_checkpoint(path: Path, wanted: DecoderConfig) -> Initial:
    """A run, or one of its checkpoints. Raises CheckpointError if there is none."""
    cfg, newest = stored_model(path)

    def load(cfg: DecoderConfig, like: dict[str, jax.ShapeDtypeStruct], places: Places | None) -> Params:
        return load_params(path, cfg, like=like, places=places).params

    source = newest / SOURCE
    return Initial(cfg, load, (lambda to: shutil.copytree(source, to)) if source.is_dir() else None)


def check(cfg: RunConfig, initial: Initial) -> None:
    """Raises ConfigError if `initial` is not the model of the run, or one of a smaller vocabulary."""
    there, here = (m.model_dump(mode="json", exclude=MAY_DIFFER) for m in (initial.cfg, cfg.model))
    if differ := [f"{path}: {a!r} there, {b!r} here" for path, a, b in differences(there, here, "model")]:
        raise ConfigError(
            f"initial={cfg.initial} holds another model than `model:` asks for:\n  " + "\n  ".join(differ[:20])
        )
    if initial.cfg.vocab > cfg.model.vocab:
        raise ConfigError(
            f"initial={cfg.initial} has a vocabulary of {initial.cfg.vocab}, model.vocab={cfg.model.vocab} is smaller; "
            f"set it to {initial.cfg.vocab} or more"
        )


def weights(setup: Setup, initial: Initial) -> Params:
    """The weights of a model that `check` passed, in their shards; rows are added for this vocabulary."""
    cfg, where = setup.cfg, jax.tree.map(lambda x: x.sharding, setup.state.params)
    if initial.cfg.vocab == cfg.model.vocab:
        return initial.load(initial.cfg, setup.state.params, setup.places)
    rules = cfg.sharding.parameters.model_copy(update={"vocab": None})  # the old size may not divide
    _, shapes, axes = abstract(initial.cfg, places=setup.places)
    like = placed(shapes, shardings(setup.mesh, rules, axes, shapes))
    params = initial.load(initial.cfg, like, setup.places)
    return jax.jit(lambda p: resize_vocabulary(p, initial.cfg, cfg.model.vocab)[0], out_shardings=where)(params)


def keep_source(initial: Initial | None, folder: Path) -> None:
    """Puts what came with the model into a run's folder, whole or not at all."""
    if initial is None or initial.keep is None:
        return
    half = folder / f"{SOURCE}.new"
    for old in (half, folder / SOURCE):
        shutil.rmtree(old, ignore_errors=True)
    initial.keep(half)
    half.rename(folder / SOURCE)
