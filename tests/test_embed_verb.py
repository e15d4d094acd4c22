"""Folders of transformers and of sentence-transformers, through the verb: vectors beside those of transformers."""

import io
import json
import shutil

import numpy as np
import pytest

from jaxllm.cli import main
from jaxllm.core.errors import CheckpointError, ConfigError, DataError
from jaxllm.embed import run
from jaxllm.inference.config import EmbedConfig
from jaxllm.verbs import convert, embed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop.oracle import byte_tokenizer, randomised  # noqa: E402
from tests.test_generate_verb import write_run  # noqa: E402

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "away", "from", "##s", "##ning", "home"]
TEXTS = ("the cat sat on the mat", "A dog", "cats and dogs ran away from home and the cat sat", "running")
CONTEXT = 16


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT whose vocabulary is a vocab.txt alone."""
    folder = tmp_path_factory.mktemp("bert")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    randomised(transformers.AutoModel.from_config(config), 0).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A random RoBERTa with a tokenizer.json of bytes that puts <s> and </s> around a text."""
    folder = tmp_path_factory.mktemp("roberta")
    size = byte_tokenizer(folder, "<s> $A </s>", ("<s>", "<pad>", "</s>"), pad_token="<pad>")
    config = transformers.RobertaConfig(
        vocab_size=size, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=62, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    randomised(transformers.AutoModel.from_config(config), 0).save_pretrained(folder)
    return folder


def theirs(folder, texts, pool="mean", length=None, normalise=True):
    """Each text alone, as transformers computes it."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = []
    for text in texts:
        asked = {} if length is None else {"truncation": True, "max_length": length}
        with torch.no_grad():
            x_TD = model(**tokenizer(text, return_tensors="pt", **asked)).last_hidden_state[0].numpy()
        vector = {"mean": x_TD.mean(0), "cls": x_TD[0], "last": x_TD[-1]}[pool]
        out.append(vector / np.linalg.norm(vector) if normalise else vector)
    return np.stack(out)


def ours(folder, texts=TEXTS, **fields):
    return run(EmbedConfig(model=str(folder), text=texts, **fields), io.StringIO())


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_vectors_are_means_of_what_transformers_says_of_all_tokens(name, request):
    folder = request.getfixturevalue(name)
    got = ours(folder, batch=3)
    assert got.shape == (4, 24) and got.dtype == np.float32
    np.testing.assert_allclose(got, theirs(folder, TEXTS), atol=1e-4, rtol=0)
    for pool in ("cls", "last"):
        wanted = theirs(folder, TEXTS, pool, normalise=False)
        np.testing.assert_allclose(ours(folder, pool=pool, normalise=False), wanted, atol=1e-4, rtol=0)


def test_a_text_that_is_too_long_is_cut_as_transformers_cuts_it_and_that_is_said(bert, capsys):
    texts = ("the dog ran", "cat " * 30)
    got = ours(bert, texts)
    assert capsys.readouterr().err == f"1 of 2 texts have more than {CONTEXT} tokens and were cut: 1\n"
    np.testing.assert_allclose(got, theirs(bert, texts, length=CONTEXT), atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours(bert, texts, max_tokens=4), theirs(bert, texts, length=4), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="max_tokens=17: the model's context is 16"):
        ours(bert, max_tokens=17)


# --- folders of sentence-transformers ------------------------------------------------------------------------------


def sentences(bert, folder, pooling, *more, files=(), **said):
    """The BERT, and beside it what sentence-transformers writes; `more` are modules after the pooling."""
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).symlink_to(path)
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False} | said))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24} | pooling))
    for name, tree in dict(files).items():
        (folder / name).write_text(json.dumps(tree))
    return folder


CLS_TOKEN = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}


@pytest.mark.parametrize(("pooling", "pool", "normalise"), [
    (CLS_TOKEN, "cls", False), (CLS_TOKEN, "cls", True), ({"pooling_mode": "lasttoken"}, "last", True),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean", False), ({}, "mean", True),
], ids=str)  # fmt: skip
def test_a_folder_says_how_its_vectors_are_made(bert, tmp_path, capsys, pooling, pool, normalise):
    folder = sentences(bert, tmp_path / "s", pooling, *["Normalize"] * normalise)
    got = ours(folder)
    assert capsys.readouterr().err == "1 of 4 texts have more than 8 tokens and were cut: 2\n"
    np.testing.assert_allclose(got, theirs(bert, TEXTS, pool, 8, normalise), atol=1e-4, rtol=0)
    asked = ours(folder, pool="mean", normalise=True, max_tokens=CONTEXT)  # what is asked for goes before
    np.testing.assert_allclose(asked, theirs(bert, TEXTS), atol=1e-4, rtol=0)


def test_texts_are_lowered_and_prompted_as_a_folder_says(roberta, tmp_path):
    prompts = {"prompts": {"query": "query: ", "passage": "no"}, "default_prompt_name": "query"}
    more = {"files": {"config_sentence_transformers.json": prompts}}
    folder = sentences(roberta, tmp_path / "s", {"include_prompt": True}, do_lower_case=True, max_seq_length=50, **more)
    got = ours(folder, ("A Dog Ran",))
    np.testing.assert_allclose(got, theirs(roberta, ["query: a dog ran"], normalise=False), atol=1e-4, rtol=0)
    told = sentences(roberta, tmp_path / "t", {"include_prompt": False}, **more)
    with pytest.raises(CheckpointError, match="include_prompt=false"):
        ours(told)


def test_a_model_may_lie_in_a_folder_of_its_own(bert, tmp_path):
    folder = sentences(bert, tmp_path / "s", {})
    modules = json.loads((folder / "modules.json").read_text())
    shutil.copytree(bert, folder / "0_Transformer")
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_allclose(ours(folder), theirs(bert, TEXTS, normalise=False), atol=1e-4, rtol=0)
    modules[0]["path"] = "../bert"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        ours(folder)


def test_what_is_not_known_of_a_folder_is_refused_by_name(bert, tmp_path):
    for i, (pooling, more, said, match) in enumerate([
        ({}, ["Dense", "Normalize"], {}, "Transformer, Pooling, Dense, Normalize; known: Transformer, Pooling, and"),
        ({"pooling_mode": "max"}, [], {}, r'the mode of pooling is \["max"\]; known: '),
        (CLS_TOKEN | {"pooling_mode_mean_tokens": True}, [], {}, r'\["cls_token", "mean_tokens"\]'),
        ({}, [], {"max_seq_length": "long"}, "max_seq_length="),
    ]):  # fmt: skip
        folder = sentences(bert, tmp_path / str(i), pooling, *more, **said)
        with pytest.raises(CheckpointError, match=match):
            ours(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"modules.json: not JSON"):
        ours(folder)


def test_a_checkpoint_keeps_how_vectors_are_made_and_a_folder_gets_it_back(bert, tmp_path):
    folder = sentences(bert, tmp_path / "s", CLS_TOKEN)
    checkpoint = convert(folder, tmp_path / "run")
    np.testing.assert_allclose(ours(checkpoint), ours(folder), atol=1e-6)
    back = convert(checkpoint, tmp_path / "back")
    assert (back / "1_Pooling/config.json").read_bytes() == (folder / "1_Pooling/config.json").read_bytes()
    np.testing.assert_array_equal(ours(back), ours(folder))


# --- texts in, vectors out -----------------------------------------------------------------------------------------


def test_texts_come_from_the_line_and_a_file_and_vectors_go_to_a_file_or_the_terminal(bert, tmp_path, capsys):
    (tmp_path / "texts").write_text("a dog\r\ncat\u2028cats\nthe mat", encoding="utf-8")  # U+2028 ends no line
    line = ["embed", str(bert), "running", "--file", str(tmp_path / "texts")]
    assert main([*line, "--out", str(tmp_path / "v.npy"), "the cat"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/v.npy: 5 vectors of 24\n"
    saved = np.load(tmp_path / "v.npy")
    wanted = theirs(bert, ["running", "the cat", "a dog", "cat cats", "the mat"])
    np.testing.assert_allclose(saved, wanted, atol=1e-4, rtol=0)
    assert saved.dtype == np.float32
    assert main([*line, "--no-normalise", "--batch", "2", "--", "the cat"]) == 0
    printed = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    np.testing.assert_allclose(printed / np.linalg.norm(printed, axis=1, keepdims=True), saved, atol=1e-5)
    np.testing.assert_array_equal(embed(bert, 'text=["running"]'), ours(bert, ("running",)))


def test_a_decoder_that_began_here_has_vectors_too(tmp_path):
    folder = write_run(tmp_path, "bfloat16")
    got = ours(folder, ("def f", "import"), step=5, pool="last", precision="float32")
    assert got.shape == (2, 16)
    np.testing.assert_allclose(ours(folder, ("def f", "import"), step=5, pool="last"), got, atol=0.05)
    assert np.abs(ours(folder, ("def f", "import"), pool="last", precision="float32") - got).max() > 0.1  # of step 7


def test_what_is_wrong_is_said_before_a_model_is_looked_for(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    (tmp_path / "lines").write_text("one\n\nthree\n")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\n")
    for fields, error, match in [
        ({}, ConfigError, "no texts: give some"),
        ({"text": ("a", " \t")}, ConfigError, "text 1 is empty"),
        ({"file": str(tmp_path / "lines")}, ConfigError, "lines: line 2 is empty"),
        ({"file": str(tmp_path / "none")}, DataError, "none cannot be read"),
        ({"file": str(tmp_path / "latin")}, DataError, "not UTF-8"),
        ({"text": ("a",), "out": "vectors.txt"}, ConfigError, r"must be a \*.npy file"),
        ({"text": ("a",), "out": f"{nowhere}/v.npy"}, ConfigError, "in a folder that is there"),
    ]:
        with pytest.raises(error, match=match):
            run(EmbedConfig(model=nowhere, **fields))


def test_a_model_that_only_writes_is_refused(tmp_path):
    size = byte_tokenizer(tmp_path / "t5", "$A </s>")
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="model.kind=encoder_decoder has no vectors"):
        ours(tmp_path / "t5")
