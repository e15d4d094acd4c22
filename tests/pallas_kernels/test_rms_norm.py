"""RMSNorm: the reference beside equation 4 in float64 and the models' own, and kernels beside the reference."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.models import config
from jaxllm.models.layers.norm import normalise
from pallas_kernels.rms_norm import gpu, reference, tpu
from pallas_kernels.rms_norm.api import WIDEST, rms_norm

ROOT = Path(__file__).parents[2]


def drawn(shape: tuple[int, ...], dtype=jnp.float32, *, weight: bool = True, residual: bool = True):
    """What there is of x, a weight and a residual, and gradients of the results."""
    keys = jax.random.split(jax.random.key(len(shape)), 5)
    x, r, dy, dtotal = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    args = {"x": x} | ({"weight_D": jax.random.normal(keys[4], shape[-1:])} if weight else {})
    return (args | {"residual": r}, (dy, dtotal)) if residual else (args, dy)


def results(args, gradients, **how) -> dict[str, jax.Array]:
    out, pull = jax.vjp(lambda args: rms_norm(**args, **how), args)
    names = ("y", "total") if "residual" in args else ("y",)
    return dict(zip(names, jax.tree.leaves(out), strict=True)) | {
        f"d{name}": d for name, d in pull(gradients)[0].items()
    }


def beside_the_reference(args, gradients, *, implementation, interpret=False, **how):
    """Results and gradients, beside those of the reference in float32."""
    ours = results(args, gradients, implementation=implementation, interpret=interpret, **how)
    args, gradients = jax.tree.map(lambda x: x.astype(jnp.float32), (args, gradients))
    exact = results(args, gradients, implementation="reference", **how)
    assert ours.keys() == exact.keys()
    for name, a in ours.items():
        most, mean = (1e-5, 1e-5) if a.dtype == jnp.float32 and ours["y"].dtype == jnp.float32 else (2e-2, 5e-3)
        a, b = (np.asarray(x, np.float64) for x in (a, exact[name]))
        error, size = np.abs(a - b), max(np.abs(b).max(), 1)
        assert error.max() <= most * size and error.mean() <= mean * size, (name, error.max(), error.mean(), size)
    return ours


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_reference_is_equation_4_in_float64(offset):
    args, _ = drawn((3, 5, 24))
    x, w, r = (np.asarray(args[name], np.float64) for name in ("x", "weight_D", "residual"))
    y, total = reference.rms_norm(**args, eps=0.1, offset=offset)
    np.testing.assert_allclose(total, x + r, rtol=1e-6, atol=1e-6)
    rms = np.sqrt(((x + r) ** 2).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(y, (x + r) / rms * (offset + w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("offset", [False, True])
def test_it_rounds_as_the_models_norm_does(dtype, offset):
    args, _ = drawn((4, 7, 48), dtype)
    cfg = config.RMSNorm(unit_offset=offset)
    y, total = rms_norm(**args, eps=cfg.epsilon, offset=float(offset), implementation="reference")
    np.testing.assert_array_equal(total, args["x"] + args["residual"])
    np.testing.assert_array_equal(y, normalise(cfg, 1, total, args["weight_D"], None))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a few rows have several, of several steps."""
    monkeypatch.setattr(tpu, "PART", 2048)
    monkeypatch.setattr(tpu, "BLOCKS", 200_000)
    monkeypatch.setattr(gpu, "SHARES", 3)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@given(
    st.sampled_from([(1,), (16,), (3, 7), (5, 20), (133,)]), st.sampled_from([1, 40, 128, 200, 384]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 1.0]),
)  # fmt: skip
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_kernel_interpreted_is_the_reference(
    small_blocks, implementation, lead, D, dtype, residual, weight, offset
):  # fmt: skip
    args, gradients = drawn((*lead, D), dtype, weight=weight, residual=residual)
    how = dict(eps=1e-5, offset=offset, implementation=implementation, interpret=True)
    ours = beside_the_reference(args, gradients, **how)
    assert all(ours[name].dtype == dtype for name in ours.keys() - {"dweight_D"})


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_bfloat16_weight_has_a_bfloat16_gradient(small_blocks, implementation):
    args, gradients = drawn((101, 200), jnp.bfloat16)
    args["weight_D"] = args["weight_D"].astype(jnp.bfloat16)
    ours = beside_the_reference(args, gradients, implementation=implementation, interpret=True)
    assert ours["dweight_D"].dtype == jnp.bfloat16


