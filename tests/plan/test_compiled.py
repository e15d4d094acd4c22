"""Proofs of small models: on four CPU devices, and with the real TPU compiler where it is installed."""

import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.core import config
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.models.config import Attention
from jaxllm.models.count import flops_per_token, parameters, parts
from jaxllm.models.masks import Coords
from jaxllm.parallel import flags
from jaxllm.plan import compiled
from jaxllm.plan.account import Kernel
from jaxllm.plan.chips import CHIPS, GIB
from jaxllm.plan.compiled import _asked, _text, attention_flops, kernel_cost, prove, visible_blocks
from jaxllm.plan.hlo import Array
from jaxllm.plan.topology import devices, topology
from tests.train.test_step import ADAMW, LENGTH, ROWS, run_config

FLOAT = 4  # bytes


@functools.cache
def proof(*overrides, on="cpu-4"):
    return prove(run_config(ADAMW, *overrides), topology(on))


# --- on CPU ----------------------------------------------------------------------------------------------------------


def test_bytes_of_the_state_are_those_of_its_shares():
    p, count = proof("mesh.fsdp=4"), parameters(run_config().model)
    assert p.parameter_bytes == count * FLOAT / 4
    assert 0 < p.optimizer_bytes - 2 * p.parameter_bytes < 32  # two moments, and counters
    assert p.batch_bytes == ROWS / 4 * (LENGTH * 5 + 1) * FLOAT
    assert p.argument_bytes == pytest.approx(p.parameter_bytes + p.optimizer_bytes + p.batch_bytes, abs=32)
    assert p.fits and p.why == "" and p.headroom == p.hbm_bytes - p.peak_bytes > 0
    assert p.peak_bytes >= p.argument_bytes + p.temporary_bytes > 0


def test_without_recomputation_the_program_multiplies_what_the_model_asks_for():
    """XLA's attention on CPU computes every pair of tokens, as PaLM counts them."""
    p, model = proof("mesh.fsdp=4"), run_config().model
    assert p.model_flops_square == flops_per_token(model, LENGTH, causal=False).train * ROWS * LENGTH / 4
    assert p.model_flops == flops_per_token(model, LENGTH).train * ROWS * LENGTH / 4
    assert p.hardware_flops == pytest.approx(p.model_flops_square, rel=1e-6)
    assert p.ratio == pytest.approx(p.hardware_flops / p.model_flops)


def test_full_recomputation_adds_a_forward_pass_of_the_layers():
    p, model = proof("mesh.fsdp=2", "mesh.tensor=2", "remat=full"), run_config().model
    forward = flops_per_token(model, LENGTH, causal=False).forward * ROWS * LENGTH / 4
    head = 2 * model.embed * model.vocab * ROWS * LENGTH / 4
    extra = p.hardware_flops - p.model_flops_square
    assert 0.7 * (forward - head) < extra <= forward - head  # what nothing needs is not made again


def test_what_is_kept_costs_memory_and_spares_products():
    """From the policy that keeps nothing to that which keeps everything."""
    policies = [
        proof("mesh.fsdp=4", f"remat={r}") for r in ("full", "save_attention", "[q, k, v, attention, residual]", "none")
    ]
    kept, flops = [p.temporary_bytes for p in policies], [p.hardware_flops for p in policies]
    assert kept == sorted(kept) and kept[0] < 0.8 * kept[-1]
    assert flops == sorted(flops, reverse=True) and flops[0] > 1.1 * flops[-1]


def test_an_optimizer_on_the_host_multiplies_nothing_more_and_leaves_no_loop_uncounted():
    plain, away = proof("mesh.fsdp=4"), proof("mesh.fsdp=4", "offload.optimizer=true")
    assert away.notes == () and away.hardware_flops == pytest.approx(plain.hardware_flops, rel=1e-6)
    assert away.host_bytes == pytest.approx(plain.optimizer_bytes, rel=0.01)


