"""Tokenizers written as the metadata of a GGUF file and read back: the same ids."""

import json
import lzma
import os
from pathlib import Path

import pytest
from real_weights import SMOLLM2

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.data import config, tokenizers
from jaxllm.data.tokenizers.base import Spec
from jaxllm.data.tokenizers.hf import HuggingFace
from jaxllm.interop import vocabulary
from jaxllm.interop.gguf import open_gguf, write_gguf

SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2].parent / "shared")) / "data/tokenizers"
TEXTS = [
    "", " ", "a", "Hello world", "  two  spaces ", "\n\n\ttabs\r\n", "don't I'LL we've", "12345 3.14 1,000,000",
    "naïve Ä e\u0301",
    "你好，世界", "नमस्ते", "👩‍💻🙂", "x = {'a': [1, 2]}  # x\n    return x", "<s> </s> <|endoftext|>", "\u2581under", "ﬁ½",
]  # fmt: skip
WORDS = [f"the {w} of a naïve {w}er, {n} times; don't!\n" for n, w in enumerate(["cat", "house", "träum", "code"] * 40)]


def built(kind, **more):
    return tokenizers.build(getattr(config, kind)(**more), WORDS)


TRAINED = {
    "bytes": lambda: built("ByteTokenizer"), "pairs": lambda: built("TrainBpe", vocab=400),
    "pairs with more": lambda: built("TrainBpe", vocab=400, add=("<a>", "<b c>")),
    "unigrams": lambda: built("TrainUnigram", vocab=400),
}  # fmt: skip


def round_trip(tokenizer, start, tmp_path, rows=None, **more):
    """Metadata through a file, and what is read back."""
    said = vocabulary.metadata(tokenizer, start, rows or tokenizer.vocab_size, **more)
    write_gguf(tmp_path / "x.gguf", said, {}, kinds="F32")
    file = open_gguf(tmp_path / "x.gguf")
    again, begins = vocabulary.tokenizer(file)
    assert begins == start
    return again, file.metadata


def assert_same(again, tokenizer, texts=TEXTS):
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert again.vocab_size == tokenizer.vocab_size
    assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert set(again.special.values()) == set(tokenizer.special.values())
    for ids in tokenizer.encode_batch(texts):
        assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("begins", [True, False])
def test_a_tokenizer_of_ours_comes_back_with_the_same_ids(name, begins, tmp_path):
    tokenizer = TRAINED[name]()
    start = (tokenizer.bos_id,) if begins else ()
    again, metadata = round_trip(tokenizer, start, tmp_path)
    assert_same(again, tokenizer)
    assert metadata["tokenizer.ggml.model"] == ("t5" if name == "unigrams" else "gpt2")
    assert metadata["tokenizer.ggml.add_bos_token"] is begins


def test_rows_without_a_token_are_unused_and_too_few_rows_are_refused(tmp_path):
    tokenizer = TRAINED["pairs"]()
    again, metadata = round_trip(tokenizer, (), tmp_path, rows=tokenizer.vocab_size + 3)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == again.vocab_size + 3
    assert metadata["tokenizer.ggml.token_type"][-3:] == [vocabulary.UNUSED] * 3
    assert_same(again, tokenizer)
    with pytest.raises(
        ConfigError, match=f"has {tokenizer.vocab_size} tokens .* as many tokens as the embedding has rows, 99"
    ):
        vocabulary.metadata(tokenizer, (), 99)
    with pytest.raises(ConfigError, match=r"puts \(0, 1\) before every text"):
        vocabulary.metadata(tokenizer, (0, 1), tokenizer.vocab_size)


def test_chat_templates_go_along_by_name(tmp_path):
    _, metadata = round_trip(TRAINED["bytes"](), (), tmp_path, templates={"default": "{{ a }}", "tool_use": "{{ b }}"})
    assert metadata["tokenizer.chat_template"] == "{{ a }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ b }}"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


def test_the_end_of_a_turn_comes_back_and_that_of_a_text_is_the_tokenizers_own(tmp_path):
    tokenizer = TRAINED["bytes"]()
    _, metadata = round_trip(tokenizer, (), tmp_path, ends=(tokenizer.eos_id, 7))
    assert metadata["tokenizer.ggml.eot_token_id"] == 7
    assert vocabulary.ends(open_gguf(tmp_path / "x.gguf")) == (7,)


def changed(path, value):
    """A byte-level tokenizer.json that says something else at a place."""
    tree = json.loads(TRAINED["pairs"]().data)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return HuggingFace(Spec(kind="hf"), json.dumps(tree).encode())


