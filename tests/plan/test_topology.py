import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.parallel.config import Mesh
from jaxllm.parallel.sharding import make_mesh
from jaxllm.plan import topology as names
from jaxllm.plan.chips import CHIPS
from jaxllm.plan.topology import devices, topology
from jaxllm.train.throughput import peak_flops

CUDA = any(names._plugin(p) for p in ("xla_cuda12", "xla_cuda13"))


@pytest.mark.parametrize(
    ("name", "shape", "slices", "chips", "count", "hosts"),
    [
        ("v5e-1", (1, 1), 1, 1, 1, 1),
        ("v5e-8", (2, 4), 1, 8, 8, 2),
        ("v5e-256", (16, 16), 1, 256, 256, 64),
        ("v6e-128", (8, 16), 1, 128, 128, 32),
        ("v6e-256x2", (16, 16), 2, 512, 512, 128),
        ("v4-8", (2, 2, 1), 1, 4, 4, 1),
        ("v5p-64", (2, 4, 4), 1, 32, 32, 8),
        ("v5p-128", (4, 4, 4), 1, 64, 64, 16),
        ("v5p-1024", (8, 8, 8), 1, 512, 512, 128),
        ("v5p-1536", (8, 8, 12), 1, 768, 768, 192),
        ("v5p-17920", (16, 20, 28), 1, 8960, 8960, 2240),
        ("tpu7x-2", (1, 1, 1), 1, 1, 2, 1),
        ("tpu7x-64", (2, 4, 4), 1, 32, 64, 8),
        ("h200", (1,), 1, 1, 1, 1),
        ("h100-8x4", (8,), 4, 32, 32, 4),
        ("cpu-4", (4,), 1, 4, 4, 1),
    ],
)
def test_a_name_means_the_chips_that_google_and_maxtext_mean(name, shape, slices, chips, count, hosts):
    on = topology(name)
    assert (on.shape, on.slices, on.chips, on.devices, on.hosts) == (shape, slices, chips, count, hosts)


def test_a_summary_says_how_many_chips_a_count_of_cores_is():
    assert str(topology("v5p-128")) == "v5p-128: 64 v5p chips (4x4x4)"
    assert str(topology("tpu7x-64")) == "tpu7x-64: 32 tpu7x chips (2x4x4), 64 JAX devices"
    assert str(topology("v6e-256x2")) == "v6e-256x2: 512 v6e chips (2 slices of 16x16)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5-16", "no topology 'v5-16': chips are v5p, v5e; names look like v5e-256"),
        ("V6E-16", "chips are v6e"),
        ("trainium-16", "chips are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200, cpu"),
        ("v5e", "say how many chips, as in v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5e-2", "v5e counts chips, nearest are v5e-1 and v5e-4"),
        ("v5e-512", "nearest are v5e-256$"),
        ("v5p-100", "v5p counts cores, 2 a chip, nearest are v5p-64 and v5p-128"),
        ("h100-16", "a host has up to 8 of h100; h100-8x2 is 2 hosts of 8"),
        ("v6e-256x0", "0 slices of v6e-256; there may be 1 to 4096, as in v6e-256x2$"),
        ("h100-8x0", "0 hosts of h100-8; there may be 1 to 131072, as in h100-8x2$"),
        ("v5e-8x999999999", "999999999 slices of v5e-8; there may be 1 to 131072"),
        ("v5e-999999999999", "no slice of 999999999999; v5e counts chips, nearest are v5e-256$"),
        ("v5p-999999999999", "nearest are v5p-17920$"),
        ("h100-999999999999", "h100-8x131072 is 131072 hosts of 8"),
        (f"v5e-{'9' * 5000}", "no topology .*: chips are v5e"),
        ("v5e-0", "no slice of 0; v5e counts chips, nearest are v5e-1$"),
        ("", "no topology '': chips are v4"),
        ("v5e-16 ", "no topology 'v5e-16 '"),
    ],
)
def test_an_unknown_name_is_refused_with_what_comes_near(name, said):
    with pytest.raises(UserError, match=said):
        topology(name)


