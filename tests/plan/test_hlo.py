"""Texts of compiled programs read back: short ones written by hand after what libtpu and XLA write, and real CPU ones."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.config import Mesh
from jaxllm.parallel.sharding import make_mesh
from jaxllm.plan.account import Cost, Layout, account, ring_bytes
from jaxllm.plan.chips import CHIPS
from jaxllm.plan.hlo import Array, flops, parse, replica_groups, trip_count

V5E = CHIPS["v5e"]
AXES = {"data": 2, "tensor": 2}


def layout(axes=AXES, slices=None):
    n = math.prod(axes.values())
    at = np.stack(np.unravel_index(np.arange(n), tuple(axes.values())), axis=1)
    return Layout(tuple(axes), at, np.zeros(n, int) if slices is None else np.array(slices))


def program(entry, *computations, partitions=4):
    """A text with the given lines of its entry and further computations."""
    header = f"HloModule test, is_scheduled=true, num_partitions={partitions}\n\n"
    return parse(header + "\n\n".join(computations) + "\n\nENTRY %main (p: f32[]) -> f32[] {\n" + entry + "\n}\n")


def counted(entry, *computations, partitions=4, axes=AXES, **options):
    return account(program(entry, *computations, partitions=partitions), layout(axes), V5E, **options)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_types_with_tiles_memory_spaces_and_nested_tuples_are_read():
    main = program(
        "  %a = bf16[2,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
        '  ROOT %t.1 = ((f32[3]{0:T(128)}, s4[6]{0}), /*index=2*/pred[], token[]) custom-call(%a), custom_call_target="X"'
    ).computations["main"]
    assert main.by_name["a"].arrays == (Array("bf16", (2, 1024), 1),)
    assert main.by_name["a"].bytes == 4096
    assert main.root.arrays == (Array("f32", (3,)), Array("s4", (6,)), Array("pred", ()), Array("token", ()))
    assert main.root.bytes == 12 + 3 + 1
    assert main.root.operands == ["a"]


def test_an_instruction_over_several_lines_is_one():
    lines = (
        '  %flash.3 = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 512}"\n'
        '}}, metadata={op_name="x"}\n'
        "  ROOT %b = f32[4]{0} copy(%flash.3)"
    )
    main = program("  %a = f32[4]{0} parameter(0)\n" + lines).computations["main"]
    assert [i.op for i in main.instructions] == ["parameter", "custom-call", "copy"]
    assert "block_q" in main.by_name["flash.3"].attributes


# --- products --------------------------------------------------------------------------------------------------------


def test_a_product_costs_two_a_multiplication():
    p = program(
        "  %a = f32[3,5,7]{2,1,0} parameter(0)\n  %b = f32[3,7,11]{2,1,0} parameter(1)\n"
        "  ROOT %d = f32[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    main = p.computations["main"]
    assert flops(main.root, main.operands(main.root)) == 2 * 3 * 5 * 7 * 11


def test_a_product_that_a_library_computes_costs_the_same():
    config = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}'
    for target, said in (("__cublas$lt$matmul", config), ("__onednn$matmul", "")):
        main = program(
            "  %a = bf16[5,7]{1,0} parameter(0)\n  %b = bf16[7,11]{1,0} parameter(1)\n"
            f'  ROOT %d = bf16[5,11]{{1,0}} custom-call(%a, %b), custom_call_target="{target}", backend_config={{{said}}}'
        ).computations["main"]
        assert flops(main.root, main.operands(main.root)) == pytest.approx(2 * 5 * 7 * 11)


@given(
    n=st.integers(1, 9), size=st.integers(1, 5), stride=st.integers(1, 4), low=st.integers(-2, 5), high=st.integers(-2, 5),
    holes=st.integers(1, 4), spread=st.integers(1, 3),
)  # fmt: skip
def test_a_convolution_costs_the_multiplications_that_meet_no_padding(n, size, stride, low, high, holes, spread):
    dilated, reach = (n - 1) * holes + 1, (size - 1) * spread + 1
    out = (dilated + low + high - reach) // stride + 1
    if out < 1:
        return
    met = sum(
        0 <= (at := o * stride + w * spread - low) < dilated and at % holes == 0
        for o, w in itertools.product(range(out), range(size))
    )
    main = program(
        f"  %a = bf16[{n},6,3]{{2,1,0}} parameter(0)\n  %b = bf16[{size},3,5]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = bf16[{out},6,5]{{2,1,0}} convolution(%a, %b), window={{size={size} stride={stride} "
        f"pad={low}_{high} lhs_dilate={holes} rhs_dilate={spread}}}, dim_labels=0bf_0io->0bf"
    ).computations["main"]
    assert flops(main.root, main.operands(main.root)) == 2 * 6 * 3 * 5 * met


def test_a_batched_product_written_as_a_convolution_costs_what_the_product_does():
    """libtpu: a window of the batch's size that steps so far that it meets one element at a time."""
    main = program(
        "  %a = bf16[4,6,3]{2,1,0} parameter(0)\n  %b = bf16[4,3,5]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[4,6,5]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    ).computations["main"]
    assert flops(main.root, main.operands(main.root)) == 2 * 4 * 6 * 3 * 5


# --- loops -----------------------------------------------------------------------------------------------------------

PRODUCT = """%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %t = (s32[]{{:T(128)}}, f32[8,8]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%t), index=0
  %x = f32[8,8]{{1,0}} get-tuple-element(%t), index=1
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} {add}(%i, %step)
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[]{{:T(128)}}, f32[8,8]{{1,0}}) tuple(%next, %y)
}}"""
CONDITION = """%condition (t: (s32[], f32[8,8])) -> pred[] {{
  %t = (s32[]{{:T(128)}}, f32[8,8]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%t), index=0
  %end = s32[]{{:T(128)}} constant({end})
  ROOT %go = pred[]{{:T(512)}} compare(%i, %end), direction={direction}
}}"""
LOOP = """  %x = f32[8,8]{{1,0}} parameter(0)
  %start = s32[]{{:T(128)}} constant({start})
  %copied = s32[]{{:T(128)}} copy(%start)
  %t = (s32[]{{:T(128)}}, f32[8,8]{{1,0}}) tuple(%copied, %x)
  ROOT %loop = (s32[]{{:T(128)}}, f32[8,8]{{1,0}}) while(%t), condition=%condition, body=%body"""


@given(
    start=st.integers(-5, 20),
    end=st.integers(-5, 20),
    step=st.integers(1, 4),
    inclusive=st.booleans(),
    down=st.booleans(),
)
def test_a_loop_runs_as_often_as_its_counter_says(start, end, step, inclusive, down):
    direction = ("G" if down else "L") + ("E" if inclusive else "T")
    p = program(
        LOOP.format(start=start),
        PRODUCT.format(step=step, add="subtract" if down else "add"),
        CONDITION.format(end=end, direction=direction),
    )
    last = end + (inclusive if not down else -inclusive)
    assert trip_count(p, p.computations["main"], p.computations["main"].root) == len(
        range(start, last, -step if down else step)
    )


def test_the_products_of_a_loop_count_as_often_as_it_runs():
    a = counted(LOOP.format(start=2), PRODUCT.format(step=1, add="add"), CONDITION.format(end=7, direction="LT"))
    assert a.flops == 5 * 2 * 8**3
    assert a.loops == {"loop": 5}
    assert not a.notes


def test_a_loop_whose_end_only_the_data_know_is_counted_once_and_noted():
    unknown = CONDITION.format(end=7, direction="LT").replace("constant(7)", "get-tuple-element(%t), index=1")
    a = counted(LOOP.format(start=0), PRODUCT.format(step=1, add="multiply"), unknown)
    assert a.flops == 2 * 8**3
    assert list(a.notes) == ["trip count of loop is not known, counted once"]


BRANCH = """%{name} (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  {line}
}}"""


DOT = "ROOT %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(
    "runs, share", [({}, 1 / 4), ({"choice": (0.1, 0.2, 0.3, 0.4)}, 0.1), ({"choice": (0.5, 0.5)}, 1 / 4)]
)
def test_branches_count_as_often_as_they_are_known_to_be_taken(runs, share):
    one, none = (
        BRANCH.format(name="one", line=DOT),
        BRANCH.format(name="none", line="ROOT %y = f32[8,8]{1,0} bitcast(%x)"),
    )
    entry = (
        "  %i = s32[] parameter(0)\n  %x = f32[8,8]{1,0} parameter(1)\n"
        "  ROOT %c = f32[8,8]{1,0} conditional(%i, %x, %x, %x, %x), branch_computations={%one, %none, %none, %none}, "
        'metadata={op_name="jit(f)/while/body/choice/cond"}'
    )
    found = counted(entry, one, none, runs=runs)
    assert found.flops == pytest.approx(2 * 8**3 * share)
    assert bool(found.notes) == (share == 1 / 4)  # a guess is said to be one


