import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.parallel.config import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble
from jaxllm.parallel.pipeline import (
    IDLE,
    B,
    Cell,
    F,
    Instructions,
    Table,
    W,
    bubble,
    forward_only,
    in_flight,
    instructions,
    slice_lengths,
    table,
)

SCHEDULES = {
    "gpipe": GPipe(),
    "slices": GPipe(slices=3),
    "1f1b": OneForwardOneBackward(),
    "interleaved": Interleaved(chunks=2),
    "interleaved-3": Interleaved(chunks=3),
    "zb_h1": ZeroBubble(),
}
SIZES = st.tuples(st.integers(2, 8), st.integers(0, 12))  # devices, microbatches beyond as many


def run_by_name(table: Table, program: Instructions) -> None:
    """Runs the instructions with names in place of arrays: nothing is missing, late, overwritten or done twice."""
    last, p = table.stages - 1, table.devices
    done: set[tuple[int, int, int]] = set()
    buffers: list[dict] = [{} for _ in range(p)]
    arriving: dict = {}  # (kind, device) -> what
    for tick, row in enumerate(program.cells):
        made = {}
        for d in range(p):
            cell, buffer = Cell(*map(int, row[d])), buffers[d]
            for kind, slot in (("input", cell.arriving), ("gradient", cell.arriving_gradient)):
                value = arriving.get((kind, d))
                assert (slot >= 0) == (value is not None), f"tick {tick}, device {d}: {kind} {value} into {slot}"
                if slot >= 0:
                    assert slot < program.slots.input if kind == "input" else program.slots.gradient
                    buffer[kind, slot] = value
            unit, stage = cell.unit, cell.stage
            if cell.op == IDLE:
                continue
            assert stage == cell.chunk * p + d
            assert (cell.op, unit, stage) not in done
            if cell.op == F:
                assert stage == 0 or buffer["input", cell.input] == (F, unit, stage - 1)
                if cell.kept >= 0:
                    buffer["kept", cell.kept] = (unit, stage)
                if stage < last:
                    made[d] = "input", (d + 1) % p, (F, unit, stage)
            elif cell.op == B:
                assert (F, unit, stage) in done
                assert stage == last or buffer["gradient", cell.gradient] == (B, unit, stage + 1)
                if program.recompute:
                    assert stage == 0 or buffer["input", cell.input] == (F, unit, stage - 1)
                    buffer["kept", cell.kept] = (unit, stage)
                assert buffer["kept", cell.kept] == (unit, stage)
                buffer["waiting", cell.waiting] = (unit, stage)
                if stage > 0:
                    made[d] = "gradient", (d - 1) % p, (B, unit, stage)
            else:
                assert buffer["waiting", cell.waiting] == (unit, stage)
            assert cell.kept < program.slots.kept and cell.waiting < program.slots.waiting
            place = unit % table.slices
            if place and cell.op == F:
                assert (F, unit - 1, stage) in done, "a slice of tokens looks at those before it"
            if cell.op == B and place < table.slices - 1:
                assert (B, unit + 1, stage) in done, "a slice of tokens is looked at by those after it"
            done.add((cell.op, unit, stage))
        arriving = {}
        for source, target in itertools.chain(*program.routes[program.route[tick]]):
            if source in made:  # else an idle device sends nothing in particular
                kind, to, value = made.pop(source)
                assert to == target
                arriving[kind, target] = value
        assert not made, f"tick {tick}: not sent: {made}"
    kinds = {op for op in (F, B, W) if op in table.op}
    assert done == set(itertools.product(kinds, range(table.units), range(table.stages)))


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("name", SCHEDULES)
@given(SIZES)
def test_every_stage_does_every_unit_once_from_what_it_was_sent(name, recompute, sizes):
    made = table(SCHEDULES[name], sizes[0], sum(sizes))
    run_by_name(made, instructions(made, recompute))


@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 3))
def test_evaluation_passes_every_stage_once_too(devices, microbatches, chunks):
    made = forward_only(devices, microbatches, chunks)
    run_by_name(made, instructions(made))
    rounds = microbatches * chunks if microbatches >= devices else (chunks - 1) * devices + microbatches
    assert len(made.op) == rounds + devices - 1


