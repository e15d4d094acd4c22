"""Tokenizers in the files that folders of models have, and the files written for other libraries: the same ids."""

import base64
import functools
import itertools
import json
import lzma
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from jaxllm.core.errors import DataError
from jaxllm.data import config
from jaxllm.data.tokenizers import build, load
from jaxllm.data.tokenizers.export import save_hugging_face
from jaxllm.data.tokenizers.files import has_tokenizer, read_folder

SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2].parent / "shared")) / "data/tokenizers"
SNIPPETS = [
    "def f(x):\n    return x", "  two", "end ", "\n\n", "\r\n", "\t", "don't", "I'LL", "1234567", "naïve", "中文字", "한국",
    "العربية", "\U0001f600", "e\u0301", "\x00", "\u2028", "\u2581", "\ufffd", "[MASK]", "<s>", "##ing", " ", "½ ﬁ",
]  # fmt: skip
PART = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(SNIPPETS)
TEXT = st.lists(PART, max_size=6).map("".join)
CORPUS = ["The quick brown fox. " * 20, "".join(SNIPPETS), Path(json.__file__).read_text("utf-8")]


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the real tokenizer file {path} (set JAXLLM_SHARED)")
    return path


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


def same_ids(ours, theirs, avoid=(), examples=40):
    """Holds ids of many texts against a function's, texts with a token of `avoid` left out."""

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        if not any(token in text for token in avoid):
            assert ours(text) == theirs(text)

    check()
    for text in CORPUS:
        if not any(token in text for token in avoid):
            assert ours(text) == theirs(text)


def write(folder, **files):
    """A folder of JSON files, by name without its ending."""
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