def test_a_branch_that_a_truth_chooses_is_counted_by_its_number():
    one, none = (
        BRANCH.format(name="one", line=DOT),
        BRANCH.format(name="none", line="ROOT %y = f32[8,8]{1,0} bitcast(%x)"),
    )
    entry = (
        "  %i = pred[] parameter(0)\n  %x = f32[8,8]{1,0} parameter(1)\n"
        "  ROOT %c = f32[8,8]{1,0} conditional(%i, %x, %x), true_computation=%one, false_computation=%none, "
        'metadata={op_name="jit(f)/meet/cond"}'
    )
    assert counted(entry, one, none, runs={"meet": (0.75, 0.25)}).flops == 2 * 8**3 / 4


def test_loops_that_no_text_counts_run_as_often_as_their_scope_says():
    """A loop in a loop, each of unknown trips; cycles of a scope are its own, without those of scopes within it."""

    def f(n, m, x):
        def outer(_, x):
            with jax.named_scope("inner"):
                return jax.lax.fori_loop(0, m, lambda _, y: y @ x, x @ x @ x)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, outer, x)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(f).lower(jnp.int32(1), jnp.int32(1), x).compile().as_text()
    one = 2 * 64**3
    found = account(parse(text), layout({"data": 1}), V5E, runs={"outer": 0.5, "inner": 3.0})
    assert found.flops == 0.5 * (2 + 3) * one
    assert found.scopes.keys() == {"outer", "outer.inner"} and not found.notes
    assert found.scopes["outer"] == pytest.approx(2 * found.scopes["outer.inner"], rel=0.5)
    unknown = account(parse(text), layout({"data": 1}), V5E)
    assert unknown.flops == 3 * one and len(unknown.notes) == 2 and not unknown.scopes


