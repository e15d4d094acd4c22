import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.core.errors import CheckpointError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import unstack
from jaxllm.models.module import abstract
from jaxllm.train import optimizers
from jaxllm.train.checkpoint import Checkpointer, load_params, restore
from jaxllm.train.config import Adafactor, AdamW, Checkpoints, Muon

BLOCK = {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}}
CFG = DecoderConfig(vocab=32, context=16, embed=16, num_layers=4, block=BLOCK)
PAIRS = CFG.model_copy(update={"pattern": (CFG.block,) * 2})
THREES = CFG.model_copy(update={"pattern": (CFG.block,) * 3})  # one group and a tail of one layer


class State(NamedTuple):
    step: Any
    params: dict
    opt: Any
    scale: Any


class Scale(NamedTuple):
    factor: Any
    good_steps: Any


def adamw(axes: dict) -> optax.GradientTransformation:
    return optimizers.build(AdamW(learning_rate=1e-3), lambda step: 1e-3, axes)


def adafactor(axes: dict) -> optax.GradientTransformation:
    return optimizers.build(Adafactor(learning_rate=1e-3, min_dim=8), lambda step: 1e-3, axes)


def muon(axes: dict) -> optax.GradientTransformation:
    return optimizers.build(Muon(learning_rate=1e-3), lambda step: 1e-3, axes)


def optax_adafactor(axes: dict) -> optax.GradientTransformation:
    """Its state has place-holders of shape (1,) instead of one leaf per layer."""
    return optax.chain(optax.clip(1.0), optax.adafactor(1e-3, min_dim_size_to_factor=8))


def shapes(cfg: DecoderConfig = CFG, optimizer=adamw, scale: bool = False) -> State:
    _, params, axes = abstract(cfg)
    made = jax.eval_shape(optimizer(axes).init, params)
    one = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    return State(one(jnp.int32), params, made, Scale(one(jnp.float32), one(jnp.int32)) if scale else None)


