"""The search against brute force, its plans as configs, and what it says about them."""

import functools
import itertools
import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.config import merge, parse
from jaxllm.core.errors import UserError
from jaxllm.parallel.config import Offload
from jaxllm.plan import calibration, explain, search, stages
from jaxllm.plan.analytic import Calibration, Plans, estimate, memory
from jaxllm.plan.topology import topology
from jaxllm.train.config import RunConfig

REACHED = Calibration(products=0.8, attention=0.45, hidden=0.8, hidden_blocking=0.5)


def run_config(rows: int, length: int = 2048, vocab: int = 32000, embed: int = 4096, layers: int = 32, **changes):
    block = {"attention": {"num_heads": 32, "num_kv_heads": 8}, "ffn": {"mlp": 11008}}
    model = {"vocab": vocab, "embed": embed, "num_layers": layers, "context": length, "block": block}
    tree = {
        "out": "unused", "steps": 1000, "batch": rows, "data": {"path": "unused"}, "model": model,
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4}, "precision": "bfloat16",
    }  # fmt: skip
    return parse(RunConfig, merge(tree, changes))


ODD = {"block": {"attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 64}, "ffn": {"mlp": 7}}}


def small() -> RunConfig:
    """A space small enough to go through it by hand, in which memory is scarce."""
    return run_config(16, layers=4, length=1024)


# --- the optimum -----------------------------------------------------------------------------------------------------


@functools.cache
def by_hand(cfg: RunConfig, on) -> tuple[Plans, np.ndarray]:
    """Every plan the rules allow and its score, infinite where it does not fit; nothing shared with the search's own
    enumeration."""
    job, choices = search.job_of(cfg), search.remats()
    s, n, powers = job.sizes, on.devices, (1, 2, 4, 8, 16)
    rows = []
    for data, pipe, fsdp, context, tensor in itertools.product(powers, repeat=5):
        if data * pipe * fsdp * context * tensor != n or s.heads % tensor or s.kv_heads % tensor or s.mlp % tensor:
            continue
        if s.groups % pipe or s.length % (2 * context) or job.rows % (data * fsdp):
            continue
        schedules, both = ((0, 1), (1, 1), (2, 2), (2, 4), (3, 1)), (0, 1)
        for zero, norm_seq, ulysses, schedule, micro, recompute in itertools.product(
            range(4), both, both, schedules, powers, both
        ):
            wrong = (
                (fsdp * context == 1 and zero != 3) or (norm_seq and tensor == 1) or (ulysses and context == 1)
                or (ulysses and s.heads % (context * tensor)) or (pipe == 1 and schedule != (1, 1))
                or s.groups % (pipe * schedule[1]) or (pipe > 1 and micro < pipe) or (pipe == 1 and recompute)
                or (job.rows // (data * fsdp)) % micro
            )  # fmt: skip
            if not wrong:
                rows.append((data, pipe, fsdp, context, tensor, zero, norm_seq, ulysses, *schedule, micro, recompute))
    policies = len(choices.policies)
    columns = [*np.repeat(np.array(rows), 2 * policies, 0).T, *np.indices((len(rows), policies, 2)).reshape(3, -1)[1:]]
    plans = Plans(**dict(zip(Plans.CHOICES, columns)), policies=choices.policies)
    host = np.array([bool(policy.host) for policy in choices.policies])[plans.remat]
    plans = plans.take((plans.pipe == 1) | ~(host | (plans.offload > 0)))
    score = search.scores(job, on, plans, REACHED)
    fits = memory(job, plans).peak <= search.HEADROOM * on.chip.device_hbm
    return plans, np.where(fits, score, np.inf)


def test_the_search_finds_the_optimum_of_the_whole_space():
    cfg, on = small(), topology("v5e-8")
    plans, score = by_hand(cfg, on)
    found = search.search(cfg, on, reached=REACHED)
    assert found.exact and found.seen == len(plans) > found.estimated
    assert np.isinf(score).any()  # memory is scarce
    best = found.best
    assert search.scores(found.job, on, best.plans, REACHED)[0] == pytest.approx(score.min(), rel=1e-12)
    order = [search.scores(found.job, on, plan.plans, REACHED)[0] for plan in found.ranked]
    mesh = list(zip(*(getattr(plans, axis).tolist() for axis in search.AXES)))
    least: dict = {}
    for m, value in zip(mesh, score.tolist()):
        least[m] = min(value, least.get(m, math.inf))
    assert order == pytest.approx(sorted(least.values())[: len(order)], rel=1e-12)  # of every mesh its own best


def test_annealing_finds_it_too():
    cfg, on = small(), topology("v5e-4")
    least = by_hand(cfg, on)[1].min()
    plan = search.anneal(search.job_of(cfg), on, search.remats(), REACHED, steps=100, chains=32)
    assert search.scores(search.job_of(cfg), on, plan, REACHED)[0] == pytest.approx(least, rel=1e-12)


def test_a_space_beyond_the_limit_is_annealed_and_said_to_be(monkeypatch):
    monkeypatch.setattr(search, "LIMIT", 100)
    monkeypatch.setattr(search, "anneal", functools.partial(search.anneal, steps=3, chains=2))
    found = search.search(small(), topology("v5e-4"), reached=REACHED)
    assert not found.exact and len(found.ranked) == 1
    assert found.best.peak <= search.HEADROOM * found.on.chip.device_hbm


def test_an_annealed_plan_that_does_not_fit_is_not_ranked(monkeypatch):
    cfg, on = small(), topology("v5e-4")
    plans, score = by_hand(cfg, on)
    monkeypatch.setattr(search, "LIMIT", 100)
    monkeypatch.setattr(search, "anneal", lambda *_: plans.take(np.flatnonzero(np.isinf(score))[:1]))
    with pytest.raises(UserError, match="no plan for v5e-4 that annealing tried fits"):
        search.search(cfg, on, reached=REACHED)


def test_annealing_stays_with_the_meshes_it_is_given():
    cfg, on = small(), topology("v5e-4")
    mesh = {"data": 1, "pipe": 1, "fsdp": 2, "context": 1, "tensor": 2}
    plan = search.anneal(search.job_of(cfg), on, search.remats(), REACHED, [mesh], steps=3, chains=2)
    assert {axis: getattr(plan, axis)[0] for axis in search.AXES} == mesh


# --- plans as configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on, layers, changes", [
    ("v5e-8", 4, {}), ("h100-8x2", 4, {}), ("v6e-8x2", 4, {}),
    ("v5e-16", 8, {"offload": {"parameters": True}}),
    ("v5e-16", 8, {"offload": {"parameters": True}, "precision": "float32"}),
    ("v5e-8", 4, {"pipeline": {"schedule": {"kind": "gpipe", "slices": 4}}, "context": "ulysses"}),
    ("v5e-16", 8, {"batch": 256, "ramp": {"start": 16, "increment": 16, "steps": 100}}),
])  # fmt: skip
def test_every_ranked_plan_is_a_config_that_asks_for_just_that_plan(on, layers, changes):
    cfg, on = run_config(16, layers=layers, length=1024, **changes), topology(on)
    found = search.search(cfg, on, reached=REACHED)
    for plan in found.ranked:
        same_plan(search.plans_of(plan.cfg, on), plan.plans)
        assert plan.cfg.model == cfg.model and plan.cfg.batch == cfg.batch and plan.cfg.topology == on.name
        assert plan.cfg.offload.parameters == cfg.offload.parameters and plan.cfg.ramp == cfg.ramp
        assert search.job_of(plan.cfg) == found.job
        assert plan.peak <= on.chip.device_hbm


def same_plan(a: Plans, b: Plans) -> None:
    for name in Plans.CHOICES:
        if name != "remat":
            assert getattr(a, name)[0] == getattr(b, name)[0], name
    assert a.policies[a.remat[0]] == b.policies[b.remat[0]] and a.slices == b.slices


def test_weights_that_wait_on_the_host_keep_every_plan_from_pipelines_and_have_copies_on_the_device():
    on, one = topology("v5e-16"), Plans.one(fsdp=16)
    for precision, there in (("bfloat16", 4), ("float32", 0)):
        cfg = run_config(64, layers=8, precision=precision)
        here, away = search.job_of(cfg), search.job_of(cfg.model_copy(update={"offload": Offload(parameters=True)}))
        assert any(mesh["pipe"] > 1 for mesh in search.meshes(here, on))
        assert all(mesh["pipe"] == 1 for mesh in search.meshes(away, on))
        freed = (memory(here, one).peak - memory(away, one).peak)[0]
        assert freed == pytest.approx(there * here.sizes.parameters / 16)


@pytest.mark.parametrize("recompute", [0, 1])
def test_a_plan_is_not_cut_into_the_slices_of_the_config(recompute):
    cfg, on, choices = (
        run_config(64, pipeline={"schedule": {"kind": "gpipe", "slices": 4}}),
        topology("v5p-32"),
        search.remats(),
    )
    job = search.job_of(cfg)
    plans = search.of_mesh(job, on, {"data": 1, "pipe": 4, "fsdp": 4, "context": 1, "tensor": 1}, choices)
    one = plans.take((plans.schedule == 0) & (plans.recompute == recompute)).take(np.array([0]))
    made = search.configured(cfg, job, on, one, choices, REACHED)
    same_plan(search.plans_of(made.cfg, on), one)
    assert parse(RunConfig, merge(cfg.model_dump(mode="json"), yaml.safe_load(explain.block(made, cfg)))) == made.cfg


def test_every_batch_of_a_ramp_divides_over_every_mesh_and_its_microbatches():
    on, ramp = topology("v5e-16"), {"start": 16, "increment": 24, "steps": 100}
    found = search.search(run_config(256, layers=8, ramp=ramp), on, reached=REACHED)
    assert found.job.unit == 8
    for plan in found.ranked:
        shares = plan.mesh["data"] * plan.mesh["fsdp"] * plan.cfg.accumulate
        assert all(rows % shares == 0 for rows in (16, 40, 64, 256))
    with pytest.raises(UserError, match="256 rows, with those of the ramp multiples of 8, of 1021 tokens"):
        search.search(run_config(256, length=1021, layers=7, ramp=ramp, model=ODD), on, reached=REACHED)


def test_every_choice_survives_the_way_through_a_config():
    cfg, on, choices = run_config(64), topology("v5p-32"), search.remats()
    job = search.job_of(cfg)
    ring = {"data": 2, "pipe": 1, "fsdp": 2, "context": 2, "tensor": 2}
    pipe = {"data": 1, "pipe": 4, "fsdp": 4, "context": 1, "tensor": 1}
    for mesh in (ring, pipe):
        plans = search.of_mesh(job, on, mesh, choices)
        for i in range(0, len(plans), len(plans) // 12):
            one = plans.take(np.array([i]))
            made = search.configured(cfg, job, on, one, choices, REACHED)
            if made is None:
                continue  # refused by the config
            asked = search.plans_of(made.cfg, on)
            assert estimate(job, on, asked, REACHED).time.expected == pytest.approx(made.estimate.time.expected)
            assert memory(job, asked).peak == pytest.approx(made.estimate.memory.peak)


def test_the_yaml_block_makes_the_same_config():
    cfg, on = small(), topology("v6e-8x2")
    for plan in search.search(cfg, on, reached=REACHED).ranked[:4]:
        text = explain.block(plan)
        assert "mesh:" in text
        again = parse(RunConfig, merge(cfg.model_dump(mode="json", exclude={"sharding"}), yaml.safe_load(text)))
        assert again == plan.cfg


@pytest.mark.parametrize(
    "name, says",
    [
        ("nothing fits", r"nothing fits v5e-4: the smallest plan is predicted to take [\d.]+ GiB.*about \d+ chips"),
        ("no mesh", r"no mesh of 4 devices divides this run: 7 rows"),
    ],
)
def test_what_cannot_be_planned_says_why(name, says):
    cfg = run_config(4, layers=128) if name == "nothing fits" else run_config(7, length=1021, layers=7, model=ODD)
    with pytest.raises(UserError, match=says):
        search.search(cfg, topology("v5e-4"), reached=REACHED)


# --- compiled plans --------------------------------------------------------------------------------------------------


def test_plans_that_do_not_fit_when_compiled_make_place_and_the_rest_is_ranked_anew():
    cfg, on = small(), topology("v5e-8")
    free = search.search(cfg, on, reached=REACHED)
    slow, full = (plan.mesh for plan in free.ranked[:2])  # the best turns out to be slow, the second to take too much
    off = 1.05 * on.chip.device_hbm / free.ranked[1].peak
    seen = []

    def verify(plan: RunConfig):
        mesh = {axis: getattr(plan.mesh, axis) for axis in search.AXES}
        seen.append(mesh)
        peak = float(memory(search.job_of(plan), search.plans_of(plan, on)).peak[0]) * (off if mesh == full else 1)
        return search.Verdict(peak <= on.chip.device_hbm, peak, 1e4 if mesh == slow else 1.0)

    found = search.search(cfg, on, reached=REACHED, verify=verify, k=3)
    assert len(found.ranked) == 3 and all(plan.verdict.fits for plan in found.ranked)
    assert found.ranked[-1].mesh == slow
    assert [plan.mesh for plan in found.dropped] == [full] and not found.dropped[0].verdict.fits
    assert seen.count(full) == 2 and full in [plan.mesh for plan in found.ranked]  # in its place, one that takes less
    gains = explain.changes(cfg, found, REACHED)
    assert gains and all(change.plan.mesh != full for change in gains)
    with pytest.raises(UserError, match="no plan of .* that were compiled fits v5e-8: the smallest takes"):
        never = search.Verdict(False, 2.0**40, 1.0)
        search.search(cfg, on, reached=REACHED, verify=lambda plan: never)


def test_a_smaller_plan_that_the_config_refuses_makes_place_for_the_next(monkeypatch):
    cfg, on = small(), topology("v5e-8")
    found, made = search.search(cfg, on, reached=REACHED), search.configured
    asked = found, cfg, found.best, 1.1, search.remats(), REACHED
    first = search._smaller(*asked)
    refused = search._parts(first.plans)

    def configured(cfg, job, on, plans, choices, reached):
        return None if search._parts(plans) == refused else made(cfg, job, on, plans, choices, reached)

    monkeypatch.setattr(search, "configured", configured)
    second = search._smaller(*asked)
    assert second.mesh == first.mesh and second.peak < found.best.peak and search._parts(second.plans) != refused


# --- beside published plans ------------------------------------------------------------------------------------------

# MaxText's public scripts of Llama on v5p and v6e: rows of published.yaml (and one script without a published speed).
LLAMA = (
    "llama2-70b v5p-1024", "llama3-405b v5p-1024", "llama2-70b v6e-256", "llama3-8b v6e-8", "llama3-8b v6e-256",
    "llama3-70b v6e-64", "llama3-70b v6e-256", "llama3-405b 2x v6e-256",
)  # fmt: skip


@pytest.mark.parametrize("name", LLAMA)
def test_the_plan_found_is_predicted_at_least_as_fast_as_maxtexts_own_and_fits(name):
    row = next(row for row in calibration.published() if row.name == name)
    s, reached = row.job.sizes, calibration.calibration(row.on)
    heads, kv = s.heads, s.kv_heads
    block = {"attention": {"num_heads": heads, "num_kv_heads": kv}, "ffn": {"mlp": s.mlp}}
    cfg = run_config(row.job.rows, s.length, s.vocab, s.embed, s.layers, model={"block": block})
    found = search.search(cfg, row.on)
    assert search.job_of(cfg).sizes == s
    theirs = float(estimate(found.job, row.on, row.plans, reached).time.expected[0])
    assert found.exact and found.best.expected <= theirs
    assert found.best.peak <= search.HEADROOM * row.on.chip.device_hbm


# --- explanations ----------------------------------------------------------------------------------------------------


def test_an_explanation_names_the_limit_the_loser_and_the_change_and_says_predicted():
    cfg, on = small(), topology("v5e-8")
    found = search.search(cfg, on, reached=REACHED)
    text = explain.explain(cfg, found, REACHED)
    assert text.count("predicted") >= 5 and explain.summary(found.best) in text and "mesh:" in text
    best, other = found.ranked[:2]
    gap = 1e3 * (other.expected - best.expected)
    assert f"{gap:+,.0f} ms predicted" in explain.lost(other, best)
    assert math.fsum(explain.memory_parts(best.estimate.memory).values()) == pytest.approx(best.peak / 2**30)


def test_a_better_chip_never_hurts_and_the_binding_resource_helps_most():
    cfg = run_config(64, layers=24)  # state and rows nearly fill the chips: more memory must help most
    on = topology("v5e-8")
    found = search.search(cfg, on, reached=REACHED)
    made = explain.changes(cfg, found, REACHED)
    gains = {change.what: change.gain for change in made}
    assert all(gain >= -10 * search.EXTRA for what, gain in gains.items() if "rows" not in what)
    assert [c.gain for c in made] == sorted(gains.values(), reverse=True)
    assert made[0].what == "twice the memory of a chip" and made[0].gain > 0.03


def test_a_change_that_touches_nothing_gains_nothing_whatever_was_compiled():
    """What a change brings is told by the formulas alone, with it and without it: not beside another mesh."""
    cfg, on = small(), topology("v5p-8")

    def verify(plan: RunConfig):
        return search.Verdict(True, 1.0, 1.0 if plan.mesh == last else 1e4)

    last = search.search(cfg, on, reached=REACHED).ranked[2].cfg.mesh
    found = search.search(cfg, on, reached=REACHED, verify=verify, k=3)
    assert found.best.cfg.mesh == last and not found.best.cfg.offload.optimizer
    gains = {change.what: change.gain for change in explain.changes(cfg, found, REACHED)}
    assert gains["twice the link to the host"] == 0 < gains["twice the memory bandwidth"]


@pytest.mark.parametrize("rows, start, increment", [(32, 16, 24), (96, 48, 72)])
def test_more_rows_of_a_ramp_are_tried_on_meshes_that_divide_all_of_its_batches(rows, start, increment):
    on = topology("v5e-16")
    cfg = run_config(rows, layers=8, ramp={"start": start, "increment": increment, "steps": 100})
    for change in explain.changes(cfg, search.search(cfg, on, reached=REACHED), REACHED):
        search.plans_of(change.plan.cfg, on)  # takes what training takes


# --- stages ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_balanced_stages_are_those_of_brute_force(costs, n):
    if len(costs) < n:
        return
    costs = [float(c) for c in costs]

    def slowest(cuts):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))

    best = min(map(slowest, itertools.combinations(range(1, len(costs)), n - 1)))
    sizes = stages.balanced(costs, n)
    assert len(sizes) == n and sum(sizes) == len(costs) and min(sizes) >= 1
    assert slowest(list(itertools.accumulate(sizes))[:-1]) == best