# --- who talks to whom -----------------------------------------------------------------------------------------------


def groups_of(written, partitions=8):
    main = program(
        f"  ROOT %a = f32[4]{{0}} all-reduce(), {written}, to_apply=%add", partitions=partitions
    ).computations["main"]
    return sorted(map(sorted, replica_groups(main.root, partitions)))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data(),
)  # fmt: skip
def test_every_spelling_of_the_groups_along_mesh_axes_means_the_same(sizes, data):
    along = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True, min_size=1))
    n, size = math.prod(sizes), math.prod(sizes[d] for d in along)
    rest = [d for d in range(len(sizes)) if d not in along]
    expected = np.arange(n).reshape(sizes).transpose(rest + along).reshape(-1, size)
    written = ",".join("{" + ",".join(map(str, group)) + "}" for group in expected)
    order = ",".join(map(str, rest + along))
    mesh = ",".join(f"'axis_{d}'={k}" for d, k in enumerate(sizes))
    axes = ",".join(f"'axis_{d}'" for d in along)
    for text in (
        f"replica_groups={{{written}}}",
        f"replica_groups=[{n // size},{size}]<=[{','.join(map(str, sizes))}]T({order})",
        f"replica_groups=mesh[{mesh}] {{{axes}}}",
    ):
        assert groups_of(text, n) == sorted(map(sorted, expected.tolist())), text


