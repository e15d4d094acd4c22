"""`jaxllm prepare`: from documents to packed shards and a manifest.

While work is unfinished the folder holds `prepare.json`, and beside each finished shard a JSON with its counts: what
was killed goes on at the first shard without one and ends with the same bytes. The manifest comes last: where there
is one, everything is there.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data import rows as codec
from jaxllm.data import sources, tokenizers
from jaxllm.data.config import PrepareConfig, Task
from jaxllm.data.manifest import (
    SPLITS,
    Prepared,
    open_prepared,
    portable,
    publish,
    seal,
    sha256,
    tokenizer_files,
    write_json,
)
from jaxllm.data.mixtures import rates
from jaxllm.data.packing import pack

# rows are read at random, so a group is a row; zstd makes a byte tokenizer's rows 3 times smaller, BPE's 1.5 times
SHARD_OPTIONS = "group_size:1,zstd:1"

Shards = dict[str, dict[str, list[dict[str, Any]]]]  # task -> split -> what is known of each shard
Progress = Callable[..., None]
Examples = Iterable[tuple[np.ndarray, int]]  # targets, and bytes of the text they stand for


def prepare(cfg: PrepareConfig, progress: Progress = print) -> Prepared:
    """The prepared folder `cfg.out`: made, finished if it was interrupted, or as it is if it is up to date.

    `progress` is called as `print` is: with a line, and with `end="\\r"` when the next line is to replace it.

    Raises:
      DataError: bad, empty or changed input, changed settings, another prepare at work in the folder, a full disk.
      ConfigError: a tokenizer that cannot be had.
    """
    given = tokenizers.from_config(cfg.tokenizer)
    asked = {
        "settings": cfg.model_dump(mode="json", exclude={"out"}),
        "inputs": {t.name: sources.inputs(t.source, cfg.on_error) for t in cfg.tasks},
        "tokenizer": given.fingerprint() if given else None,
    }
    out = Path(cfg.out)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out):
            if (out / "manifest.json").exists():
                manifest = open_prepared(out).manifest
                _refuse_changes(manifest | {"tokenizer": given and manifest["tokenizer"]["fingerprint"]}, asked, out)
                progress(f"{out}: up to date")
            else:
                _make(cfg, out, asked, given, progress)
            prepared = open_prepared(out)
            if left_out := _left_out(prepared.manifest["counts"]):
                progress(f"left out: {left_out}")
            for file in (out / "prepare.json", *out.glob("shards/*.json")):
                file.unlink(missing_ok=True)
            return prepared
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # nothing was written: leave nothing behind
        raise


def _make(cfg: PrepareConfig, out: Path, asked: dict[str, Any], given: Any, progress: Progress) -> None:
    try:
        state = _state(cfg, out, asked, progress)
        tokenizer = _tokenizer(cfg, out, state["survey"], given, progress)
        shards, mixture = _write_shards(cfg, out, state["survey"], tokenizer, progress)
        with _writing(out):
            write_json(out / "manifest.json", _manifest(cfg, out, state, tokenizer, shards, mixture))
    except (ConfigError, DataError):
        _forget_survey(out)  # so that a corrected config is not refused for what nothing was made from
        raise


def _begun(out: Path) -> bool:
    """Whether anything was made from the settings in `prepare.json`: the tokenizer comes first."""
    return (out / "tokenizer").exists() or (out / "shards").exists()


def _forget_survey(out: Path) -> None:
    if (out / "prepare.json").exists() and not _begun(out):
        shutil.rmtree(out / "tokenizer.part", ignore_errors=True)
        (out / "prepare.json").unlink()


def _left_out(counts: dict[str, dict[str, int]]) -> str:
    """`words: 2 empty, 1 too long; lines: ...`, of the tasks where something is missing."""
    said = {
        task: ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in c.items()) for task, c in counts.items()
    }
    return "; ".join(f"{task}: {reasons}" for task, reasons in said.items() if reasons)


# --- documents and their split -----------------------------------------------------------------------------------


def _texts(cfg: PrepareConfig, task: Task, counts: Counter) -> Iterator[tuple[int, bytes]]:
    """The documents of a task in order: the place in [0, 2^64) that decides on their split, and their text as UTF-8."""
    limit = int(cfg.max_document_mb * 1e6)
    for document in sources.documents(task.source, max_bytes=limit, on_error=cfg.on_error, counts=counts):
        digest = hashlib.blake2b(f"{cfg.seed}:{document.held_out_key}".encode(), digest_size=8).digest()
        yield int.from_bytes(digest, "big"), document.text.encode()


def _split_texts(cfg: PrepareConfig, task: Task, split: str, cut: int) -> Iterator[bytes]:
    return (text for place, text in _texts(cfg, task, Counter()) if (place < cut) == (split == "validation"))


def _survey(cfg: PrepareConfig, task: Task, meter: "_Meter") -> dict[str, Any]:
    """Documents and bytes of a task's splits, the `cut` below which a document is held out, what is left out and why.

    Of two keys or more at least one is held out (unless validation is 0), and at least one is not.
    """
    cut = round(cfg.validation * 2**64)
    skipped: Counter = Counter()
    total, below = Counter(), Counter()
    lowest, highest = (2**64, Counter()), (-1, Counter())  # the first and last place, and what is there
    for place, text in _texts(cfg, task, skipped):
        one = {"documents": 1, "bytes": len(text)}
        total.update(one)
        if place < cut:
            below.update(one)
        if place < lowest[0]:
            lowest = (place, Counter())
        if place > highest[0]:
            highest = (place, Counter())
        for at, there in (lowest, highest):
            if place == at:
                there.update(one)
        meter.add(f"reading {task.name}", len(text))
    if lowest[0] == highest[0]:
        cut, below = 0, Counter()
    elif cut and not below:
        cut, below = lowest[0] + 1, lowest[1]
    elif below == total:
        cut, below = highest[0], total - highest[1]
    sizes = {"train": total - below, "validation": below}
    found = {split: {k: sizes[split][k] for k in ("documents", "bytes")} for split in SPLITS}
    return found | {"cut": cut, "skipped": dict(skipped)}


# --- the state of unfinished work --------------------------------------------------------------------------------


def _state(cfg: PrepareConfig, out: Path, asked: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What `prepare.json` holds: what was asked, and the survey of the input; made if it is not there."""
    file = out / "prepare.json"
    if file.exists():
        state = json.loads(file.read_text(encoding="utf-8"))
        if _begun(out):
            _refuse_changes(state, asked, out)
        if _begun(out) or asked.items() <= state.items():
            progress(f"{out}: going on where it stopped")
            return state
        _forget_survey(out)
    if strangers := sorted(f.name for f in out.iterdir() if f.name != "prepare.json.part"):
        raise DataError(f"{out}: holds {strangers[0]!r} and no prepared data; choose a new or empty folder as `out`")
    meter = _Meter(progress)
    state = asked | {"survey": {t.name: _survey(cfg, t, meter) for t in cfg.tasks}}
    with _writing(out):
        write_json(file, state)
    return state


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    changes = list(_changed_settings(portable(_filled(old["settings"])), portable(new["settings"])))
    for task, files in new["inputs"].items():
        before = {f["name"]: f for f in old["inputs"].get(task, [])}
        now = {f["name"]: f for f in files}
        for word, names in (
            ("new", now.keys() - before.keys()),
            ("gone", before.keys() - now.keys()),
            ("changed", {name for name in before.keys() & now.keys() if before[name] != now[name]}),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                changes.append(f"input of {task}: {word}: {', '.join(sorted(names)[:3])}{more}")
    if old["tokenizer"] != new["tokenizer"]:
        changes.append("the tokenizer's file is another")
    if changes:
        raise DataError(
            f"{out} was prepared from something else: {'; '.join(changes)}. Set another `out`, or delete {out}"
        )


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version with the defaults of fields that are new since; as they are if they do not fit."""
    try:
        return PrepareConfig.model_validate(settings | {"out": ""}).model_dump(mode="json", exclude={"out"})
    except ValueError:
        return settings


def _changed_settings(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changed_settings(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _changed_settings(*pair, f"{path}.{i}")
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is {json.dumps(new)}"


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        yield
    except BlockingIOError:
        raise DataError(f"{out}: another `jaxllm prepare` is at work there; wait, or set another `out`") from None
    finally:
        os.close(fd)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:  # ArrayRecord raises RuntimeError
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise DataError(f"{path}: cannot be written: {reason}; mend that and run again: it goes on from here") from None


# --- tokenizer, shards, manifest ---------------------------------------------------------------------------------


def _tokenizer(cfg: PrepareConfig, out: Path, survey: dict[str, Any], given: Any, progress: Progress) -> Any:
    """The run's tokenizer, saved in the folder: the given one, or one that learns from the training split alone.

    Each task gives its first documents, as many as its share of `sample_mb` by size.
    """
    folder, part = out / "tokenizer", out / "tokenizer.part"
    if folder.exists():
        return tokenizers.load(folder)
    if given is None:
        total = sum(survey[t.name]["train"]["bytes"] for t in cfg.tasks)
        meter = _Meter(progress, min(total, int(cfg.tokenizer.sample_mb * 1e6)))

        def sample() -> Iterator[str]:
            for task in cfg.tasks:
                left = cfg.tokenizer.sample_mb * 1e6 * survey[task.name]["train"]["bytes"] / total
                for text in _split_texts(cfg, task, "train", survey[task.name]["cut"]):
                    meter.add(f"{cfg.tokenizer.kind} on {task.name}", len(text))
                    yield text.decode()
                    left -= len(text)
                    if left <= 0:
                        break

        given = tokenizers.build(cfg.tokenizer, texts=sample())
    with _writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        given.save(part)
        publish(part, folder)
    return given


def _write_shards(
    cfg: PrepareConfig, out: Path, survey: dict[str, Any], tokenizer: Any, progress: Progress
) -> tuple[Shards, dict[str, float]]:
    """Task -> split -> entries of its shards, those that were there before included; and the mixture's rates."""
    progress("loading TensorFlow, which runs the seqio tasks")
    from jaxllm.data import tasks as seqio_tasks  # ten seconds: only where there is work for it

    written = {(t.name, split): _written(cfg, out, t, split) for t in cfg.tasks for split in SPLITS}

    def reader(task: Task) -> Callable[[str], Iterable[bytes]]:
        def read(split: str) -> Iterable[bytes]:
            done = len(written[task.name, split]) * cfg.shard_documents
            return itertools.islice(_split_texts(cfg, task, split, survey[task.name]["cut"]), done, None)

        return read

    tasks = [seqio_tasks.TextTask(t.name, tokenizer, reader(t)) for t in cfg.tasks]
    meter = _Meter(progress, sum(survey[t.name][s]["bytes"] for t in cfg.tasks for s in SPLITS))
    for task, split in itertools.product(tasks, SPLITS):
        entries, size = written[task.name, split], survey[task.name][split]
        meter.skip(sum(e["bytes_read"] for e in entries))
        units = -(-size["documents"] // cfg.shard_documents)
        examples = task.examples(split) if len(entries) < units else iter(())
        for unit in range(len(entries), units):
            texts = meter.watch(f"{task.name} {split}", itertools.islice(examples, cfg.shard_documents))
            entries.append(_write_shard(cfg, out, f"{task.name}-{split}-{unit:05d}", texts, tokenizer))
        got = {"documents": sum(e["documents"] for e in entries), "bytes": sum(e["bytes_read"] for e in entries)}
        if got != size or next(examples, None):
            raise DataError(
                f"input of {task.name} changed while it was read: {size}, then {got}; delete {out}, run again"
            )
    shards = {t.name: {split: written[t.name, split] for split in SPLITS} for t in cfg.tasks}
    tokens = {name: sum(e["tokens"] for e in splits["train"]) for name, splits in shards.items()}
    if none := [name for name, n in tokens.items() if not n]:
        raise DataError(
            f"no training tokens in {', '.join(none)}: the tokenizer makes nothing of the text; delete {out}"
        )
    meter.finish(sum(tokens.values()))
    mixture = seqio_tasks.mixture(tasks, rates(cfg.mixture, cfg.tasks, tokens))
    return shards, {task.name: mixture.get_rate(task) for task in tasks}


def _written(cfg: PrepareConfig, out: Path, task: Task, split: str) -> list[dict[str, Any]]:
    """The entries of the shards that are finished, up to the first that is not."""
    files = (out / "shards" / f"{task.name}-{split}-{j:05d}.json" for j in itertools.count())
    return [json.loads(file.read_text(encoding="utf-8")) for file in itertools.takewhile(Path.exists, files)]


def _write_shard(cfg: PrepareConfig, out: Path, name: str, examples: Examples, tokenizer: Any) -> dict[str, Any]:
    """Packs and writes one shard, then its counts; returns them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    counts: Counter = Counter({"documents": 0, "bytes_read": 0, "rows": 0, "tokens": 0, "bytes_of_text": 0})
    first = next((i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None), 0)

    def counted() -> Iterator[tuple[np.ndarray, int]]:
        for targets, size in examples:
            assert not len(targets) or targets.max() < tokenizer.vocab_size
            counts.update(documents=1, bytes_read=size, documents_without_tokens=0 if len(targets) else 1)
            yield targets, size

    file = out / "shards" / f"{name}.array_record"
    part = file.with_suffix(".part")
    try:
        with _writing(file):
            file.parent.mkdir(exist_ok=True)
            writer = ArrayRecordWriter(str(part), SHARD_OPTIONS)
        for block in pack(counted(), cfg.length, first, cfg.split_long, counts):
            records = [codec.encode({k: v[i] for k, v in block.items()}) for i in range(len(block["bytes"]))]
            with _writing(file):
                for record in records:
                    writer.write(record)
            tokens = int(np.count_nonzero(block["documents"]))
            counts.update(rows=len(records), tokens=tokens, bytes_of_text=int(block["bytes"].sum()))
        with _writing(file):
            writer.close()
            publish(part, file)
            entry = dict(counts) | {"file": f"shards/{file.name}", "size": file.stat().st_size, "sha256": sha256(file)}
            write_json(file.with_suffix(".json"), entry)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return entry


_SHARD_FIELDS = ("file", "rows", "size", "sha256", "tokens", "bytes_of_text", "documents")


def _manifest(
    cfg: PrepareConfig, out: Path, state: dict[str, Any], tokenizer: Any, shards: Shards, mixture: dict[str, float]
) -> dict:
    tasks, counts = {}, {}
    for task, splits in shards.items():
        tasks[task] = {
            split: {
                "shards": [{k: e[k] for k in _SHARD_FIELDS} for e in entries],
                **{k: sum(e[k] for e in entries) for k in ("rows", "tokens", "documents")},
                "bytes": sum(e["bytes_of_text"] for e in entries),
            }
            for split, entries in splits.items()
        }
        # left out by the source, and what packing had to cut off
        counts[task] = Counter(state["survey"][task]["skipped"])
        for entry in itertools.chain(*splits.values()):
            counts[task].update({k: entry[k] for k in entry if k.startswith("cut_") or k == "documents_without_tokens"})
        counts[task] = {reason: n for reason, n in sorted(counts[task].items()) if n}
    special = {k: getattr(tokenizer, k) for k in ("bos_id", "eos_id", "pad_id")}
    return seal(
        {
            "length": cfg.length,
            "vocab": tokenizer.vocab_size,
            "tokenizer": {
                "kind": cfg.tokenizer.kind,
                "fingerprint": tokenizer.fingerprint(),
                **special,
                "files": tokenizer_files(out),
            },
            "tasks": tasks,
            "mixture": mixture,
            "counts": counts,
            "settings": state["settings"],
            "inputs": state["inputs"],
        }
    )


# --- progress ----------------------------------------------------------------------------------------------------


class _Meter:
    """Says how far it is: on a terminal twice a second on one line, elsewhere a line every ten seconds."""

    def __init__(self, progress: Progress, total: int | None = None):
        self._progress, self._total = progress, total
        self._live = sys.stdout.isatty()
        self._documents = self._tokens = self._bytes = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def skip(self, size: int) -> None:
        """Counts bytes that were done in an earlier run."""
        self._skipped += size

    def add(self, what: str, size: int, tokens: int = 0) -> None:
        """Counts one document."""
        self._documents, self._tokens, self._bytes = self._documents + 1, self._tokens + tokens, self._bytes + size
        now = time.monotonic()
        if now - self._shown >= (0.5 if self._live else 10):
            self._shown = now
            line = f"{what}: {self._sum()}{self._left(now)}"
            self._progress(f"{line:<100}", end="\r" if self._live else "\n", flush=True)

    def watch(self, what: str, examples: Examples) -> Iterator[tuple[np.ndarray, int]]:
        """The examples, counted as they pass."""
        for targets, size in examples:
            self.add(what, size, len(targets))
            yield targets, size

    def finish(self, tokens: int) -> None:
        """The last line: what this run did, and the training tokens there are."""
        line = f"prepared {self._sum()}; {tokens:,} training tokens in all"
        self._progress(f"{line:<100}")

    def _sum(self) -> str:
        rate = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-9)
        tokens = f", {self._tokens:,} tokens" if self._tokens else ""
        return f"{self._documents:,} documents{tokens}, {self._bytes / 1e6:.1f} MB, {rate:.1f} MB/s"

    def _left(self, now: float) -> str:
        left = (self._total or 0) - self._skipped - self._bytes
        seconds = left * (now - self._start) / max(self._bytes, 1)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left" if self._total and left > 0 else ""
