"""Times of compiled functions on the device at hand, and what a result has to say of where it was measured."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib


class Times(NamedTuple):
    """Seconds a call, of several rounds, each of many calls in a row."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def ms(self) -> list[float]:
        return [1e3 * t for t in self.rounds]


def in_turns(functions: dict[str, Callable[[], Any]], *, rounds: int, seconds: float = 0.02) -> dict[str, Times]:
    """Times of functions that are called in turns, so that all see the same moods of the machine.

    Args:
      seconds: of one round of one function, about.
    """
    for f in functions.values():
        jax.block_until_ready(f())
    calls = {}
    for name, f in functions.items():
        began = time.perf_counter()
        jax.block_until_ready(f())
        calls[name] = max(1, round(seconds / (time.perf_counter() - began)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                out = f()
            jax.block_until_ready(out)
            found[name].append((time.perf_counter() - began) / calls[name])
    return {name: Times(tuple(times)) for name, times in found.items()}


def options(doc: str) -> argparse.ArgumentParser:
    """Of a measurement that `doc` describes: where to write it (`json`), and `rounds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE too")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def machine() -> dict[str, Any]:
    return {"device": jax.devices()[0].device_kind, **versions()}


def versions() -> dict[str, str | None]:
    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()}
    try:
        return found | {"libtpu": metadata.version("libtpu")}
    except metadata.PackageNotFoundError:
        return found


def write(path: Path | None, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")
