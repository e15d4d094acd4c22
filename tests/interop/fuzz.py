"""Opens mutated files and says what came of it: `python fuzz.py KIND COUNT SEED FOLDER` prints a line of JSON.

A process of its own, so that a crash is seen, and so that its address space can be kept to what it has when it begins
and one GiB. A file has ten seconds of computing. Outcomes are a model, or an error of the kind that is the reader's to
mend; the first of any other kind ends the run.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm import pretrained
from jaxllm.core.errors import UserError
from jaxllm.interop import llamacpp
from jaxllm.interop.folder import open_folder

ROOM = 1 << 30  # bytes of address space beyond those at the start
SECONDS = 10.0
ODD: list[Any] = [
    -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, 2**64, 10**30, 0.5, 1e-300, 1e308, float("nan"), float("inf"), True,
    False, None, "", "x", "llama", "gelu", "../x", "a" * 4096, [], {}, [1], [None], {"": 1}, [[]], [2**40] * 3,
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Each container in a tree with each of its keys."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key, _ in inner] + [place for _, value in inner for place in places(value)]


def edited(data: bytes, draw: random.Random) -> bytes:
    """JSON with one to three of its values changed, moved or missing."""
    tree = json.loads(data)
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = places(tree)
        if not found:
            break
        # Few of the places in a vocabulary, many of those above it.
        where, key = draw.choice(found) if draw.random() < 0.5 else draw.choice([p for p in found if len(p[0]) < 40])
        match draw.randrange(5):
            case 0:
                del where[key]
            case 1:
                other, at = draw.choice(found)
                there = at in (other if isinstance(other, dict) else range(len(other)))
                where[key] = copy.deepcopy(other[at]) if there else None
            case 2 if isinstance(where[key], int):
                where[key] = where[key] + draw.choice([-1, 1, 8, 1000, 1 << 20, 1 << 33])
            case _:
                where[key] = draw.choice(ODD)
    return json.dumps(tree).encode()


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, inserted, repeated or missing."""
    at = draw.randrange(len(data) or 1)
    match draw.randrange(5):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at:]
        case 2:
            return data[:at] + data[at + draw.randint(1, 64) :]
        case 3:
            return (
                data[:at]
                + draw.choice([b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000, b"NaN", b'"', b"\\ud800"])
                + data[at:]
            )
        case _:
            return data[:at]


def json_file(data: bytes, draw: random.Random) -> bytes:
    return edited(data, draw) if draw.random() < 0.8 else scrambled(data, draw)


def gguf_file(data: bytes, draw: random.Random) -> bytes:
    """Mostly values in the header changed; sometimes what `scrambled` does."""
    head = min(len(data), 16_000)
    if draw.random() < 0.2:
        return scrambled(data[:head], draw) + data[head:]
    out = bytearray(data)
    keys = [
        i for i in range(24, head - 8) if data[i : i + 6] in (b"llama.", b"tokeni", b"genera", b"blk.0.", b"output")
    ]
    at = draw.choice(keys) + draw.randint(0, 60)
    form, value = draw.choice([
        ("<B", draw.randrange(256)), ("<I", draw.choice([0, 1, 2, 3, 5, 8, 9, 1 << 16, 1 << 31, (1 << 32) - 1])),
        ("<Q", draw.choice([0, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1])),
        ("<f", draw.choice([0.0, -1.0, 1e-38, 3e38, float("nan"), float("inf")])),
    ])  # fmt: skip
    struct.pack_into(form, out, at, value)
    return bytes(out)


def tokenizer(folder: Path) -> None:
    found = pretrained.texts_of_folder(folder).tokenizer
    found.decode(found.encode("a b\n"))


def gguf_model(folder: Path) -> None:
    _, _, weights, file = llamacpp.open_model(folder / "model.gguf")
    found, _ = llamacpp.tokenizer(file)
    found.decode(found.encode("a b\n"))
    for name in weights:
        weights[name]


# kind -> files that are mutated, how, and what opens them
KINDS: dict[str, tuple[tuple[str, ...], Callable, Callable[[Path], Any]]] = {
    "config": (("config.json",), json_file, open_folder),
    "index": (("model.safetensors.index.json",), json_file, open_folder),
    "tokenizer": (("tokenizer.json", "tokenizer_config.json"), json_file, tokenizer),
    "gguf": (("model.gguf",), gguf_file, gguf_model),
    "load": (
        ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
         "model.safetensors.index.json"),
        json_file, pretrained.load,
    ),
}  # fmt: skip


def rewrite(path: Path, data: bytes) -> None:
    """In place: a file that is emptied first waits for the disk on some file systems."""
    with path.open("r+b") as f:
        f.truncate(f.write(data))


def peak() -> int:
    """Bytes, at most so far; `getrusage` would count the memory of the process that started this one, too."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def run(kind: str, count: int, seed: int, source: Path, folder: Path) -> dict[str, Any]:
    names, mutate, open_it = KINDS[kind]
    shutil.copytree(source, folder, dirs_exist_ok=True)
    open_it(folder)  # loads all that it needs
    before = peak()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    draw, opened, refused = random.Random(f"{kind} {seed}"), 0, {}

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds of computing")

    signal.signal(signal.SIGPROF, too_long)
    for number in range(count):
        name = draw.choice(names)
        whole = (folder / name).read_bytes()
        rewrite(folder / name, mutate(whole, draw))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            open_it(folder)
            opened += 1
        except UserError as e:
            refused[type(e).__name__] = refused.get(type(e).__name__, 0) + 1
        except BaseException as e:  # noqa: BLE001 (also what Rust's panics become)
            shown = (folder / name).read_bytes()[:2000].decode(errors="replace")
            return {
                "number": number,
                "name": name,
                "error": repr(e),
                "at": traceback.format_exc()[-3000:],
                "file": shown,
            }
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            rewrite(folder / name, whole)
    grown = peak() - before
    return {"opened": opened, "refused": refused, "grown": grown}


if __name__ == "__main__":
    kind, count, seed, source, folder = sys.argv[1:]
    print(json.dumps(run(kind, int(count), int(seed), Path(source), Path(folder))))