def test_shared_out_parameters_are_gathered_twice_and_their_gradients_scattered_once():
    p, counted = proof("mesh.fsdp=4"), parts(run_config().model)
    layers = sum(n for name, n in counted.items() if name.startswith("layers"))
    gathered = p.account.collective_bytes_by_axes["all-gather", ("fsdp",)]
    assert gathered == pytest.approx((2 * layers + counted["head"]) * FLOAT, rel=0.02)  # and token ids for the table
    scattered = p.account.collective_bytes_by_axes["reduce-scatter", ("fsdp",)]
    assert scattered == pytest.approx((layers + counted["head"]) * FLOAT, rel=0.02)


def test_replicas_reduce_gradients_over_data_and_shares_of_a_layer_over_tensor():
    p = proof("mesh.data=2", "mesh.tensor=2")
    found = p.account.collective_bytes_by_axes
    assert {axes for _, axes in found} == {("data",), ("tensor",)}
    assert found["all-reduce", ("data",)] == pytest.approx(p.parameter_bytes, rel=0.01)
    assert p.account.overlapped == 0  # XLA for CPUs exchanges while nothing computes


def test_longer_rows_are_more_of_everything_but_the_state():
    short, cfg = proof("mesh.fsdp=4"), run_config(ADAMW, "mesh.fsdp=4", "model.context=32")
    long = prove(cfg, topology("cpu-4"), rows_length=24)
    assert (long.length, long.tokens) == (24, ROWS * 24 / 4)
    assert long.parameter_bytes == short.parameter_bytes
    assert long.temporary_bytes > short.temporary_bytes
    assert long.hardware_flops == pytest.approx(
        flops_per_token(cfg.model, 24, causal=False).train * long.tokens, rel=1e-6
    )


def test_a_record_is_json():
    record = json.loads(json.dumps(proof("mesh.data=2", "mesh.tensor=2").record()))
    assert record["collective_bytes_by_axes"]["all-reduce"].keys() == {"data", "tensor"}
    assert record["mesh"] == {"data": 2, "pipe": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert record["compile_s"] > 0 and record["rss_bytes"] > 2**20 and len(record["text_sha256"]) == 64


def test_a_plan_that_does_not_know_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="model.vocab is not set"):
        prove(run_config(vocab=None), topology("cpu-4"))


def test_a_text_that_cannot_be_written_is_a_note_and_no_failure():
    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n async-update")

    assert _text(Compiled()) == ("", ["text not available: INTERNAL: RET_CHECK failure async-update"])


VMEM = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem. Used 20M of 16M."
HBM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."


def refused(monkeypatch, said: str):
    """The proof of a step that a compiler complains about."""

    def compile_with(lowered, options):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(compiled, "compile_with", compile_with)
    return prove(run_config(ADAMW, "mesh.fsdp=2", "mesh.tensor=2"), topology("cpu-4"))


@pytest.mark.parametrize("said", [VMEM, "INTERNAL: Mosaic failed to compile\n TPU kernel"])
def test_a_program_that_the_compiler_refuses_is_a_message_with_the_mesh(monkeypatch, said):
    words = " ".join(said.removeprefix("RESOURCE_EXHAUSTED: ").split())
    with pytest.raises(compiled.DoesNotCompile) as told:
        refused(monkeypatch, said)
    assert isinstance(told.value, UserError)
    assert str(told.value).startswith(
        f"the compiler for cpu-4 refuses this step on mesh fsdp=2 x tensor=2: {words}; try "
    )


def test_want_of_memory_is_a_verdict(monkeypatch):
    p = refused(monkeypatch, HBM)
    assert not p.fits and p.peak_bytes == int(20.5 * GIB) and "space hbm" in p.why


