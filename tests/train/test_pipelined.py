"""Runs whose layers lie on several stages train as one device does, and cost what their schedules promise."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from test_loop import losses, parse, prepared  # noqa: F401 (a fixture)
from test_step import LENGTH, random_batch, random_model, run_config

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import split, stack, unstack
from jaxllm.models.module import abstract, create
from jaxllm.parallel.pipeline import IDLE, bubble, table
from jaxllm.parallel.pipelined import Stages
from jaxllm.train import optimizers
from jaxllm.train.checkpoint import Checkpointer, load_params, restore
from jaxllm.train.config import Checkpoints, RunConfig
from jaxllm.train.loop import train
from jaxllm.train.precision import init_scale
from jaxllm.train.step import (
    Setup,
    TrainState,
    abstract_batch,
    init_state,
    make_eval_step,
    make_train_step,
    place_batch,
    set_up,
)


@functools.cache
def setup_of(cfg: RunConfig) -> Setup:
    return set_up(cfg, jax.devices()[: np.prod(cfg.mesh.sizes)])


@functools.cache
def traced(cfg: RunConfig, length: int = LENGTH):
    setup = setup_of(cfg)
    return make_train_step(setup).trace(setup.state, abstract_batch(setup, cfg.batch, length))


@functools.cache
def compiled(cfg: RunConfig, length: int = LENGTH):
    return traced(cfg, length).lower().compile()


@functools.cache
def first_weights(model) -> dict[str, np.ndarray]:
    """By layer, as checkpoints have them; not the model's own, which take long to compile."""
    rng = np.random.default_rng(0)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape) / np.sqrt(shape[0]) * (len(shape) > 1 or 0.1)
        return np.float32(noise + name.endswith("scale"))

    return {name: make(name, x.shape) for name, x in unstack(abstract(model)[1], model).items()}


def start(cfg: RunConfig) -> TrainState:
    """Like init_state, which would be compiled once for every mesh."""
    setup = setup_of(cfg)
    params = stack(first_weights(cfg.model), cfg.model, setup.places)
    opt = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.state.opt)
    state = TrainState(np.int32(0), params, opt, init_scale(cfg.precision))
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, setup.state))