# --- read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [
    {}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
], ids=str)  # fmt: skip
def test_a_vocab_txt_is_wordpiece_as_its_config_says(tmp_path, transformers, said):
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    shutil.copy(shared("bert/vocab.txt"), tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", **said})
    ours, start = read_folder(tmp_path)
    fast, python = (
        kind.from_pretrained(tmp_path, **said) for kind in (transformers.BertTokenizer, BertTokenizerLegacy)
    )
    special = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
    same_ids(ours.encode, lambda text: fast.encode(text, add_special_tokens=False), special)
    # The Python class asks its own interpreter's Unicode tables: newer ones than the library's.
    plain = [text for text in CORPUS if not any(token in text for token in special)]
    assert plain and all(ours.encode(t) == python.encode(t, add_special_tokens=False) for t in plain)
    assert start == (101,) and (ours.bos_id, ours.eos_id, ours.pad_id) == (101, 102, 0)
    assert ours.encode_marked("a [MASK] b") == fast.encode("a [MASK] b", add_special_tokens=False)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", None])
def test_vocab_json_and_merges_txt_are_byte_pairs_as_their_class_splits_them(tmp_path, transformers, kind):
    shutil.copy(shared("gpt2/encoder.json"), tmp_path / "vocab.json")
    shutil.copy(shared("gpt2/vocab.bpe"), tmp_path / "merges.txt")
    if kind:
        write(tmp_path, tokenizer_config={"tokenizer_class": kind})
    ours, start = read_folder(tmp_path)
    theirs = getattr(transformers, kind or "GPT2Tokenizer").from_pretrained(tmp_path)
    same_ids(ours.encode, functools.partial(theirs.encode, add_special_tokens=False), ("<|endoftext|>",))
    assert ours.eos_id == theirs.eos_token_id == 50256 and start == ()
    if kind != "Qwen2Tokenizer":
        ranked = build(config.TiktokenTokenizer(file=str(shared("tiktoken/r50k_base.tiktoken.gz")), encoding="gpt2"))
        same_ids(ours.encode, ranked.encode, examples=20)


def test_roberta_puts_its_tokens_around_byte_pairs(tmp_path, transformers):
    vocab = json.loads(shared("gpt2/encoder.json").read_text("utf-8"))
    first = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocab = first | {token: i + 4 for token, i in vocab.items() if token != "<|endoftext|>"} | {"<mask>": 50260}
    write(tmp_path, vocab=vocab, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    shutil.copy(shared("gpt2/vocab.bpe"), tmp_path / "merges.txt")
    ours, start = read_folder(tmp_path)
    theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    same_ids(ours.encode, functools.partial(theirs.encode, add_special_tokens=False), first, examples=20)
    assert (start, ours.bos_id, ours.eos_id, ours.pad_id) == ((0,), 0, 2, 1)
    assert ours.encode_marked("<s>a</s>") == theirs.encode("a")


def test_a_tokenizer_model_is_sentencepiece_with_what_other_files_add(tmp_path, transformers):
    shutil.copy(shared("llama2/tokenizer.model"), tmp_path)
    added = {"<|im_start|>": 32000, "<|im_end|>": 32001, "<tool>": 32002}
    special = {"eos_token": "<|im_end|>", "pad_token": "</s>", "additional_special_tokens": ["<|im_start|>"]}
    write(tmp_path, added_tokens=added, special_tokens_map=special, tokenizer_config={"legacy": True})
    ours, start = read_folder(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    same_ids(ours.encode, library.encode)
    assert start == (1,) and (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 32001, 2, 32003)
    assert ours.encode("<|im_start|>") == library.encode("<|im_start|>") and ours.encode("<tool>") == [32002]
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=True)
    text = "<|im_start|>user\nHow are you?<|im_end|><tool>\nfine"
    assert ours.encode_marked(text) == theirs.encode(text, add_special_tokens=False)
    ours.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.encode_marked(text) == ours.encode_marked(text) and again.fingerprint() == ours.fingerprint()
    write(tmp_path, tokenizer_config={"add_bos_token": False})
    assert read_folder(tmp_path)[1] == ()
    write(tmp_path, added_tokens={"<tool>": 32005})
    with pytest.raises(DataError, match=r"its added tokens have ids 32005; .* end with 31999, and they must follow"):
        read_folder(tmp_path)


def test_a_tokenizer_model_may_hold_ranks(tmp_path):
    shutil.copy(shared("llama3/tokenizer_llama3.tiktoken"), tmp_path / "tokenizer.model")
    ours, start = read_folder(tmp_path)
    named = build(config.TiktokenTokenizer(file=str(tmp_path / "tokenizer.model"), encoding="llama3"))
    assert ours.fingerprint() == named.fingerprint() and start == (128_000,)
    tokens = "<|begin_of_text|>", "<|eot_id|>"
    assert ours.encode_marked("{}a{}".format(*tokens)) == [128_000, *ours.encode("a"), 128_009]


def rank_lines(count):
    """A rank file of single bytes, pairs and triples of bytes."""
    letters = [bytes([b]) for b in range(256)]
    pairs = (a + b for a in letters for b in letters)
    triples = (a + b + c for a in letters[32:] for b in letters[32:] for c in letters[32:])
    tokens = itertools.islice(itertools.chain(letters, pairs, triples), count)
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def test_ranks_of_qwen_are_known_by_their_number_and_text_is_composed_first(tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(rank_lines(151_643))
    ours, start = read_folder(tmp_path)
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    library = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ours.ranks, special_tokens=ours.special)
    same_ids(ours.encode, lambda text: library.encode_ordinary(unicodedata.normalize("NFC", text)))
    assert start == () and (ours.eos_id, ours.vocab_size) == (151_643, 151_851)
    assert ours.encode_marked("<|im_start|>a<|im_end|>") == [151_644, *ours.encode("a"), 151_645]
    (tmp_path / "qwen.tiktoken").write_bytes(rank_lines(1000))
    with pytest.raises(
        DataError, match=r"qwen.tiktoken: 1000 tokens are of no encoding that is known here: gpt2 50256"
    ):
        read_folder(tmp_path)


def test_tokens_that_a_tokenizer_json_lacks_are_added_as_other_files_say(tmp_path, transformers):
    build(config.TrainBpe(vocab=300), CORPUS).save(tmp_path)
    (tmp_path / "tokenizer.yaml").unlink()
    added = {
        "300": {"content": "<|end|>", "special": True, "rstrip": True},
        "301": {"content": "<call>", "special": False},
    }
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added, "eos_token": "<|end|>"})
    ours, _ = read_folder(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a<|end|>  b<call> c"
    assert ours.encode_marked(text) == theirs.encode(text) and ours.eos_id == 300 and ours.vocab_size == 302
    assert 300 not in ours.encode(text) and 301 in ours.encode(text)
    write(tmp_path, tokenizer_config={}, added_tokens={"<call>": 305})
    with pytest.raises(DataError, match=r"'<call>' is said to have id 305, but the vocabulary gives it 300"):
        read_folder(tmp_path)


def test_a_folder_without_a_tokenizer_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no tokenizer in it; known are tokenizer.json, "):
        read_folder(tmp_path)
    assert not has_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"a\nb\n")
    with pytest.raises(DataError, match=r"vocab.txt: '\[UNK\]' is not in it"):
        read_folder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="vocab.txt: not UTF-8"):
        read_folder(tmp_path)
    write(tmp_path, vocab={"a": 0, "b": 1, "ab": 2})
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match="vocab.json has no letters for bytes"):
        read_folder(tmp_path)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {"x": 1}})
    with pytest.raises(DataError, match=r"added_tokens_decoder\['x'\] is no token and its id"):
        read_folder(tmp_path)
    write(tmp_path, added_tokens={"<a>": "7"})
    with pytest.raises(DataError, match="added_tokens.json: '<a>' has '7' for an id"):
        read_folder(tmp_path)


