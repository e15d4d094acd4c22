"""What an import loads, asked of fresh interpreters: the command line answers before anything heavy is there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"tensorflow", "torch", "transformers", "seqio", "daft", "matplotlib"}


def loaded(code: str) -> set[str]:
    """Top-level modules in a new interpreter after `code`."""
    told = f"{code}\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.rpartition("loaded:")[2].split()}


def test_importing_jaxllm_loads_nothing_heavy():
    assert not loaded("import jaxllm") & (HEAVY | {"jax", "flax", "pydantic"})


@pytest.mark.parametrize("module", ["models.config", "data.config", "train.config", "inference.config", "verbs"])
def test_config_schemas_load_no_jax(module):
    assert not loaded(f"import jaxllm.{module}") & (HEAVY | {"jax", "flax", "numpy"})


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--fields"], ["train", "no_such.yaml"], ["trian"], ["models"], ["models", "llama2_7b"]],
    ids=" ".join,
)
def test_the_command_line_answers_without_jax(argv):
    assert not loaded(f"from jaxllm.cli import main; main({argv})") & (HEAVY | {"jax", "flax", "numpy"})


@pytest.mark.parametrize("verb", ["prepare", "train", "generate", "chat", "embed"])
def test_a_config_error_is_told_without_jax(verb, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("stepz: 3\n")
    assert not loaded(f"from jaxllm.cli import main; assert main([{verb!r}, {str(wrong)!r}]) == 2") & (HEAVY | {"jax"})