@functools.cache
def trained(cfg: RunConfig) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Metrics of two steps, and the weights after them by layer."""
    setup, state, step, metrics = setup_of(cfg), start(cfg), compiled(cfg), []
    for i in range(2):
        state, sums = step(state, place_batch(setup, random_batch(seed=i)))
        metrics.append({k: float(s) / max(float(w), 1e-9) for k, (s, w) in sums.items()})
    return metrics, unstack(jax.device_get(state.params), cfg.model, setup.places)


def assert_trains_as_one_device(*overrides: str, rtol: float = 1e-5, **model) -> None:
    piped = run_config(*overrides, **model)
    alone = run_config(*(o for o in overrides if not o.startswith(("mesh", "pipeline"))), **model)
    (metrics, weights), (expected, expected_weights) = trained(piped), trained(alone)
    for a, b in zip(metrics, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rtol)
        assert a["accuracy"] == pytest.approx(b["accuracy"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rtol)
    assert weights.keys() == expected_weights.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], expected_weights[name], atol=2 * rtol, err_msg=name)
    # Any other permutation would be one of all devices, of which some are elsewhere in the program.
    permutations = [line for line in compiled(piped).as_text().splitlines() if " collective-permute(" in line]
    assert permutations and all("cond/branch_" in line and "/ppermute" in line for line in permutations)


DEEP = random_model(0) | {"num_layers": 7, "tie": True}
EVEN = random_model(1) | {"num_layers": 4, "tie": False}
PAIRS = {"num_layers": 4, "pattern": [{}, {"ffn": {"mlp": 24}}]}
ON_THREE = ("mesh.pipe=3", "accumulate=4")  # more microbatches than stages, and no multiple of them
KINDS = ("gpipe", "1f1b", "interleaved", "zb_h1")


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_trains_as_one_device_does(kind):
    assert_trains_as_one_device(f"pipeline.schedule={kind}", *ON_THREE, **DEEP)  # 7 layers: stages are uneven


@pytest.mark.parametrize(
    ("kind", "axis"),
    [("1f1b", "fsdp"), ("zb_h1", "tensor"), pytest.param("interleaved", "data", marks=pytest.mark.slow)],
)
def test_a_pipeline_goes_with_other_mesh_axes(kind, axis):
    assert_trains_as_one_device(f"pipeline.schedule={kind}", "mesh.pipe=2", f"mesh.{axis}=2", "accumulate=4", **EVEN)


EIGHT = """
import sys
from test_pipelined import EVEN, assert_trains_as_one_device
assert_trains_as_one_device("mesh.pipe=2", "accumulate=2", "model.position=learned", *sys.argv[1:], **EVEN)
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("fsdp", "tensor"), ("context", "tensor"), ("fsdp", "expert")], ids="-".join)
def test_a_pipeline_goes_with_two_other_mesh_axes(axes):
    """On eight devices, in a process that may end: XLA's partitioner ends it over what it cannot cut."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parents[1])))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", EIGHT, *(f"mesh.{axis}=2" for axis in axes)]
    ended = subprocess.run(command, check=False, env=os.environ | flags, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize(
    ("schedule", "pipe", "m", "model"),
    [("zb_h1", 4, 4, EVEN), ("gpipe", 2, 4, EVEN), pytest.param("interleaved", 2, 4, EVEN, marks=pytest.mark.slow)],
)
def test_a_pipeline_that_computes_nothing_twice_trains_the_same(schedule, pipe, m, model):
    """In GPipe and interleaved several outputs wait on the last stage."""
    assert_trains_as_one_device(
        f"pipeline.schedule={schedule}", f"mesh.pipe={pipe}", f"accumulate={m}",
        "pipeline.recompute=false", **model,
    )  # fmt: skip


def test_slices_of_tokens_train_as_whole_rows_do():
    assert_trains_as_one_device("pipeline.schedule={kind: gpipe, slices: 4}", *ON_THREE, **DEEP)


def test_a_pipeline_draws_the_same_dropout_and_backpropagates_a_scaled_loss():
    dropout = "model.dropout={embedding: 0.1, residual: 0.1}"
    half = "precision={kind: float16, initial_scale: 1024}"
    assert_trains_as_one_device("mesh.pipe=2", "accumulate=2", dropout, half, rtol=2e-3, **PAIRS)


# --- what it costs ---------------------------------------------------------------------------------------------------


def jaxprs(jaxpr):
    """A program and all within it."""
    yield jaxpr
    for e in jaxpr.eqns:
        for inner in jaxprs_in_params(e.params):
            yield from jaxprs(inner)


def ticks_of(cfg: RunConfig):
    """The scan over ticks: the one in which devices send."""
    scans = [e for j in jaxprs(traced(cfg).jaxpr.jaxpr) for e in j.eqns if e.primitive.name == "scan"]
    inner = {id(e): [i for j in jaxprs_in_params(e.params) for i in jaxprs(j)] for e in scans}
    (found,) = [e for e in scans if any(i.primitive.name == "ppermute" for j in inner[id(e)] for i in j.eqns)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_program_idles_as_long_as_the_formula_says(kind):
    p, m, v = 3, 4, 2 if kind == "interleaved" else 1
    share = {"zb_h1": (p - 1) / (3 * m + p - 1)}.get(kind, (p - 1) / (v * m + p - 1))
    cfg = run_config(f"pipeline.schedule={kind}", *ON_THREE, **DEEP)
    whole = 3 * m + p - 1 if kind == "zb_h1" else 2 * (v * m + p - 1)
    counts = [int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', compiled(cfg).as_text())]
    assert ticks_of(cfg).params["length"] == whole and counts.count(whole) == 1
    (cells,) = [c for c in traced(cfg).jaxpr.consts if np.shape(c)[:2] == (p, whole)]
    idle = np.asarray(cells)[:, :, 0] == IDLE
    np.testing.assert_allclose(idle.mean(1), share)  # of every device


def products(jaxpr) -> int:
    """Floating-point operations of matrix products; those in a loop of unknown length once."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            left = e.invars[0].aval.shape
            total += 2 * math.prod(e.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        times = e.params["length"] if e.primitive.name == "scan" else 1
        total += times * sum(map(products, jaxprs_in_params(e.params)))
    return total


def passes(cfg: RunConfig) -> list[int]:
    """Operations of F, B and W: the loops of no or one iteration that a tick has."""
    (tick,) = jaxprs_in_params(ticks_of(cfg).params)
    return [sum(map(products, jaxprs_in_params(e.params))) for e in tick.eqns if e.primitive.name == "while"]


def test_cutting_the_backward_pass_in_two_adds_no_products():
    run = functools.partial(run_config, *ON_THREE, **DEEP)
    f, b, w = passes(run("pipeline.schedule=zb_h1"))
    whole_f, whole_b = passes(run("pipeline.schedule=1f1b"))
    assert f == whole_f and b + w == whole_b
    matrices = [x for name, x in setup_of(run()).state.params.items() if ".w_" in name]
    tokens = 8 // 4 * LENGTH
    assert w == sum(2 * tokens * math.prod(x.shape[1:]) for x in matrices)  # all products with weights, no other
    kept_f, kept_b = passes(run("pipeline.schedule=1f1b", "pipeline.recompute=false"))
    assert (kept_f, kept_b) == (whole_f, whole_b - whole_f)  # nothing is made again


@functools.cache
def temporary(kind: str, m: int, *more: str) -> int:
    """Bytes on a device besides the train state and the batch; microbatches are of 8 rows of 64 tokens."""
    cfg = run_config(
        f"pipeline.schedule={kind}", "mesh.pipe=2", f"accumulate={m}", f"batch={8 * m}", "model.context=64", *more
    )
    return compiled(cfg, 64).memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_the_microbatches():
    x, batch = 8 * 64 * 32 * 4, (5 * 64 + 1) * 8 * 4  # bytes of a stage's input, and of a microbatch as it comes
    assert temporary("1f1b", 12) - temporary("1f1b", 4) <= 8 * 2 * batch
    assert temporary("gpipe", 12) - temporary("1f1b", 12) >= 10 * x  # it has 12 in flight, not 2
    assert x > 2 * batch


def test_a_device_has_the_layers_of_its_stages_only():
    cfg = run_config("pipeline.schedule=1f1b", "mesh.pipe=2", "mesh.fsdp=2", "accumulate=4", **EVEN)
    setup, state = setup_of(cfg), start(cfg)
    first = jax.devices()[0]
    for name, x in state.params.items():
        if name.startswith("blocks."):
            (mine,) = [s.data for s in x.addressable_shards if s.device == first]
            assert mine.shape[0] == 2 and x.shape[0] == 4
    whole = {",".join(map(str, x.shape[:1] + shard[1:])) for name, x in setup.state.params.items()
             if ".w_" in name for shard in (x.shape, x.sharding.shard_shape(x.shape))}  # fmt: skip
    assert not [shape for shape in whole if f"[{shape}]" in compiled(cfg).as_text()]


# --- where layers lie ------------------------------------------------------------------------------------------------


INTERLEAVED = ("pipeline.schedule=interleaved", *ON_THREE)


def test_stages_lie_device_after_device_and_what_is_left_over_is_zero():
    assert setup_of(run_config(*INTERLEAVED, **DEEP)).places == (0, 1, 4, -1, 2, -1, 5, -1, 3, -1, 6, -1)
    # groups 0, 1 | 2 | 3 | 4 | 5 | 6; device d has stages d and d + 3
    setup = setup_of(run_config("mesh.pipe=2", "accumulate=2", num_layers=3))
    fresh = jax.device_get(init_state(setup).params)
    make = jax.jit(functools.partial(create, setup.cfg.model))
    expected = unstack(make(jax.random.key(setup.cfg.seed)), setup.cfg.model)
    for name, x in unstack(fresh, setup.cfg.model, setup.places).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, err_msg=name)
    for name, x in fresh.items():
        if name.startswith("blocks."):
            assert x.shape[0] == 4 and not x[setup.places.index(-1)].any()


