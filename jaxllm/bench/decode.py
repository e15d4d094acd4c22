"""Greedy generation on the CPU: ours beside transformers' `generate`, 128 tokens after prompts of 128, float32.

Each side lives in a process of its own with all cores, so that neither's threads spin while the other works; they take
turns, a round each. Both read the same weights from a folder as Hugging Face has them and must say the same tokens,
prompts are processed within the timed part, and nothing ends a completion early. Of the peer's two ways to attend
(`eager` and `sdpa`) the one that is faster in the first timed round goes on, for each size of a batch. What is compiled
or allocated once is left out on both sides: a round before.

The model is SmolLM2-135M: the one that is given, or random weights of its shape, which cost the same.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.bench import compare, worker
from jaxllm.core.errors import UserError

PROMPT, NEW = 128, 128  # tokens
TARGETS = {1: 1.5, 8: 1.2}  # rows of a batch -> how many times the peer's speed is wanted
ATTENTION = ("sdpa", "eager")
SMOLLM2 = {
    "kind": "decoder", "vocab": 49152, "context": 8192, "embed": 576, "num_layers": 30, "tie": True,
    "position": {"kind": "rope", "theta": 100_000.0},
    "block": {
        "norm": {"kind": "rmsnorm", "epsilon": 1e-5}, "ffn": {"mlp": 1536},
        "attention": {"num_heads": 9, "num_kv_heads": 3},
    },
}  # fmt: skip


def measure(rounds: int, model: str | None = None) -> dict[str, Any]:
    """Tokens/s of one row and of eight; `ratio` is the lower of both ratios, each divided by what is wanted of it.

    Args:
      model: a folder as Hugging Face has them or a GGUF file; None: random weights.
    """
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"):
        raise UserError("bench decode needs transformers as the peer: pip install 'jaxllm[oracle]'")
    sides = ("ours", *ATTENTION)
    seconds = {rows: {side: [] for side in sides} for rows in TARGETS}
    cpu_seconds = {rows: {side: [] for side in sides} for rows in TARGETS}
    first = {}
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(model))
        ask = {side: stack.enter_context(worker(__name__, side, str(folder), JAX_PLATFORMS="cpu")) for side in sides}
        for rows, side in ((r, s) for r in TARGETS for s in sides):
            first[rows, side] = ask[side](rows)
        agree = {rows: _agreement(rows, [first[rows, side]["tokens"] for side in sides]) for rows in TARGETS}
        faster = {}
        for i, rows in ((i, rows) for i in range(rounds) for rows in TARGETS):
            for side in ("ours", faster[rows]) if i else sides:
                answer = ask[side](rows)
                seconds[rows][side].append(answer["seconds"])
                cpu_seconds[rows][side].append(answer["cpu_seconds"])
            if not i:
                faster[rows] = min(ATTENTION, key=lambda side, of=seconds[rows]: of[side][0])
            now = ", ".join(f"{side} {of[-1]:.2f} s" for side, of in seconds[rows].items() if len(of) == i + 1)
            print(f"round {i + 1} of {rounds}, batch of {rows}: {now}", file=sys.stderr, flush=True)
    found = {rows: _of_batch(rows, seconds[rows], faster[rows]) for rows in TARGETS}
    version = importlib.metadata.version("transformers")
    return {
        "unit": "tokens/s of one row", "ours": found[1]["ours"], "peer": found[1]["peer"],
        "ratio": min(found[rows]["ratio"] / wanted for rows, wanted in TARGETS.items()),
        "batches": {
            str(rows): found[rows] | {
                "wanted": TARGETS[rows], "cpu_seconds": cpu_seconds[rows], "same_tokens": agree[rows],
                "first_round_seconds": {side: first[rows, side]["seconds"] for side in sides},
            }
            for rows in TARGETS
        },
        "load_before": load,
        "config": {
            "model": SMOLLM2 if model is None else Path(model).name,
            "weights": "random" if model is None else "given", "dtype": "float32", "prompt": PROMPT, "new": NEW,
            "rounds": rounds, "threads": _cores(), "sampling": "greedy",
            "left_out": "the first round of each side: compilation of ours, first allocations of the peer's",
        },
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        "peer_is": f"transformers {version} generate, float32, inference_mode, of sdpa and eager the one that was faster in round 1",
    }  # fmt: skip


def _of_batch(rows: int, seconds: dict[str, list[float]], faster: str) -> dict[str, Any]:
    """Tokens/s of ours and of the faster peer, for batches of so many rows."""
    return compare(seconds["ours"], seconds[faster], float(rows * NEW)) | {"seconds": seconds, "peer_attention": faster}


def _agreement(rows: int, said: list[list[list[int]]]) -> float:
    """Share of the rows in which all sides say the same; with random weights ties may fall either way."""
    return sum(all(tokens[b] == said[0][b] for tokens in said) for b in range(rows)) / rows


@contextlib.contextmanager
def _folder(model: str | None) -> Iterator[Path]:
    """Where the model lies as Hugging Face has it, in float32."""
    from jaxllm.interop import folder as hugging_face
    from jaxllm.interop import llamacpp
    from jaxllm.interop.weights import logical_shapes
    from jaxllm.models.config import DecoderConfig

    if model is not None and Path(model).is_dir():
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as name:
        if model is None:
            cfg, draw = DecoderConfig.model_validate(SMOLLM2), np.random.default_rng(0)
            shapes = logical_shapes(cfg)

            def read(name: str) -> np.ndarray:
                return 0.05 * draw.standard_normal(shapes[name], np.float32) + name.endswith("scale")
        else:
            _, cfg, weights, _ = llamacpp.open_model(model)
            shapes, read = weights.shapes, weights.__getitem__
        hugging_face.save_folder(name, cfg, shapes, read, dict.fromkeys(shapes, np.dtype("float32")))
        yield Path(name)


def _serve(side: str, folder: str) -> None:
    complete = our_side(folder) if side == "ours" else their_side(folder, side)
    for rows in map(int, sys.stdin):
        prompts = np.random.default_rng(rows).integers(SMOLLM2["vocab"] - 1, size=(rows, PROMPT))
        start = time.perf_counter(), time.process_time()
        tokens = complete(prompts)
        spent = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        print(json.dumps({"tokens": tokens, **spent}), flush=True)


def our_side(folder: str) -> Callable[[np.ndarray], list[list[int]]]:
    """Completes a batch with `jaxllm.inference.generate`, the model laid out as `jaxllm generate` does."""
    from jaxllm.inference.generate import generate
    from jaxllm.models.module import for_decoding
    from jaxllm.pretrained import load_model

    model = for_decoding(load_model(folder, "float32"))
    return lambda prompts: [list(c.tokens) for c in generate(model, prompts.tolist(), max_new_tokens=NEW)]


def their_side(folder: str, attention: str) -> Callable[[np.ndarray], list[list[int]]]:
    """Completes a batch with transformers."""
    import torch
    import transformers

    torch.set_num_threads(_cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    model.generation_config.eos_token_id = None  # nothing ends a completion early
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def complete(prompts: np.ndarray) -> list[list[int]]:
        ids = torch.from_numpy(prompts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return out[:, PROMPT:].tolist()

    return complete


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    _serve(*sys.argv[1:])
