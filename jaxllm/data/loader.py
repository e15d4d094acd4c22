"""Batches of prepared rows: batch k is a pure function of (manifest, seed, k), so the step is all of the state.

Row r of a run: a schedule without randomness says which task row r comes from and how many of that task came before;
grain's index shuffle says which record that is, anew in each epoch; ArrayRecord reads it. Nothing is walked through:
any row costs the same. grain also reads ahead in threads. No TensorFlow here.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data import rows as codec
from jaxllm.data.manifest import Prepared, open_prepared
from jaxllm.data.mixtures import schedule

__all__ = ["Batches", "Prepared", "Rows", "batches", "open_prepared", "validation_rows"]

Weights = Mapping[str, float] | Sequence[tuple[str, float]]


class Rows:
    """The endless rows of a run: `rows[r]` is a dict of arrays `[length]` (and `bytes`), for any r >= 0.

    Tasks come by `weights` (task -> weight; by default the manifest's mixture); each task's rows come once per epoch
    of that task, in a new order each time.

    Raises:
      ConfigError: `weights` names a task that is not there, or has a weight that is not above 0.
    """

    def __init__(self, prepared: Prepared, seed: int, weights: Weights | None = None):
        import grain  # brings JAX along: only where rows are read

        self.prepared = prepared
        weights = _checked(dict(sorted(dict(weights or prepared.manifest["mixture"]).items())), prepared)
        self.tasks = tuple(weights)
        self._schedule = schedule([max(1, round(w / sum(weights.values()) * 2**40)) for w in weights.values()])
        self._shards = [_Shards(prepared, task, "train") for task in self.tasks]
        self._orders = [
            grain.MapDataset.range(len(shards)).shuffle(seed=_seed(seed, task)).repeat()
            for task, shards in zip(self.tasks, self._shards, strict=True)
        ]

    def locate(self, r: int) -> tuple[str, int]:
        """The task and the record of row r."""
        part, n = self._schedule(r)
        return self.tasks[part], int(self._orders[part][n])

    def __getitem__(self, r: int) -> dict[str, np.ndarray]:
        part, n = self._schedule(r)
        return self._shards[part][self._orders[part][n]]


def _checked(weights: dict[str, float], prepared: Prepared) -> dict[str, float]:
    known = prepared.manifest["tasks"]
    for task, weight in weights.items():
        if task not in known:
            raise ConfigError(f"data.weights: no task {task!r} in {prepared.path}; its tasks: {', '.join(known)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.weights: {task}={weight} must be above 0; leave the task out to train without it")
    return weights


def _seed(seed: int, task: str) -> int:
    """32 bits for a task's shuffle. grain adds the epoch to it: hashed, seeds 0 and 1 do not share epochs."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}".encode()).digest()[:4], "big")


class _Shards:
    """The records of a task's split, across its shards, as rows."""

    def __init__(self, prepared: Prepared, task: str, split: str):
        from grain.sources import ArrayRecordDataSource

        entries = prepared.shards(task, split)
        self._length, self._files = prepared.length, [prepared.path / s["file"] for s in entries]
        self._ends = np.cumsum([s["rows"] for s in entries])
        # the counts are given, so that nothing is opened before it is read
        paths = [f"{file}[0:{s['rows']}]" for file, s in zip(self._files, entries, strict=True)]
        self._records = ArrayRecordDataSource(paths) if paths else ()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        try:
            return codec.decode(self._records[i], self._length)
        except (RuntimeError, ValueError, IndexError) as e:  # what array_record and the codec raise for a damaged file
            file = self._files[int(np.searchsorted(self._ends, i, side="right"))]
            raise DataError(
                f"{file}: row {i} of its task cannot be read ({' '.join(str(e).split())}); "
                "delete the folder and run `jaxllm prepare` again, or copy it again"
            ) from None


class _HeldOut(Sequence):
    """Held-out rows in a fixed order, tasks evenly mixed by their number of rows."""

    def __init__(self, prepared: Prepared, limit: int | None):
        parts = [_Shards(prepared, task, "validation") for task in prepared.manifest["tasks"]]
        self._parts = [p for p in parts if len(p)]
        total = sum(map(len, self._parts))
        self._len = total if limit is None else min(limit, total)
        self._schedule = schedule([len(p) for p in self._parts]) if total else None

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self._len:
            raise IndexError(i)
        part, n = self._schedule(i)
        return self._parts[part][n]


def validation_rows(prepared: Prepared, limit: int | None = None) -> Sequence[dict[str, np.ndarray]]:
    """The held-out rows, or the first `limit` of them: always the same, in the same order, every task in proportion."""
    return _HeldOut(prepared, limit)


class Batches:
    """Iterator of (k, batch) that reads ahead in threads; `waited` is the time in seconds its user stood waiting."""

    def __init__(self, read: Callable[[int], Any], first: int, prefetch: int):
        import grain

        self.waited = 0.0
        ahead = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
        self._batches = iter(grain.MapDataset.range(first, sys.maxsize).map(read).to_iter_dataset(ahead))

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        start = time.perf_counter()
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise
        finally:
            self.waited += time.perf_counter() - start

    def close(self) -> None:
        """Stops reading ahead; the iterator is of no use afterwards."""
        self._batches.close()


def batches(
    rows: Rows | Sequence[dict[str, np.ndarray]],
    first: int,
    plan: Callable[[int], tuple[int, int]],
    host: int = 0,
    hosts: int = 1,
    prefetch: int = 2,
) -> Batches:
    """Endless (k, batch) from global batch `first` on: dicts of arrays `[B, T]`, `bytes` `[B]`.

    `plan(k)` is (first row, number of rows) of global batch k; of these, host h of n takes the h-th of n contiguous
    parts. An error in reading is raised where the batch is asked for.
    """

    def read(k: int) -> tuple[int, dict[str, np.ndarray]]:
        start, count = plan(k)
        mine = [rows[r] for r in range(start + count * host // hosts, start + count * (host + 1) // hosts)]
        return k, {name: np.stack([row[name] for row in mine]) for name in mine[0]}

    return Batches(read, first, prefetch)
