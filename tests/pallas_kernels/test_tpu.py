"""TPU kernels by the real compiler: they compile for every chip, and its simulator says how fast they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import static
from pallas_kernels.attention import static as attention_static
from pallas_kernels.attention import tpu
from pallas_kernels.attention.api import attention, vector_memory
from pallas_kernels.attention.bias import Distances
from pallas_kernels.attention.masks import Causal, Documents, Sinks, Window, work
from tests.pallas_kernels.test_attention_masks import kinds

FORWARD, BACKWARD = ([*attention_static.TUNINGS[which][0]] for which in ("forward", "backward"))


def kernel_cycles(chip: str, **how) -> int:
    return static.simulated(chip, "pallas_kernels.attention.static:ours", H=128, **how)["cycles"]


@given(st.data(), st.sampled_from([(1, 1), (40, 40), (70, 33)]), st.sampled_from([(4, 8), (12, 5)]))
@settings(max_examples=60)
def test_steps_as_arithmetic_are_those_of_the_work(data, sizes, blocks):
    todo = work(data.draw(kinds(1, *sizes)), *blocks, *sizes)
    steps = tpu.closed(jax.tree.map(np.asarray, todo))
    if steps is None:
        return
    for i in range(todo.order.shape[1]):
        assert (steps.partial(i), steps.full(i)) == (todo.partial[0, i], todo.full[0, i])
        for step in range(int(todo.partial[0, i] + todo.full[0, i])):
            assert steps.at(i, step) == todo.order[0, i, step]


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(1023), (Causal() & Window(1023)) | (Sinks(4) & Causal())])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_causal_work_and_that_of_windows_is_arithmetic(mask, by):
    assert tpu.closed(work(mask, 512, 512, 32768, 32768, by=by)) is not None


def compiled_with_gradients(chip, T: int, H: int, bias=None, **how):
    """Of two query heads that share a key head, within documents."""
    here = jax.sharding.SingleDeviceSharding(chip)
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    def gradients(q, k, v, do, document, bias):
        mask = Causal() & Documents(document, document)
        how_ = how | dict(mask=mask, implementation="tpu", chip=chip.device_kind)
        o, pull = jax.vjp(lambda q, k, v, bias: attention(q, k, v, bias=bias, **how_), q, k, v, bias)
        return o, *pull(do)

    q, k, document = shape(1, T, 2, H), shape(1, T, 1, H), shape(1, T, dtype=jnp.int32)
    bias = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), bias)
    return jax.jit(gradients).lower(q, k, k, q, document, bias).compile()


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("T", "H"), [*((T, H) for T in (1024, 32768) for H in (64, 128, 256)), (4096, 128), (8192, 128)]
)
def test_attention_compiles_for_every_chip(chip, T, H):
    done = compiled_with_gradients(chip, T, H)
    assert done.as_text().count("tpu_custom_call") >= 2
    whole = T * T * 2  # bytes of one head's logits in bfloat16
    assert done.memory_analysis().temp_size_in_bytes < max(whole, 64 << 20)
    assert vector_memory(chip.device_kind) >= 64 << 20


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_attention_with_a_bias_of_distances_and_dropout_compiles_for_every_chip(chip):
    T = 8192
    bias = Distances(jnp.zeros((2, 2 * T - 1)))
    done = compiled_with_gradients(chip, T, 64, bias, softcap=30.0, dropout=0.1, key=jax.random.key(0))
    assert done.memory_analysis().temp_size_in_bytes < max(T * T * 2, 64 << 20)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5e", "v6e"])
def test_causal_attention_takes_no_more_cycles_than_jax_s_own(name):
    """At 4096 tokens, beside splash attention in blocks of 1024, the best of those that `bench.py --static` tries."""
    ours = [kernel_cycles(name, T=4096, which="forward", tuning=FORWARD)]
    ours.append(ours[0] + kernel_cycles(name, T=4096, which="backward", tuning=BACKWARD))
    peer = "pallas_kernels.attention.static:splash"
    for backward, cycles, most in ((False, ours[0], 1.0), (True, ours[1], 0.9)):
        theirs = static.simulated(name, peer, T=4096, H=128, block=1024, step=512, backward=backward)["cycles"]
        assert cycles <= most * theirs


@pytest.mark.tpu_aot
def test_a_kernel_s_bytes_are_those_of_its_operands_and_results():
    T, H = 1024, 128
    made = "pallas_kernels.attention.static:ours"
    (kernel,) = static.simulated("v5e", made, T=T, H=H, which="forward", tuning=FORWARD)["kernels"]
    assert kernel["bytes"] == 4 * T * H * 2 + T * 4  # q, k, v and what comes out, and float32 log-sum-exps
    assert kernel["cycles"] >= kernel["bytes"] / 819e9 * 1.5e9