def test_the_compiler_is_announced_after_the_faults_of_the_config(monkeypatch):
    seen = []

    def compile_with(lowered, options):
        seen.append("compiler")
        raise jax.errors.JaxRuntimeError(HBM)

    monkeypatch.setattr(compiled, "compile_with", compile_with)
    with pytest.raises(ConfigError, match="needs 3 devices"):
        prove(run_config(ADAMW, "mesh.fsdp=3"), topology("cpu-4"), begin=lambda: seen.append("begin"))
    assert not seen
    prove(run_config(ADAMW, "mesh.fsdp=4"), topology("cpu-4"), begin=lambda: seen.append("begin"))
    assert seen == ["begin", "compiler"]


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (
            "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * GIB,
        ),
        ("required for HLO temporaries (400.00G) exceeds available HBM (15.75G).", 400 * GIB),
        ("nothing of the kind", 0),
    ],
)
def test_what_a_program_would_take_is_in_the_compilers_complaint(said, size):
    assert _asked(said) == size


# --- kernels ---------------------------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 40), bq=st.integers(1, 12), bk=st.integers(1, 12), window=st.one_of(st.none(), st.integers(1, 12)),
    mask=st.sampled_from(["causal", "full"]),
)  # fmt: skip
def test_blocks_in_which_nothing_is_seen_are_told_from_the_others(length, bq, bk, window, mask):
    a = config.parse(Attention, {"mask": mask, "window": window})
    at = np.arange(length)
    seen = a.mask.visible(Coords(at[:, None], 1, False), Coords(at[None, :], 1, False)) | (at[:, None] == at)
    if window:
        seen = seen & (at[:, None] - at < window)
    blocks = [seen[i : i + bq, j : j + bk].any() for i in range(0, length, bq) for j in range(0, length, bk)]
    assert visible_blocks(a, length, bq, bk) == pytest.approx(np.mean(blocks))


def flash(name, metadata="", heads=8, length=1024):
    q = Array("bf16", (2, heads, length, 128))
    k = Array("bf16", (2, 2, length, 128))
    return Kernel(name, (Array("s8", (1, 2, 2)), q, k, k, Array("s32", (2, length, 128))), (q,), None, metadata)


def test_attention_kernels_are_counted_by_the_products_they_do():
    model = run_config(context=1024).model
    pairs = 2 * 8 * 1024 * 1024 * 0.75 * 128 * 2  # of the four blocks of 512 a causal mask needs three
    blocks = r"block_q\": 512, \"block_kv\": 512, \"block_q_dq\": 512, \"block_kv_dq\": 512, \"block_q_dkv\": 512, \"block_kv_dkv\": 512"
    seen = 2 * 8 * (1024 * 1025 / 2) * 128 * 2  # and a query sees half of the keys
    fused = blocks + r", \"use_fused_bwd_kernel\": true"
    for name, metadata, done, asked in (
        ("splash_mha_fwd_segmented", blocks, 2, 2), ("splash_mha_dq", blocks, 3, 2), ("splash_mha_dkv", blocks, 4, 3),
        ("splash_mha_dkv", fused, 5, 5), ("layer_norm", blocks, 0, 0),
    ):  # fmt: skip
        assert attention_flops(flash(name, metadata), model, 1024) == pytest.approx((done * pairs, asked * seen))


