"""Training speed of a small LLaMA-like decoder: our step beside a plain torch loop, in tokens a second.

Each side lives in a process of its own, so that neither's thread pool spins while the other works; they take turns,
a round each. Both compute the same thing: 3.3M parameters, causal attention, AdamW, gradients clipped to norm 1.
Ours also masks attention by document, weighs targets and measures, as every real run of it does.
Ours runs as `jaxllm train` does, with `runtime.start`, which on CPU keeps freed memory; the peer is plain torch.

Both sides want all cores: on a machine that others use the waiting threads of torch collapse first and the ratio
flatters us. `load_before` and `cpu_seconds` tell such a run; believe only one that began with a load near 0.
"""

import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.bench import compare, worker
from jaxllm.core.errors import UserError

SHAPE = {
    "vocab": 256,
    "embed": 256,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 64,
    "mlp": 688,
    "seq": 256,
    "batch": 8,
}
RATE, DECAY, BETAS = 3e-4, 0.1, (0.9, 0.95)
WARM_UP, STEPS = 3, 10  # steps before the clock starts, once; steps a round


def measure(rounds: int) -> dict[str, Any]:
    """Tokens/s in float32, and under `bfloat16` of mixed precision (float32 weights, bfloat16 products)."""
    if not importlib.util.find_spec("torch"):
        raise UserError("bench train needs torch as the peer: pip install 'jaxllm[oracle]'")
    seconds = {precision: {"ours": [], "peer": []} for precision in ("float32", "bfloat16")}
    cpu_seconds = {precision: {"ours": [], "peer": []} for precision in seconds}
    load = os.getloadavg()[0]
    with worker(__name__, "ours") as ours, worker(__name__, "peer") as peer:
        for precision, side in ((p, s) for _ in range(rounds) for p in seconds for s in ("ours", "peer")):
            wall, cpu = (ours if side == "ours" else peer)(precision)
            seconds[precision][side].append(wall)
            cpu_seconds[precision][side].append(cpu)
    tokens, torch = float(SHAPE["batch"] * SHAPE["seq"] * STEPS), importlib.metadata.version("torch")
    results = {p: compare(**sides, work=tokens) | {"cpu_seconds": cpu_seconds[p]} for p, sides in seconds.items()}
    return {
        "unit": "tokens/s",
        **results["float32"],
        "bfloat16": results["bfloat16"],
        "load_before": load,
        "config": {**SHAPE, "optimizer": "adamw", "clip": 1.0, "steps_per_round": STEPS, "rounds": rounds},
        "versions": {"torch": torch},
        "peer_is": f"torch {torch}, eager: RMSNorm, RoPE, SwiGLU, scaled_dot_product_attention, fused AdamW;"
        " bfloat16 is autocast",
    }


def _serve(side: str) -> None:
    make = {"ours": our_steps, "peer": torch_steps}[side]
    run_steps = {}
    for precision in map(str.strip, sys.stdin):
        if precision not in run_steps:
            run_steps[precision] = make(precision)
            run_steps[precision](WARM_UP)
        start = time.perf_counter(), time.process_time()
        run_steps[precision](STEPS)
        print([time.perf_counter() - start[0], time.process_time() - start[1]], flush=True)


def _rows() -> np.ndarray:
    return np.random.default_rng(0).integers(SHAPE["vocab"], size=(SHAPE["batch"], SHAPE["seq"] + 1))


def our_steps(precision: str) -> Callable[[int], float]:
    """Runs that many of our training steps, the batch brought from the host each time, and returns the last loss."""
    from jaxllm.core.config import parse
    from jaxllm.train import runtime
    from jaxllm.train.config import RunConfig
    from jaxllm.train.step import init_state, make_train_step, place_batch, set_up

    runtime.start(compile_cache=False)  # as `jaxllm train` does
    attention = {"num_heads": SHAPE["num_heads"], "head_dim": SHAPE["head_dim"]}
    tree = {
        "out": "", "data": {"path": ""}, "steps": 1000, "batch": SHAPE["batch"], "precision": precision, "clip": 1.0,
        "model": {
            "kind": "decoder", "vocab": SHAPE["vocab"], "context": SHAPE["seq"], "embed": SHAPE["embed"],
            "num_layers": SHAPE["num_layers"], "block": {"attention": attention, "ffn": {"mlp": SHAPE["mlp"]}},
        },
        "optimizer": {"kind": "adamw", "learning_rate": RATE, "weight_decay": DECAY, "b1": BETAS[0], "b2": BETAS[1]},
        "schedule": "constant", "mesh": {"data": -1, "fsdp": 1}, "scan": False,  # so few layers compile fast unrolled
    }  # fmt: skip
    setup = set_up(parse(RunConfig, tree))
    step, state = make_train_step(setup), init_state(setup)
    rows = _rows().astype(np.int32)
    shape = rows[:, 1:].shape
    batch = {
        "tokens": rows[:, :-1], "targets": rows[:, 1:],
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "documents": np.ones(shape, np.int32), "weights": np.ones(shape, np.float32),
        "bytes": np.full(shape[0], shape[1], np.int32),
    }  # fmt: skip

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, sums = step(state, place_batch(setup, batch))
        loss, weight = sums["loss"]
        return float(loss) / float(weight)

    return run


def torch_steps(precision: str) -> Callable[[int], float]:
    """Runs that many steps of the torch loop and returns the last loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    D, N, H, T = SHAPE["embed"], SHAPE["num_heads"], SHAPE["head_dim"], SHAPE["seq"]

    def linear(rows: int, columns: int) -> nn.Linear:
        return nn.Linear(rows, columns, bias=False)

    angles_TH = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(0, H, 2) / H))
    cos_TH, sin_TH = angles_TH.cos(), angles_TH.sin()

    def rotate(x_BNTH: torch.Tensor) -> torch.Tensor:
        a, b = x_BNTH.chunk(2, -1)
        return torch.cat((a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH), -1).to(x_BNTH.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
            self.qkv, self.out = linear(D, 3 * N * H), linear(N * H, D)
            self.gate_up, self.down = linear(D, 2 * SHAPE["mlp"]), linear(SHAPE["mlp"], D)

        def forward(self, x_BTD):
            q, k, v = self.qkv(self.norm1(x_BTD)).view(-1, T, 3, N, H).permute(2, 0, 3, 1, 4)
            o_BNTH = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x_BTD = x_BTD + self.out(o_BNTH.transpose(1, 2).flatten(2))
            gate, up = self.gate_up(self.norm2(x_BTD)).chunk(2, -1)
            return x_BTD + self.down(F.silu(gate) * up)

    layers = [Layer() for _ in range(SHAPE["num_layers"])]
    model = nn.Sequential(nn.Embedding(SHAPE["vocab"], D), *layers, nn.RMSNorm(D), linear(D, SHAPE["vocab"]))
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    rows = torch.from_numpy(_rows())
    tokens_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].flatten()

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                logits_BTV = model(tokens_BT)
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT)
            adamw.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
        return loss.item()

    return run


if __name__ == "__main__":
    _serve(sys.argv[1])
