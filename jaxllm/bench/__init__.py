"""Ours beside a peer on the same machine in the same run: one JSON object a measurement.

A module here is a measurement: its `measure(rounds)` returns `config`, `peer_is` and `rounds`, the raw seconds of
each side round by round. Every number in the README comes from a file written here.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import statistics
from pathlib import Path
from typing import Any


def names() -> list[str]:
    """What can be measured."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def run(name: str, rounds: int = 5, file: Path | None = None) -> dict[str, Any]:
    """Prints, and writes to `file`, one object: name, ours, peer, ratio (> 1: ours is better), raw times, versions."""
    measured = importlib.import_module(f"{__name__}.{name}").measure(rounds)
    result = {
        "name": name,
        **measured,
        "versions": {"python": platform.python_version(), **_versions("jax", "jaxlib", "flax", "optax", "numpy", "torch")},
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": len(os.sched_getaffinity(0))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    return result


def compare(ours: list[float], peer: list[float], work: float) -> dict[str, Any]:
    """Medians of work a second of both sides and their ratio, from the seconds each took round by round."""
    speed = {"ours": work / statistics.median(ours), "peer": work / statistics.median(peer)}
    return {**speed, "ratio": speed["ours"] / speed["peer"], "seconds": {"ours": ours, "peer": peer}}


def _versions(*packages: str) -> dict[str, str | None]:
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found.get(name) for name in packages}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
