"""Where metrics go: metrics.jsonl always, a progress line, TensorBoard and Weights & Biases if asked.

metrics.jsonl has one JSON object a line: {"step", "time", metric: value...} for metrics, {"event", "message",
"time", ...} for events; time in Unix seconds. JSON has no NaN and no infinity: they are the strings "nan", "inf",
"-inf", so that float(value) reads every number back.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxllm.core.errors import ConfigError
from jaxllm.core.metrics import Metrics, TensorBoard, WandB


@runtime_checkable
class Sink(Protocol):
    """A place for metrics and events. Values are Python scalars already."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def event(self, kind: str, message: str, data: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All sinks of a run; none on processes but the first, where `log` and `event` do nothing."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics after optimizer step `step`. Values: numbers (Python, numpy or JAX scalars) or strings."""
        plain = {k: _scalar(v) for k, v in metrics.items()}
        for sink in self._sinks:
            sink.log(step, plain)

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Something that happened (a rewind, a checkpoint, an evaluation), in words and in data."""
        plain = {k: _scalar(v) for k, v in data.items()}
        for sink in self._sinks:
            sink.event(kind, message, plain)

    def rewind(self, step: int) -> None:
        """Takes the lines of steps after `step` out of metrics.jsonl; other sinks keep what they were told."""
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.rewind(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Sinks":  # noqa: PYI034 (beartype refuses Self here)
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def check_extras(cfg: Metrics) -> None:
    """Raises ConfigError for a sink whose package is not installed."""
    for sink in cfg.sinks:
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[sink.kind]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"metrics.sinks asks for {sink.kind}, but the package {package} is not installed;"
                f" pip install 'jaxllm[{sink.kind}]', or take {sink.kind} out of metrics.sinks"
            )


def open_sinks(cfg: Metrics, folder: str | Path, run_name: str, total_steps: int) -> Sinks:
    """The sinks that `metrics:` asks for, below the run folder, which is created if need be.

    Appends to what is there: call `truncate_after` first when resuming. Raises ConfigError for a missing extra.
    """
    if not _is_first_process():
        return Sinks([])
    check_extras(cfg)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [_open(sink, folder, run_name) for sink in cfg.sinks]
    console = [Console(total_steps)] if cfg.console else []
    return Sinks([JsonLines(folder / "metrics.jsonl"), *console, *others])


def _open(cfg: TensorBoard | WandB, folder: Path, run_name: str) -> Sink:
    return EventFiles(folder / "tensorboard") if isinstance(cfg, TensorBoard) else WandBRun(cfg, folder, run_name)


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")  # without JAX there is one process
    return jax is None or jax.process_index() == 0


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


# --- metrics.jsonl ------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends one JSON object a line, each flushed: a killed run loses at most the line it was writing."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        self._file.close()
        truncate_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._write({"step": step, "time": time.time(), **metrics})

    def event(self, kind: str, message: str, data: dict[str, Any]) -> None:
        self._write({"event": kind, "message": message, "time": time.time(), **data})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def truncate_after(path: str | Path, step: int) -> None:
    """Drops from a metrics file the lines of steps after `step`, so that a resumed run writes each step once.

    Events stay, whatever their step: they tell what happened, and a rewind that is not told cannot be understood.
    Lines that are no JSON object, such as the half line of a killed run, are dropped too. The file is replaced as a
    whole or not at all; a missing one is left missing.
    """
    path = Path(path)
    if not path.exists():
        return
    draft = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, draft.open("wb") as new:
        for line in old:
            if _is_kept(line, step):
                new.write(line.rstrip(b"\n") + b"\n")
    os.replace(draft, path)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return False
    return isinstance(entry, dict) and ("event" in entry or entry.get("step", 0) <= step)


# --- console ------------------------------------------------------------------------------------------------------


class Console:
    """Progress on stderr: one live line on a terminal, else a line for each log."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._width = 0  # of the live line on the screen
        self._first: tuple[int, float] | None = None  # step and time of the first log

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        done, since = step - self._first[0], now - self._first[1]
        pace = metrics.get("step_time") or (since / done if done > 0 else None)
        left = (self._total - step) * pace if pace is not None else None
        self._show(progress_line(step, self._total, metrics, left), live=sys.stderr.isatty())

    def event(self, kind: str, message: str, data: dict[str, Any]) -> None:
        self._show(f"{kind}: {message}", live=False)

    def close(self) -> None:
        if self._width:
            print(file=sys.stderr, flush=True)
            self._width = 0

    def _show(self, text: str, live: bool) -> None:
        if live:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some terminals say 0
            text = text[: columns - 1]  # a wrapped line cannot be overwritten
        start = "\r" if self._width else ""
        print(start + text.ljust(self._width), end="" if live else "\n", file=sys.stderr, flush=True)
        self._width = len(text) if live else 0


def progress_line(step: int, total: int, metrics: Mapping[str, Any], seconds_left: float | None) -> str:
    """`step 120/1000  loss 3.214  lr 3.0e-04  12.3k tokens/s  MFU 41.2%  1:05 left`, of what is known."""
    parts = [f"step {step}/{total}"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.1e}")
    if "tokens_per_second" in metrics:
        parts.append(f"{_short(metrics['tokens_per_second'])} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.1f}%")
    if len(parts) == 1:  # an evaluation, say: show what there is
        parts += [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float)]
    if seconds_left is not None:
        parts.append(f"{_duration(seconds_left)} left")
    return "  ".join(parts)


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# --- extras -------------------------------------------------------------------------------------------------------


class EventFiles:
    """TensorBoard event files, written by tensorboardX: it needs no TensorFlow."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def event(self, kind: str, message: str, data: dict[str, Any]) -> None:
        self._writer.add_text(kind, message, data.get("step"))

    def close(self) -> None:
        self._writer.close()


class WandBRun:
    """A Weights & Biases run. Its id lies in the run folder, so that a resumed run goes on in the same one."""

    def __init__(self, cfg: WandB, folder: Path, run_name: str):
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(os.urandom(6).hex())
        self._run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            mode=cfg.mode,
            name=run_name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
        )
        # the service's own step may only grow; a resumed or rewound run logs some steps again
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log({"step": step, **metrics})

    def event(self, kind: str, message: str, data: dict[str, Any]) -> None:
        self._run.log({f"event/{kind}": message, **data})

    def close(self) -> None:
        self._run.finish()