def on_mesh(like: State, *sizes: int) -> State:
    """`like`, each leaf sharded as far as it divides: over fsdp along an early axis, over tensor along its last."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec: list[str | None] = [None] * len(x.shape)
        first = int("blocks." in jax.tree_util.keystr(path))
        if len(spec) > first and x.shape[first] % sizes[1] == 0:
            spec[first] = "fsdp"
        if len(spec) > first + 1 and x.shape[-1] % sizes[2] == 0:
            spec[-1] = "tensor"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map_with_path(place, like)


def on_one_device(like: State) -> State:
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like)


def filled(like: State, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    draw = lambda x: (100 * rng.normal(size=x.shape)).astype(x.dtype)
    return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), like)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_shardings(a: Any, b: Any) -> None:
    assert [x.sharding for x in jax.tree.leaves(a)] == [x.sharding for x in jax.tree.leaves(b)]


def save(folder: Path, *states: State, cfg: DecoderConfig = CFG, **extra: Path | str) -> None:
    """Checkpoints of steps 1, 2, ..."""
    with Checkpointer(folder, Checkpoints(keep=9), cfg, extra_files=extra) as checkpoints:
        for step, state in enumerate(states, 1):
            checkpoints.save(step, state, {"batch": 10 * step})


def layers(state: State, cfg: DecoderConfig) -> dict[str, np.ndarray]:
    """Every leaf of the state by its logical name, through paths spelt here independently."""
    paths = {"/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", None)))) for k in path): x
             for path, x in jax.tree.leaves_with_path(state)}  # fmt: skip
    return {n: np.asarray(x) for n, x in unstack(paths, cfg).items()}


# --- what is saved is what is restored ---


@pytest.mark.parametrize("optimizer", [adamw, adafactor, muon, optax_adafactor])
@pytest.mark.parametrize("cfg", [CFG, THREES], ids=["stacked", "with_tail"])
def test_a_state_comes_back_to_the_bit_on_its_mesh(tmp_path, optimizer, cfg):
    like = on_mesh(shapes(cfg, optimizer, scale=True), 1, 2, 2)
    state = filled(like)
    save(tmp_path, state, cfg=cfg)
    restored = restore(tmp_path, like, cfg)
    assert_same_bits(restored.state, state)
    assert (restored.meta, restored.step) == ({"batch": 10}, 1)
    assert_same_shardings(restored.state, like)


def test_a_state_comes_back_to_the_bit_on_another_mesh(tmp_path):
    state = filled(on_mesh(shapes(), 1, 4, 1))
    save(tmp_path, state)
    other = on_mesh(shapes(), 1, 2, 2)
    for like in (other, on_one_device(shapes())):
        restored = restore(tmp_path, like, CFG).state
        assert_same_bits(restored, state)
        assert_same_shardings(restored, like)
    w_q = restore(tmp_path, other, CFG).state.opt[0].mu["blocks.0.attention.w_q"]
    assert {s.data.size for s in w_q.addressable_shards} == {w_q.size // 4}


@pytest.mark.parametrize("optimizer", [adamw, adafactor, optax_adafactor])
def test_a_state_loads_in_any_grouping_of_its_layers(tmp_path, optimizer):
    state = filled(on_one_device(shapes(CFG, optimizer)))
    save(tmp_path / "1", state)
    pairs = restore(tmp_path / "1", on_mesh(shapes(PAIRS, optimizer), 1, 2, 2), PAIRS).state
    save(tmp_path / "2", pairs, cfg=PAIRS)
    threes = restore(tmp_path / "2", shapes(THREES, optimizer), THREES).state
    save(tmp_path / "3", threes, cfg=THREES)
    assert_same_bits(restore(tmp_path / "3", shapes(CFG, optimizer), CFG).state, state)
    first, second = layers(state, CFG), layers(pairs, PAIRS)
    assert first.keys() == second.keys() >= {"params/layers.3.attention.w_q"}
    assert all(np.array_equal(first[n], second[n]) for n in first)


def test_leaves_are_named_by_layer_and_part(tmp_path):
    save(tmp_path, filled(on_one_device(shapes())))
    names = json.loads((tmp_path / "00000001/arrays.json").read_text())
    assert names["params/layers.3.attention.w_q"] == ["float32", [16, 2, 8]]
    assert names["opt/0/mu/layers.3.attention.w_q"] == ["float32", [16, 2, 8]]
    assert names["step"] == ["int32", []]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    like = on_mesh(shapes(DecoderConfig(vocab=4096, embed=64, num_layers=4, block=BLOCK)), 1, 4, 1)
    cfg = DecoderConfig(vocab=4096, embed=64, num_layers=4, block=BLOCK)
    with Checkpointer(tmp_path, Checkpoints(keep=9), cfg) as checkpoints:
        for seed in (1, 2, 3):
            state = filled(like, seed)
            checkpoints.save(seed, state, {})
            jax.block_until_ready(overwrite(state))
            assert state.params["embedding"].is_deleted()
    for seed in (1, 2, 3):
        assert_same_bits(restore(tmp_path / f"0000000{seed}", like, cfg).state, filled(like, seed))


def test_a_checkpoint_is_as_large_as_its_arrays(tmp_path):
    cfg = DecoderConfig(vocab=8192, embed=128, num_layers=2, block=BLOCK)
    state = filled(on_mesh(shapes(cfg), 1, 2, 2))
    save(tmp_path, state, cfg=cfg)
    written = sum(p.stat().st_size for p in (tmp_path / "00000001").rglob("*") if p.is_file())
    arrays = sum(x.nbytes for x in jax.tree.leaves(state))
    assert arrays < written < 1.01 * arrays + 100_000


# --- folders ---


def test_a_checkpoint_folder_is_all_that_generation_needs(tmp_path):
    run = tmp_path / "20261121"  # a date is no step
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/vocab.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    files = {"tokenizer": tmp_path / "tok", "config.yaml": tmp_path / "run.yaml", "note.txt": "a text"}
    state = filled(on_one_device(shapes(PAIRS)))
    save(run / "checkpoints", state, state, cfg=PAIRS, **files)
    alone = shutil.move(run / "checkpoints/00000002", tmp_path / "published")
    assert (alone / "tokenizer/vocab.json").read_text() == "{}"
    assert (alone / "config.yaml").read_text() == "steps: 3\n"
    assert (alone / "note.txt").read_text() == "a text"
    for folder, batch in {alone: 20, run: 10, run / "checkpoints": 10}.items():
        weights = load_params(folder)
        assert_same_bits(weights.params, state.params)
        assert (weights.model_cfg, weights.meta) == (PAIRS, {"batch": batch})
    assert weights.folder == run / "checkpoints/00000001"


def test_weights_load_in_another_grouping_type_and_sharding(tmp_path):
    state = filled(on_one_device(shapes()))
    save(tmp_path, state)
    like = on_mesh(shapes(PAIRS), 1, 4, 1).params
    params = load_params(tmp_path, PAIRS, like, dtype=jnp.bfloat16).params
    assert_same_shardings(params, like)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unstack(state.params, CFG))
    assert_same_bits(unstack(params, PAIRS), wanted)


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    state = {"params": {"w": jnp.ones(3)}}

    @settings(max_examples=6)
    @given(st.lists(st.none() | st.sampled_from([1.0, 2.0, 3.0, float("nan")]), min_size=1, max_size=7),
           st.integers(1, 3), st.booleans())  # fmt: skip
    def keeps(losses, keep, best):
        shutil.rmtree(tmp_path)
        known: dict[int, float | None] = {}
        with Checkpointer(tmp_path, Checkpoints(keep=keep, best=best, asynchronous=False), CFG) as checkpoints:
            for step, loss in enumerate(losses):
                checkpoints.save(step, state, {}, loss)
                known[step] = loss
                measured = [(loss, -s) for s, loss in known.items() if loss is not None and math.isfinite(loss)]
                kept = sorted(known)[-keep:] + ([-min(measured)[1]] if best and measured else [])
                known = {s: known[s] for s in sorted(set(kept))}
                assert checkpoints.steps() == list(known)
                assert checkpoints.latest() == step

    keeps()


def test_saving_a_step_again_replaces_it_and_what_came_after(tmp_path):
    state = [filled(on_one_device(shapes()), seed) for seed in range(2)]
    save(tmp_path, state[0], state[0], state[0])
    with Checkpointer(tmp_path, Checkpoints(), CFG) as checkpoints:
        checkpoints.save(2, state[1], {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert_same_bits(restore(tmp_path, shapes(), CFG).state, state[1])


def test_a_save_that_fails_is_named_and_leaves_the_ones_before(tmp_path):
    state = filled(on_one_device(shapes()))
    save(tmp_path, state)
    checkpoints = Checkpointer(tmp_path, Checkpoints(), CFG, extra_files={"tokenizer": tmp_path / "absent"})
    checkpoints.save(2, state, {})
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written.*absent"):
        checkpoints.wait()
    checkpoints.close()
    assert restore(tmp_path, shapes(), CFG).step == 1


# --- damage ---


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("run")
    states = [filled(on_one_device(shapes()), seed) for seed in (1, 2)]
    save(folder, *states, **{"config.yaml": "steps: 3\n"})
    return folder, states[0]


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_to_a_file_is_named_and_the_checkpoint_before_used(two_checkpoints, tmp_path, damage):
    folder, before = two_checkpoints
    rng = random.Random(0)
    files = sorted(p.relative_to(folder) for p in (folder / "00000002").rglob("*") if p.is_file())
    assert len(files) > 20
    for i, file in enumerate(files if damage is flip else files[::3]):
        shutil.copytree(folder, tmp_path / str(i))
        damage(tmp_path / str(i) / file, rng)
        warnings: list[str] = []
        restored = restore(tmp_path / str(i), shapes(), CFG, warn=warnings.append)
        assert restored.step == 1, file
        (warning,) = warnings
        assert "00000002" in warning
        # a changed checksum accuses the file it belongs to
        assert file.name == "checksums.json" or str(file.relative_to("00000002")) in warning
    assert_same_bits(restored.state, before)


def test_weights_are_read_past_damage_to_what_they_do_not_need(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    for file in (folder / "00000002/arrays/state").rglob("*"):
        if file.is_file():
            file.unlink()
    assert load_params(folder).meta == {"batch": 20}
    assert restore(folder, shapes(), CFG).step == 1


def test_where_no_checkpoint_is_usable_each_is_listed_with_its_reason(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    (folder / "00000001/meta.json").unlink()
    (folder / "00000002/config.yaml").write_text("steps: 30\n")
    (folder / "00000003").mkdir()
    with pytest.raises(CheckpointError) as e:
        restore(folder, shapes(), CFG)
    lines = str(e.value).splitlines()
    assert "no usable checkpoint" in lines[0]
    assert ["00000003" in lines[1], "00000002" in lines[2], "00000001" in lines[3]] == [True] * 3
    assert "checksums.json is missing" in lines[1]
    assert "config.yaml has 10 bytes, 9 were written" in lines[2]
    assert "meta.json is missing" in lines[3]


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent", tmp_path / "00000007"):
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            load_params(folder)


def test_a_checkpoint_of_another_architecture_is_refused_by_name(two_checkpoints):
    folder, _ = two_checkpoints
    wide = CFG.model_copy(update={"vocab": 40})
    with pytest.raises(CheckpointError, match=r"params/embedding is float32\[32, 16\], wanted float32\[40, 16\]"):
        restore(folder, shapes(wide), wide)
    deep = CFG.model_copy(update={"num_layers": 5})
    with pytest.raises(CheckpointError, match=r"it has no params/layers\.4\."):
        restore(folder, shapes(deep), deep)
    with pytest.raises(CheckpointError, match=r"layers\.4\..* is missing"):
        load_params(folder, deep)
    with pytest.raises(CheckpointError, match=r"it has an unknown opt/0/.* more"):
        restore(folder, shapes(optimizer=adafactor), CFG)


def test_a_checkpoint_of_a_newer_format_is_refused_though_an_older_one_would_do(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    meta, sums = folder / "00000002/meta.json", folder / "00000002/checksums.json"
    text = meta.read_text().replace('"format": 1', '"format": 7')
    listed = json.loads(sums.read_text())
    listed["files"]["meta.json"] = [len(text), hashlib.sha256(text.encode()).hexdigest()]
    meta.write_text(text), sums.write_text(json.dumps(listed))
    for read in (lambda: restore(folder, shapes(), CFG), lambda: load_params(folder)):
        with pytest.raises(CheckpointError, match="format 7 is newer than 1, the newest this jaxllm reads; upgrade"):
            read()


# --- a process killed while it saves ---

SAVES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from jaxllm.models.config import DecoderConfig
from jaxllm.train.checkpoint import Checkpointer
from jaxllm.train.config import Checkpoints

with Checkpointer(Path(sys.argv[1]), Checkpoints(keep=2), DecoderConfig()) as checkpoints:
    for step in range((checkpoints.latest() or 0) + 1, 1000):
        checkpoints.save(step, {"params": {f"w{i}": jnp.full((1 << 18,), float(step)) for i in range(8)}}, {})
"""


