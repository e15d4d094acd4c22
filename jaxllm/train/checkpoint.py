"""Checkpoints: what a run is at a step, in one folder that no mesh, host count or grouping of layers shows through.

`RUN/checkpoints/{step:08d}/` holds

    arrays/params/, arrays/state/   orbax (tensorstore OCDBT); one leaf per layer: `params/layers.3.attention.w_q`
    arrays.json                     dtype and shape of every leaf
    meta.json                       format, step, held-out loss, model config, and what the loop adds as `meta`
    config.yaml, tokenizer/, ...    files the run puts beside them, so that the folder is all `generate` needs
    source/                         of a model that began as another's: its config.json and what else came with it
    checksums.json                  size and SHA-256 of each file above

It is written as `{step:08d}.saving` and renamed when complete, so a folder under its final name was whole once;
whether it still is, the checksums say before anything is read. (Tensorstore's own checksums cover its index but not
the arrays: a flipped bit there is read back as a weight.)
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxllm.core.config import Config, parse
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.models import layout
from jaxllm.models.config import AnyModel, Model
from jaxllm.train import distributed
from jaxllm.train.config import Checkpoints

FORMAT = 1  # of the folder described above

_CHECKSUMS = "checksums.json"
_RESIDUAL = "opt/residual/"  # leaves of train.compressed.Fed: of each replica, and only their sum counts
_APART = "opt/params/"  # leaves of train.outer.Replicas
_AT_ONCE = 64 << 20  # bytes of unread leaves that are in memory together, if no leaf alone has more
_warn = logging.getLogger(__name__).warning

Extra = Path | str | Callable[[Path], Any]  # a file or folder to copy, a text, or what makes a folder at that path


@dataclasses.dataclass(frozen=True)
class Unread:
    """A leaf that is read when it is written, so that a model need not fit into memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Checkpointer:
    """Saves a run under `folder` (`RUN/checkpoints`), keeps the newest `cfg.keep` and the one of lowest held-out loss.

    Every process of a run makes one and calls it alike. `extra_files` go into each checkpoint, by name. Leftovers of a
    save that was killed are removed. A context manager: leaving it waits for the save under way. `places` says where
    the run's stacks have which layers.
    """

    def __init__(
        self,
        folder: Path,
        cfg: Checkpoints,
        model_cfg: AnyModel,
        *,
        extra_files: dict[str, Extra] | None = None,
        places: layout.Places | None = None,
    ):
        self.folder, self.cfg, self.model_cfg, self.places = folder, cfg, model_cfg, places
        self.extra_files = extra_files or {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        distributed.from_first(self._clear)

    def _clear(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("*.saving"), *self.folder.glob("*.deleted")]:
            shutil.rmtree(path)

    def __enter__(self) -> "Checkpointer":  # noqa: PYI034 (beartype checks functions one by one and refuses Self)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        # An error may be this process's alone: the others would not come to agree on the save.
        self.close(agree=kind is None)

    def save(self, step: int, state: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Saves a TrainState (or any tree with `params`); replaces a checkpoint of the same step.

        Leaves may be `Unread` ones, of logical names. Returns when every array is copied to the host, so the caller may donate them; writing goes on behind it if
        `cfg.asynchronous`. Checkpoints of later steps, of a future that a rewind gave up, go once this one is complete.

        Args:
          meta: JSON values that `restore` gives back.
          loss: held-out loss, if it was measured at this step.
        Raises:
          CheckpointError: this save, or the one before that went on behind, could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        record = {
            "format": FORMAT,
            "step": step,
            "loss": loss if loss is not None and math.isfinite(loss) else None,
            "model": self.model_cfg.model_dump(mode="json"),
            "meta": meta,
        }
        texts = {"meta.json": json.dumps(record, indent=1)}  # now: the caller may change `meta` next
        saving = self.folder / f"{step:08d}.saving"

        def make_folder() -> None:
            with self._failure_named(step):
                shutil.rmtree(saving, ignore_errors=True)
                saving.mkdir()

        distributed.from_first(make_folder)
        with self._failure_named(step):
            leaves = _logical_on_host(state, self.model_cfg, self.places)
            rows = [f"{json.dumps(n)}: {json.dumps([str(x.dtype), x.shape])}" for n, x in leaves.items()]
            texts["arrays.json"] = "{\n" + ",\n".join(rows) + "\n}\n"
            trees = {item: ocp.args.PyTreeSave(tree) for item, tree in _items(leaves).items()}
            self._writer.save(saving.absolute() / "arrays", args=ocp.args.Composite(**trees))
        self._pending = self._thread.submit(self._finish, step, saving, texts)
        if not self.cfg.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is complete. Raises CheckpointError if a process could not write its part."""
        if self._pending:
            pending, self._pending = self._pending, None
            distributed.together(pending.result)  # the first process alone has seen the rename

    def close(self, agree: bool = True) -> None:
        try:
            if agree:
                self.wait()
            elif self._pending:
                self._pending.result()
        finally:
            self._thread.shutdown()
            if "_writer" in vars(self):
                self._writer.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were completed, in order; one that was damaged since is among them."""
        return steps(self.folder)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the kept checkpoint of lowest held-out loss; the newest of equals."""
        losses = {step: loss for step in self.steps() if (loss := self._loss(step)) is not None}
        return min(reversed(losses), key=losses.__getitem__, default=None)

    @functools.cached_property
    def _writer(self):
        import orbax.checkpoint as ocp

        known = ocp.type_handlers.get_type_handler
        types = ocp.type_handlers.create_type_handler_registry(
            (np.number, known(np.number)), (jax.Array, known(jax.Array)), (Unread, _unread_handler()),
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),  # they are copies already
        )  # fmt: skip
        # zstd makes float weights 8 % smaller and writing and reading several times dearer (measured).
        how = {"use_compression": False, "type_handler_registry": types}
        items = {item: ocp.PyTreeCheckpointHandler(**how) for item in ("params", "state")}
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))

    def _finish(self, step: int, saving: Path, texts: dict[str, str]) -> None:
        with self._failure_named(step):
            self._writer.wait_until_finished()
            if jax.process_index() != 0:
                return
            for name, source in self.extra_files.items():
                if isinstance(source, str):
                    texts[name] = source
                elif callable(source):
                    source(saving / name)
                elif source.is_dir():
                    shutil.copytree(source, saving / name)
                else:
                    shutil.copyfile(source, saving / name)
            for name, text in texts.items():
                _write(saving / name, text)
            _write(saving / _CHECKSUMS, _checksums(saving))
            final = self.folder / f"{step:08d}"
            old = self.folder / f"{step:08d}.deleted"
            if final.exists():
                final.rename(old)
            saving.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            self._remove([s for s in self.steps() if s > step])
            kept = [*self.steps()[-self.cfg.keep :], self.best() if self.cfg.best else None]
            self._remove([s for s in self.steps() if s not in kept])

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            # renamed first: a kill half-way through the removal leaves no folder that looks like a checkpoint
            gone = (self.folder / f"{step:08d}").rename(self.folder / f"{step:08d}.deleted")
            shutil.rmtree(gone)

    def _loss(self, step: int) -> float | None:
        try:
            return json.loads((self.folder / f"{step:08d}" / "meta.json").read_bytes())["loss"]
        except (OSError, ValueError, KeyError):  # damaged since: restore will say so
            return None

    @contextlib.contextmanager
    def _failure_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise CheckpointError(f"the checkpoint of step {step} cannot be written to {self.folder}: {e}") from e


class Restored(NamedTuple):
    state: Any
    meta: dict[str, Any]  # what the loop gave to `save`
    step: int


class Weights(NamedTuple):
    params: dict[str, jax.Array]
    model_cfg: AnyModel
    meta: dict[str, Any]
    folder: Path  # of the checkpoint; its `tokenizer/` is there


def restore(
    folder: Path,
    like: Any,
    model_cfg: AnyModel,
    warn: Callable[[str], None] = _warn,
    places: layout.Places | None = None,
) -> Restored:
    """The newest usable state in a run, its `checkpoints/`, or one checkpoint folder.

    Each leaf is read straight into the sharding it has in `like` (ShapeDtypeStructs; without one: the first device),
    its layers where `places` has them.
    A checkpoint that is damaged or does not fit `like` is named to `warn`, and the one before it is tried. What
    compression has left over, of however many replicas, is given to the first of those in `like`.

    Raises:
      CheckpointError: none is usable (each is listed with its reason), or the newest was written by a newer jaxllm.
      ConfigError: replicas that train apart were more or fewer.
    """
    targets = {name: _placed(leaf) for name, leaf in _named_leaves(like).items()}
    wanted = layout.unstack(targets, model_cfg, places)
    misfit = lambda record, stored: _misfit(stored, _as_saved(wanted, stored))
    path, record, stored = _newest(folder, ("params", "state"), misfit, warn)
    leaves = _read(path, targets, wanted, stored, model_cfg, places)
    return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves.values()), record["meta"], record["step"])


def load_params(
    folder: Path,
    model_cfg: AnyModel | None = None,
    like: dict[str, jax.ShapeDtypeStruct] | None = None,
    dtype: Any = None,
    warn: Callable[[str], None] = _warn,
    places: layout.Places | None = None,
) -> Weights:
    """The weights alone, of the newest usable checkpoint of a run or of one checkpoint folder.

    Args:
      model_cfg: groups the layers; None: the config in the checkpoint.
      like: shapes, dtypes and shardings to read into; None: those stored, on the first device.
      dtype: of floating-point weights; None: that of `like`.
      places: of layers in the stacks of `like`.
    Raises:
      CheckpointError: as `restore`.
    """

    def plan(record: dict, stored: dict[str, jax.ShapeDtypeStruct]):
        cfg = model_cfg or parse(_Record, {"model": record["model"]}, name=f"{folder}: meta.json").model
        targets = like or layout.stack({n.removeprefix("params/"): x for n, x in stored.items()}, cfg, places)
        return cfg, {f"params/{n}": _placed(x, dtype) for n, x in targets.items()}

    def misfit(record: dict, stored: dict[str, jax.ShapeDtypeStruct]) -> str | None:
        try:
            cfg, targets = plan(record, stored)
        except CheckpointError as e:
            return str(e)
        return _misfit(stored, layout.unstack(targets, cfg, places), dtypes=False)

    path, record, stored = _newest(folder, ("params",), misfit, warn)
    cfg, targets = plan(record, stored)
    leaves = _read(path, targets, layout.unstack(targets, cfg, places), stored, cfg, places)
    return Weights({n.removeprefix("params/"): x for n, x in leaves.items()}, cfg, record["meta"], path)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints of a run (or in its `checkpoints/`) that were completed, in order."""
    return [int(path.name) for path in reversed(_checkpoints(folder))]


def stored_model(folder: Path) -> tuple[AnyModel, Path]:
    """The model config of the newest checkpoint, its weights unread, and its folder; CheckpointError without one."""
    for path in _checkpoints(folder):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: the one before it will be used
            model = json.loads((path / "meta.json").read_bytes())["model"]
            return parse(_Record, {"model": model}, name=str(path)).model, path
    raise CheckpointError(f"{folder}: no checkpoint here; expected a run folder, its checkpoints/, or one checkpoint")


class _Record(Config):
    model: Model


class Stored(NamedTuple):
    """The weights of a checkpoint, none of them read yet."""

    leaves: dict[str, Unread]  # by logical name
    model_cfg: AnyModel
    folder: Path  # of the checkpoint


def open_params(folder: Path, warn: Callable[[str], None] = _warn) -> Stored:
    """The weights of the newest usable checkpoint of a run or of one checkpoint folder, to be read one by one.

    Raises:
      CheckpointError: as `restore`.
    """
    path, record, stored = _newest(folder, ("params",), lambda record, stored: None, warn)
    cfg = parse(_Record, {"model": record["model"]}, name=f"{path}: meta.json").model
    read = functools.partial(_read_leaf, path.absolute() / "arrays" / "params")
    leaves = {n.removeprefix("params/"): x for n, x in stored.items()}
    return Stored({n: Unread(x.dtype, x.shape, functools.partial(read, n)) for n, x in leaves.items()}, cfg, path)


def _read_leaf(item: Path, name: str) -> np.ndarray:
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result().read().result()


def _newest(
    folder: Path, items: tuple[str, ...], misfit: Callable[[dict, dict], str | None], warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """Path, record and stored leaves of the newest checkpoint whose `items` are whole and fit."""
    problems = []
    found = distributed.from_first(lambda: [str(path) for path in _checkpoints(folder)])
    for path in map(Path, found):
        problem = next(filter(None, distributed.gather(_damage(path, items))), None)
        if problem is None:
            record = json.loads((path / "meta.json").read_bytes())
            if record["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: checkpoint format {record['format']} is newer than {FORMAT}, "
                    "the newest this jaxllm reads; upgrade jaxllm"
                )
            index = json.loads((path / "arrays.json").read_bytes())
            stored = {
                name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
                for name, (dtype, shape) in index.items()
                if _item(name) in items
            }
            problem = misfit(record, stored)
            if problem is None:
                return path, record, stored
        warn(f"{path}: checkpoint not used: {problem}")
        problems.append(f"  {path}: {problem}")
    if not problems:
        raise CheckpointError(
            f"{folder}: no checkpoint here; expected a run folder, its checkpoints/, or one checkpoint"
        )
    raise CheckpointError(f"{folder}: no usable checkpoint:\n" + "\n".join(problems))


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, newest first; `folder` itself if it is one."""
    inner = folder / "checkpoints"
    if not inner.is_dir():
        if folder.is_dir() and (re.fullmatch(r"\d{8,}", folder.name) or (folder / _CHECKSUMS).is_file()):
            return [folder]
        inner = folder
    found = [p for p in inner.iterdir() if p.is_dir() and re.fullmatch(r"\d{8,}", p.name)] if inner.is_dir() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def _damage(path: Path, items: tuple[str, ...]) -> str | None:
    """What is wrong with the files of a checkpoint that hold `items`, each process reading a share; None: nothing."""
    try:
        listed = json.loads((path / _CHECKSUMS).read_bytes())["files"]
    except FileNotFoundError:
        return f"{_CHECKSUMS} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{_CHECKSUMS} is damaged"
    other = tuple(f"arrays/{item}/" for item in {"params", "state"} - set(items))
    needed = {"meta.json", "arrays.json"} | {name for name in listed if not name.startswith(other)}
    if not needed <= set(listed):
        return f"{_CHECKSUMS} is damaged"

    def check(name: str) -> str | None:
        size, digest = listed[name]
        try:
            with open(path / name, "rb") as f:
                if (found := os.fstat(f.fileno()).st_size) != size:
                    return f"{name} has {found} bytes, {size} were written"
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written: its SHA-256 differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
        return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        share = sorted(needed)[jax.process_index() :: jax.process_count()]
        return next((problem for problem in pool.map(check, share) if problem), None)


def _misfit(
    stored: dict[str, jax.ShapeDtypeStruct], wanted: dict[str, jax.ShapeDtypeStruct], dtypes: bool = True
) -> str | None:
    """Where the stored leaves are not those wanted: names, shapes, and if asked dtypes."""

    def show(x: jax.ShapeDtypeStruct) -> str:
        return f"{x.dtype}{list(x.shape)}" if dtypes else f"{list(x.shape)}"

    def kind(x: jax.ShapeDtypeStruct) -> tuple:
        # A place-holder of shape (1,) cannot be told from one scalar per layer when there is one layer.
        return (() if x.shape == (1,) else x.shape, x.dtype if dtypes else None)

    def some(what: str, found: list[str]) -> list[str]:
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return [f"{what} {', '.join(found[:2])}{more}"] if found else []

    differ = [n for n, x in wanted.items() if n in stored and kind(x) != kind(stored[n])]
    problems = [
        *some("it has no", [n for n in wanted if n not in stored]),
        *some("it has an unknown", [n for n in stored if n not in wanted]),
        *some("shapes differ:", [f"{n} is {show(stored[n])}, wanted {show(wanted[n])}" for n in differ]),
    ]
    return f"it does not fit this config: {'; '.join(problems)}" if problems else None


def _as_saved(
    wanted: dict[str, jax.ShapeDtypeStruct], stored: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """`wanted`, but residuals of as many replicas as were saved.

    Raises:
      ConfigError: replicas that train apart were more or fewer.
    """
    found = dict(wanted)
    for name, x in wanted.items():
        saved = stored.get(name, x)
        if saved.shape == x.shape or saved.shape[1:] != x.shape[1:]:
            continue
        if name.startswith(_APART):
            raise ConfigError(
                f"outer: the run was saved with {saved.shape[0]} replicas, mesh.data={x.shape[0]}; their number is "
                f"part of the algorithm: set mesh.data to {saved.shape[0]}, or `initial` to the run, for its weights "
                "alone"
            )
        if name.startswith(_RESIDUAL):
            found[name] = jax.ShapeDtypeStruct(saved.shape, x.dtype, sharding=_whole_along_first(x))
    return found


def _whole_along_first(x: jax.ShapeDtypeStruct) -> Sharding:
    """Like that of `x`; mesh axes that share its first dimension out share another, if one divides."""
    rest = layout.layer_sharding(x.sharding, x.shape)
    if not isinstance(rest, NamedSharding):
        return rest
    return NamedSharding(rest.mesh, PartitionSpec(None, *rest.spec), memory_kind=rest.memory_kind)


def _read(
    path: Path,
    targets: dict[str, jax.ShapeDtypeStruct],
    wanted: dict[str, jax.ShapeDtypeStruct],
    stored: dict[str, jax.ShapeDtypeStruct],
    cfg: AnyModel,
    places: layout.Places | None,
) -> dict[str, jax.Array]:
    """`targets` filled from a checkpoint whose logical leaves are `wanted`."""
    import orbax.checkpoint as ocp

    logical: dict[str, jax.Array] = {}
    for item, tree in _items(_as_saved(wanted, stored)).items():
        how = {n: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for n, x in tree.items()}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(path.absolute() / "arrays" / item, args=ocp.args.PyTreeRestore(restore_args=how))
        logical |= {f"params/{n}" if item == "params" else n: x for n, x in arrays.items()}
        del arrays  # else it keeps what is taken out below
    leaves = {}
    for name, target in targets.items():
        # Taken out as they are used: beyond the state, the devices hold one stacked leaf twice.
        names = layout.logical_names(name, cfg)
        parts = [logical.pop(n) for n in names]
        if name.startswith(_RESIDUAL):
            parts = [_given_to_first(x, wanted[n]) for x, n in zip(parts, names)]
        leaves[name] = layout.join(parts, target, layout.has_layers(name, target.shape, cfg, places), places)
    return leaves


def _given_to_first(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """What all replicas have left over, summed, as that of the first of those in `like`."""
    return x if x.shape == like.shape else _giver(like.shape, like.sharding)(x)


@functools.cache
def _giver(shape: tuple[int, ...], sharding: Sharding):
    return jax.jit(lambda x: jnp.zeros(shape, x.dtype).at[0].set(jnp.sum(x, 0)), out_shardings=sharding)


def _logical_on_host(state: Any, cfg: AnyModel, places: layout.Places | None) -> dict[str, Any]:
    """Copies of the state's logical leaves in host memory, each shard on its own host.

    With one process each leaf is copied whole and once, however many devices hold it. With several, one leaf at a time
    is cut on the device, so a state that fills the device can be saved.
    """
    copies: dict[str, Any] = {}
    for name, leaf in _named_leaves(state).items():
        if isinstance(leaf, Unread):
            copies[name] = leaf
            continue
        if leaf.is_fully_addressable:  # a copy: on CPU the array itself may share memory with what is donated next
            copies |= layout.split(name, np.array(leaf), cfg, places)
            continue
        parts = layout.split(name, leaf, cfg, places)
        where = {n: x.sharding.with_memory_kind("pinned_host") for n, x in parts.items()}
        copies |= jax.block_until_ready(jax.device_put(parts, where))
    return copies


def _unread_handler():
    """Orbax's way to write `Unread` leaves: a few at a time, as NumPy arrays."""
    import orbax.checkpoint as ocp

    class Handler(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, values, infos, args=None):
            begin, held = 0, 0
            for i, x in enumerate(values):
                size = x.size * x.dtype.itemsize
                if i > begin and held + size > _AT_ONCE:
                    await self._write(slice(begin, i), values, infos, args)
                    begin, held = i, 0
                held += size
            await self._write(slice(begin, len(values)), values, infos, args)

        async def _write(self, part, values, infos, args):
            arrays = [np.ascontiguousarray(x.read()) for x in values[part]]
            await super()._background_serialize(arrays, infos[part], args[part])

    return Handler(deepcopy_host_arrays=False)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path: `step`, `params/embedding`, `opt/0/mu/blocks.0.ffn.w_up`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _item(name: str) -> str:
    return "params" if name.startswith("params/") else "state"


def _items(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The two trees of a checkpoint: weights can be read without the rest."""
    trees: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        trees.setdefault(_item(name), {})[name.removeprefix("params/")] = leaf
    return trees


def _placed(leaf: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    cast = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, cast, sharding=sharding)


def _checksums(folder: Path) -> str:
    """Size and SHA-256 of every file below. Without a space: any changed byte of the text changes what it says."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())

    def entry(path: Path) -> tuple[int, str]:
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        entries = dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(entry, files), strict=True))
    return json.dumps({"files": entries}, separators=(",", ":"))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
