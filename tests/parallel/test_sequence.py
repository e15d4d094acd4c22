"""Megatron's sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).

Between matrix products the residual stream is shared out over mesh axis `tensor` along the row. That it trains as one
device does is shown together with the other parallel forms.
"""

import re

import jax
import pytest

from jaxllm.core.config import parse
from jaxllm.train.config import RunConfig
from jaxllm.train.step import abstract_batch, make_train_step, set_up

L, B, T, D, SHARES = 3, 4, 64, 48, 4


def compiled_step(norm_seq: list[str], devices: list, **changes) -> str:
    cfg = parse(RunConfig, {
        "out": "unused", "steps": 1, "schedule": "constant", "batch": B, "data": {"path": "unused"}, "remat": "full",
        "mesh": {"fsdp": 1, "tensor": SHARES}, "sharding": {"activations": {"norm_seq": norm_seq}},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "model": {
            "vocab": 128, "embed": D, "num_layers": L, "context": T,
            "block": {"attention": {"num_heads": 4, "head_dim": 16}, "ffn": {"mlp": 96}},
        },
    } | changes)  # fmt: skip
    setup = set_up(cfg, devices)
    return make_train_step(setup).lower(setup.state, abstract_batch(setup, B, T)).compile().as_text()


def test_what_is_kept_between_layers_falls_by_the_tensor_degree():
    whole, share = f"f32[{L},{B},{T},{D}]", f"f32[{L},{B},{T // SHARES},{D}]"  # the stacked inputs of the layers
    plain = compiled_step(["context"], jax.devices())
    assert whole in plain and share not in plain
    sequence = compiled_step(["context", "tensor"], jax.devices())
    assert share in sequence and whole not in sequence


@pytest.mark.tpu_aot
def test_on_a_tpu_all_reduces_of_activations_become_reduce_scatters_and_all_gathers(v5e):
    counts = {}
    for name, norm_seq in (("plain", ["context"]), ("sequence", ["context", "tensor"])):
        text = compiled_step(norm_seq, v5e, precision="bfloat16")
        whole, share = rf"(?:bf16|f32)\[{B},{T},{D}\]", rf"(?:bf16|f32)\[{B},{T // SHARES},{D}\]"
        # XLA for TPU spells a reduce-scatter as a fusion of an all-reduce and a slice.
        counts[name] = {
            "reduced": len(re.findall(rf"= {whole}\S* all-reduce\(", text)),
            "scattered": len(re.findall(rf"%all-reduce-scatter[\w.]* \([\w.]+: {whole}\) -> {share}", text)),
            "gathered": len(re.findall(rf"= {whole}\S* all-gather\(", text)),
        }
    plain, sequence = counts["plain"], counts["sequence"]
    assert plain["reduced"] >= 4 and not plain["scattered"] and not plain["gathered"]  # two a layer, forth and back
    assert sequence["scattered"] == sequence["reduced"] >= 4 and sequence["gathered"] >= 4
