"""The training configs that are shipped: published sizes, a topology each, and a program that fits on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.core.config import load
from jaxllm.models.count import parameters
from jaxllm.plan.topology import topology
from jaxllm.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs/train").glob("*.yaml"))
PUBLISHED = {
    "llama2_7b_v5e256": 6_738_415_616,  # Hugging Face, meta-llama/Llama-2-7b-hf
    "llama2_7b_v5p64": 6_738_415_616,
    "llama2_13b_v6e64": 13_015_864_320,
    "llama2_70b_v5p256": 68_976_648_192,
    "llama2_70b_v6e256": 68_976_648_192,
    "gpt3_175b_v5p1024": 174.6e9,  # arXiv:2005.14165, table 2.1: 175.0B
    "palm_540b_v5p2048": 540.35e9,  # arXiv:2204.02311, table 1
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_names_the_chips_it_is_for(path):
    cfg = load(RunConfig, path)
    assert cfg.topology, f"{path.name} names no topology"
    on = topology(cfg.topology)
    assert cfg.mesh.resolve(on.devices)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    count = parameters(load(RunConfig, next(p for p in CONFIGS if p.stem == name)).model)
    assert count == pytest.approx(PUBLISHED[name], rel=1e-12 if isinstance(PUBLISHED[name], int) else 3e-3)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "quickstart"], ids=lambda p: p.stem)
def test_every_config_compiles_for_its_chips_and_fits(path, tmp_path):
    """As a user asks for it, in a process of its own: a compiler may end one."""
    record = planned(path, tmp_path)
    assert record["fits"] and record["compiled"], record["why"]
    assert record["peak_bytes"] <= record["hbm_bytes"]
    assert record["notes"] == []
    assert record["model_flops"] < record["hardware_flops"] < 1.5 * record["model_flops_square"]
    low, high = record["step_ms"]
    assert 0 < low <= record["expected_ms"] <= high and 0.2 < record["mfu"][0] <= record["mfu"][1] < 0.9
    assert record["rss_bytes"] < 6 * 2**30
    if record["mesh"]["fsdp"] > 1:  # gradients leave by reduce-scatter; what is left to all-reduces is of little weight
        sent = {
            kind: sum(size for axes, size in by_axes.items() if "fsdp" in axes)
            for kind, by_axes in record["collective_bytes_by_axes"].items()
        }
        assert sent.get("all-reduce", 0) < 0.1 * sent.get("reduce-scatter", 0)


def test_the_quickstart_is_planned_on_the_cpu_it_is_for(tmp_path):
    path = next(p for p in CONFIGS if p.stem == "quickstart")
    record = planned(path, tmp_path, "model.vocab=4096")
    assert record["fits"] and record["compiled"] and record["on"] == "cpu-1"


def planned(path: Path, folder: Path, *overrides: str) -> dict:
    """What `jaxllm plan` writes."""
    file = folder / "plan.json"
    command = [sys.executable, "-m", "jaxllm", "plan", str(path), "--json", str(file), *overrides]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text(encoding="utf-8"))
