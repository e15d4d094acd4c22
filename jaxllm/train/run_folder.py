"""The folder of a run: its config, what it was made with, and who may continue it."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from jaxllm.core import config
from jaxllm.core.errors import ConfigError
from jaxllm.core.machine import describe_machine, git_revision, versions
from jaxllm.train import distributed
from jaxllm.train.config import RunConfig

# What may change when a run continues: where it computes, what it reports, how long it goes on. Of these `steps` moves
# the end of schedules, `accumulate` the draws of dropout, `stability` what is skipped: the loop logs what changed.
FREE = ("out", "steps", "accumulate", "mesh", "sharding", "pipeline", "remat", "scan", "evaluation", "checkpoints",
        "stability", "metrics", "profile", "compile_cache", "initial", "distributed")  # fmt: skip
FREE_DATA = ("path", "prefetch", "verify")  # the manifest's hash says whether it is the same data


@contextmanager
def open_run(cfg: RunConfig, manifest_hash: str) -> Iterator[tuple[Path, list[str]]]:
    """The run's folder, locked, and what has changed in its config: made if it is new, checked if the run is to go on.

    Of several processes the first does all that; what it finds, or is refused, holds for all.

    Raises:
      ConfigError: the folder holds another run, one that is being trained already, or is not the same on all hosts.
    """
    with ExitStack() as stack:
        changed = distributed.from_first(lambda: stack.enter_context(_opened(cfg, manifest_hash)))
        folder = Path(cfg.out)
        distributed.check_shared(folder / "run.json")
        yield folder, changed


@contextmanager
def _opened(cfg: RunConfig, manifest_hash: str) -> Iterator[list[str]]:
    folder = Path(cfg.out)
    written, changed = folder / "config.yaml", []
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder")
    if written.exists():
        changed = _check_same(cfg, manifest_hash, folder)
    elif folder.exists() and any(p for p in folder.iterdir() if p.name != "lock" and p.suffix != ".new"):
        raise ConfigError(f"out={folder} is not empty and holds no run; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"out={folder} cannot be made: {e.strerror}") from None
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"out={folder}: another process is training this run; stop it or name another folder"
            ) from None
        made_with = {
            "manifest": manifest_hash, "versions": versions(), "git": git_revision(Path(__file__).parent),
            "machine": describe_machine(),
        }  # fmt: skip
        _replace(written, config.dump(cfg))
        _replace(folder / "run.json", json.dumps(made_with, indent=1) + "\n")
        yield changed


def check_alike(cfg: RunConfig, manifest_hash: str) -> None:
    """Raises ConfigError on all processes if one was started with another config, data or JAX than the first."""
    mine = cfg.model_dump(mode="json", exclude={"distributed"}) | {
        "prepared data": manifest_hash[:12],
        "version of": {name: number for name, number in versions().items() if name.startswith("jax")},
    }
    theirs = distributed.from_first(lambda: mine)

    def compare() -> None:
        differ = [f"{path}: {_short(a)} there, {_short(b)} here" for path, a, b in differences(theirs, mine)]
        if differ:
            lines = "\n  ".join(differ)
            raise ConfigError(
                f"process {jax.process_index()} is not what process 0 is; start all with the same, or each as a run of "
                f"its own with distributed.kind=none:\n  {lines}"
            )

    distributed.together(compare)


def _replace(path: Path, text: str) -> None:
    """Writes the whole file or leaves the old one."""
    half = path.with_suffix(path.suffix + ".new")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _check_same(cfg: RunConfig, manifest_hash: str, folder: Path) -> list[str]:
    """What differs and may; raises ConfigError for what differs and may not."""
    old = config.load(RunConfig, folder / "config.yaml")
    differ = [f"{path}: {_short(a)} there, {_short(b)} asked" for path, a, b in differences(_fixed(old), _fixed(cfg))]
    if (folder / "run.json").exists():
        there = json.loads((folder / "run.json").read_text())["manifest"]
        if there != manifest_hash:
            differ.append(f"data: prepared data with hash {there[:12]} there, {manifest_hash[:12]} asked")
    if differ:
        lines = "\n  ".join(differ)
        raise ConfigError(
            f"out={folder} holds another run, which this one cannot continue; name another folder, or undo:\n  {lines}"
        )
    both = (c.model_dump(mode="json") for c in (old, cfg))
    return [f"{path}: {_short(a)} -> {_short(b)}" for path, a, b in differences(*both) if path != "out"]


def _fixed(cfg: RunConfig) -> dict:
    tree = {k: v for k, v in cfg.model_dump(mode="json").items() if k not in FREE}
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in FREE_DATA}
    return tree


def differences(a: object, b: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
