"""State that waits in host memory. That it trains alike on every mesh is shown with the other forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_outer import program
from test_step import random_batch, run_config

from jaxllm.core.config import parse
from jaxllm.models.module import abstract
from jaxllm.parallel.config import Offload
from jaxllm.train import offload, optimizers
from jaxllm.train.checkpoint import Checkpointer, restore
from jaxllm.train.config import SGD, Adafactor, AdamW, Checkpoints, Lion, Muon, RunConfig
from jaxllm.train.step import abstract_batch, make_train_step, set_up

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "adamw": AdamW(learning_rate=1e-2),
    "adafactor": Adafactor(learning_rate=1e-2, min_dim=8, scale_by_parameter=True),
    "lion": Lion(learning_rate=1e-2),
    "sgd": SGD(learning_rate=1e-2),
    "muon": Muon(learning_rate=1e-2),
}


@functools.cache
def drawn() -> tuple[dict, dict, dict]:
    """Axes, weights and gradients of a decoder of three layers in pairs: stacked ones, and one alone."""
    model = run_config(num_layers=3).model
    _, shapes, axes = abstract(model.model_copy(update={"pattern": (model.block,) * 2}))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    return axes, jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_group_by_group_is_that_of_everything_at_once(name):
    axes, params, grads = drawn()
    build = functools.partial(optimizers.build, OPTIMIZERS[name], lambda step: 1e-2)
    tx = build(axes)
    opt = jax.tree.map(jnp.asarray, tx.init(params))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    at = jax.tree.map(lambda _: device, (params, opt))
    host = offload.places(Offload(optimizer=True, parameters=True), *at, optimizers.state_axes(opt, params, axes))
    update = lambda params, opt, wanted: offload.update(build, axes, host, grads, jnp.float32(0.5), params, opt, wanted)
    update = jax.jit(update, out_shardings=host)

    updates, then = tx.update(jax.tree.map(lambda g: 0.5 * g, grads), opt, params)
    expected = {True: (optax.apply_updates(params, updates), then), False: (params, opt)}
    for wanted, outcome in expected.items():
        got = update(*jax.device_put((params, opt), host), wanted)
        assert jax.tree.structure(got) == jax.tree.structure(outcome)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(outcome), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=1e-6)
        on = {"pinned_host": 0, "device": 0}
        for x in jax.tree.leaves(got):
            on[x.sharding.memory_kind] += x.nbytes
        assert on["device"] < 100 and on["pinned_host"] >= sum(x.nbytes for x in params.values())


BOTH = "offload={optimizer: true, parameters: true}"
HALF = ("precision=bfloat16", "mesh.fsdp=2", "optimizer={kind: adamw, learning_rate: 1e-2}")


def test_a_run_with_everything_on_the_host_is_the_run_without():
    mine, plain = program(run_config(*HALF, BOTH)), program(run_config(*HALF))
    state, reference = mine.start(), plain.start()
    for i in range(4):
        batch = random_batch(seed=i)
        if i == 1:
            batch["weights"][0, 0] = np.inf
        (state, seen), (reference, expected) = mine(state, batch), plain(reference, batch)
        assert seen == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert seen["nonfinite"] == (i == 1)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((state.params, state.opt)) if x.ndim}
    assert kinds == {"pinned_host"}


def test_what_waits_on_the_host_is_saved_and_restored_there(tmp_path):
    mine = program(run_config(*HALF, BOTH))
    state, _ = mine(mine.start(), random_batch())
    model = mine.setup.cfg.model
    with Checkpointer(tmp_path, Checkpoints(), model) as checkpoints:
        checkpoints.save(1, state, {})
    on_device = program(run_config(*HALF)).setup.state
    for like in (mine.setup.state, on_device):  # a run may go on with or without offload
        back = restore(tmp_path, like, model).state
        for x, y, wanted in zip(*map(jax.tree.leaves, (back, state, like)), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.sharding == wanted.sharding


# --- on a TPU --------------------------------------------------------------------------------------------------------


def compiled(devices: list, *overrides: str):
    """The setup and what the TPU compiler says of the memory of its step: weights are most of it."""
    tree = {
        "out": "unused", "steps": 1, "schedule": "constant", "batch": 4, "data": {"path": "unused"}, "remat": "full",
        "mesh": {"fsdp": 4}, "precision": "bfloat16", "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "model": {
            "vocab": 1024, "embed": 1024, "num_layers": 12, "context": 512,
            "block": {"attention": {"num_heads": 8}, "ffn": {"mlp": 4096}},
        },
    }  # fmt: skip
    cfg = parse(RunConfig, tree, overrides)
    setup = set_up(cfg, devices)
    step = make_train_step(setup).lower(setup.state, abstract_batch(setup, cfg.batch, cfg.model.context)).compile()
    return setup, step.memory_analysis()


def share(tree) -> int:
    """Bytes of one device."""
    return sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree))


@pytest.mark.tpu_aot
def test_on_a_tpu_the_host_gains_what_the_device_loses(v5e):
    setup, plain = compiled(v5e)
    params, opt = share(setup.state.params), share(setup.state.opt)
    # What libtpu holds against a chip's memory, see `plan.compiled`: it refuses a step where this is more.
    device = lambda m: m.peak_memory_in_bytes - m.host_argument_size_in_bytes
    _, optimizer = compiled(v5e, "offload.optimizer=true")
    assert optimizer.host_argument_size_in_bytes == pytest.approx(opt, rel=0.01)
    assert plain.argument_size_in_bytes - optimizer.argument_size_in_bytes == pytest.approx(opt, rel=0.01)
    assert optimizer.host_temp_size_in_bytes == 0  # updated in place
    assert device(plain) - device(optimizer) > 0.9 * opt  # streamed: a twelfth at a time
    _, both = compiled(v5e, BOTH)
    assert both.host_argument_size_in_bytes == pytest.approx(params + opt, rel=0.01)
    assert both.argument_size_in_bytes < 0.01 * params
    assert device(optimizer) - device(both) > 0.9 * params


@pytest.mark.tpu_aot
def test_on_a_tpu_activations_kept_on_the_host_leave_the_device(v5e):
    longer = ("batch=16", "model.num_layers=8")
    _, kept = compiled(v5e, "remat=save_attention", *longer)
    setup, away = compiled(v5e, "remat=offload", *longer)
    cfg = setup.cfg.model
    one = 16 * 512 // 4 * cfg.embed * 2  # bytes of q, k, v or what attention gives: bfloat16
    assert away.host_temp_size_in_bytes == pytest.approx(4 * cfg.num_layers * one, rel=0.1)
    assert kept.temp_size_in_bytes - away.temp_size_in_bytes > 0.8 * 4 * cfg.num_layers * one