@pytest.mark.slow
def test_a_kill_during_a_save_costs_that_save_alone(tmp_path):
    rng, half_written = random.Random(0), 0
    like = {"params": {f"w{i}": jax.ShapeDtypeStruct((1 << 18,), jnp.float32) for i in range(8)}}
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    complete = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], env=env)
        while process.poll() is None and not (tmp_path / f"{complete + 2:08d}.saving").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        half_written += any(tmp_path.glob("*.saving"))
        warnings: list[str] = []
        state, _, step = restore(tmp_path, like, DecoderConfig(), warn=warnings.append)
        assert not warnings and step > complete
        assert all(bool((x == step).all()) for x in state["params"].values())
        complete = step
    assert half_written, "no kill met a save: the test shows nothing"
    Checkpointer(tmp_path, Checkpoints(), DecoderConfig()).close()
    assert {p.name for p in tmp_path.iterdir()} == {f"{step:08d}" for step in (complete - 1, complete)}


# --- several hosts ---

HOST = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxllm.models.config import DecoderConfig
from jaxllm.train.checkpoint import Checkpointer, restore
from jaxllm.train.config import Checkpoints

folder, cfg = Path(sys.argv[1]), DecoderConfig(num_layers=4)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
values = np.arange(4 * 8 * 6, dtype=np.float32).reshape(4, 8, 6)
w = jax.make_array_from_callback(values.shape, where, lambda index: values[index])
with Checkpointer(folder, Checkpoints(keep=2), cfg) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, {"params": {"blocks.0.w": w * step}}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
like = {"params": {"blocks.0.w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=where)}}
state, _, step = restore(folder, like, cfg)
assert step == 3
for shard in state["params"]["blocks.0.w"].addressable_shards:
    assert np.array_equal(shard.data, 3 * values[shard.index])
"""


@pytest.mark.slow
def test_two_hosts_save_what_one_restores(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    hosts = [subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path), address, str(i)], env=env) for i in range(2)]
    assert [host.wait(120) for host in hosts] == [0, 0]
    weights = load_params(tmp_path, DecoderConfig(num_layers=4, pattern=[{}, {}])).params
    values = np.arange(4 * 8 * 6, dtype=np.float32).reshape(4, 8, 6)
    assert np.array_equal(weights["blocks.1.w"], 3 * values[1::2])
