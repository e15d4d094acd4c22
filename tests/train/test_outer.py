"""Local SGD and DiLoCo. That they train alike on every mesh of as many replicas is shown with the other forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import exchanges
from test_loop import lines, parse, prepared  # noqa: F401 (a fixture)
from test_step import LENGTH, random_batch, run_config

from jaxllm.core.errors import ConfigError
from jaxllm.parallel.config import DiLoCo, LocalSGD
from jaxllm.train import loop
from jaxllm.train.checkpoint import Checkpointer, restore
from jaxllm.train.config import Checkpoints, RunConfig
from jaxllm.train.loop import train
from jaxllm.train.outer import outer_update
from jaxllm.train.step import TrainState, abstract_batch, init_state, make_train_step, place_batch, set_up

ADAMW = "optimizer={kind: adamw, learning_rate: 1e-2}"
SGD = "optimizer={kind: sgd, learning_rate: 0.3, momentum: 0}"


class Program:
    """A compiled training step; compiled fast, for it runs a few times."""

    def __init__(self, cfg: RunConfig):
        self.setup = set_up(cfg, jax.devices()[: np.prod(cfg.mesh.sizes)])
        step = make_train_step(self.setup).lower(self.setup.state, abstract_batch(self.setup, cfg.batch, LENGTH))
        self.step = step.compile()

    @functools.cached_property
    def first(self) -> TrainState:
        return jax.device_get(init_state(self.setup))

    def start(self) -> TrainState:
        return jax.device_put(self.first, jax.tree.map(lambda x: x.sharding, self.setup.state))

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, float]]:
        state, sums = self.step(state, place_batch(self.setup, batch))
        return state, {k: float(s) / max(float(w), 1e-9) for k, (s, w) in sums.items()}


program = functools.cache(Program)


def even(seed: int) -> dict[str, np.ndarray]:
    """Batches whose replicas have equally many tokens: then the mean of replicas is the mean of tokens."""
    return random_batch(seed=seed) | {"weights": np.ones((8, LENGTH), np.float32)}


def assert_close(params, others, atol: float) -> None:
    for name, x in params.items():
        np.testing.assert_allclose(np.asarray(x), np.asarray(others[name]), atol=atol, err_msg=name)


@pytest.mark.slow
def test_local_sgd_that_meets_at_every_step_is_data_parallelism():
    plain = program(run_config("mesh.data=2", "clip=null", SGD))
    local = program(run_config("mesh.data=2", "clip=null", SGD, "outer={kind: local_sgd, every: 1}"))
    mine, reference = local.start(), plain.start()
    for i in range(3):
        (mine, seen), (reference, expected) = local(mine, even(i)), plain(reference, even(i))
        assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_close(mine.params, reference.params, 1e-6)


@pytest.mark.slow
def test_diloco_of_one_replica_a_rate_of_one_and_no_momentum_is_its_inner_optimizer():
    outer = "outer={kind: diloco, every: 1, learning_rate: 1.0, momentum: 0}"
    adamw = "optimizer={kind: adamw, learning_rate: 1e-2, epsilon: 1e-3}"  # divides no rounding by almost nothing
    plain, alone = program(run_config(adamw)), program(run_config(adamw, outer))
    mine, reference = alone.start(), plain.start()
    for i in range(3):
        (mine, _), (reference, _) = alone(mine, random_batch(seed=i)), plain(reference, random_batch(seed=i))
    assert_close(mine.params, reference.params, 3e-6)  # x - (x - y) is y but for rounding


H, STEPS = 3, 7
DILOCO = f"outer={{kind: diloco, every: {H}, learning_rate: 0.7, momentum: 0.9}}"
TWO = ("mesh.data=2", "mesh.fsdp=2", "accumulate=2", "clip=0.5", f"steps={STEPS}", ADAMW, DILOCO)


@pytest.mark.slow
def test_diloco_is_algorithm_1_and_the_last_step_is_a_meeting():
    """Against a loop over replicas, each of them a plain run on one device with its half of the batch."""
    diloco = program(run_config(*TWO))
    plain = program(run_config("accumulate=2", "clip=0.5", f"steps={STEPS}", "batch=4", ADAMW))
    mine, each = diloco.start(), [plain.start() for _ in range(2)]
    anchor = jax.tree.map(np.asarray, each[0].params)
    velocity = {name: np.zeros_like(x) for name, x in anchor.items()}
    for step in range(1, STEPS + 1):
        batch = random_batch(seed=step)
        mine, seen = diloco(mine, batch)
        halves = [{k: x[:4] for k, x in batch.items()}, {k: x[4:] for k, x in batch.items()}]
        each, losses = zip(*(plain(state, half) for state, half in zip(each, halves, strict=True)), strict=True)
        tokens = [half["weights"].sum() for half in halves]
        assert seen["loss"] == pytest.approx(np.average([x["loss"] for x in losses], weights=tokens), rel=1e-5)
        if step % H == 0 or step == STEPS:
            for name, x in anchor.items():
                change = x - np.mean([np.asarray(state.params[name]) for state in each], 0)
                velocity[name] = 0.9 * velocity[name] + change
                anchor[name] = x - 0.7 * (change + 0.9 * velocity[name])
            each = [state._replace(params=jax.tree.map(jnp.array, anchor)) for state in each]
        assert_close(mine.params, anchor, 5e-5)
    assert_close(mine.opt.velocity, velocity, 5e-5)


@pytest.mark.slow
def test_between_meetings_only_sums_of_metrics_leave_a_replica():
    diloco = program(run_config(*TWO))
    across = [e for e in exchanges(diloco.step.as_text(), diloco.setup.mesh) if "data" in e.axes]
    between, meeting = [[e for e in across if e.sometimes == now] for now in (False, True)]
    assert between and sum(e.bytes for e in between) < 100
    whole = sum(4 * x.size for x in diloco.setup.state.params.values())
    assert {e.kind for e in meeting} == {"all-reduce"}
    assert sum(e.bytes for e in meeting) == pytest.approx(whole / 2, rel=0.01)  # each device: its share over fsdp
    # The layers' loops, which no meeting is in, do exchange: within a replica.
    assert any(e.axes == ("fsdp",) and not e.sometimes for e in exchanges(diloco.step.as_text(), diloco.setup.mesh))


@pytest.mark.slow
def test_the_state_is_logical_and_comes_back_to_the_bit_on_another_mesh(tmp_path):
    diloco = program(run_config(*TWO))
    state = diloco.start()
    for i in range(2):
        state, _ = diloco(state, random_batch(seed=i))
    model = diloco.setup.cfg.model
    with Checkpointer(tmp_path, Checkpoints(), model) as checkpoints:
        checkpoints.save(2, state, {})
    text = (tmp_path / "00000002" / "arrays.json").read_text()
    assert '"opt/params/layers.1.attention.w_q": ["float32", [2, 32, 4, 8]]' in text  # of each replica
    assert '"opt/velocity/layers.1.attention.w_q": ["float32", [32, 4, 8]]' in text
    other = set_up(run_config(*TWO, "mesh.fsdp=1"), jax.devices()[:2])
    for setup in (diloco.setup, other):
        back = restore(tmp_path, setup.state, model).state
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    resumed, _ = diloco(restore(tmp_path, diloco.setup.state, model).state, random_batch(seed=2))
    state, _ = diloco(state, random_batch(seed=2))
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.slow
def test_each_replica_has_its_own_loss_scale_and_skips_alone():
    half = program(run_config("mesh.data=2", "precision={kind: float16, initial_scale: 1024}", SGD, DILOCO))
    state = half.start()
    before = np.asarray(state.opt.params["embedding"])
    batch = random_batch()
    batch["weights"][5, 0] = np.inf  # of the second replica
    state, seen = half(state, batch)
    after = np.asarray(state.opt.params["embedding"])
    assert seen["nonfinite"] == 0.5 and np.isfinite(seen["loss"])
    assert (np.asarray(state.scale.scale) == [1024, 512]).all()
    assert (after[1] == before[1]).all() and (after[0] != before[0]).any()
    assert (np.asarray(state.params["embedding"]) == before[0]).all()  # no meeting yet


@pytest.mark.slow
def test_a_step_that_one_replica_skips_is_a_step_of_the_others(prepared, tmp_path, monkeypatch):  # noqa: F811
    def place(setup, batch, rows, steps=itertools.count(1)):
        weights = batch["weights"].copy()
        weights[0, 0] = np.inf if next(steps) == 2 else weights[0, 0]  # a row of the first replica
        return place_batch(setup, batch | {"weights": weights}, rows)

    monkeypatch.setattr(loop, "place_batch", place)
    train(parse(prepared, tmp_path / "run", "steps=4", "mesh.data=2", "mesh.fsdp=2", "model.vocab=260", DILOCO))
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert len(logged) == 4 and all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in logged)
    tokens = np.diff([0, *(line["tokens"] for line in logged)])
    assert 0.4 < tokens[1] / tokens[0] < 0.6
    (said,) = [line["message"] for line in lines(tmp_path / "run") if line.get("event") == "nonfinite"]
    assert "step 2: loss or gradients are not finite in 1 of 2 replicas; the step is skipped" in said


def test_a_checkpoint_of_more_or_fewer_replicas_is_refused_by_their_number(tmp_path):
    two, four = (set_up(run_config(f"mesh.data={n}", DILOCO), jax.devices()[:n]) for n in (2, 4))
    with Checkpointer(tmp_path, Checkpoints(), two.cfg.model) as checkpoints:
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), two.state)
        checkpoints.save(1, zeros, {})
    with pytest.raises(ConfigError, match=r"outer: .* saved with 2 replicas, mesh.data=4; .* set mesh.data to 2"):
        restore(tmp_path, four.state, four.cfg.model)


def test_an_outer_update_is_sgd_with_nesterov_momentum_on_the_change():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=5), jnp.float32)
    anchor, velocity = {"w": draw()}, {"w": jnp.zeros(5)}
    weight = torch.nn.Parameter(torch.tensor(np.asarray(anchor["w"])))
    oracle = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(4):
        mean = draw()
        weight.grad = weight.detach() - torch.tensor(np.asarray(mean))
        oracle.step()
        anchor, velocity = outer_update(DiLoCo(), anchor, {"w": mean}, velocity)
        np.testing.assert_allclose(anchor["w"], weight.detach().numpy(), rtol=1e-5)
    assert outer_update(LocalSGD(), anchor, {"w": mean}, {}) == ({"w": mean}, {})


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["outer=local_sgd", "mesh.data=1"], r"outer=local_sgd with mesh.data=1: one replica has nobody"),
        (["outer=diloco", "compression=int8", "mesh.data=2"], "no gradient crosses mesh axis data"),
        (["outer=diloco", "mesh.data=2", "mesh.pipe=2", "accumulate=2"], "mesh.pipe=2 with outer"),
        (["outer=diloco", "mesh.data=2", "offload.optimizer=true"], "outer=diloco with offload"),
        (["outer=diloco", "mesh.data=2", "sharding.optimizer.embed=[data, fsdp]"],
         r"sharding.optimizer.embed=\('data', 'fsdp'\): mesh axis data counts replicas"),
        (["compression=int8", "mesh.data=1"], r"compression=int8 with mesh.data=1"),
        (["compression=int8", "mesh.data=2", "mesh.pipe=2", "accumulate=2"], "mesh.pipe=2 with compression"),
        (["compression=int8", "mesh.data=2", "sharding.gradients.mlp=data"], "mesh axis data counts replicas"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_reason(overrides, why):
    with pytest.raises(ConfigError, match=why):
        run_config(*overrides)


def test_a_size_that_only_the_devices_tell_is_refused_too():
    cfg = run_config("outer=local_sgd", "mesh={data: -1, fsdp: 1}")
    with pytest.raises(ConfigError, match=r"outer=local_sgd with mesh.data=1"):
        set_up(cfg, jax.devices()[:1])
