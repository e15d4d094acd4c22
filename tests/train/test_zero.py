"""What ZeRO's stages and HSDP hold on a device and send between devices: Rajbhandari et al. 2019, arXiv:1910.02054."""

import functools
import math

import jax
import pytest
from exchanges import exchanges
from test_outer import program
from test_step import LENGTH, random_batch, run_config

from jaxllm.train.step import abstract_batch, set_up
from jaxllm.train.step import gradients as step_gradients

pytestmark = pytest.mark.slow

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
    batch = abstract_batch(setup, 8, LENGTH)
    size = sum(x.size for x in setup.state.params.values())
    assert share(setup.state.params) == PARAMETERS * size / parameters
    moments = [x for x in jax.tree.leaves(setup.state.opt) if x.ndim]
    assert share(moments) == OPTIMIZER * size / optimizer
    made = (
        jax.jit(lambda state, batch: step_gradients(setup, state, batch, None)[0]).lower(setup.state, batch).compile()
    )
    assert made.memory_analysis().output_size_in_bytes == pytest.approx(GRADIENTS * size / gradients, abs=256)


def sent(*overrides: str, axis: str = "fsdp") -> dict[str, float]:
    """What goes over `axis` in a step by kind of collective, in bytes of all the weights. An all-reduce counts once."""
    p = step(*overrides)
    whole = share(step("sharding=ddp").setup.state.params)
    found: dict[str, float] = {}
    for e in exchanges(p.step.as_text(), p.setup.mesh):
        if e.axes == (axis,):
            found[e.kind] = found.get(e.kind, 0) + e.bytes / whole
    return found


def test_stage_2_sends_what_data_parallelism_sends():
    """A reduce-scatter of gradients and an all-gather of weights make an all-reduce (section 7.2.1)."""
    ddp, stage_2 = sent("sharding=ddp"), sent("sharding=zero2")
    assert ddp == {"all-reduce": pytest.approx(1, rel=0.01)}
    assert stage_2["reduce-scatter"] > 0.9 and stage_2["all-gather"] == pytest.approx(1, rel=0.01)
    assert sum(stage_2.values()) == pytest.approx(2 * ddp["all-reduce"], rel=0.05)


def test_stage_3_gathers_weights_in_both_passes_and_sends_half_as_much_again():
    """All but the embedding, of which the tokens' rows are exchanged (section 7.2.2: 3 in place of 2)."""
    stage_3 = sent("sharding=zero3")
    assert stage_3["reduce-scatter"] > 0.9 and stage_3["all-reduce"] < 0.01
    assert stage_3["all-gather"] == pytest.approx(2 * sent("sharding=zero2")["all-gather"], rel=0.1)
    assert 2.7 < sum(stage_3.values()) < 3


def test_fully_sharded_training_is_data_parallel_training():
    losses = {}
    for preset in ("ddp", "zero3"):
        p = step(f"sharding={preset}")
        state, losses[preset] = p.start(), []
        for i in range(3):
            state, seen = p(state, random_batch(rows=N, seed=i))
            losses[preset].append(seen["loss"])
    assert losses["zero3"] == pytest.approx(losses["ddp"], rel=1e-6)


HSDP = ("mesh.data=2", "mesh.fsdp=2")  # weights shared out inside, replicated across


def test_across_hybrid_shards_only_a_share_of_the_gradients_is_summed():
    inside, across = sent(*HSDP), sent(*HSDP, axis="data")
    assert inside["all-gather"] > 1.7 and inside["reduce-scatter"] > 0.9 and inside["all-reduce"] < 0.01
    assert across["all-reduce"] == pytest.approx(1 / 2, rel=0.02)
    cfg = step(*HSDP).setup.cfg
    tokens = 4 * cfg.batch * LENGTH * cfg.model.embed / share(step("sharding=ddp").setup.state.params)
    assert sum(across.values()) - across["all-reduce"] < tokens  # XLA for CPU gathers embedded tokens: no weights
    assert not {e.axes for e in exchanges(step(*HSDP).step.as_text(), step(*HSDP).setup.mesh) if e.bytes > 5000} - {
        ("data",), ("fsdp",)
    }  # fmt: skip


def test_optimizer_state_may_be_shared_out_over_replicas_too():
    plain, wide = step(*HSDP), step(*HSDP, "sharding.optimizer.embed=[data, fsdp]")
    moments = [[x for x in jax.tree.leaves(p.setup.state.opt) if x.ndim] for p in (plain, wide)]
    assert share(moments[1]) == share(moments[0]) / 2
    state, other = plain.start(), wide.start()
    for i in range(2):
        batch = random_batch(rows=N, seed=i)
        (state, seen), (other, expected) = plain(state, batch), wide(other, batch)
        assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-6)
