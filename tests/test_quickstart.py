"""The quickstart end to end, on a small corpus: source to shards to checkpoint to picture and last line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "schedule.warmup=5",
    "steps=30",
    "model.embed=32",
    "model.num_layers=2",
    "model.block.ffn.mlp=64",
    "model.block.attention.num_heads=2",
]


@pytest.mark.slow
def test_the_quickstart_ends_with_bits_per_byte_beside_a_bigram_and_a_completion(tmp_path):
    def python(*argv: str) -> str:
        env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        done = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = ROOT / "configs/train/quickstart.yaml"
    python("-m", "jaxllm", "prepare", str(ROOT / "configs/data/quickstart.yaml"), "tasks.0.source.package=email",
           "tokenizer.vocab=300", "validation=0.2")  # fmt: skip
    python("-m", "jaxllm", "train", str(train), *SMALL)
    lines = python(str(ROOT / "notebooks/quickstart.py"), str(train), *SMALL).splitlines()
    last = re.fullmatch(
        r"quickstart: model (\d\.\d+) bits/byte, bigram (\d\.\d+) bits/byte, run folder runs/quickstart", lines[-1]
    )
    model, bigram = map(float, last.groups())
    assert 1 < bigram < 5 and 1 < model < 8
    assert any(line.startswith("def ") for line in lines)
    assert (tmp_path / "runs/quickstart/loss.png").stat().st_size > 5_000


def test_without_a_held_out_evaluation_there_is_one_message(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    command = [sys.executable, ROOT / "notebooks/quickstart.py", ROOT / "configs/train/quickstart.yaml"]
    done = subprocess.run(
        [*command, f"out={tmp_path}"], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"{tmp_path}: no held-out evaluation was logged")
    assert done.stderr.count("\n") == 1
