import functools
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import config
from jaxllm.core.errors import ConfigError
from jaxllm.models.config import Keep
from jaxllm.train.config import RunConfig
from jaxllm.train.step import init_state, make_eval_step, make_train_step, place_batch, set_up
from tests.marks import slow_but

LENGTH, ROWS = 16, 8


def run_config(*overrides: str, **model) -> RunConfig:
    tree = {
        "out": "unused", "steps": 10, "batch": ROWS, "data": {"path": "unused"},
        "model": {
            "vocab": 96, "embed": 32, "num_layers": 2, "context": LENGTH,
            "block": {"attention": {"num_heads": 4, "num_kv_heads": 2}, "ffn": {"mlp": 64}},
        } | model,
        "optimizer": {"kind": "sgd", "learning_rate": 0.3},
        "schedule": {"kind": "constant"},
        "mesh": {"data": 1, "fsdp": 1},
        "objective": {"kind": "next_token", "z_loss": 1e-4},
    }  # fmt: skip
    return config.parse(RunConfig, tree, overrides)


ADAMW = "optimizer={kind: adamw, learning_rate: 1e-2}"


def random_model(seed: int) -> dict:
    """A small decoder that divides over two devices in every way."""
    r = random.Random(seed)
    block = {
        "norm": r.choice(["rmsnorm", "layernorm"]),
        "placement": r.choice(["pre", "post", "sandwich", "parallel", "subln", "deepnorm"]),
        "attention": {"num_heads": 4, "num_kv_heads": r.choice([2, 4]), "bias": r.random() < 0.5,
                      "qk_norm": r.choice([None, "rmsnorm"]), "window": r.choice([None, 5])},
        "ffn": {"mlp": 8 * r.randint(2, 9), "glu": r.random() < 0.5, "activation": r.choice(["silu", "gelu", "relu2"])},
    }  # fmt: skip
    return {
        "num_layers": r.randint(1, 3), "embed": 8 * r.randint(2, 5), "block": block, "tie": r.random() < 0.5,
        "position": r.choice(["rope", "alibi", "learned", "sinusoidal"]),
    }  # fmt: skip


def random_batch(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of several documents of unequal length, some padding, unequal weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 96, (rows, LENGTH), dtype=np.int32)
    documents = np.sort(rng.integers(1, 4, (rows, LENGTH), dtype=np.int32), 1)
    for row in range(rows):
        documents[row, LENGTH - rng.integers(0, 10) :] = 0
    positions = np.zeros_like(documents)
    for t in range(1, LENGTH):
        positions[:, t] = np.where(documents[:, t] == documents[:, t - 1], positions[:, t - 1] + 1, 0)
    weights = (documents > 0) * rng.choice(np.float32([0.0, 0.5, 1.0, 1.0]), (rows, LENGTH))
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "documents": documents,
        "weights": weights.astype(np.float32), "bytes": np.full(rows, LENGTH, np.int32),
    }  # fmt: skip


@functools.cache
def run(cfg: RunConfig, steps: int = 3, batch=random_batch):
    """State and averaged metrics after some steps on as many devices as the mesh asks for."""
    setup = set_up(cfg, jax.devices()[: np.prod([n for n in cfg.mesh.sizes])])
    state, step = init_state(setup), make_train_step(setup)
    metrics = []
    for i in range(steps):
        state, sums = step(state, place_batch(setup, batch(seed=i)))
        metrics.append({k: float(s) / max(float(w), 1e-9) for k, (s, w) in sums.items()})
    return state, metrics


def assert_same_run(cfg: RunConfig, other: RunConfig, rtol: float = 1e-5) -> None:
    (state, metrics), (other_state, other_metrics) = run(cfg), run(other)
    for a, b in zip(metrics, other_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rtol)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    if cfg.optimizer.kind == "sgd":  # the others divide a gradient of almost nothing by almost nothing
        chex.assert_trees_all_close(state.params, other_state.params, atol=2e-5)


MESHES = {
    "data": ["mesh.data=4"],
    "data-fsdp": ["mesh.data=2", "mesh.fsdp=2"],
    "fsdp-tensor": ["mesh.fsdp=2", "mesh.tensor=2"],
}