@given(st.lists(st.integers(1, 3), min_size=2, max_size=12), st.integers(1, 4), st.integers(1, 2))
def test_stacks_in_the_order_of_stages_hold_every_layer_once(counts, devices, period):
    counts = counts[: max(1, len(counts) // devices) * devices]
    if len(counts) % devices:
        return
    order = Stages.of(tuple(counts)).order(devices)
    cfg = DecoderConfig(
        vocab=8, embed=8, num_layers=sum(counts) * period, block={"attention": {"num_heads": 2}, "ffn": {"mlp": 8}},
        pattern=[{}] * period,
    )  # fmt: skip
    logical = {f"layers.{i}.w": np.full(2, 1.0 + i) for i in range(cfg.num_layers)} | {"embedding": np.ones(3)}
    stacked = stack(logical, cfg, order)
    back = unstack(stacked, cfg, order)
    assert back.keys() == logical.keys() and all(np.array_equal(back[n], logical[n]) for n in logical)
    share = len(order) // devices  # of the places that each device has
    for d in range(devices):
        mine = [g for g in order[d * share : (d + 1) * share] if g >= 0]
        runs = [range(sum(counts[:s]), sum(counts[: s + 1])) for s in range(d, len(counts), devices)]
        assert mine == [g for run in runs for g in run]
    assert all(not stacked[f"blocks.{s}.w"][i].any() for s in range(period) for i, g in enumerate(order) if g < 0)


def test_a_layer_of_a_stage_leaves_its_stack_in_shares_of_all_devices():
    setup = setup_of(run_config(*INTERLEAVED, **DEEP | {"embed": 24}))
    name = "blocks.0.ffn.w_up"
    parts = split(name, start(setup.cfg).params[name], setup.cfg.model, setup.places)
    for layer, x in parts.items():
        np.testing.assert_array_equal(x, first_weights(setup.cfg.model)[layer])
        assert {s.data.size for s in x.addressable_shards} == {x.size // 3}  # no device has to hold all layers


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_no_optimizer_moves_what_is_zero(optimizer):
    cfg = run_config(f"optimizer={{kind: {optimizer}, learning_rate: 0.1, weight_decay: 0.1}}").optimizer
    axes = {"w": ("layers", "embed", "mlp"), "b": ("layers", "mlp"), "embedding": ("vocab", "embed")}
    params = {"w": jnp.ones((2, 4, 6)).at[1].set(0), "b": jnp.ones((2, 6)).at[1].set(0), "embedding": jnp.ones((5, 4))}
    tx = optimizers.build(cfg, lambda step: 0.1, axes)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)  # gradients that are zero in the same place
        params = jax.tree.map(jnp.add, params, updates)
    assert not params["w"][1].any() and not params["b"][1].any()
    assert params["w"][0].any() and jnp.isfinite(params["w"]).all()


@pytest.mark.parametrize("way", ["from a pipeline", "to a pipeline"])
def test_a_checkpoint_does_not_know_the_stages(way, tmp_path):
    piped, alone = run_config(*INTERLEAVED, **DEEP), run_config("accumulate=4", **DEEP)
    saved, loaded = (piped, alone) if way == "from a pipeline" else (alone, piped)
    setup, other = setup_of(saved), setup_of(loaded)
    state = start(saved)
    with Checkpointer(tmp_path, Checkpoints(asynchronous=False), saved.model, places=setup.places) as checkpoints:
        checkpoints.save(3, state, {})
    back = restore(tmp_path, other.state, loaded.model, places=other.places).state
    jax.tree.map(
        lambda x, like: np.testing.assert_(x.sharding.is_equivalent_to(like.sharding, x.ndim)), back, other.state
    )
    for name, x in unstack(jax.device_get(back.params), loaded.model, other.places).items():
        np.testing.assert_array_equal(x, first_weights(saved.model)[name])
    weights = load_params(tmp_path, loaded.model, like=other.state.params, places=other.places).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights), jax.device_get(back.params))


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "model"),
    [(INTERLEAVED, DEEP), (("mesh.pipe=2", "mesh.fsdp=2", "accumulate=2"), EVEN)],
    ids=["uneven chunks", "in parts, beside fsdp"],
)
def test_evaluation_goes_through_the_stages(overrides, model):
    def sums(cfg):
        setup = setup_of(cfg)
        batch = place_batch(setup, random_batch())
        return jax.device_get(make_eval_step(setup)(start(cfg).params, batch))

    piped, alone = sums(run_config(*overrides, **model)), sums(run_config(**model))
    assert piped.keys() == alone.keys()
    for name in piped:
        np.testing.assert_allclose(piped[name], alone[name], rtol=1e-5, err_msg=name)