# --- written -------------------------------------------------------------------------------------------------------

KINDS = {
    "byte": lambda _: config.ByteTokenizer(add=("<tool>",)),
    "bpe": lambda _: config.TrainBpe(vocab=400, add=("<tool>",)),
    "wordpiece": lambda _: config.TrainWordPiece(vocab=400),
    "unigram": lambda _: config.TrainUnigram(vocab=400, add=("<tool>",)),
    "pairs": lambda file: config.TiktokenTokenizer(file=str(file), encoding="gpt2", add=("<tool>",)),
    "cl100k": lambda _: config.TiktokenTokenizer(file=str(shared("tiktoken/cl100k_base.tiktoken.gz")), encoding="cl100k_base"),
    "llama2": lambda _: config.SentencePieceTokenizer(file=str(shared("llama2/tokenizer.model")), add=("<tool>",)),
    "mistral": lambda _: config.SentencePieceTokenizer(file=str(shared("mistral/tokenizer.mistral-v3"))),
    "smollm2": lambda _: config.HfTokenizer(file=str(shared("smollm2"))),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_gives_transformers_the_same_ids(name, tmp_path, transformers):
    (tmp_path / "ranks").write_bytes(rank_lines(50_256))
    ours, folder = build(KINDS[name](tmp_path / "ranks"), CORPUS), tmp_path / "written"
    own = ours.prefix() if name == "smollm2" else ()  # what a tokenizer.json says of its beginning stays
    start = own if name == "smollm2" or ours.bos_id is None else (ours.bos_id,)
    save_hugging_face(ours, folder, start=start, context=77, chat_templates={"default": "{{ messages }}"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    once = (lambda ids: sorted(ids)) if name == "unigram" else list  # pieces of equal probability: in any order
    encode = lambda text: once([*start, *ours.encode(text)])
    same_ids(encode, lambda text: once(theirs.encode(text)), ours.special)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.model_max_length == 77 and theirs.chat_template == "{{ messages }}"
    marked = "".join(f"a{token}" for token in list(ours.special)[:5])
    assert theirs.encode(marked, add_special_tokens=False) == ours.encode_marked(marked)
    for text in CORPUS[:1]:
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    again, begins = read_folder(folder)
    assert begins == start and (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert all(once(again.encode(text)) == once(ours.encode(text)) for text in CORPUS)


def test_named_templates_are_written_and_symbols_that_no_tokenizer_json_can_have_are_refused(tmp_path, transformers):
    templates = {"default": "a", "rag": "b"}
    save_hugging_face(build(config.ByteTokenizer()), tmp_path / "t", chat_templates=templates)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "t").chat_template == templates
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(build(config.TrainUnigram(vocab=400), CORPUS).data)
    proto.pieces[-1].type, proto.normalizer_spec.add_dummy_prefix = proto.pieces[-1].USER_DEFINED, True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="its symbols .* cannot be written as a tokenizer.json that gives the same ids"):
        save_hugging_face(read_folder(tmp_path)[0], tmp_path / "u")


# --- much text -----------------------------------------------------------------------------------------------------

MEGABYTES = float(os.environ.get("JAXLLM_TOKENIZER_MB", "1"))


def mixed_text(megabytes):
    """Chunks of text in turn out of corpora, source code and generated Unicode, so many megabytes of UTF-8 in all."""
    import random
    import sysconfig

    def documents(name):
        with lzma.open(SHARED.parent / "corpora" / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]

    def code():
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            yield path.read_text("utf-8", "replace")

    def unicode():
        draw, planes = random.Random(0), [(32, 127), (9, 14), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00),
                                          (0x2000, 0x2700), (0x3040, 0xA000), (0xAC00, 0xD7A4), (0x1F300, 0x1FA00)]  # fmt: skip
        while True:
            letters = (chr(draw.randrange(*draw.choice(planes))) + " " * (draw.random() < 0.15) for _ in range(4000))
            yield "".join(letters)

    names = ("docs_en.jsonl.xz", "gutenberg_books.jsonl.xz", "multilingual_debian_reference_handbook.jsonl.xz")
    sources = [itertools.chain.from_iterable(documents(n) for _ in itertools.count()) for n in names]
    sources += [itertools.chain.from_iterable(code() for _ in itertools.count()), unicode()]
    left = megabytes * 1e6
    for source in itertools.cycle(sources):
        text = next(source)[:20_000]
        yield text
        left -= len(text.encode())
        if left < 0:
            return


def _json(folder):
    import tokenizers

    ours, _ = read_folder(shared("smollm2"))
    model = tokenizers.Tokenizer.from_file(str(shared("smollm2") / "tokenizer.json"))
    model.encode_special_tokens = True
    return ours, lambda texts: [e.ids for e in model.encode_batch(texts, add_special_tokens=False)]


def _sentencepiece(folder):
    shutil.copy(shared("llama2/tokenizer.model"), folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return read_folder(folder)[0], lambda texts: [library.encode(text) for text in texts]


def _tiktoken(folder):
    """Llama 3's ranks, beside the tokenizer.json that others made of them."""
    import tokenizers

    shutil.copy(shared("llama3/tokenizer_llama3.tiktoken"), folder / "tokenizer.model")
    ours, _ = read_folder(folder)
    library = tiktoken.Encoding(
        "llama3", pat_str=ours._encoding._pat_str, mergeable_ranks=ours.ranks, special_tokens=ours.special
    )
    model = tokenizers.Tokenizer.from_buffer(lzma.decompress(shared("llama3/llama3_2.tokenizer.json.xz").read_bytes()))
    model.encode_special_tokens = True

    def theirs(texts):
        ids = library.encode_ordinary_batch(texts, num_threads=1)
        assert ids == [e.ids for e in model.encode_batch(texts, add_special_tokens=False)]
        return ids

    return ours, theirs


def _wordpiece(folder):
    from transformers import BertTokenizer

    shutil.copy(shared("bert/vocab.txt"), folder)
    library = BertTokenizer.from_pretrained(folder)._tokenizer
    library.encode_special_tokens = True
    return read_folder(folder)[0], lambda texts: [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [_json, _sentencepiece, _tiktoken, _wordpiece], ids=lambda kind: kind.__name__[1:])
def test_ids_are_those_of_the_kinds_own_library_on_much_text(kind, tmp_path, transformers, record_property):
    """Megabytes: JAXLLM_TOKENIZER_MB."""
    shared("../corpora/docs_en.jsonl.xz")
    ours, theirs = kind(tmp_path)
    stream, size, tokens = mixed_text(MEGABYTES), 0, 0
    while texts := list(itertools.islice(stream, 64)):
        ids = ours.encode_batch(texts)
        assert ids == theirs(texts)
        size += sum(len(text.encode()) for text in texts)
        tokens += sum(map(len, ids))
    record_property("bytes", size)
    print(f"{kind.__name__[1:]}: {size / 1e6:.1f} MB, {tokens:,} tokens, all ids equal")
    assert size >= MEGABYTES * 1e6
