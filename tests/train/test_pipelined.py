"""Runs whose layers lie on several stages train as one device does, and cost what their schedules promise."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from test_step import LENGTH, random_batch, random_model, run_config

from jaxllm.core.errors import ConfigError
from jaxllm.models.layout import stack, unstack
from jaxllm.models.module import create
from jaxllm.parallel.pipeline import IDLE, bubble, table
from jaxllm.train import optimizers
from jaxllm.train.checkpoint import Checkpointer, load_params, restore
from jaxllm.train.config import Checkpoints, RunConfig
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

FAST = {"xla_backend_optimization_level": 0}  # most of the time here is spent in the compiler


@functools.cache
def setup_of(cfg: RunConfig) -> Setup:
    return set_up(cfg, jax.devices()[: np.prod(cfg.mesh.sizes)])


@functools.cache
def compiled(cfg: RunConfig, length: int = LENGTH):
    setup = setup_of(cfg)
    return make_train_step(setup).lower(setup.state, abstract_batch(setup, cfg.batch, length)).compile(FAST)


@functools.cache
def first_weights(model):
    """By layer, as checkpoints have them."""
    return unstack(jax.device_get(jax.jit(lambda: create(model, jax.random.key(0)))()), model)


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
        np.testing.assert_allclose(weights[name], expected_weights[name], atol=20 * rtol / 10, err_msg=name)


DEEP = random_model(0) | {"num_layers": 7, "tie": True}
PAIRS = random_model(1) | {"num_layers": 8, "pattern": [{}, {"ffn": {"mlp": 24}}], "tie": False}
DROPOUT = "model.dropout={embedding: 0.1, attention: 0.1, residual: 0.1}"


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        # more microbatches than stages, and no multiple of them
        (("pipeline.schedule=gpipe", "mesh.pipe=3", "accumulate=4"), DEEP),
        (("pipeline.schedule=1f1b", "mesh.pipe=3", "accumulate=4", "pipeline.stages=[1, 4, 2]"), DEEP),
        (("pipeline.schedule=interleaved", "mesh.pipe=3", "accumulate=4"), DEEP),
        (("pipeline.schedule=zb_h1", "mesh.pipe=3", "accumulate=4"), DEEP),
        # beside other mesh axes
        (("pipeline.schedule=1f1b", "mesh.pipe=2", "mesh.fsdp=2", "accumulate=4", DROPOUT), PAIRS),
        (("pipeline.schedule=interleaved", "mesh.pipe=2", "mesh.data=2", "accumulate=4", DROPOUT), PAIRS),
        (("pipeline.schedule=zb_h1", "mesh.pipe=2", "mesh.tensor=2", "accumulate=4", DROPOUT), PAIRS),
        # all devices in a row; nothing computed twice
        (("pipeline.schedule=zb_h1", "mesh.pipe=4", "accumulate=4", DROPOUT, "pipeline.recompute=false"), PAIRS),
        (("pipeline.schedule={kind: gpipe, slices: 4}", "mesh.pipe=3", "accumulate=4"), DEEP),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, tuple) else "",
)
def test_a_pipeline_trains_as_one_device_does(overrides, model):
    assert_trains_as_one_device(*overrides, **model)