@pytest.mark.parametrize("seed", slow_but(range(3), 0))
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_trains_as_one_device_does(mesh, seed):
    model = random_model(seed)
    assert_same_run(run_config(**model), run_config(*MESHES[mesh], **model))


SPLIT = "{embed: null, mlp: [fsdp, tensor]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.fsdp=2", "mesh.tensor=2", f"sharding={{parameters: {SPLIT}, gradients: {SPLIT}, optimizer: {SPLIT}}}"),
        ("mesh.fsdp=2", "mesh.tensor=2", "sharding.gradients.kv_heads=null"),
        ("mesh.data=2", "mesh.fsdp=2", "sharding.activations.batch=data"),
    ],
    ids=["mlp over fsdp", "gradients whole", "rows whole"],
)
def test_weights_and_gradients_may_lie_otherwise_than_activations(overrides):
    assert_same_run(run_config(), run_config(*overrides))


def test_replicas_stay_equal_to_the_bit():
    """Of weights and optimizer state that every device of a data-parallel run holds whole, after three steps."""
    state, _ = run(run_config("mesh.data=4", "optimizer={kind: adamw, learning_rate: 1e-3}"))
    for x in jax.tree.leaves((state.params, state.opt)):
        first, *others = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(others) == 3 and first.shape == x.shape
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("preset", slow_but(["ddp", "zero1", "zero2", "zero3"], "ddp", "zero2"))
def test_every_zero_stage_trains_as_one_device_does(preset):
    assert_same_run(run_config(), run_config(f"sharding={preset}", "mesh.fsdp=4"))


@pytest.mark.parametrize("optimizer", slow_but(["adamw", "adafactor", "lion", "muon"], "adamw"))
def test_every_optimizer_trains_on_a_mesh_as_on_one_device(optimizer):
    choose = [f"optimizer={{kind: {optimizer}, learning_rate: 1e-3}}"]
    assert_same_run(run_config(*choose), run_config(*choose, "mesh.fsdp=2", "mesh.tensor=2"), rtol=2e-5)


def bytes_on_first_device(tree) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize(
    ("preset", "parameters", "optimizer"), [("ddp", 1, 1), ("zero1", 1, 4), ("zero2", 1, 4), ("zero3", 4, 4)]
)
def test_each_zero_stage_holds_its_share_of_parameters_and_optimizer(preset, parameters, optimizer):
    state = init_state(set_up(run_config(f"sharding={preset}", "mesh.fsdp=4", ADAMW)))
    whole_params = sum(x.nbytes for x in jax.tree.leaves(state.params))
    whole_opt = sum(x.nbytes for x in jax.tree.leaves(state.opt))
    assert bytes_on_first_device(state.params) == whole_params // parameters
    assert bytes_on_first_device(state.opt) == pytest.approx(whole_opt / optimizer, rel=1e-3)  # counters are whole


def collectives(cfg: RunConfig) -> str:
    setup = set_up(cfg)
    batch = place_batch(setup, random_batch())
    return make_train_step(setup).lower(setup.state, batch).compile().as_text()


def test_logits_sharded_over_the_vocabulary_are_never_gathered():
    text = collectives(
        run_config("mesh.tensor=4", "mesh.fsdp=1", "model.block.attention.num_kv_heads=4", "model.vocab=320")
    )
    assert "all-reduce" in text
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    assert not [line for line in gathers if f"{ROWS},{LENGTH},320]" in line]


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_accumulated_microbatches_equal_the_large_batch(pieces):
    assert_same_run(run_config(), run_config(f"accumulate={pieces}"))


def test_accumulation_is_exact_on_a_mesh_too():
    assert_same_run(run_config(), run_config("accumulate=2", "mesh.data=2", "mesh.fsdp=2"))


