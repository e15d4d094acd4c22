"""What a plan says of pipelines: of compiled programs, whose loops no text counts, and by the formulas."""

import functools

import numpy as np
import pytest

from jaxllm.core.config import parse
from jaxllm.models.count import parameters
from jaxllm.parallel import pipeline
from jaxllm.parallel.pipeline import B, F, W
from jaxllm.plan.analytic import memory
from jaxllm.plan.compiled import Proof, prove
from jaxllm.plan.predict import NAMES, predict
from jaxllm.plan.search import job_of, plans_of
from jaxllm.plan.topology import topology
from jaxllm.train.config import RunConfig

LENGTH, LAYERS, EMBED, MLP, VOCAB = 64, 8, 64, 128, 128
FOUR = "mesh.pipe=4"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")


def config(*overrides: str) -> RunConfig:
    block = {"attention": {"num_heads": 2}, "ffn": {"mlp": MLP}}
    model = {"vocab": VOCAB, "embed": EMBED, "num_layers": LAYERS, "context": LENGTH, "block": block}
    tree = {
        "out": "unused", "steps": 1000, "batch": 16, "data": {"path": "unused"}, "model": model, "mesh": {"fsdp": 1},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4}, "accumulate": 8,
    }  # fmt: skip
    return parse(RunConfig, tree, overrides)


@functools.cache
def proof(*overrides: str) -> Proof:
    return prove(config(*overrides), topology("cpu-4"))


def head_share() -> float:
    layer = 4 * EMBED**2 + 3 * EMBED * MLP + 2 * EMBED * LENGTH
    return EMBED * VOCAB / (LAYERS * layer + EMBED * VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_multiply_what_the_model_asks_for_and_nothing_twice(schedule):
    p = proof(FOUR, f"pipeline.schedule={schedule}", "pipeline.recompute=false")
    assert p.hardware_flops == pytest.approx(p.model_flops_square, rel=1e-6)
    assert p.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        ((FOUR,), 4), ((FOUR, "pipeline.schedule=gpipe"), 4), ((FOUR, "pipeline.schedule=interleaved"), 8),
        (("mesh.pipe=2", "mesh.fsdp=2"), 2), (("mesh.pipe=2", "mesh.tensor=2"), 2),
    ],
)  # fmt: skip
def test_recomputed_stages_go_forward_twice_but_for_the_last(overrides, stages):
    p = proof(*overrides)
    again = (1 - head_share()) / 3 * (1 - 1 / stages)
    assert p.hardware_flops == pytest.approx(p.model_flops_square * (1 + again), rel=1e-3)


def test_stages_of_unequal_length_count_as_they_are():
    even, uneven = (
        proof(FOUR, "pipeline.recompute=false"),
        proof(FOUR, "pipeline.stages=[3, 2, 2, 1]", "pipeline.recompute=false"),
    )
    assert uneven.hardware_flops == pytest.approx(even.hardware_flops, rel=0.01)
    assert uneven.bubble > 1.2 * even.bubble  # all wait for the longest


def spent(schedule: str, recompute: bool, head: float) -> tuple[pipeline.Table, np.ndarray]:
    """A schedule and what each of its ticks takes, in forward passes of a stage, if gradients of inputs and of weights
    take one each, and the last stage has the logits, `head` of all that the model's forward pass does. Where stages go
    forward again to go backward, the last one goes only then."""
    cfg = config(FOUR, f"pipeline.schedule={schedule}")
    table = pipeline.table(cfg.pipeline.schedule, 4, cfg.accumulate)
    last, logits = table.stage == table.stages - 1, 3 * head / (1 - head) * table.stages
    backward = recompute + (1 if W in table.op else 2) + logits * last
    forward = np.where(last & recompute, 0.0, 1.0)
    return table, np.select([table.op == F, table.op == B, table.op == W], [forward, backward, 1.0], 0.0)


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_bubble_of_the_program_is_that_of_its_schedule(schedule, recompute):
    overrides = FOUR, f"pipeline.schedule={schedule}", f"pipeline.recompute={recompute}"
    p = proof(*overrides)
    assert p.bubble == pytest.approx(pipeline.idle(*spent(schedule, recompute == "true", head_share())), rel=0.03)
    said = predict(config(*overrides), p.on, p)
    assert said.terms[NAMES["bubble"]] / said.expected_ms == pytest.approx(p.bubble, rel=1e-6)