@pytest.mark.parametrize("D", [1, 128, 4096, WIDEST])
@pytest.mark.parametrize("R", [16, 100, 8192])
def test_blocks_are_whole_chunks_that_fit_together(R, D):
    for itemsize, arrays in ((2, 2), (4, 4)):
        blocks, block, chunk, parts = tpu.cut(R, D, itemsize, arrays)
        assert (parts[0].start, parts[-1].stop) == (0, D)
        assert block % chunk == 0 and chunk % tpu.ROWS == 0 and block <= R <= blocks * block < R + block
        assert block * max(D, tpu.LANES) * itemsize * arrays * 2 <= tpu.BLOCKS


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("R", "D", "dtype"), [
    (8192, 4096, jnp.bfloat16), (1000, 16384, jnp.float32), (300, 200, jnp.bfloat16), (3, 128, jnp.float16),
])  # fmt: skip
def test_it_compiles_for_every_tpu(chip, R, D, dtype):
    here = jax.sharding.SingleDeviceSharding(chip)
    for residual in (True, False):
        shapes = jax.eval_shape(lambda residual=residual: drawn((R, D), dtype, residual=residual))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        run = jax.jit(lambda *a: results(*a, implementation="tpu", chip=chip.device_kind))
        assert run.lower(*shapes).compile().as_text().count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_it_takes_fewer_cycles_of_a_tpu_than_xla_s_programs(tmp_path):
    command = [sys.executable, "-m", "pallas_kernels.rms_norm.bench", "--static", "v6e", "--json", tmp_path / "found"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert json.loads((tmp_path / "found").read_text())["ratio"] > 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 333, 200), (5000, 64), (777, 4096), (100, 16384)])
def test_the_gpu_kernel_is_the_reference_and_gives_the_same_bits_again(shape, dtype):
    first, again = (beside_the_reference(*drawn(shape, dtype), implementation="gpu", offset=1.0) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


@pytest.mark.parametrize(
    ("chip", "kernel"), [("TPU v5 lite", True), ("TPU7x", True), ("NVIDIA H100 80GB HBM3", False), ("cpu", False)]
)
def test_none_takes_the_kernel_on_tpus_only(chip, kernel):
    program = jax.make_jaxpr(lambda x: rms_norm(x, chip=chip))(jnp.zeros((8, 128)))
    assert ("pallas_call" in str(program)) == kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 8), jnp.int32)}, r"x \(2, 8\) of int32 must be \[\.\.\., D\] of floats"),
        ({"weight_D": jnp.ones(9)}, r"weight of shape \(9,\) must be \(8,\)"),
        ({"residual": jnp.ones((2, 9))}, r"residual \(2, 9\) of float32 must be \(2, 8\) of float32"),
        ({"residual": jnp.ones((2, 8), jnp.bfloat16)}, "of bfloat16 must be"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; known: tpu, gpu, reference"),
        ({"implementation": "tpu"}, "implementation='tpu': it needs a TPU.*, this is cpu"),
        (
            {"implementation": "gpu", "chip": "Tesla V100-SXM2-16GB"},
            "it needs an NVIDIA GPU since Ampere, this is Tesla",
        ),
        (
            {"implementation": "tpu", "x": jnp.ones((1, 40000)), "interpret": True},
            "at most 16384 numbers, not of 40000",
        ),
        (
            {"implementation": "gpu", "x": jnp.ones((1, 40000)), "interpret": True},
            "at most 16384 numbers, not of 40000",
        ),
        (
            {"implementation": "gpu", "x": jnp.ones((2, 8), jnp.float8_e4m3fn), "interpret": True},
            "bfloat16, float16 and float32, not float8_e4m3fn",
        ),
        ({"implementation": "tpu", "x": jnp.ones((0, 8)), "interpret": True}, "at least one number"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": jnp.ones((2, 8))} | change)