# --- what is refused -------------------------------------------------------------------------------------------------


SLICES = "pipeline.schedule={kind: gpipe, slices: 2}"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("accumulate=2",), "mesh.pipe=4 needs as many microbatches.*accumulate=2; set accumulate to 4 or more"),
        (("model.num_layers=5", "model.pattern=[{}, {}]"), "5 layers in a pattern of 2: 1 would be left over"),
        (("model.num_layers=3",), "4 stages need as many layer groups, the model has 3"),
        (("pipeline.stages=[1, 1, 3]",), r"pipeline.stages=\[1, 1, 3\] must be 4 numbers"),
        (("offload.optimizer=true",), "visits one group of layers after the other"),
        (("compression=int8", "mesh.data=2"), "what is mapped cannot be cut into stages; set compression to null"),
        (("remat=offload",), "mesh.pipe=4 with remat=offload: .* set remat to save_attention"),
        (("remat={device: [q], host: [input]}",), r"mesh.pipe=4 with remat={host: \[input\]}: .* set remat to"),
        ((SLICES, "model.block.attention.mask=full"), "a token sees later ones"),
        ((SLICES, "model.dropout.residual=0.1"), "dropout is drawn for whole rows"),
        ((SLICES, "pipeline.recompute=false"), "they keep their inputs alone"),
        (("sharding.activations.batch=[data, pipe]",), "for layers and nothing else: sharding.activations.batch"),
        (("sharding.parameters.layers=null",), "for layers and nothing else: sharding.parameters.layers=None"),
    ],
)  # fmt: skip
def test_what_cannot_be_pipelined_is_refused_with_its_reason(overrides, reason):
    base = ("mesh.pipe=4", "accumulate=4", "model.num_layers=4")
    with pytest.raises(ConfigError, match=reason):
        run_config(*base, *overrides)
    with pytest.raises(ConfigError, match=reason):  # how many devices there are is known later
        set_up(run_config("mesh.pipe=-1", "mesh.fsdp=1", *base[1:], *overrides))