def test_flat_slices_are_rings_only_where_they_span_the_pod_and_cubes_of_four_always():
    rings = {
        n: topology(n).chip.links.rings(topology(n).shape)
        for n in ("v5e-64", "v5e-128", "v6e-256", "v5p-64", "v5p-256")
    }
    assert rings == {
        "v5e-64": (False, False), "v5e-128": (False, True), "v6e-256": (True, True),
        "v5p-64": (False,) * 3, "v5p-256": (True,) * 3,
    }  # fmt: skip


@pytest.mark.parametrize("chip", [c for c in CHIPS.values() if c.platform != "cpu"], ids=lambda c: c.name)
def test_the_peaks_of_plans_are_those_that_training_measures_against(chip):
    assert chip.device_flops == pytest.approx(peak_flops(chip.title, jnp.bfloat16), rel=1e-3)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
def test_no_program_may_use_more_memory_than_a_chip_has(chip):
    assert 0.95 * chip.hbm_bytes < chip.hbm_usable <= chip.hbm_bytes


def test_cpu_devices_are_those_that_there_are():
    assert devices(topology("cpu-4")) == jax.devices("cpu")[:4]


@pytest.mark.parametrize("given", ["", "cpu"])
def test_planning_for_cpus_starts_no_accelerator(given):
    script = (
        "import jax\nfrom jaxllm.plan.topology import devices, topology\n"
        "found = devices(topology('cpu-2'))\nprint(len(found), jax.config.jax_platforms)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": given, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "2 cpu\n"


def test_more_cpu_devices_than_jax_has_started_with_are_refused_with_the_flag_that_makes_them():
    with pytest.raises(UserError, match="XLA_FLAGS=--xla_force_host_platform_device_count=64"):
        devices(topology("cpu-64"))


@pytest.mark.parametrize(("name", "extra"), [("v5e-4", "tpu"), ("h100", "cuda")])
def test_a_compiler_that_is_not_installed_is_asked_for_by_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'jaxllm\[{extra}\]'"):
        devices(topology(name))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v6e-256x2", "v4-8", "v5p-128", "v5p-2048", "tpu7x-2", "tpu7x-64"])
def test_libtpu_knows_every_kind_of_slice(name):
    on = topology(name)
    found = devices(on)
    assert len(found) == on.devices
    assert {d.device_kind for d in found} == {on.chip.title}
    assert len({tuple(d.coords) for d in found}) * on.slices == on.chips
    assert len({d.process_index for d in found}) == on.hosts


@pytest.mark.tpu_aot
def test_the_axis_across_spans_slices_and_no_other_does():
    found = devices(topology("v5e-16x2"))
    mesh = make_mesh(Mesh(data=2, fsdp=-1, tensor=2), found)
    for replica in range(2):
        assert len({d.slice_index for d in mesh.devices[replica].flat}) == 1
    within = make_mesh(Mesh(data=2, fsdp=4, tensor=4, across="fsdp"), found)
    assert len({d.slice_index for d in within.devices[0].flat}) == 2
    assert len({d.slice_index for d in within.devices[0, 0, 0].flat}) == 1  # tensor stays within
    with pytest.raises(ConfigError, match="mesh.data=1 does not divide over the 2 slices"):
        make_mesh(Mesh(), found)


@pytest.mark.tpu_aot
def test_neighbours_on_the_fastest_axis_are_linked():
    mesh = make_mesh(Mesh(data=4, fsdp=8, tensor=2), devices(topology("v5p-128")))
    for pair in mesh.devices.reshape(-1, 2):
        assert sum(abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords)) == 1


@pytest.mark.skipif(not CUDA, reason="needs the CUDA compiler: pip install 'jaxllm[cuda]'")
@pytest.mark.parametrize("name", ["a100", "h100-8x4", "h200-8", "b200-8"])
def test_the_cuda_compiler_believes_in_every_kind_of_gpu(name, monkeypatch):
    monkeypatch.setitem(os.environ, "XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    on = topology(name)
    found = devices(on)
    assert len(found) == on.devices
    assert {d.device_kind for d in found} == {on.chip.title}
    assert len({d.process_index for d in found}) == on.hosts
