"""What ZeRO's stages and HSDP hold on a device and send between devices: Rajbhandari et al. 2019, arXiv:1910.02054."""

import functools
import math

import jax
import numpy as np
import pytest
from exchanges import exchanges
from test_outer import program
from test_step import random_batch, run_config

from jaxllm.train.step import set_up

N = 4
ADAMW = "optimizer={kind: adamw, learning_rate: 1e-3}"
# Weights that divide over 4 and are most of the bytes; loops unrolled, so that each exchange is in the text as often as
# it happens; all activations computed again, so that weights are gathered in both passes.
FLAT = ("scan=false", "remat=full", ADAMW, "model.num_layers=3", "model.vocab=64", "mesh.fsdp=4", "batch=4")
PARAMETERS, GRADIENTS, OPTIMIZER = 4, 4, 8  # bytes: float32 weights and gradients, two float32 moments


@functools.cache
def step(*overrides: str):
    return program(run_config(*FLAT, *overrides))


def share(tree) -> float:
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("preset", "parameters", "gradients", "optimizer"),
    [("ddp", 1, 1, 1), ("zero1", 1, 1, N), ("zero2", 1, N, N), ("zero3", N, N, N)],
)
def test_a_device_holds_what_the_papers_formulas_say(preset, parameters, gradients, optimizer):
    """16 bytes a parameter, of which stage 1 divides 8 by n, stage 2 12, stage 3 all (section 5, figure 1)."""
    setup = set_up(run_config(f"sharding={preset}", f"mesh.fsdp={N}", ADAMW))
    size = sum(x.size for x in setup.state.params.values())
    assert share(setup.state.params) == PARAMETERS * size / parameters
    moments = [x for x in jax.tree.leaves(setup.state.opt) if x.ndim]
    assert share(moments) == OPTIMIZER * size / optimizer
    grads = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.gradients[n]) for n, x in setup.state.params.items()}
    assert share(grads) == GRADIENTS * size / gradients


def sent(*overrides: str, axis: str = "fsdp") -> dict[str, float]:
    """Bytes, in those of all parameters, that a step's collectives over `axis` give or take by kind."""
    p = step(*overrides)
    whole = share(step("sharding=ddp").setup.state.params)
    found: dict[str, float] = {}
    for e in exchanges(p.step.as_text(), p.setup.mesh):
        if e.axes == (axis,):
            found[e.kind] = found.get(e.kind, 0) + e.bytes / whole
    return found


def test_probe():
    for o in (["sharding=ddp"], ["sharding=zero1"], ["sharding=zero2"], ["sharding=zero3"]):
        print(o, sent(*o))
    for axis in ("data", "fsdp"):
        print(sent("mesh.data=2", "mesh.fsdp=2", axis=axis))