def test_rules_by_which_stages_would_have_to_swap_shares_are_refused():
    mesh = ("mesh={pipe: 2, fsdp: 2, tensor: 2}", "accumulate=2")
    run_config(*mesh, "sharding.parameters={embed: null, mlp: [tensor, fsdp]}")
    reason = r"mlp=\('fsdp', 'tensor'\): stages .* not swap them; set it to the axes of sharding.activations.mlp=tensor"
    with pytest.raises(ConfigError, match=reason):
        run_config(*mesh, "sharding.parameters={embed: null, mlp: [fsdp, tensor]}")


def test_costs_of_schedules_can_be_compared_without_running_them():
    share = {kind: bubble(table(run_config(f"pipeline.schedule={kind}").pipeline.schedule, 4, 8)) for kind in KINDS}
    assert share["zb_h1"] < share["interleaved"] < share["1f1b"] == pytest.approx(share["gpipe"])  # 0.11, 0.16, 0.27


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages_or_none(prepared, tmp_path):  # noqa: F811
    def run(out: str, *overrides: str) -> dict[int, float]:
        train(parse(prepared, tmp_path / out, "steps=6", "accumulate=4", "batch=16", "model.num_layers=5", *overrides))
        return losses(tmp_path / out)

    unbroken = run("unbroken", "mesh.fsdp=4")
    every = ("checkpoints.every=2", "evaluation.every=2")
    run("moved", "mesh={pipe: 2, fsdp: 2}", "pipeline.schedule=interleaved", "steps=3", *every)
    run("moved", "mesh={pipe: 4, fsdp: 1}", "pipeline.schedule=zb_h1", "steps=5", *every)
    moved = run("moved", "mesh.fsdp=4", *every)
    assert moved.keys() == unbroken.keys()
    for step, loss in unbroken.items():
        assert moved[step] == pytest.approx(loss, rel=1e-4)
    # and its weights start another
    run("next", f"initial={tmp_path / 'moved'}", "mesh={pipe: 4, fsdp: 1}", "steps=3")
