"""Training begins with a model of others, and what was trained goes back as a folder of theirs."""

import json

import numpy as np
import pytest
from test_convert_verb import files, theirs  # noqa: F401 (a fixture)

from jaxllm.core.errors import ConfigError
from jaxllm.interop.folder import open_folder
from jaxllm.interop.gguf import write_gguf
from jaxllm.verbs import convert, prepare, train


@pytest.fixture(scope="module")
def data(theirs, tmp_path_factory):  # noqa: F811
    """Rows of text in the tokens of the model."""
    root = tmp_path_factory.mktemp("data")
    (root / "text.txt").write_text("\n".join("the quick brown fox jumps over the lazy dog" for _ in range(20)))
    cfg = root / "prepare.yaml"
    cfg.write_text(json.dumps({
        "out": str(root / "out"), "length": 32, "tokenizer": {"kind": "hf", "file": str(theirs)},
        "tasks": [{"name": "text", "source": {"kind": "text", "files": [str(root / "text.txt")]}}],
    }))  # fmt: skip
    prepare(cfg)
    return root / "out"


def run(folder, data, initial, *overrides, heads=4):
    """A run of the fixture's model, written as a person would, that changes next to nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    cfg = folder.with_suffix(".yaml")
    cfg.write_text(json.dumps({
        "out": str(folder), "steps": 2, "batch": 4, "data": {"path": str(data)}, "initial": str(initial),
        "model": {
            "context": 64, "embed": 32, "num_layers": 3, "tie": True, "position": {"kind": "rope"},
            "block": {
                "attention": {"num_heads": heads, "num_kv_heads": 2}, "ffn": {"mlp": 48},
                "norm": {"kind": "rmsnorm", "epsilon": 1e-6},
            },
        },
        "optimizer": {"kind": "sgd", "learning_rate": 1e-12}, "schedule": {"kind": "constant"},
        "metrics": {"console": False}, "checkpoints": {"every": 1},
    }))  # fmt: skip
    train(cfg, *overrides)
    return folder


def test_a_model_that_was_trained_goes_back_with_the_files_it_came_with(theirs, data, tmp_path):  # noqa: F811
    trained = run(tmp_path / "run", data, theirs, "steps=1")
    back = convert(
        run(tmp_path / "run", data, theirs), tmp_path / "back", dtype="bfloat16"
    )  # stopped, and gone on with
    assert files(back) == files(theirs)
    before, after = open_folder(theirs).tensors, open_folder(back).tensors
    assert before.keys() == after.keys()
    for name in before:
        assert before.read(name).tobytes() == after.read(name).tobytes()
    assert {p.name for p in trained.iterdir()} == {
        "checkpoints", "config.yaml", "lock", "metrics.jsonl", "run.json", "source"
    }  # fmt: skip


def test_checkpoints_of_it_and_the_runs_that_begin_with_those_keep_the_files_too(theirs, data, tmp_path):  # noqa: F811
    converted = convert(theirs, tmp_path / "converted")
    assert [p.name for p in converted.iterdir()] == ["checkpoints"]
    again = run(tmp_path / "again", data, run(tmp_path / "run", data, converted))
    assert files(convert(again, tmp_path / "back", dtype="bfloat16")) == files(theirs)


def test_another_tokenizer_takes_the_place_of_the_one_it_came_with(theirs, data, tmp_path):  # noqa: F811
    text = (theirs / "tokenizer.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files(theirs).items():
        (other / name).write_bytes(content)
    (other / "tokenizer.json").write_text(text.replace('"content": "</s>"', '"content":  "</s>"'))
    (other / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes())
    assert (other / "tokenizer.json").read_text() != text
    back = convert(run(tmp_path / "run", data, other), tmp_path / "back")
    assert (back / "tokenizer.json").read_text() == text
    assert (back / "config.json").is_file()
    said = back / "tokenizer_config.json"
    assert not said.exists() or said.read_bytes() != files(theirs).get("tokenizer_config.json")


def test_another_model_is_refused_field_by_field(theirs, data, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"model\.block\.attention\.num_heads: 4 there, 8 here"):
        run(tmp_path / "run", data, theirs, heads=8)
    assert not (tmp_path / "run").exists()


def test_a_file_of_llama_cpp_is_a_beginning_too(theirs, data, tmp_path):  # noqa: F811
    from jaxllm.interop.llamacpp import ARCHITECTURES
    from jaxllm.interop.weights import tensors_of

    found = open_folder(theirs)
    keys = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    sizes = ARCHITECTURES["llama"].theirs(found.cfg)
    keys |= {
        f"llama.{k}": v for k, v in sizes.items() if k not in ("architectures", "model_type", "vocab_size", "tied")
    }
    made = tensors_of(ARCHITECTURES["llama"], found.cfg, found.weights.shapes)
    tensors = {
        name: np.asarray(row.form.theirs([found.weights[n].astype(np.float32) for n in row.ours])[0])
        for name, (_, row, *_) in made.items()
    }
    write_gguf(tmp_path / "model.gguf", keys, tensors, kinds="F32")
    back = convert(run(tmp_path / "run", data, tmp_path / "model.gguf"), tmp_path / "back", dtype="bfloat16")
    before, after = found.tensors, open_folder(back).tensors
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before)
