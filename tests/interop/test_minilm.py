"""all-MiniLM-L6-v2, fetched by `make weights`, through the public path, against what transformers computes of it.

Golden figures stand in minilm.json; all elements of all vectors are compared where there is JAXLLM_SHARED.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from real_weights import MINILM, MODELS, is_whole

from jaxllm.embed import run
from jaxllm.inference.config import EmbedConfig
from jaxllm.pretrained import texts_of_folder
from jaxllm.verbs import convert

GOLDEN = json.loads(Path(__file__).with_name("minilm.json").read_text(encoding="utf-8"))
TEXTS = tuple(t["text"] for t in GOLDEN["texts"])
SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2].parent / "shared"))
REFERENCE = SHARED / "data/weights/all_minilm_l6_v2.hf_reference.npz"


@pytest.fixture(scope="module")
def folder():
    if not (MINILM / "model.safetensors").is_file():
        pytest.skip(f"needs the weights of MiniLM in {MINILM}: `make weights` fetches them (JAXLLM_WEIGHTS)")
    weights = MODELS[1].files["minilm/model.safetensors"]
    assert is_whole(MINILM / "model.safetensors", weights), f"{MINILM} is not what `make weights` fetches"
    return MINILM


@pytest.fixture(scope="module")
def vectors(folder):
    return embedded(folder)


def embedded(model, **fields):
    return run(EmbedConfig(model=str(model), text=TEXTS, **fields), io.StringIO())


def test_vectors_are_those_of_transformers(vectors):
    wanted = [t["embedding"] for t in GOLDEN["texts"]]  # every eighth element
    np.testing.assert_allclose(vectors[:, ::8], wanted, atol=1e-4, rtol=0)


def test_all_elements_are_those_of_transformers(vectors):
    if not REFERENCE.is_file():
        pytest.skip(f"needs the reference outputs {REFERENCE} (JAXLLM_SHARED)")
    wanted = np.load(REFERENCE, allow_pickle=False)["sentence_embedding"]
    np.testing.assert_allclose(vectors, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-4, rtol=0)


def test_vectors_have_length_one_and_the_cosines_of_transformers(vectors):
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors @ vectors.T, GOLDEN["cosines"], atol=1e-4, rtol=0)


def test_texts_have_the_ids_of_transformers(folder):
    texts = texts_of_folder(folder)
    for t in GOLDEN["texts"]:
        assert [*texts.start, *texts.tokenizer.encode(t["text"]), *texts.tokenizer.suffix()] == t["ids"]


def test_a_text_alone_has_the_vector_it_has_among_others(folder, vectors):
    alone = run(EmbedConfig(model=str(folder), text=TEXTS[-1:]), io.StringIO())
    np.testing.assert_allclose(alone[0], vectors[-1], atol=1e-6)


def test_longer_texts_are_cut_at_the_length_that_the_folder_names(folder, capsys):
    """256, not the 128 of its tokenizer.json nor the model's 512."""
    texts = ("word " * 254, "word " * 255)
    fit, cut = run(EmbedConfig(model=str(folder), text=texts), io.StringIO())
    assert capsys.readouterr().err == "1 of 2 texts have more than 256 tokens and were cut: 1\n"
    np.testing.assert_allclose(fit, cut, atol=1e-6)


def test_bfloat16_gives_nearly_the_same_cosines(folder):
    half = embedded(folder, precision="bfloat16")
    np.testing.assert_allclose(half @ half.T, GOLDEN["cosines"], atol=0.02, rtol=0)


@pytest.mark.slow
def test_a_checkpoint_of_it_and_a_folder_written_back_give_the_same_vectors(folder, vectors, tmp_path):
    checkpoint = convert(folder, tmp_path / "run")
    np.testing.assert_allclose(embedded(checkpoint), vectors, atol=1e-6)
    back = convert(checkpoint, tmp_path / "back")
    np.testing.assert_allclose(embedded(back), vectors, atol=1e-6)
    for name in MODELS[1].files:
        name = name.removeprefix("minilm/")
        if not name.endswith(".safetensors"):
            assert (back / name).read_bytes() == (folder / name).read_bytes(), name
