"""`jaxllm plan` as a whole: what it writes and prints, what it refuses, and that its YAML makes the plan it found."""

import functools
import json
import math
from pathlib import Path

import jax
import pytest
import yaml

from jaxllm import cli, verbs
from jaxllm.core import config
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.models.config import Keep
from jaxllm.plan import compiled, explain, run
from jaxllm.plan.analytic import memory
from jaxllm.plan.run import Asked, plan
from jaxllm.plan.search import HEADROOM, job_of, plans_of, search
from jaxllm.plan.topology import Topology, topology
from jaxllm.train.config import RunConfig
from jaxllm.train.step import check_batches, set_up
from tests.train.test_step import ADAMW, run_config

SHIPPED = Path(__file__).parents[2] / "configs/train"
FORMULAS = Asked(proof=False)
SMALL = run_config(ADAMW, "mesh.fsdp=4", "topology=cpu-4")


@pytest.fixture
def small(tmp_path) -> Path:
    """The YAML file of a run that compiles in seconds on four CPU devices."""
    file = tmp_path / "small.yaml"
    file.write_text(config.dump(SMALL), encoding="utf-8")
    return file


# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_proven_plan_writes_what_it_promises_for_one_device_and_step(small, tmp_path, capsys):
    file = tmp_path / "new" / "plan.json"
    assert cli.main(["plan", str(small), "--json", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["fits"] is True and 0 < record["peak_bytes"] <= record["hbm_bytes"]
    assert 0 < record["model_flops"] < record["hardware_flops"] and record["compile_s"] > 0
    assert record["collective_bytes"]["all-gather"] > 0
    low, high = record["step_ms"]
    assert 0 < low <= high and 0 < record["mfu"][0] <= record["mfu"][1] < 1 and record["predicted"] is True
    out = capsys.readouterr().out
    assert all(f"\n{word}" in out for word in ("verdict ", "memory ", "FLOPs ", "moves ", "step ", "training "))
    assert out.index("compiling the training step for cpu-4") < out.index("verdict")


def test_formulas_answer_with_the_verdict_of_a_search(small, tmp_path, capsys, monkeypatch):
    file, on = tmp_path / "plan.json", topology("cpu-4")
    peak = float(memory(job_of(SMALL), plans_of(SMALL, on)).peak[0])
    for size, fits in ((1.001 * peak / HEADROOM, True), (0.999 * peak / HEADROOM, False)):
        other = on._replace(chip=on.chip._replace(hbm_usable=int(size)))
        monkeypatch.setattr(run, "topology", lambda name, other=other: other)
        assert cli.main(["plan", str(small), "--formulas", "--json", str(file)]) == 0
        record = json.loads(file.read_text(encoding="utf-8"))
        assert (record["fits"], record["peak_bytes"], record["hbm_bytes"]) == (fits, peak, int(size))
        assert f"memory     (predicted) {'fits' if fits else 'DOES NOT FIT'}: peak " in capsys.readouterr().out


def test_formulas_and_proof_count_the_same_flops_of_the_model():
    assert plan(SMALL, FORMULAS)["model_flops"] == pytest.approx(proof().model_flops)


def test_the_tokens_of_a_ramp_are_those_it_feeds():
    cfg = run_config(ADAMW, "mesh.fsdp=4", "topology=cpu-4", "batch=16", "ramp={start: 4, increment: 4, steps: 6}")
    fed = 2 * 4 + 2 * 8 + 2 * 12 + 4 * 16  # rows of its ten steps
    assert [cfg.batch_rows(k)[1] for k in range(10)] == [4, 4, 8, 8, 12, 12, 16, 16, 16, 16]
    assert plan(cfg, FORMULAS)["training"]["tokens"] == 16 * fed


@pytest.mark.parametrize(
    ("n", "said"),
    [(12, "12"), (3.72e6, "3.72M"), (999.6e3, "1M"), (6.738e9, "6.74B"), (540.35e9, "540B"), (1.5e16, "1.5e+04T")],
)
def test_numbers_have_the_unit_that_suits_them(n, said):
    assert run._scaled(n, "KMBT") == said


def test_a_small_model_has_parameters(capsys):
    plan(config.load(RunConfig, SHIPPED / "quickstart.yaml", ["model.vocab=4096"]), FORMULAS)
    assert capsys.readouterr().out.startswith("\n4.21M parameters on cpu-1")


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--on", ""], "no topology ''"),
        (["--on", "v5e-8x0"], "no topology 'v5e-8x0': 0 slices"),
        (["--top", "0"], "--top must be at least 1, and at most 1e+30; got 0"),
        (["--tokens", "0"], "--tokens must be above 0"),
        (["--tokens", "nan"], "--tokens must be above 0, and at most 1e+30; got nan"),
        (["--price", "-1"], "--price must be 0 or more"),
        (["--pue", "0.9"], "--pue must be at least 1"),
        (["--grid", "inf"], "--grid must be 0 or more, and at most 1e+30; got inf"),
        (["--watts", "0"], "--watts must be above 0"),
        (["mesh.fsdp=3"], "mesh fsdp=3 needs 3 devices, there are 4"),
        (["topology=null"], "no topology: say --on"),
        (["model.vocab=null"], "model.vocab is not set"),
        (["--on", "cpu-64"], "cpu-64 needs 64 CPU devices"),
    ],
)
def test_what_cannot_be_planned_is_one_message_and_no_file(small, tmp_path, capsys, argv, told):
    file = tmp_path / "plan.json"
    overrides = ["mesh.fsdp=64", "batch=64"] if "cpu-64" in argv else []
    assert cli.main(["plan", str(small), *overrides, *argv, "--json", str(file)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(told) and said.err.count("\n") == 1 and "compiling" not in said.out
    assert not file.exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mesh.context=4", "model.context=12"], "model.context=12 does not divide into 2 x 4 chunks, two for each"),
        (
            ["mesh.tensor=4", "sharding={activations: {norm_seq: [context, tensor]}}", "model.context=18",
             "model.block.attention={num_heads: 4, num_kv_heads: 4}"],
            "model.context=18 does not divide over mesh axis tensor of 4",
        ),
        (["mesh.context=-1", "model.dropout.attention=0.1"], "model.dropout.attention=0.1 with mesh.context=4"),
        (
            ["mesh.context=-1", "context=ulysses", "model.block.attention={num_heads: 6, head_dim: 8}"],
            "num_heads=6 does not divide over mesh axes context of 4",
        ),
        (["mesh={data: -1, fsdp: 4}", "outer={kind: local_sgd}"], "outer=local_sgd with mesh.data=1"),
        (
            ["mesh.fsdp=4", "batch=16", "accumulate=2", "ramp={start: 4, increment: 4, steps: 5}"],
            "a batch of 4 rows in accumulate=2 parts of 2 does not divide over mesh axis fsdp of 4",
        ),
        (
            ["mesh.fsdp=4", "sharding=zero1", "model.embed=34", "model.block.attention.head_dim=8"],
            "model.embed=34 does not divide over mesh axis fsdp of 4",
        ),
        (
            ["mesh.pipe=2", "mesh.tensor=2", "accumulate=2", "pipeline.schedule={kind: gpipe, slices: 2}",
             "sharding={activations: {norm_seq: [context, tensor]}}", "model.context=18"],
            "model.context=18 in 2 slices does not divide over mesh axis tensor of 2",
        ),
        (
            ["mesh={data: 2, pipe: 2, fsdp: 1}", "accumulate=2", "pipeline.schedule={kind: gpipe, slices: 2}",
             "model.context=15"],
            "model.context=15 does not divide into pipeline.schedule.slices=2",
        ),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_training_refuses_on_the_same_devices(overrides, told):
    cfg = run_config(ADAMW, *overrides)
    with pytest.raises(ConfigError):
        check_batches(set_up(cfg, jax.devices()[:4]), cfg.model.context)
    with pytest.raises(ConfigError, match=told):
        plans_of(cfg, topology("cpu-4"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.context=4", "model.context=12", "context={kind: ring, balanced: false}"],
        ["mesh.context=4", "model.context=12", "model.block.attention.mask=full"],
        ["mesh.tensor=2", "mesh.data=2", "sharding={activations: {norm_seq: [context, tensor]}}", "model.context=18"],
        ["mesh.fsdp=4", "batch=16", "ramp={start: 4, increment: 4, steps: 5}"],
    ],
)
def test_a_plan_takes_what_training_takes(overrides):
    cfg = run_config(ADAMW, *overrides)
    check_batches(set_up(cfg, jax.devices()[:4]), cfg.model.context)
    plans_of(cfg, topology("cpu-4"))


@pytest.mark.parametrize("given", [{"price": 0.0}, {"grid": 0.0}, {"pue": 1.0}, {"tokens": 1e30}, {"watts": 1e30}])
def test_numbers_at_the_end_of_their_range_are_taken(given, tmp_path):
    file = tmp_path / "plan.json"
    plan(SMALL, Asked(proof=False, **given), file)
    training = json.loads(file.read_text(encoding="utf-8"))["training"]
    assert training["tokens"] == given.get("tokens", 10 * 8 * 16) and all(map(math.isfinite, training["energy_kwh"]))
    assert (training["money"] is None, training["co2e_kg"] is None) == ("price" not in given, "grid" not in given)


def test_a_file_is_tried_without_leaving_or_changing_one(tmp_path):
    run.check_writable(tmp_path / "new" / "plan.json")
    assert not (tmp_path / "new" / "plan.json").exists()
    (tmp_path / "old.json").write_text("kept")
    run.check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"
    with pytest.raises(UserError, match="--json .* cannot be written"):
        run.check_writable(tmp_path / "old.json" / "plan.json")


# --- the plan that is found ------------------------------------------------------------------------------------------


@pytest.fixture
def proven(monkeypatch) -> list[RunConfig]:
    """The configs that are compiled; their proof is that of another, which takes less time."""
    seen, known = [], proof()

    def prove(cfg: RunConfig, on: Topology, *, begin) -> compiled.Proof:
        begin()
        seen.append(cfg)
        return known

    monkeypatch.setattr(compiled, "prove", prove)
    return seen


@functools.cache
def proof() -> compiled.Proof:
    return compiled.prove(SMALL, topology("cpu-4"))


def test_the_winner_of_a_search_is_compiled_once(proven, tmp_path, capsys):
    file = tmp_path / "plan.json"
    plan(SMALL, Asked(search=True, top=2), file)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(proven) == len(set(proven)) == 2 and record["config"] in [cfg.model_dump(mode="json") for cfg in proven]
    assert len(record["search"]["ranked"]) == 2 and record["search"]["ranked"][0]["peak_bytes"] == proof().peak_bytes
    assert record["compile_s"] == proof().compile_s
    assert capsys.readouterr().out.count("compiling a candidate: mesh ") == 2


def test_a_candidate_that_does_not_compile_is_written_with_its_reason(proven, monkeypatch, tmp_path, capsys):
    file, prove = tmp_path / "plan.json", compiled.prove

    def refused(cfg: RunConfig, on: Topology, *, begin) -> compiled.Proof:
        if not proven:
            proven.append(cfg)
            raise compiled.DoesNotCompile("no room in the scratchpad")
        return prove(cfg, on, begin=begin)

    monkeypatch.setattr(compiled, "prove", refused)
    plan(SMALL, Asked(search=True, top=1), file)
    (dropped,) = json.loads(file.read_text(encoding="utf-8"))["search"]["dropped"]
    assert (dropped["fits"], dropped["why"]) == (False, "no room in the scratchpad")
    out = capsys.readouterr().out
    assert "dropped: " in out and ": no room in the scratchpad" in out


@pytest.mark.parametrize("on", ["v5e-8", "cpu-4"])
def test_a_child_of_the_shipped_config_with_the_block_asks_for_the_plan(on, tmp_path):
    shipped, child = SHIPPED / "125m_v5e8.yaml", tmp_path / "child.yaml"
    cfg = config.load(RunConfig, shipped)
    found = search(cfg, topology(on))
    assert found.best.cfg != cfg
    child.write_text(f"base: {shipped}\n{explain.block(found.best, cfg)}", encoding="utf-8")
    assert config.load(RunConfig, child) == found.best.cfg
    assert plan(cfg, Asked(on=on, search=True, proof=False))["yaml"] == explain.block(found.best, cfg)


@pytest.mark.parametrize(
    ("name", "on", "overrides"),
    [
        ("quickstart", "cpu-4", ["model.vocab=4096", "mesh.tensor=2", "accumulate=2", "offload.optimizer=true"]),
        (
            "quickstart",
            "v5p-16",
            ["model.vocab=4096", "remat=[q]", "sharding={preset: zero1, gradients: {embed: tensor}}"],
        ),
        ("llama2_7b_v5e256", "v5e-8", []),  # keeps something on the host
    ],
)
def test_a_block_replaces_those_of_a_config_or_is_laid_over_them(name, on, overrides):
    tree = config.parse(RunConfig, config.read_tree(SHIPPED / f"{name}.yaml"), overrides).model_dump(mode="json")
    cfg = config.parse(RunConfig, tree)
    for found in search(cfg, topology(on)).ranked:
        block = yaml.safe_load(explain.block(found, cfg)) or {}
        assert config.parse(RunConfig, config.merge(tree, block)) == found.cfg
        assert config.parse(RunConfig, tree | block) == found.cfg
        assert config.parse(RunConfig, tree | yaml.safe_load(explain.block(found))) == found.cfg


def test_the_plan_of_a_config_that_asks_for_it_has_nothing_to_paste(capsys):
    cfg = config.load(RunConfig, SHIPPED / "125m_v5e8.yaml")
    best = search(cfg, topology("v5e-8")).best.cfg
    assert plan(best, Asked(search=True, proof=False))["yaml"] == ""
    assert "the config asks for just that plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("remat", "said"),
    [
        ("full", "remat full"),
        (Keep(device=("q", "k")), "remat keeps q k"),
        (Keep(device=("q", "k"), host=("input",)), "remat keeps q k, on the host input"),
        (Keep(host=("input", "v")), "remat keeps on the host input v"),
    ],
)
def test_what_is_kept_is_said_with_its_place(remat, said):
    assert explain.remat_in_words(remat) == said


@pytest.mark.parametrize(("on", "said"), [("h100-8x4", "between hosts"), ("v5e-8x2", "between slices")])
def test_what_is_slow_between_groups_of_chips_has_their_name(on, said):
    cfg = config.load(RunConfig, SHIPPED / "125m_v5e8.yaml")
    found = search(cfg, topology(on), keep=4)
    assert any(change.what == f"twice the network {said}" for change in explain.changes(cfg, found))
    text = explain.explain(cfg, found)
    assert text.count("predicted time:") == 4 and all(explain.limits(p, found.on) in text for p in found.ranked[:4])


def test_a_notebook_gets_the_record(small):
    record = verbs.plan(small, "steps=20", on="v5e-4", proof=False)
    assert record["training"]["tokens"] == 20 * 8 * 16 and record["topology"].startswith("v5e-4")