def test_our_own_attention_kernels_are_counted_as_others():
    model = run_config(context=1024).model
    todo = (Array("s32", (1, 8, 8)), Array("s32", (1, 8)), Array("s32", (1, 8)))
    q, k = Array("bf16", (2, 1024, 8, 128)), Array("bf16", (2, 1024, 2, 128))
    by_head = [Array("bf16", (2, n, 1024, 128)) for n in (8, 2)]
    row = Array("f32", (2, 8, 1024))
    back, tpu_back = (q, q, row, row, k, k), (by_head[0], by_head[0], *[Array("f32", (2, 8, 1, 1024))] * 2)
    blocks = " ".join(f"block_{side}{part}: 512" for side in ("q", "kv") for part in ("", "_dq", "_dkv"))
    for name, operands, like in (  # of queries first, then what comes back, and of both by row
        ("hopper_attention_fwd:block_q=512:block_kv=512", (q, k, k), flash("splash_mha_fwd", blocks)),
        ("hopper_attention_dq:block_q_dq=512:block_kv_dq=512", back, flash("splash_mha_dq", blocks)),
        ("hopper_attention_dkv:block_q_dkv=512:block_kv_dkv=512", back, flash("splash_mha_dkv", blocks)),
        ("triton_attention_dkv:block_q_dkv=512:block_kv_dkv=512", (row, row, q, q, k, k), flash("splash_mha_dkv", blocks)),
        ("triton_attention_fwd:block_q=512:block_kv=512", (q, k, Array("bf16", (2, 1024, 2, 64))), flash("splash_mha_fwd", blocks)),
        ("tpu_attention_fwd:block_q=512:block_kv=512", (Array("f32", (8, 1, 2048)), *by_head, by_head[1]), flash("splash_mha_fwd", blocks)),
        ("tpu_attention_fwd:block_q=512:block_kv=512", (*by_head, by_head[1]), flash("splash_mha_fwd", blocks)),
        (
            "tpu_attention_bwd:block_q_dkv=512:block_kv_dkv=512", (*tpu_back, by_head[1], by_head[1]),
            flash("splash_mha_dkv", blocks + " use_fused_bwd_kernel: true"),
        ),
    ):  # fmt: skip
        counted = attention_flops(Kernel(name, (*todo, *operands), (q,), None, ""), model, 1024)
        assert counted == pytest.approx(attention_flops(like, model, 1024)) and counted[0] > 0


def test_a_kernel_runs_at_the_peak_at_best():
    model, chip = run_config(context=1024).model, CHIPS["v5e"]
    cost = kernel_cost(flash("flash_fwd"), model, 1024, chip)
    assert cost.flops / (cost.cycles / chip.clock) == pytest.approx(chip.flops)


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_that_a_compiler_does_not_know_are_left_out():
    device = jax.devices("cpu")[0]
    assert flags._accepted(device, {"xla_no_such_option": True}) == {}
    known = {"xla_embed_ir_in_executable": True}
    assert flags._accepted(device, known | {"xla_no_such_option": True}) == known
    assert flags.compiler_options(device) == {}


# --- with the real TPU compiler --------------------------------------------------------------------------------------

SMALL = {
    "vocab": 512, "embed": 256, "num_layers": 2, "context": 256,
    "block": {"attention": {"num_heads": 4}, "ffn": {"mlp": 512}, "norm": "rmsnorm"},
}  # fmt: skip


@functools.cache
def on_tpu(name, *overrides):
    return prove(run_config(ADAMW, "precision=bfloat16", *overrides, **SMALL), topology(name))


def test_a_program_that_options_break_is_compiled_without_them():
    lowered = jax.jit(lambda x: 2 * x).lower(1.0)
    compiled, used, said = flags.compile_with(lowered, {"xla_no_such_option": True})
    assert (compiled(3.0), used) == (6.0, {})
    assert "xla_no_such_option" in said
    assert flags.compile_with(lowered, {})[1:] == ({}, "")


def test_fusions_of_collectives_are_what_a_program_is_first_compiled_without():
    lowered, known = jax.jit(lambda x: 2 * x).lower(1.0), {"xla_llvm_disable_expensive_passes": False}
    compiled, used, said = flags.compile_with(lowered, known | {"xla_tpu_enable_async_collective_fusion": True})
    assert (compiled(3.0), used) == (6.0, known)
    assert "xla_tpu_enable_async_collective_fusion" in said