def brute_force(layers: int, devices: int, microbatches: int, seconds) -> float:
    """Least latency over all cuts and all shares of the devices."""
    least = math.inf
    for n in range(1, min(layers, devices) + 1):
        for cuts in itertools.combinations(range(1, layers), n - 1):
            spans = list(itertools.pairwise((0, *cuts, layers)))
            for shares in itertools.product(range(1, devices + 1), repeat=n):
                if sum(shares) == devices:
                    times = [seconds(a, b, d) for (a, b), d in zip(spans, shares)]
                    least = min(least, stages.latency(times, microbatches))
    return least


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1),
    st.integers(1, 12),
)  # fmt: skip
def test_stages_and_their_devices_are_those_of_brute_force(costs, devices, microbatches, serial, room):
    def seconds(first: int, last: int, n: int) -> float:
        work = float(sum(costs[first:last]))
        return math.inf if work > room * n else work * (serial + (1 - serial) / n)

    found = stages.cut(len(costs), devices, microbatches, seconds)
    best = brute_force(len(costs), devices, microbatches, seconds)
    assert found.latency == pytest.approx(best) or math.isinf(best) and math.isinf(found.latency)
    if found.stages:
        assert sum(s.devices for s in found.stages) == devices
        assert [s.first for s in found.stages] == [0, *(s.last for s in found.stages[:-1])]
        assert found.latency == pytest.approx(stages.latency([seconds(*s) for s in found.stages], microbatches))