def test_groups_of_part_of_an_axis_and_of_other_device_orders_are_read():
    assert groups_of("replica_groups=mesh['a'=8] {'a':(2)2}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups_of("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}") == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert groups_of("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", 4) == [[0, 1], [2, 3]]
    assert groups_of("replica_groups={}", 4) == [[0, 1, 2, 3]]
    assert groups_of("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_permutation_spans_the_ring_that_it_turns():
    assert groups_of("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}") == [[0, 1], [2, 3]]
    assert groups_of("source_target_pairs={{0,2},{2,4},{4,6}}") == [[0, 2, 4, 6]]


@pytest.mark.parametrize(
    ("line", "kind", "size", "axes"),
    [
        ("f32[64]{0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 256, ("tensor",)),
        ("f32[32]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add", "all-reduce", 128, ("data",)),
        ("bf16[32]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 64, ("data", "tensor")),
        ("f32[16]{0} reduce-scatter(%x), replica_groups=[2,2]<=[4], dimensions={0}, to_apply=%add", "reduce-scatter", 128, ("tensor",)),
        ("f32[32]{0} all-to-all(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", "all-to-all", 128, ("data",)),
        ("f32[32]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", "collective-permute", 128, ("tensor",)),
    ],
)  # fmt: skip
def test_a_collective_is_counted_whole_and_along_its_axes(line, kind, size, axes):
    a = counted(f"  %x = f32[32]{{0}} parameter(0)\n  ROOT %c = {line}, channel_id=1, use_global_device_ids=true")
    assert a.collective_bytes_by_axes == {(kind, axes): size}
    assert a.overlapped == 0


# --- collectives beside compute --------------------------------------------------------------------------------------

WORK = '  %w.{n} = f32[32]{{0}} copy(%x), backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}\n'


def test_a_start_and_a_done_with_compute_between_them_overlap():
    start = (
        "  %x = f32[32]{0} parameter(0)\n"
        "  %s = (f32[32]{0}, f32[128]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}\n"
    )
    done = "  ROOT %d = f32[128]{0} all-gather-done(%s)"
    a = counted(start + WORK.format(n=1, cycles=700) + WORK.format(n=2, cycles=300) + done)
    (c,) = a.collectives
    assert (c.kind, c.bytes, c.overlapped, c.between, c.count) == ("all-gather", 512, True, 1000, 1)
    assert a.cycles["compiler"] == 1000
    (c,) = counted(start + done).collectives
    assert (c.overlapped, c.between) == (False, 0)
    sync = start.replace(
        "dimensions={0}", 'dimensions={0}, backend_config={"collective_backend_config":{"is_sync":true}}'
    )
    assert counted(sync + WORK.format(n=1, cycles=700) + done).overlapped == 0


PIECE = """  %p = bf16[8]{0} parameter(0)
  %all-gather.NAME = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
"""


def test_libtpu_cuts_one_gather_into_three_fusions_and_it_counts_once():
    first = (
        "%f.1 (p: bf16[8]) -> (bf16[8], bf16[32], u32[]) {\n"
        + PIECE.replace("NAME", "1")
        + (
            '  ROOT %c = (bf16[8]{0}, bf16[32]{0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"\n}'
        )
    )
    step = (
        "%async_collective_fusion.2 (p: bf16[8], x: f32[8,8]) -> (f32[8,8], bf16[32]) {\n"
        + PIECE.replace("NAME", "2")
        + (
            "  %x = f32[8,8]{1,0} parameter(1)\n"
            "  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
            "  ROOT %t = (f32[8,8]{1,0}, bf16[32]{0}) tuple(%y, %all-gather.2)\n}"
        )
    )
    last = (
        "%f.3 (p: bf16[8]) -> bf16[32] {\n"
        + PIECE.replace("NAME", "3")
        + ('  ROOT %c = bf16[32]{0} custom-call(%p, %all-gather.3), custom_call_target="AsyncCollectiveDone"\n}')
    )
    a = counted(
        "  %p = bf16[8]{0} parameter(0)\n  %x = f32[8,8]{1,0} parameter(1)\n"
        "  %async-collective-start = (bf16[8]{0}, bf16[32]{0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%f.1\n"
        "  %y = (f32[8,8]{1,0}, bf16[32]{0}) fusion(%p, %x), kind=kOutput, calls=%async_collective_fusion.2, "
        'backend_config={"window_config":{"estimated_cycles":"900"}}\n'
        "  ROOT %async-collective-done = bf16[32]{0} fusion(%p), kind=kCustom, calls=%f.3",
        first, step, last,
    )  # fmt: skip
    (c,) = a.collectives
    assert (c.kind, c.bytes, c.axes, c.overlapped, c.between) == ("all-gather", 64, ("data", "tensor"), True, 900)
    assert a.flops == 2 * 8**3


def test_libtpus_sum_of_which_each_device_keeps_its_slice_is_a_reduce_scatter():
    scatter = """%all-reduce-scatter (input: bf16[32,8]) -> bf16[16,8] {
  %input = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add, frontend_attributes={from-cross-replica-sharding="true"}
  %partition-id.3 = u32[] partition-id()
  ROOT %dynamic-slice.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.1, %partition-id.3), dynamic_slice_sizes={16,8}
}"""
    a = counted(
        "  %x = bf16[32,8]{1,0} parameter(0)\n"
        "  ROOT %fusion = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        scatter,
    )
    assert a.collective_bytes_by_axes == {("reduce-scatter", ("tensor",)): 512}
    whole = scatter.replace("ROOT %dynamic-slice.1", "%dynamic-slice.1").replace("%all-reduce-scatter", "%fused")
    whole = whole.replace("\n}", "\n  ROOT %y = bf16[32,8]{1,0} add(%all-reduce.1, %all-reduce.1)\n}").replace(
        "-> bf16[16,8]", "-> bf16[32,8]"
    )
    b = counted(
        "  %x = bf16[32,8]{1,0} parameter(0)\n  ROOT %f = bf16[32,8]{1,0} fusion(%x), kind=kLoop, calls=%fused", whole
    )
    assert list(b.collective_bytes) == ["all-reduce"]


def test_collectives_of_one_channel_are_each_counted():
    """Programs of shard_map give all their collectives the channel 1."""
    line = "  %{n} = f32[16]{{0}} reduce-scatter(%x), channel_id=1, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}, to_apply=%add\n"
    a = counted(
        "  %x = f32[32]{0} parameter(0)\n"
        + line.format(n="a")
        + line.format(n="b")
        + "  ROOT %r = f32[16]{0} add(%a, %b)"
    )
    assert a.collective_bytes == {"reduce-scatter": 2 * 128}


def test_another_core_of_the_chip_gathers_while_this_one_computes():
    gather = """%gather (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"estimated_cycles":"5000"}
}, execution_thread="sparsecore\""""
    a = counted(
        "  %p = f32[8]{0} parameter(0)\n  %x = f32[32]{0} parameter(1)\n"
        "  %s = ((f32[8]{0}), f32[32]{0}) call-start(%p), async_execution_thread=\"sparsecore\", to_apply=%gather\n"
        + WORK.format(n=1, cycles=400) + "  ROOT %d = f32[32]{0} call-done(%s)",
        gather,
    )  # fmt: skip
    (c,) = a.collectives
    assert (c.kind, c.bytes, c.overlapped, c.between) == ("all-gather", 128, True, 400)
    assert a.cycles["compiler"] == 400


def test_what_slices_send_each_other_goes_over_the_slow_network():
    send = (
        'channel_id={c}, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="psum.1_0",'
        '_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}\n'
    )
    a = counted(
        "  %x = f32[32]{0} parameter(0)\n  %token = token[] after-all()\n"
        "  %send.1 = (f32[32]{0}, u32[], token[]) send(%x, %token), " + send.format(c=2)
        + "  %recv.1 = (f32[32]{0}, u32[], token[]) recv(%token), " + send.format(c=1) + WORK.format(n=1, cycles=50)
        + "  %sent = token[] send-done(%send.1), channel_id=2\n"
        "  ROOT %received = (f32[32]{0}, token[]) recv-done(%recv.1), channel_id=1",
    )  # fmt: skip
    (c,) = a.collectives
    assert (c.kind, c.bytes, c.axes, c.slices, c.group, c.between) == ("all-reduce", 128, ("data",), 2, 2, 50)


def test_groups_that_reach_into_another_host_are_known():
    p = program(
        "  %x = f32[8]{0} parameter(0)\n  ROOT %c = f32[8]{0} all-reduce(%x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add"
    )
    (c,) = account(p, layout(slices=[0, 0, 1, 1]), V5E).collectives
    assert (c.axes, c.slices) == (("data",), 2)


def test_a_ring_moves_what_a_ring_moves():
    entry = "  %x = f32[32]{{0}} parameter(0)\n  ROOT %c = f32[32]{{0}} {op}(%x), replica_groups={{}}, to_apply=%add"
    (reduce,) = counted(entry.format(op="all-reduce")).collectives
    assert ring_bytes(reduce) == 2 * 128 * 3 / 4
    (swap,) = counted(entry.format(op="all-to-all")).collectives
    assert ring_bytes(swap) == 128 * 3 / 4


# --- cycles, kernels, memory -----------------------------------------------------------------------------------------


def test_a_simulation_is_believed_before_a_cost_model_and_no_guess_is_no_guess():
    both = '"window_config":{"estimated_cycles":"10"},"bundle_analysis_data":{"estimated_cycles":"7"}'
    none = '"window_config":{"estimated_cycles":"9223372036854775807"}'
    entry = "  %x = f32[1024]{{0}} parameter(0)\n  ROOT %y = f32[1024]{{0}} copy(%x), backend_config={{{said}}}"
    assert counted(entry.format(said=both)).cycles == {"bundles": 7}
    assert counted(entry.format(said=none)).cycles == {
        "roofline": pytest.approx(2 * 4096 / V5E.hbm_bandwidth * V5E.clock)
    }


def test_arrays_in_the_scratchpad_are_no_traffic_of_hbm():
    entry = "  %x = f32[1024]{0:T(1024)S(1)} parameter(0)\n  ROOT %y = f32[1024]{0:T(1024)} copy(%x)"
    assert counted(entry).traffic == 4096


def test_a_copy_that_was_started_earlier_moves_bytes_and_takes_no_cycles():
    a = counted(
        "  %x = f32[1024]{0:T(1024)S(5)} parameter(0)\n"
        "  %s = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)S(5)}, u32[]{:S(2)}) copy-start(%x)\n"
        "  ROOT %d = f32[1024]{0:T(1024)} copy-done(%s)"
    )
    assert (a.traffic, a.host_traffic, a.cycles) == (4096, 4096, {})


def test_of_a_slice_read_and_an_update_written_in_place_only_that_part_is_traffic():
    fused = """%f (stack: f32[64,256], i: s32[], x: f32[1,256]) -> f32[64,256] {
  %stack = f32[64,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,256]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,256]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,256}
  %new = f32[1,256]{1,0} add(%old, %x)
  ROOT %u = f32[64,256]{1,0} dynamic-update-slice(%stack, %new, %i, %zero)
}"""
    a = counted(
        "  %stack = f32[64,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %x = f32[1,256]{1,0} parameter(2)\n"
        "  ROOT %y = f32[64,256]{1,0} fusion(%stack, %i, %x), kind=kLoop, calls=%f",
        fused,
    )
    assert a.traffic == 3 * 1024 + 4  # slice and x read, slice written, and the index


def test_a_kernel_is_named_and_costs_what_it_is_said_to_but_no_less_than_its_arrays():
    entry = (
        "  %q = bf16[2,4096]{{1,0}} parameter(0)\n"
        '  ROOT %flash_fwd.12 = bf16[2,4096]{{1,0}} custom-call(%q), custom_call_target="tpu_custom_call"{said}'
    )
    a = counted(entry.format(said=""), kernel_cost=lambda k: Cost(1e6, 1e9))
    (k,) = a.kernels
    assert (k.name, k.operands, k.results, k.cycles, k.bytes) == (
        "flash_fwd", (Array("bf16", (2, 4096)),), (Array("bf16", (2, 4096)),), None, 2 * 2 * 2 * 4096,
    )  # fmt: skip
    assert (a.kernel_flops, a.cycles) == (1e6, {"kernels": 1e9})
    simulated = counted(entry.format(said=', backend_config={"bundle_analysis_data":{"estimated_cycles":"3"}}'))
    assert simulated.kernels[0].cycles == 3
    assert simulated.cycles == {"kernels": pytest.approx(k.bytes / V5E.hbm_bandwidth * V5E.clock)}


def test_a_kernel_beside_which_a_collective_runs_is_counted_all_the_same():
    """libtpu puts both into one fusion when it is asked to overlap them."""
    fused = "%async_collective_fusion.9 (p: bf16[8], q: bf16[2,4096]) -> (bf16[2,4096], bf16[32]) {\n" + PIECE.replace(
        "NAME", "9"
    ) + (
        "  %q = bf16[2,4096]{1,0} parameter(1)\n"
        '  %flash.4 = bf16[2,4096]{1,0} custom-call(%q), custom_call_target="tpu_custom_call"\n'
        "  ROOT %t = (bf16[2,4096]{1,0}, bf16[32]{0}) tuple(%flash.4, %all-gather.9)\n}"
    )  # fmt: skip
    a = counted(
        "  %p = bf16[8]{0} parameter(0)\n  %q = bf16[2,4096]{1,0} parameter(1)\n"
        "  ROOT %y = (bf16[2,4096]{1,0}, bf16[32]{0}) fusion(%p, %q), kind=kCustom, calls=%async_collective_fusion.9",
        fused,
        kernel_cost=lambda k: Cost(5.0, 1e6),
    )
    assert [(k.name, k.count) for k in a.kernels] == [("flash", 1)]
    assert (a.kernel_flops, a.cycles, a.traffic) == (5.0, {"kernels": 1e6}, 2 * 2 * 2 * 4096)


# --- real texts of XLA for CPUs --------------------------------------------------------------------------------------


def compiled(f, *args):
    return parse(jax.jit(f).lower(*args).compile().as_text())


def test_products_in_a_scan_on_shares_are_counted_by_hand():
    mesh = make_mesh(Mesh(data=2, fsdp=1, tensor=2))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "tensor")))

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    p = compiled(f, x, w)
    a = account(p, Layout.of(mesh, p.partitions), CHIPS["cpu"])
    assert a.flops == 5 * 2 * (8 // 2) * 16 * (16 // 2)
    assert {axes for _, axes in a.collective_bytes_by_axes} == {("tensor",)}
    assert a.collective_bytes["all-gather"] == 5 * (8 // 2) * 16 * 4


def test_gradients_of_replicas_and_shares_leave_along_the_axes_they_lie_on():
    mesh = make_mesh(Mesh(data=2, fsdp=2))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def f(w, x):
        return jax.lax.with_sharding_constraint(jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), w_place)

    w_place = NamedSharding(mesh, P("fsdp"))
    p = compiled(f, w, x)
    found = account(p, Layout.of(mesh, p.partitions), CHIPS["cpu"]).collective_bytes_by_axes
    assert found["all-gather", ("fsdp",)] == 64 * 32 * 4
    reduced = sum(
        size for (kind, axes), size in found.items() if kind in ("all-reduce", "reduce-scatter") and "data" in axes
    )
    assert reduced in (64 * 32 * 4, 64 * 32 * 4 / 2)  # the whole gradient, or after it was scattered over fsdp
