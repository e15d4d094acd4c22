"""Loading of weights: our safetensors reader beside the reference library, in bytes a second.

Both give NumPy arrays in memory of the process, of one file that the page cache holds: what is measured is how fast
bytes come out of it. Both are one thread. Ours maps the file and copies each tensor; of the library's two ways to
read (`mmap` and `pread`) the faster counts. Sides take turns, and what one has read is let go before the other's turn.
"""

import importlib.metadata
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.bench import compare
from jaxllm.core.errors import UserError
from jaxllm.interop.safetensors import open_tensors, write

SHAPES = {f"layers.{i}.{name}": shape for i in range(10) for name, shape in (
    ("norm", (1024,)), ("qkv", (1536, 1024)), ("out", (1024, 1024)), ("up", (4224, 1024)), ("down", (1024, 5700)),
)}  # fmt: skip
BACKENDS = ("mmap", "pread")


def measure(rounds: int) -> dict[str, Any]:
    """Bytes/s of a 500 MB float32 file; `ratio` is ours over the faster backend of safetensors."""
    if not importlib.util.find_spec("safetensors"):
        raise UserError("bench load needs safetensors as the peer: pip install 'jaxllm[oracle]'")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        draw = np.random.default_rng(0)
        write(path, {name: draw.standard_normal(shape, np.float32) for name, shape in SHAPES.items()})
        seconds = {side: [] for side in ("ours", *BACKENDS)}
        check(path)  # which also brings the file into the page cache
        for side in (s for _ in range(rounds) for s in seconds):
            start = time.perf_counter()
            read = ours(path) if side == "ours" else theirs(path, side)
            seconds[side].append(time.perf_counter() - start)
            del read
        size = float(path.stat().st_size)
    speeds = {backend: compare(seconds["ours"], seconds[backend], size) for backend in BACKENDS}
    fastest = min(speeds, key=lambda backend: speeds[backend]["ratio"])
    version = importlib.metadata.version("safetensors")
    return {
        "unit": "bytes/s", **speeds[fastest], "seconds": seconds, "load_before": load,
        "config": {"bytes": size, "tensors": len(SHAPES), "dtype": "float32", "rounds": rounds, "page_cache": "warm"},
        "versions": {"safetensors": version},
        "peer_is": f"safetensors {version}, numpy.load_file(backend={fastest!r}), the faster of its two",
    }  # fmt: skip


def ours(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as tensors:
        return {name: tensors.read(name).copy() for name in tensors}


def theirs(path: Path, backend: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path, backend=backend)


def check(path: Path) -> None:
    """Both read the same."""
    mine = ours(path)
    for backend in BACKENDS:
        peer = theirs(path, backend)
        assert mine.keys() == peer.keys()
        assert all(np.array_equal(mine[name], peer[name]) for name in mine)