def test_a_batch_with_one_heavy_and_one_empty_microbatch_is_the_mean_over_tokens():
    def uneven(seed):
        batch = random_batch(seed=seed)
        batch["weights"][1::2] = 0  # microbatch i has the rows i, i + 2, ...
        return batch

    a, b = run(run_config(), 1, uneven)[1][0], run(run_config("accumulate=2"), 1, uneven)[1][0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def poisoned(seed):
    """A batch that makes the loss of step 1 infinite: the others are sound."""
    batch = random_batch(seed=seed)
    if seed == 1:
        batch["weights"][0, 0] = np.inf
    return batch


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    state, metrics = run(run_config(), 3, poisoned)
    assert [m["nonfinite"] for m in metrics] == [0, 1, 0]
    sound, _ = run(run_config(), 2, lambda seed: random_batch(seed=2 * seed))  # steps 0 and 2 alone
    chex.assert_trees_all_equal(state.params, sound.params)
    chex.assert_trees_all_equal(state.opt, sound.opt)
    assert int(state.step) == 3


def test_a_float16_overflow_skips_the_step_halves_the_scale_and_is_counted():
    cfg = run_config("precision={kind: float16, initial_scale: 1e30, growth_interval: 2}", ADAMW)
    state, metrics = run(cfg, 2)
    assert [m["nonfinite"] for m in metrics] == [1, 1]
    assert float(state.scale.scale) == pytest.approx(1e30 / 4)
    assert int(state.scale.overflows) == 2
    chex.assert_trees_all_equal(state.params, init_state(set_up(cfg, jax.devices()[:1])).params)


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_half_precision_follows_float32(kind, tolerance):
    half, full = run(run_config(f"precision.kind={kind}", ADAMW), 6)[1], run(run_config(ADAMW), 6)[1]
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=tolerance)
    assert half[-1]["nonfinite"] == 0


def test_master_weights_and_optimizer_state_stay_float32_in_bfloat16_runs():
    state, _ = run(run_config("precision=bfloat16", ADAMW), 1)
    for x in jax.tree.leaves((state.params, state.opt)):
        assert x.dtype in (jnp.float32, jnp.int32)


def test_dropout_is_the_same_on_every_mesh():
    rates = "model.dropout={embedding: 0.1, attention: 0.1, residual: 0.1}"
    assert_same_run(run_config(rates), run_config(rates, "mesh.fsdp=2", "mesh.tensor=2"))


def test_dropout_is_off_in_evaluation():
    cfg = run_config("model.dropout.residual=0.5")
    setup = set_up(cfg, jax.devices()[:1])
    state, step = init_state(setup), make_eval_step(setup)
    batch = place_batch(setup, random_batch())
    chex.assert_trees_all_equal(step(state.params, batch), step(state.params, batch))
    without = make_eval_step(set_up(run_config(), jax.devices()[:1]))(state.params, batch)
    chex.assert_trees_all_equal(step(state.params, batch), without)


@functools.cache
def clipped_norm(clip: str) -> float:
    cfg = run_config(f"clip={clip}", "optimizer={kind: sgd, learning_rate: 1.0, momentum: 0}")
    setup = set_up(cfg, jax.devices()[:1])
    state = init_state(setup)
    before = jax.tree.map(jnp.copy, state.params)
    state, _ = make_train_step(setup)(state, place_batch(setup, random_batch()))
    return float(
        jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(before.values(), state.params.values(), strict=True)))
    )


def test_clipping_bounds_the_norm_of_the_gradient():
    assert clipped_norm("0.25") == pytest.approx(0.25, rel=1e-4)
    assert clipped_norm("null") > 0.5


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ConfigError, match=r"data=3 needs 3 devices, there are 4"):
        set_up(run_config("mesh.data=3"))


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"w_k.*kv_heads=2 does not divide over mesh axis tensor of 4"):
        set_up(run_config("mesh.tensor=4"))


def test_a_batch_that_does_not_divide_is_refused():
    setup = set_up(run_config("mesh.fsdp=4"))
    with pytest.raises(ConfigError, match=r"batch array tokens: batch=6 does not divide over mesh axis fsdp of 4"):
        place_batch(setup, random_batch(rows=6))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("none", "none"), ("{kind: none}", "none"), ("[q, k]", Keep(device=("q", "k"))),
        ("{host: [input]}", Keep(host=("input",))), ("{kind: full, device: [q]}", Keep(device=("q",))),
    ],
)  # fmt: skip
def test_what_is_kept_is_a_policy_or_names(said, meant):
    assert run_config(f"remat={said}").remat == meant


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("bogus", "'none', 'full'"), ("[bogus]", "remat.device.0"), ("3", "a list of q, k"), ("null", "a list of q, k"),
        ("{device: [q], host: [q]}", "both places"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_told_with_what_can(said, answer):
    with pytest.raises(ConfigError, match=answer):
        run_config(f"remat={said}")
