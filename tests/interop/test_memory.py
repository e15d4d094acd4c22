"""Models go through memory a few tensors at a time: peaks of processes that convert and load one of several shards."""

import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.interop.folder import save_folder
from jaxllm.interop.weights import logical_shapes
from jaxllm.models.config import DecoderConfig
from tests.interop import fuzz

MB, SHARD = 1e6, 108e6  # bytes

PEAK = "from pathlib import Path\n" + inspect.getsource(fuzz.peak)

CONVERT = (
    PEAK
    + """
import sys
from jaxllm.convert import run
run(*sys.argv[1:])
print(peak())
"""
)

LOAD = (
    PEAK
    + """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxllm.interop.folder import open_folder
from jaxllm.interop.weights import load
from jaxllm.models.module import abstract

found, mesh = open_folder(sys.argv[1]), jax.make_mesh((4,), ("fsdp",))

def share(x):
    widest = max(range(x.ndim), key=lambda i: (x.shape[i] % 4 == 0) * (i > 0 or x.ndim < 3) * x.shape[i])
    spec = PartitionSpec(*("fsdp" if i == widest else None for i in range(x.ndim)))
    return jax.ShapeDtypeStruct(x.shape, sys.argv[2], sharding=NamedSharding(mesh, spec))

before = peak()
params = jax.block_until_ready(load(found.weights, found.cfg, jax.tree.map(share, abstract(found.cfg)[1])))
assert all(x.addressable_shards[0].data.size * 4 == x.size for x in params.values())
print(peak() - before)
"""
)


def folder_of(path, num_layers):
    """Random float32 weights; the file's size in bytes."""
    cfg = DecoderConfig.model_validate({
        "vocab": 24_000, "embed": 1024, "num_layers": num_layers, "tie": True, "position": {"kind": "rope"},
        "block": {"norm": {"kind": "rmsnorm"}, "attention": {"num_heads": 16}, "ffn": {"mlp": 2816}},
    })  # fmt: skip
    shapes, draw = logical_shapes(cfg), np.random.default_rng(0)
    save_folder(
        path, cfg, shapes, lambda name: draw.standard_normal(shapes[name], np.float32),
        dict.fromkeys(shapes, np.dtype("float32")), shard_bytes=int(SHARD),
    )  # fmt: skip
    return 4 * sum(math.prod(shape) for shape in shapes.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small and a large model, whose embeddings, the largest tensors, are alike."""
    base = tmp_path_factory.mktemp("models")
    return {name: (base / name, folder_of(base / name, layers)) for name, layers in (("small", 1), ("large", 10))}


def peak(code, *args):
    """Bytes of memory that a process reports which runs the code on four devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_what_converting_takes_does_not_grow_with_the_model(models, tmp_path):
    (small, small_bytes), (large, large_bytes) = models["small"], models["large"]
    assert large_bytes > 590 * MB and len(list(large.glob("*.safetensors"))) >= 6
    there = peak(CONVERT, large, tmp_path / "run") - peak(CONVERT, small, tmp_path / "small")
    back = peak(CONVERT, tmp_path / "run", tmp_path / "back") - peak(CONVERT, tmp_path / "small", tmp_path / "again")
    assert max(there, back) < 0.1 * (large_bytes - small_bytes), (there / MB, back / MB)
    assert peak(CONVERT, large, tmp_path / "other") < 700 * MB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_go_into_their_shards_with_little_memory_beside_them(models, dtype):
    (small, small_bytes), (large, large_bytes) = models["small"], models["large"]
    width = np.dtype(dtype).itemsize / 4
    grown = peak(LOAD, large, dtype)
    assert grown < width * large_bytes + 2 * SHARD + 0.1 * large_bytes, grown / MB
    # Most of that is the largest tensor, which the small model has too: what comes on top is the larger model itself.
    more = grown - peak(LOAD, small, dtype)
    assert more < 1.1 * width * (large_bytes - small_bytes), more / MB
