"""Training whose gradients cross mesh axis data as 8-bit integers."""

import jax
import numpy as np
import pytest
from exchanges import exchanges
from test_outer import program
from test_step import random_batch, run_config

from jaxllm.train import replicas
from jaxllm.train.checkpoint import Checkpointer, restore
from jaxllm.train.config import Checkpoints

pytestmark = pytest.mark.slow

RATE = 0.3
SGD = (f"optimizer={{kind: sgd, learning_rate: {RATE}, momentum: 0}}", "clip=null", "mesh.data=2", "mesh.fsdp=2")
INT8 = "compression={kind: int8, block: 64}"


def exact(*overrides: str):
    return program(run_config(*SGD, *overrides))


def rounded(*overrides: str):
    return program(run_config(*SGD, INT8, *overrides))


def weights(state) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("overrides", [(), ("accumulate=2",)], ids=" ".join)
def test_gradients_used_and_the_last_residual_are_the_exact_gradients_of_all_steps(overrides):
    mine, plain = rounded(*overrides), exact(*overrides)
    state = mine.start()
    first = weights(state)
    gradients = {name: np.zeros(x.shape) for name, x in first.items()}
    for i in range(6):
        here = plain.start()._replace(params=jax.tree.map(jax.numpy.copy, state.params))
        before = weights(state)
        there, _ = plain(here, random_batch(seed=i))
        for name, x in weights(there).items():
            gradients[name] += (before[name] - x) / RATE
        state, _ = mine(state, random_batch(seed=i))
    for name, x in weights(state).items():
        residual = np.asarray(state.opt.residual[name]).sum(replicas.dim(mine.setup.axes[name]))
        assert abs(residual).max() > 0
        used = (first[name] - x) / RATE
        # What weights are rounded to, six times, over the rate.
        np.testing.assert_allclose(used + residual, gradients[name], atol=2e-5 * max(1, abs(x).max()), err_msg=name)


@pytest.mark.parametrize("overrides", [(), ("accumulate=2", "precision=bfloat16")], ids=" ".join)
def test_it_trains_as_well_as_the_exact_run(overrides):
    losses = []
    for p in (rounded(*overrides), exact(*overrides)):
        state = p.start()
        for i in range(30):
            state, seen = p(state, random_batch(seed=i % 3))
        losses.append(seen["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[1] < 4.8  # from 5.1


def test_bytes_over_data_fall_by_nearly_four_and_none_are_of_gradients_in_float32():
    mine = [e for e in exchanges(rounded().step.as_text(), rounded().setup.mesh) if "data" in e.axes]
    assert {e.dtype for e in mine if e.bytes > 600} <= {"s8", "f32"}
    integers = sum(e.bytes for e in mine if e.dtype == "s8")
    rest = sum(e.bytes for e in mine if e.dtype != "s8")
    share = {n: x.sharding.shard_shape(x.shape) for n, x in rounded().setup.state.params.items()}
    # A loop over the layers has the message of one of them.
    size = sum(np.prod(s[1:] if n.startswith("blocks.") else s) for n, s in share.items())
    assert integers == pytest.approx(2 * size, rel=0.05)  # to the owner of each share, and back; blocks filled up
    assert rest < integers / 10  # a scale for 64 values, and sums of metrics
    reduced = [e for e in exchanges(exact().step.as_text(), exact().setup.mesh) if e.axes == ("data",)]
    # An all-reduce sends its bytes twice, an all-to-all or all-gather once.
    twice = 2 * 4 * size
    assert sum(2 * e.bytes for e in reduced if e.kind == "all-reduce") >= 0.98 * twice
    assert 3.6 < twice / (integers + rest) < 4


def test_a_step_that_is_not_finite_leaves_the_residuals_as_they_were():
    mine = rounded()
    state, _ = mine(mine.start(), random_batch())
    before = jax.tree.map(np.asarray, (state.params, state.opt))
    batch = random_batch(seed=1)
    batch["weights"][0, 0] = np.inf
    state, seen = mine(state, batch)
    assert seen["nonfinite"] == 1
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt)), strict=True):
        assert x.tobytes() == np.asarray(y).tobytes()


def test_residuals_are_saved_by_layer_and_come_back_to_the_bit(tmp_path):
    mine = rounded()
    state, _ = mine(mine.start(), random_batch())
    model = mine.setup.cfg.model
    with Checkpointer(tmp_path, Checkpoints(), model) as checkpoints:
        checkpoints.save(1, state, {})
    text = (tmp_path / "00000001" / "arrays.json").read_text()
    assert '"opt/residual/layers.1.attention.w_q": ["float32", [2, 32, 4, 8]]' in text
    back = restore(tmp_path, mine.setup.state, model).state
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.sharding == y.sharding


@pytest.mark.parametrize("count", [4, 2])
def test_replicas_that_come_or_go_leave_the_sum_of_residuals_as_it_was(count, tmp_path):
    before, now = (rounded(f"mesh={{data: {n}, fsdp: {4 // n}}}") for n in (6 - count, count))
    state, _ = before(before.start(), random_batch())
    model = before.setup.cfg.model
    with Checkpointer(tmp_path, Checkpoints(), model) as checkpoints:
        checkpoints.save(1, state, {})
    back = restore(tmp_path, now.setup.state, model).state
    assert weights(back).keys() == weights(state).keys()
    for name, x in back.opt.residual.items():
        assert x.sharding == now.setup.state.opt.residual[name].sharding
        dim = replicas.dim(now.setup.axes[name])
        total = np.asarray(state.opt.residual[name]).sum(dim)
        np.testing.assert_allclose(np.asarray(x).sum(dim), total, rtol=1e-6, atol=1e-9, err_msg=name)
        assert total.any() and not np.delete(np.asarray(x), 0, dim).any()
    now(back, random_batch(seed=1))