def test_a_tokenizer_that_llamacpp_lacks_is_refused_with_the_reason():
    wordpiece = built("TrainWordPiece", vocab=300, special=("[UNK]",))
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    lower = {"type": "Lowercase"}
    for tokenizer, why in {
        wordpiece: "a tokenizer of kind WordPiece in tokenizer.json cannot be written as GGUF; known: byte,",
        changed(
            ["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [level, digits]}
        ): "splits text as no tokenizer.g",
        changed(["normalizer"], lower): 'splits text as no tokenizer.ggml.pre that is known here does: ."Lowercase"',
    }.items():
        with pytest.raises(ConfigError, match=why):
            vocabulary.metadata(tokenizer, (), tokenizer.vocab_size)


def test_a_tokenizer_that_would_not_come_back_is_refused():
    """A token that takes the spaces before it: nothing in GGUF says so."""
    tree = json.loads(TRAINED["pairs"]().data)
    tree["added_tokens"].append({
        "id": TRAINED["pairs"]().vocab_size, "content": "Hello", "special": False, "single_word": False, "lstrip": False,
        "rstrip": True,
        "normalized": False,
    })  # fmt: skip
    tokenizer = HuggingFace(Spec(kind="hf"), json.dumps(tree).encode())
    with pytest.raises(ConfigError, match="llama.cpp would split text otherwise than its tokenizer"):
        vocabulary.metadata(tokenizer, (), tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "rwkv"}, "tokenizer.ggml.model='rwkv' is not known here; known: gpt2, llama, t5"),
        ({"model": "none"}, "tokenizer.ggml.model='none' is not known here"),
        ({"pre": "odd"}, "tokenizer.ggml.pre='odd' is not known here; known: gpt-2"),
        ({"tokens": None}, "do not make a gpt2 tokenizer"),
        ({"tokens": 5}, "do not make a gpt2 tokenizer"),
        ({"token_type": [1]}, "do not make a gpt2 tokenizer"),
        ({"merges": [3]}, "do not make a gpt2 tokenizer|tokenizer.json"),
        ({"model": "llama"}, "do not make a llama tokenizer"),
        ({"eos_token_id": "x"}, "do not make a gpt2 tokenizer"),
    ],
)
def test_metadata_that_make_no_tokenizer_are_refused(changes, why):
    said = vocabulary.metadata(TRAINED["bytes"](), (), 259) | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    said = {key: value for key, value in said.items() if value is not None}
    with pytest.raises((CheckpointError, vocabulary.ConfigError, tokenizers.base.DataError), match=why):
        vocabulary.read(said, "x.gguf")


# --- real tokenizers -----------------------------------------------------------------------------------------------


def real(name, tmp_path):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs the real tokenizer file {path} (set JAXLLM_SHARED)")
    if path.suffix == ".xz":
        (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(path.read_bytes()))
        return tokenizers.build(config.HfTokenizer(file=str(tmp_path / "tokenizer.json")))
    if path.suffix == ".json":
        return tokenizers.build(config.HfTokenizer(file=str(path)))
    return tokenizers.build(config.SentencePieceTokenizer(file=str(path)))


REAL = {
    "smollm2/tokenizer.json": "gpt-2", "llama3/llama3_2.tokenizer.json.xz": "llama-bpe",
    "llama2/tokenizer.model": "default",
    "mistral/tokenizer.mistral-v1": "default", "mistral/tokenizer.mistral-v3": "default",
    "t5/seqio_test_sentencepiece.model": "default", "t5/maxtext_tokenizer.default.model": "default",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_real_tokenizer_comes_back_with_the_same_ids(name, tmp_path):
    tokenizer = real(name, tmp_path)
    again, metadata = round_trip(tokenizer, () if tokenizer.bos_id is None else (tokenizer.bos_id,), tmp_path)
    assert_same(again, tokenizer, [*TEXTS, Path(__file__).read_text(encoding="utf-8")])
    assert metadata["tokenizer.ggml.pre"] == REAL[name]


def test_the_tokenizer_of_a_real_file_is_written_as_llamacpp_wrote_it():
    if not SMOLLM2.is_file():
        pytest.skip(f"needs the weights of SmolLM2 at {SMOLLM2}: `make weights` fetches them (JAXLLM_WEIGHTS)")
    file = open_gguf(SMOLLM2)
    theirs = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    tokenizer, start = vocabulary.tokenizer(file)
    ours = vocabulary.metadata(tokenizer, start, 49152, {"default": theirs["tokenizer.chat_template"]})
    assert theirs.pop("tokenizer.ggml.unknown_token_id") == 0  # byte pairs know none
    assert ours == theirs


def test_byte_pairs_of_sentencepiece_in_a_tokenizer_json_come_back_with_the_same_ids(tmp_path):
    """LLaMA 2's tokenizer as transformers writes it: merges in place of scores."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(real("llama2/tokenizer.model", tmp_path).data)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "json")
    tokenizer = tokenizers.build(config.HfTokenizer(file=str(tmp_path / "json")))
    again, metadata = round_trip(tokenizer, (1,), tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:4] == [vocabulary.UNKNOWN, *[vocabulary.CONTROL] * 2, vocabulary.BYTE]
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.vocab_size == tokenizer.vocab_size and again.special.keys() == {"<s>", "</s>"}