def test_want_of_memory_is_told_from_other_troubles():
    assert flags.no_room(ValueError("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."))
    assert not flags.no_room(ValueError("FAILED_PRECONDITION: continuation fusion"))
    assert not flags.no_room(ValueError("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: memory space vmem"))


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_libtpu_proves_a_step_and_its_text_is_understood():
    p, counted = on_tpu("v5e-4", "mesh.fsdp=4"), parts(run_config(**SMALL).model)
    count = sum(counted.values())
    assert p.fits and p.parameter_bytes == count * FLOAT / 4
    assert p.argument_bytes >= p.parameter_bytes + p.optimizer_bytes  # tiles pad small arrays
    assert p.account.notes == {} and p.notes == ()
    assert set(p.account.loops.values()) == {2}
    assert {k.name.split("_segmented")[0] for k in p.account.kernels} == {
        "splash_mha_fwd",
        "splash_mha_dq",
        "splash_mha_dkv",
    }
    assert p.account.kernel_flops > 0
    weights = 3 * 2 * p.tokens * (sum(counted.values()) - counted["embedding"])
    assert p.account.flops == pytest.approx(weights, rel=0.05)  # rotations of queries and keys are products as well
    assert p.account.cycles["compiler"] > 0

    bf16 = 2
    layers = sum(n for name, n in counted.items() if name.startswith("layers"))
    found = p.account.collective_bytes
    # A gather that is cut into permutations moves each share but one's own, once.
    gathered = found["all-gather"] + found.get("collective-permute", 0) * 4 / 3
    assert gathered == pytest.approx((2 * layers + counted["head"]) * bf16, rel=0.02)
    assert found["reduce-scatter"] == pytest.approx(layers * bf16, rel=0.02)
    assert found["all-reduce"] == pytest.approx(counted["head"] * bf16, rel=0.1)  # too narrow to be scattered
    assert {axes for _, axes in p.account.collective_bytes_by_axes} == {("fsdp",)}


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_slices_meet_over_the_axis_across_and_nothing_else_leaves_a_slice():
    p = on_tpu("v5e-4x2", "mesh.data=2", "mesh.fsdp=4")
    outside = [c for c in p.account.collectives if c.slices > 1]
    assert {c.axes for c in outside} == {("data",)}
    assert {c.axes for c in p.account.collectives if c.slices == 1} == {("fsdp",)}
    gradients = sum(c.bytes * c.count for c in outside)
    # Each device its share of the gradients, in 16 or, of the tables, 32 bits.
    assert p.parameter_bytes / 2 <= gradients <= p.parameter_bytes * 1.05


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_what_does_not_fit_says_by_how_much():
    p = on_tpu("v5e-1", "mesh.fsdp=1", "model.vocab=4000000")
    assert not p.fits
    assert "HBM" in p.why.upper()
    assert p.peak_bytes > p.hbm_bytes and p.headroom < 0
    assert p.parameter_bytes == parameters(run_config(**SMALL | {"vocab": 4_000_000}).model) * FLOAT
    assert p.account is None and p.record()["collective_bytes"] is None


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_what_waits_on_the_host_is_not_held_against_the_chip():
    wide = ("model.embed=1024", "model.block.ffn.mlp=4096")
    plain = on_tpu("v5e-4", "mesh.fsdp=4", *wide)
    away = on_tpu("v5e-4", "mesh.fsdp=4", "offload={optimizer: true, parameters: true}", *wide)
    waits = plain.parameter_bytes + plain.optimizer_bytes
    assert away.host_bytes == pytest.approx(waits, rel=0.01)
    assert plain.peak_bytes - away.peak_bytes > 0.7 * waits  # a layer's share comes and goes
    assert away.peak_bytes == away.argument_bytes + away.temporary_bytes


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_libtpu_takes_the_options_of_every_kind(name):
    device = devices(topology(name))[0]
    assert flags.compiler_options(device) == flags._wanted(device)


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_layers_cut_by_column_and_row_are_summed_once_for_attention_and_once_for_the_feed_forward():
    """Forward, backward, and all but the last again; once for the embedding and the head (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3)."""
    p, cfg = on_tpu("v5e-4", "mesh.tensor=4", "remat=full"), run_config(ADAMW, **SMALL)
    stream = cfg.batch * cfg.model.context * cfg.model.embed * 2
    sums = [c for c in p.account.collectives if c.kind == "all-reduce" and c.bytes >= stream]
    assert all(c.bytes < 1.02 * stream for c in sums)  # libtpu puts small sums beside some
    assert sum(c.count for c in sums) == (2 + 1 + 2) * cfg.model.num_layers + 2
