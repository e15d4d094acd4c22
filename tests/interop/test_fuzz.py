"""Mutated folders and files are opened whole or refused: no crash, no hang, and no memory that a number asks for.

`fuzz.py` does it, in a process of its own. Files of safetensors and GGUF alone are mutated in their own tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.verbs import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop.oracle import byte_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
MOST = 512 << 20  # bytes: what the library keeps of thousands of models that differ


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small LLaMA in four shards, with a tokenizer; and the same as GGUF."""
    folder = tmp_path_factory.mktemp("whole")
    size = byte_tokenizer(folder, chat_template="{{ messages }}")
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    convert(folder, folder / "model.gguf")
    return folder


def fuzzed(kind, count, whole, folder):
    """What came of `count` mutants."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), kind, str(count), "0", str(whole), str(folder)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert ended.returncode == 0, f"died with {ended.returncode}: {ended.stderr[-3000:]}"
    said = json.loads(ended.stdout.splitlines()[-1])
    assert "error" not in said, "\n".join(map(str, said.values()))
    assert said["opened"] + sum(said["refused"].values()) == count
    assert said["grown"] < MOST
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    {"config": 3000, "index": 3000, "tokenizer": 3000, "gguf": 3000, "load": 150}.items(),
)
def test_a_mutated_model_is_opened_or_refused(kind, count, whole, tmp_path):
    said = fuzzed(kind, count, whole, tmp_path)
    assert count / 50 < said["opened"] < count * 0.9  # mutants are neither all broken nor all as good as new
    assert set(said["refused"]) <= {"CheckpointError", "DataError", "ConfigError"}
