"""The training configs that are shipped: published sizes, a topology each, and a program that fits on it."""

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