@pytest.mark.parametrize("again", [0.0, 1.0])
@given(SIZES)
def test_bubbles_are_those_of_the_papers_whatever_the_passes_cost(again, sizes):
    p, m = sizes[0], sum(sizes)
    for schedule, share in {
        GPipe(): (p - 1) / (m + p - 1),
        GPipe(slices=3): (p - 1) / (3 * m + p - 1),
        OneForwardOneBackward(): (p - 1) / (m + p - 1),
        Interleaved(chunks=2): (p - 1) / (2 * m + p - 1),
        Interleaved(chunks=3): (p - 1) / (3 * m + p - 1),
    }.items():
        made = table(schedule, p, m)
        assert np.mean(made.op == IDLE) == pytest.approx(share)  # counted in ticks
        assert bubble(made, again=again) == pytest.approx(share)  # and in time


@given(SIZES)
def test_zero_bubble_idles_p_minus_1_passes_of_one_kind(sizes):
    p, m = sizes[0], sum(sizes)
    made = table(ZeroBubble(), p, m)
    assert len(made.op) == 3 * m + p - 1  # Qi et al. 2023, table 1: (p - 1) (F + B - W) idle
    assert bubble(made) == pytest.approx((p - 1) / (3 * m + p - 1))
    for again in (0.0, 1.0):
        assert bubble(made, again=again) < bubble(table(OneForwardOneBackward(), p, m), again=again)


@given(SIZES)
def test_what_is_in_flight_is_bounded_by_the_devices_not_by_the_microbatches(sizes):
    p, m = sizes[0], sum(sizes)
    one, zero = table(OneForwardOneBackward(), p, m), table(ZeroBubble(), p, m)
    assert [in_flight(one, d) for d in range(p)] == [p - d for d in range(p)]
    assert [in_flight(zero, d) for d in range(p)] == [p - d for d in range(p)]
    assert max(in_flight(zero, d, W) for d in range(p)) == p
    assert instructions(one).slots.input == p - 1  # the first stage starts from tokens
    assert instructions(zero).slots.waiting == p
    assert in_flight(table(GPipe(), p, m), 0) == m == instructions(table(GPipe(), p, m)).slots.input


def test_interleaving_has_in_flight_what_megatron_has():
    made = table(Interleaved(chunks=3), 4, 8)
    warmup = [(4 - d - 1) * 2 + (3 - 1) * 4 + 1 for d in range(4)]  # Megatron-LM, forward passes before the first B
    assert [in_flight(made, d) for d in range(4)] == warmup


def test_messages_take_few_routes():
    for schedule in SCHEDULES.values():
        few = 24 if schedule == ZeroBubble() else 4
        assert len(instructions(table(schedule, 8, 32)).routes) <= few


@pytest.mark.parametrize("seed", range(20))
def test_slice_lengths_are_the_best_there_are(seed):
    r = random.Random(seed)
    length, stages = r.randint(1, 8), r.randint(1, 6)
    a, b, c = r.random(), r.random(), r.random()

    def cost(tokens, before):
        return a + b * tokens + c * tokens * (before + tokens / 2)

    def time(lengths):
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        each = [cost(n, start) for n, start in zip(lengths, starts)]
        return sum(each) + (stages - 1) * max(each)

    ways = [
        np.diff([0, *ends, length]).tolist()
        for n in range(length)
        for ends in itertools.combinations(range(1, length), n)
    ]
    found = slice_lengths(length, stages, cost)
    assert sum(found) == length
    assert time(found) == pytest.approx(min(map(time, ways)))


def test_slices_get_shorter_along_a_row_and_keep_to_the_step():
    lengths = slice_lengths(2048, 8, lambda n, before: 100 + n + n * (before + n / 2) / 500, step=128)
    assert all(n % 128 == 0 for n in lengths) and sum(lengths) == 2048
    assert lengths[0] > lengths[-1]  # later tokens look at more (TeraPipe, figure 4)
