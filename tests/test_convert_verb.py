"""A folder of Hugging Face becomes a checkpoint or a GGUF file, which generate; a checkpoint goes back as it came."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cli import main
from jaxllm.core.errors import UserError
from jaxllm.data.config import ByteTokenizer
from jaxllm.data.tokenizers import build
from jaxllm.generate import run as generate
from jaxllm.inference.config import GenerateConfig, Greedy
from jaxllm.interop.folder import open_folder
from jaxllm.models.config import DecoderConfig
from jaxllm.models.module import create
from jaxllm.pretrained import load
from jaxllm.train.checkpoint import Checkpointer
from jaxllm.train.config import Checkpoints
from jaxllm.verbs import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop.oracle import byte_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random LLaMA with a tokenizer of bytes and the words that it begins with."""
    folder = tmp_path_factory.mktemp("theirs")
    size = byte_tokenizer(folder, chat_template="{{ messages }}")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory):
    return convert(theirs, tmp_path_factory.mktemp("ours") / "run")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}


def test_what_goes_to_a_checkpoint_and_back_is_what_it_was(theirs, checkpoint, tmp_path):
    back = convert(checkpoint, tmp_path / "back")
    assert files(back) == files(theirs)
    before, after = open_folder(theirs).tensors, open_folder(back).tensors
    assert {n: (e.dtype, e.shape) for n, e in before.items()} == {n: (e.dtype, e.shape) for n, e in after.items()}
    assert all(before.read(n).tobytes() == after.read(n).tobytes() for n in before)


def said(model):
    cfg = GenerateConfig(
        model=str(model), prompt=("ab",), max_new_tokens=8, sampling=Greedy(), precision="float32", stream=False
    )
    return generate(cfg, io.StringIO())[0].tokens


def test_a_folder_and_its_checkpoint_say_the_same(theirs, checkpoint):
    assert said(theirs) == said(checkpoint)
    found = load(theirs)
    assert found.start == (0,) and found.ends == (1,) and found.chat_template == "{{ messages }}"


def test_a_gguf_file_says_what_the_folder_and_the_checkpoint_say(theirs, checkpoint, tmp_path):
    assert main(["convert", str(checkpoint), str(tmp_path / "model.gguf"), "--dtype", "float32"]) == 0
    file, folder = load(tmp_path / "model.gguf"), load(theirs, precision="float32")
    assert (file.start, file.chat_template) == (folder.start, folder.chat_template)
    assert file.tokenizer.encode("ab\nÄ") == folder.tokenizer.encode("ab\nÄ")
    assert said(tmp_path / "model.gguf") == said(theirs)
    again = load(convert(tmp_path / "model.gguf", tmp_path / "again.gguf", dtype="q8_0"))
    assert again.chat_template == folder.chat_template
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".gguf"]


def test_weights_take_the_type_that_is_asked_for(checkpoint, tmp_path):
    wide = open_folder(convert(checkpoint, tmp_path / "wide", dtype="float32"))
    assert {e.dtype for e in wide.tensors.values()} == {np.dtype("float32")}


def test_a_destination_that_holds_something_is_left_alone(theirs, checkpoint):
    before = files(theirs)
    with pytest.raises(UserError, match="is there already"):
        convert(checkpoint, theirs)
    assert files(theirs) == before


def test_a_family_that_has_no_such_model_is_refused_with_the_reason(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "x"), "--family", "gpt2"]) == 2
    assert "no gpt2 is like this model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["convert", str(checkpoint), str(tmp_path / "x"), "--family", "nothing"]) == 2
    assert "known: " in capsys.readouterr().err


def test_a_gguf_file_becomes_a_folder_that_transformers_loads_with_its_template(theirs, tmp_path):
    file = convert(theirs, tmp_path / "model.gguf")
    run = convert(file, tmp_path / "run")
    back = convert(run, tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (theirs, back))
    for text in ("", "Hello, wörld!\n  x = 1", "中文"):
        assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template == "{{ messages }}"
    assert after.model_max_length == 64
    said = [load(model) for model in (theirs, file, run, back)]
    assert {found.start for found in said} == {(0,)} and {found.chat_template for found in said} == {"{{ messages }}"}
    config = transformers.AutoConfig.from_pretrained(back)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, None)
    assert load(back).ends == (1,)


def test_a_run_that_began_here_becomes_a_folder_with_its_tokenizer(theirs, tmp_path):
    words = build(ByteTokenizer(add=("<tool>",)))
    cfg = DecoderConfig(vocab=words.vocab_size, context=32, embed=16, num_layers=1)
    files = {"tokenizer": words.save, "config.yaml": "precision: {kind: float32}\n"}
    with Checkpointer(tmp_path / "run" / "checkpoints", Checkpoints(), cfg, extra_files=files) as saver:
        saver.save(0, {"step": jnp.int32(0), "params": create(cfg, jax.random.key(0))}, {})
    folder = convert(tmp_path / "run", tmp_path / "folder")
    after = transformers.AutoTokenizer.from_pretrained(folder)
    assert after.encode("aé<tool>") == [257, *words.encode("aé<tool>")] and len(after) == words.vocab_size
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (257, 258, 256)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (257, 258, 256)
    found = load(folder)
    assert found.start == (257,) and found.tokenizer.encode("aé<tool>") == words.encode("aé<tool>")
