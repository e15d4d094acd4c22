"""Ours beside a peer on the same machine in the same run: one JSON object a measurement.

A module here is a measurement: its `measure(rounds)` returns what `compare` does, the unit, the config, what the
peer is and the versions of its packages. Every number in the README comes from a file written here.
"""

import contextlib
import datetime
import importlib
import inspect
import json
import os
import pkgutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.core.machine import describe_machine, versions
from jaxllm.plan.run import check_writable


def names() -> list[str]:
    """What can be measured."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def run(name: str, rounds: int = 5, file: Path | None = None, model: str | None = None, **peer: str) -> dict[str, Any]:
    """Prints, and writes to `file`, one object: name, ours, peer, ratio (> 1: ours is better), raw times, versions.

    Args:
      model: what to measure with, of measurements that can be given one.
      peer: another peer than the measurement's own, as its `beside` takes it.

    Raises:
      UserError: before anything is measured, if there is no round to take, no such peer, or `file` cannot be written.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    if peer and not hasattr(module, "beside"):
        raise UserError(f"bench {name}: --peer is for `jaxllm bench plan`; {name} has one peer, and brings it along")
    if model is not None and "model" not in inspect.signature(module.measure).parameters:
        raise UserError(f"bench {name}: --model is for `jaxllm bench decode`; {name} measures what it makes itself")
    if rounds < 1:
        raise UserError(f"bench {name}: --rounds must be at least 1, got {rounds}")
    if file is not None:
        check_writable(file)
    given = {} if model is None else {"model": model}
    measured = module.beside(**peer) if peer else module.measure(rounds, **given)
    result = {
        "name": name,
        **measured,
        "versions": versions() | measured.get("versions", {}),
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    return result


@contextlib.contextmanager
def worker(module: str, *arguments: str, **env: str) -> Iterator[Callable[[Any], Any]]:
    """A process `python -m module arguments`, so that no other's threads spin beside it; `env` is added to ours.

    Gives a function that tells it a value, as a line, and returns the JSON that it answers in one.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env)

    def ask(value: Any) -> Any:
        print(value, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}; its message stands above")
        return json.loads(answer)

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def compare(ours: list[float], peer: list[float], work: float) -> dict[str, Any]:
    """Medians of work a second of both sides and their ratio, from the seconds each took round by round."""
    speed = {"ours": work / statistics.median(ours), "peer": work / statistics.median(peer)}
    return {**speed, "ratio": speed["ours"] / speed["peer"], "seconds": {"ours": ours, "peer": peer}}
