"""Predictions are intervals that say what they are; compiled programs are priced by the network they run on."""

import json
import types

import pytest

from jaxllm.core.config import parse
from jaxllm.plan import calibration, predict, search
from jaxllm.plan.account import Account, Collective, Kernel
from jaxllm.plan.hlo import Array
from jaxllm.plan.network import group
from jaxllm.plan.topology import topology
from jaxllm.train.config import RunConfig


def run_config(**changes) -> RunConfig:
    block = {"attention": {"num_heads": 32}, "ffn": {"mlp": 11008}}
    tree = {
        "out": "unused", "steps": 1000, "batch": 64, "data": {"path": "unused"}, "precision": "bfloat16",
        "model": {"vocab": 32000, "embed": 4096, "num_layers": 8, "context": 2048, "block": block},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4}, "remat": "full",
    }  # fmt: skip
    return parse(RunConfig, tree | changes)


ON = topology("v5e-16")
REACHED = calibration.calibration(ON)


def program(**changes) -> Account:
    empty = {
        "flops": 0.0, "kernel_flops": 0.0, "kernel_asked": 0.0, "cycles": {}, "traffic": 0.0, "host_traffic": 0.0,
        "collectives": (), "kernels": (), "loops": {}, "scopes": {}, "notes": {},
    }  # fmt: skip
    return Account(**empty | changes)


def proof(account: Account | None, mesh: dict[str, int] | None = None, **changes) -> types.SimpleNamespace:
    """What a prediction asks of a proof."""
    rows, length = 64, 2048
    flops = 6e9 * rows * length / ON.devices
    return types.SimpleNamespace(
        on=ON, mesh=mesh or {"fsdp": 16}, rows=rows, length=length, model_flops=flops, account=account,
        fits=True, peak_bytes=2**30, **{"bubble": 0.0, "across": None} | changes,
    )  # fmt: skip


# --- intervals -------------------------------------------------------------------------------------------------------


def test_a_prediction_from_formulas_is_an_interval_around_what_is_expected_and_says_so():
    made = predict.predict(run_config(), ON)
    low, high = made.step_ms
    assert 0 < low < made.expected_ms < high
    tokens, mfu = made.tokens_per_s_per_chip, made.mfu
    assert tokens.low == pytest.approx(64 * 2048 / 16 / high * 1e3) and tokens.high == pytest.approx(8192 / low * 1e3)
    assert mfu.high == pytest.approx(tokens.high * made.flops / ON.chip.flops) and mfu.high < 1
    assert str(made).startswith("predicted from formulas") and "products" in made.limit
    record = json.loads(json.dumps(made.record()))
    assert record["predicted"] is True and record["step_ms"] == [low, high] and record["predicted_from"] == "formulas"


def test_a_prediction_falls_back_on_formulas_where_the_program_is_not_known():
    assert predict.predict(run_config(), ON, proof(None)).basis == "formulas"
    verdict = predict.verdict(run_config(), ON, proof(None))
    assert verdict.fits and verdict.peak_bytes == 2**30
    assert verdict.expected_ms == predict.predict(run_config(), ON).expected_ms


# --- compiled programs -----------------------------------------------------------------------------------------------


def test_the_compilers_cycles_are_taken_as_they_are_and_peaks_are_not():
    cycles = 1.5e9  # a second of v5e
    made = predict.of_program(proof(program(cycles={"compiler": cycles})), REACHED)
    assert made.expected_ms == pytest.approx(1e3)
    assert made.step_ms == pytest.approx((1e3 / (1 + REACHED.error), 1e3 * (1 + REACHED.error)))
    assert made.basis == "the compiled program" and "products" in made.limit
    at_peak = predict.of_program(proof(program(cycles={"roofline": cycles})), REACHED)
    assert at_peak.expected_ms == pytest.approx(1e3 / REACHED.products)


def test_attention_kernels_without_cycles_are_priced_by_their_products_and_no_faster_than_memory():
    flops = 1e13
    q = Array("bf16", (32, 2048, 128), 0)
    kernel = Kernel("splash_mha_fwd", (q, q, q), (q,), None, "")
    fast = predict.of_program(proof(program(kernel_asked=flops, kernels=(kernel,))), REACHED)
    assert fast.terms["attention"] == pytest.approx(1e3 * flops / ON.chip.device_flops / REACHED.attention)
    many = predict.of_program(proof(program(kernel_asked=flops, kernels=(kernel._replace(count=1e6),))), REACHED)
    assert many.terms["attention"] == pytest.approx(1e3 * 1e6 * 4 * q.bytes / ON.chip.device_bandwidth)


def test_a_step_takes_at_least_the_time_of_its_memory_traffic():
    traffic = 3 * ON.chip.device_bandwidth
    made = predict.of_program(proof(program(cycles={"compiler": 1.5e8}, traffic=traffic)), REACHED)
    assert made.expected_ms == pytest.approx(3000) and made.limit.startswith("memory bandwidth")


