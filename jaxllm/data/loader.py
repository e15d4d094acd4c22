"""Batches of prepared rows: batch k is a pure function of (manifest, seed, k), so the step is all of the state.

Row r of a run: a schedule without randomness says which task row r comes from and how many of that task came before;
a computed shuffle says which record that is, anew in each epoch; grain reads it, and reads ahead in threads. Nothing
is walked through: any row costs the same. (grain's own mixing and shuffle are not used: the one holds proportions only
over long windows, the other takes milliseconds a row in tasks of a few rows.) No TensorFlow here.
"""

import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data import rows as codec
from jaxllm.data.manifest import AGAIN, Prepared, open_prepared
from jaxllm.data.mixtures import schedule
from jaxllm.data.shuffle import shuffled

__all__ = ["Batches", "Prepared", "Rows", "batches", "open_prepared", "validation_rows"]

Weights = Mapping[str, float] | Sequence[tuple[str, float]]


@runtime_checkable
class RandomAccess(Protocol):
    """Rows by number, such as `Rows` or what `validation_rows` gives; asked from several threads."""

    def __getitem__(self, r: int) -> dict[str, np.ndarray]: ...


class Rows:
    """The endless rows of a run: `rows[r]` is a dict of arrays `[length]` (and `bytes`), for any r >= 0.

    Tasks come by `weights` (task -> weight; by default the manifest's mixture); each task's rows come once per epoch
    of that task, in a new order each time.

    Raises:
      ConfigError: `weights` names a task that is not there, or has a weight that is not above 0.
    """

    def __init__(self, prepared: Prepared, seed: int, weights: Weights | None = None):
        self.prepared = prepared
        chosen = _checked(dict(weights), prepared) if weights else prepared.manifest["mixture"]
        weights = dict(sorted(chosen.items()))  # in whatever order they were given: the same rows
        self.tasks = tuple(weights)
        self._schedule = schedule([max(1, round(w / sum(weights.values()) * 2**40)) for w in weights.values()])
        self._shards = [_Shards(prepared, task, "train") for task in self.tasks]
        self._seed = seed

    def locate(self, r: int) -> tuple[str, int]:
        """The task and the record of row r."""
        part, i = self._locate(r)
        return self.tasks[part], i

    def __getitem__(self, r: int) -> dict[str, np.ndarray]:
        part, i = self._locate(r)
        return self._shards[part][i]

    def _locate(self, r: int) -> tuple[int, int]:
        part, n = self._schedule(r)
        epoch, i = divmod(n, len(self._shards[part]))
        return part, shuffled(i, len(self._shards[part]), _key(self._seed, self.tasks[part], epoch))


def _checked(weights: dict[str, float], prepared: Prepared) -> dict[str, float]:
    known = prepared.manifest["tasks"]
    for task, weight in weights.items():
        if task not in known:
            raise ConfigError(f"data.weights: no task {task!r} in {prepared.path}; its tasks: {', '.join(known)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.weights: {task}={weight} must be above 0; leave the task out to train without it")
    return weights


@functools.lru_cache(maxsize=1024)
def _key(seed: int, task: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{epoch}".encode()).digest()[:8], "big")


class _Shards:
    """The records of a task's split, across its shards, as rows."""

    def __init__(self, prepared: Prepared, task: str, split: str):
        from grain.sources import ArrayRecordDataSource  # brings JAX along: only where rows are read

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
                f"{file}: row {i} of its task cannot be read ({' '.join(str(e).split())}); {AGAIN}"
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
    rows: RandomAccess,
    first: int,
    plan: Callable[[int], tuple[int, int]],
    mine: Callable[[int], Sequence[int]] = range,
    prefetch: int = 2,
) -> Batches:
    """Endless (k, batch) from global batch `first` on: dicts of arrays `[B, T]`, `bytes` `[B]`.

    `plan(k)` is (first row, number of rows) of global batch k; of a batch of n rows, those of `mine(n)` are read, by
    default all. An error in reading is raised where the batch is asked for.
    """

    def read(k: int) -> tuple[int, dict[str, np.ndarray]]:
        start, count = plan(k)
        read = [rows[start + i] for i in mine(count)]
        return k, {name: np.stack([row[name] for row in read]) for name in read[0]}

    return Batches(read, first, prefetch)