@pytest.mark.parametrize("schedule, share", [("gpipe", 3 / 11), ("1f1b", 3 / 11), ("interleaved", 3 / 19)])
def test_without_a_head_the_bubble_of_the_program_is_that_of_the_formula(schedule, share):
    """(p-1)/(m+p-1) of p=4, m=8; interleaved stages in v=2 chunks: (p-1)/(vm+p-1)."""
    small = ("model.vocab=4", "model.num_layers=32")
    p = proof(FOUR, f"pipeline.schedule={schedule}", "pipeline.recompute=false", *small)
    assert p.bubble == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_stages_go_forward_again_nobody_waits_longer_for_it(schedule):
    table, again = spent(schedule, recompute=True, head=0)
    clock = again.sum() / 4 / (1 - pipeline.idle(table, again))
    assert clock < 1.001 * 4 * 8 * table.chunks / (1 - pipeline.bubble(table, again=1.0))


def test_the_bubble_of_a_program_that_puts_weight_gradients_off_is_smaller():
    plain, late = (proof(FOUR, f"pipeline.schedule={name}", "pipeline.recompute=false") for name in ("1f1b", "zb_h1"))
    assert 1 / 9 < late.bubble < plain.bubble


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_recomputation_frees_is_predicted_as_it_is_compiled(schedule):
    """Differences of one program from another, so that what all steps have in common does not hide what is asked."""

    def bytes_of(recompute: str) -> tuple[float, float]:
        overrides = FOUR, f"pipeline.schedule={schedule}", f"pipeline.recompute={recompute}"
        formula = memory(job_of(config(*overrides)), plans_of(config(*overrides), topology("cpu-4")))
        return proof(*overrides).temporary_bytes, float(formula.activations[0])

    (kept, kept_formula), (again, again_formula) = bytes_of("false"), bytes_of("true")
    assert kept_formula - again_formula == pytest.approx(kept - again, rel=0.35)


def test_the_stages_of_megatron_turing_nlg_530b_are_a_config():
    """8-way tensor by 35-way pipeline parallelism, 280 hosts of 8 GPUs (Smith et al. 2022, arXiv:2201.11990)."""
    block = {"attention": {"num_heads": 128}, "ffn": {"mlp": 4 * 20480, "glu": False}}
    model = {"vocab": 51200, "embed": 20480, "num_layers": 105, "context": 2048, "block": block, "tie": True}
    cfg = parse(RunConfig, {
        "out": "unused", "steps": 1000, "batch": 1920, "data": {"path": "unused"}, "model": model, "accumulate": 240,
        "optimizer": {"kind": "adamw", "learning_rate": 5e-5}, "mesh": {"data": 8, "pipe": 35, "fsdp": 1, "tensor": 8},
        "precision": "bfloat16",
    })  # fmt: skip
    assert parameters(cfg.model) == pytest.approx(530e9, rel=0.01)
    plan = plans_of(cfg, topology("a100-8x280"))
    assert cfg.pipeline.groups(35, cfg.model.num_groups) == (3,) * 35
    tables = 51200 * 20480 / 8  # on every stage
    assert memory(job_of(cfg), plan).parameters[0] == pytest.approx(4 * (530e9 / 280 + tables), rel=0.02)


def test_replicas_that_meet_now_and_then_send_as_often():
    rare, often = (
        proof("mesh.data=4", "accumulate=4", f"outer={{kind: diloco, every: {n}}}") for n in (500, 1)
    )  # fmt: skip
    sent = [sum(c.bytes * c.count for c in p.account.collectives if "data" in c.axes) for p in (rare, often)]
    assert sent[0] < sent[1] / 100
    formula = [
        predict(config("mesh.data=4", "accumulate=4", f"outer={{kind: diloco, every: {n}}}"), topology("v5e-4")).terms
        for n in (500, 1)
    ]
    assert formula[1][NAMES["data"]] == pytest.approx(500 * formula[0][NAMES["data"]])