def test_a_pipeline_waits_for_its_bubble():
    busy = predict.of_program(proof(program(cycles={"compiler": 1.5e9})), REACHED)
    made = predict.of_program(proof(program(cycles={"compiler": 1.5e9}), bubble=0.2), REACHED)
    assert made.expected_ms == pytest.approx(busy.expected_ms / 0.8)
    assert made.terms[predict.NAMES["bubble"]] == pytest.approx(0.2 * made.expected_ms)
    assert made.step_ms.high == pytest.approx(busy.step_ms.high / 0.8)


def gather(**changes) -> Collective:
    return Collective("all-gather", 1e9, 16, ("fsdp",), 1, overlapped=False, between=0.0)._replace(**changes)


def test_collectives_that_the_program_overlaps_hide_as_far_as_there_is_work_between():
    each = float(group(ON, {"fsdp": 16}, ("fsdp",)).gather(1e9))
    clock = ON.chip.clock
    shown = predict.of_program(proof(program(cycles={"compiler": clock}, collectives=(gather(count=10.0),))), REACHED)
    apart = predict.of_program(proof(program(cycles={"compiler": clock})), REACHED)
    assert shown.expected_ms - apart.expected_ms == pytest.approx(1e4 * each)
    assert shown.terms["all-gather over fsdp"] == pytest.approx(1e4 * each)
    half = gather(count=10.0, overlapped=True, between=each / 2 * clock)
    hidden = predict.of_program(proof(program(cycles={"compiler": clock}, collectives=(half,))), REACHED)
    assert hidden.step_ms.high == pytest.approx(shown.step_ms.high)
    assert shown.expected_ms - hidden.expected_ms == pytest.approx(REACHED.hidden * 1e4 * each / 2)
    assert shown.step_ms.low - hidden.step_ms.low == pytest.approx(1e4 * each / 2 / (1 + REACHED.error))


@pytest.mark.parametrize(
    "kind, of_gather",
    [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)],
)
def test_an_all_reduce_takes_a_scatter_and_a_gather(kind, of_gather):
    one = predict.seconds(gather(kind=kind), ON, {"fsdp": 16})
    assert one == pytest.approx(of_gather * predict.seconds(gather(), ON, {"fsdp": 16}))


def test_tensor_and_fsdp_collectives_have_their_own_links():
    mesh = {"fsdp": 4, "tensor": 4}
    for axes in (("fsdp",), ("tensor",)):
        on_axis = predict.seconds(gather(axes=axes, group=4), ON, mesh)
        assert on_axis == pytest.approx(1e9 * 3 / 4 / ON.chip.links.link, rel=1e-3)  # 4 x 4 does not close
    swap = predict.seconds(gather(kind="all-to-all", axes=("tensor",), group=4), ON, mesh)
    shift = predict.seconds(gather(kind="collective-permute", axes=("tensor",), group=4), ON, mesh)
    assert swap > shift == pytest.approx(1e9 / ON.chip.links.link, rel=1e-3)


# --- what training costs ---------------------------------------------------------------------------------------------


def test_the_cost_of_training_is_arithmetic_on_the_predicted_speed():
    made = predict.predict(run_config(), ON)
    cost = predict.training_cost(made, 1e12, price_per_chip_hour=1.2, pue=1.1, grid_g_per_kwh=400.0, watts=200.0)
    hours = 1e12 / (64 * 2048) * made.step_ms.high / 1e3 / 3600
    assert cost.hours.high == pytest.approx(hours) and cost.chip_hours.high == pytest.approx(16 * hours)
    assert cost.energy_kwh.high == pytest.approx(16 * hours * 0.2 * 1.1)
    assert cost.co2e_kg.high == pytest.approx(16 * hours * 0.2 * 1.1 * 0.4)
    assert cost.money.high == pytest.approx(16 * hours * 1.2)
    for part in (cost.hours, cost.energy_kwh, cost.co2e_kg, cost.money):
        assert 0 < part.low < part.high
    assert str(cost).startswith("predicted") and json.loads(json.dumps(cost.record()))["predicted"] is True


def test_what_was_not_given_is_not_predicted():
    cost = predict.training_cost(predict.predict(run_config(), ON), 1e12)
    assert cost.co2e_kg is None and cost.money is None and "CO2e" not in str(cost)
    assert cost.energy_kwh.low == pytest.approx(cost.chip_hours.low * ON.chip.watts * 1.1 / 1000)


def test_a_config_is_the_plan_it_asks_for():
    cfg = run_config(
        mesh={"fsdp": 4, "tensor": 4}, sharding={"preset": "zero1", "activations": {"norm_seq": ["context", "tensor"]}},
        accumulate=2, remat=["q", "k", "v"],
    )  # fmt: skip
    plans = search.plans_of(cfg, ON)
    asked = {name: int(getattr(plans, name)[0]) for name in plans.CHOICES}
    expected = {"fsdp": 4, "tensor": 4, "zero": 1, "norm_seq": 1, "accumulate": 2, "data": 1, "pipe": 1}
    assert expected.items() <= asked.items()
    assert plans.policies[0].device == {"q", "k", "v"}
