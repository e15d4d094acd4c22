import base64
import functools
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data import config
from jaxllm.data.tokenizers import StreamDecoder, build, load
from jaxllm.data.tokenizers.ranks import ENCODINGS

SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2].parent / "shared")) / "data/tokenizers"
CORPUS = [Path(m.__file__).read_text("utf-8") for m in (json, functools, re, gzip, random)]
CORPUS += ["Größe 中文 \U0001f600 ñandú"] * 3


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the real tokenizer file {path} (set JAXLLM_SHARED)")
    return str(path)


def rank_lines(count):
    """A rank file of single bytes and pairs of bytes."""
    tokens = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens[:count]))


CONFIGS = {
    "byte": lambda folder: config.ByteTokenizer(),
    "bpe": lambda folder: config.TrainBpe(vocab=600),
    "wordpiece": lambda folder: config.TrainWordPiece(vocab=600),
    "unigram": lambda folder: config.TrainUnigram(vocab=600),
    "pairs": lambda folder: config.TiktokenTokenizer(file=str(folder / "pairs.tiktoken"), encoding="gpt2"),
    "cl100k": lambda _: config.TiktokenTokenizer(
        file=shared("tiktoken/cl100k_base.tiktoken.gz"), encoding="cl100k_base"
    ),
    "llama3": lambda _: config.TiktokenTokenizer(file=shared("llama3/tokenizer_llama3.tiktoken"), encoding="llama3"),
    "llama2": lambda _: config.SentencePieceTokenizer(file=shared("llama2/tokenizer.model")),
    "mistral": lambda _: config.SentencePieceTokenizer(file=shared("mistral/tokenizer.mistral-v3")),
    "t5": lambda _: config.SentencePieceTokenizer(file=shared("t5/maxtext_tokenizer.default.model")),
    "smollm2": lambda _: config.HfTokenizer(file=shared("smollm2")),
    "bert": lambda _: config.HfTokenizer(file=shared("bert/minilm_tokenizer.json"), bos="[CLS]", eos="[SEP]"),
}
LOSSLESS = ["byte", "bpe", "pairs", "cl100k", "llama3"]


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """`kinds(name)`: the tokenizer of that name, built once."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "pairs.tiktoken").write_bytes(rank_lines(50256))
    return functools.cache(lambda name: build(CONFIGS[name](folder), CORPUS))


every_kind = pytest.mark.parametrize("name", CONFIGS)
SNIPPETS = [
    "def f(x):\n    return x", "  leading", "trailing  ", "\n\n\n", "\r\n", "\t\t", "don't", "I'LL", "123456", "naïve",
    "中文字", "日本語", "한국", "العربية", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u0301", "\x00", "\x1b[0m",
    "\u2028", "\u2581", "\ufffd", "\ufeff", "<bos>", "<|endoftext|>", "</s>", "[MASK]", "<0x41>", "##ing", " ", "a",
]  # fmt: skip
PART = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(SNIPPETS)
TEXT = st.lists(PART, max_size=6).map("".join)
quick = settings(max_examples=60, deadline=None, derandomize=True)


# --- ids and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
@quick
@given(text=TEXT)
def test_a_lossless_tokenizer_gives_every_text_back(kinds, name, text):
    tokenizer = kinds(name)
    ids = tokenizer.encode(text)
    assert tokenizer.lossless and tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == text.encode()


@quick
@given(text=TEXT)
def test_trained_unigram_gives_every_text_back_but_for_the_sign_it_keeps_for_spaces(kinds, text):
    tokenizer = kinds("unigram")
    assert not tokenizer.lossless and tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@every_kind
@quick
@given(texts=st.lists(TEXT, max_size=4))
def test_a_batch_encodes_as_its_texts_do_alone_and_to_no_special_token(kinds, name, texts):
    tokenizer = kinds(name)
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    unknown = {tokenizer.token_id(t) for t in ("[UNK]", "<unk>")}
    assert not {i for ids in batch for i in ids} & (set(tokenizer.special.values()) - unknown)
    assert all(0 <= i < tokenizer.vocab_size for ids in batch for i in ids)


@every_kind
def test_special_tokens_and_ids_of_no_token_decode_to_nothing(kinds, name):
    tokenizer = kinds(name)
    ids = tokenizer.encode("abc")
    noise = [*tokenizer.special.values(), tokenizer.vocab_size, tokenizer.vocab_size + 1000, -1]
    assert tokenizer.decode(noise) == "" and tokenizer.decode([*noise, *ids, *noise]) == tokenizer.decode(ids)
    assert all(tokenizer.id_to_bytes(i) == b"" for i in tokenizer.special.values())


@every_kind
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_whole(kinds, name, data):
    tokenizer = kinds(name)
    some = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, min(300, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(some, max_size=12)) + tokenizer.encode(data.draw(TEXT))
    at = data.draw(st.integers(0, len(ids)))
    stream, alone = StreamDecoder(tokenizer, ids[:at]), StreamDecoder(tokenizer)
    assert "".join([alone.feed(i) for i in ids] + [alone.finish()]) == tokenizer.decode(ids)
    said = tokenizer.decode(ids[:at]).rstrip("\ufffd")  # a character the context left unfinished is ours to finish
    assert said + "".join([stream.feed(i) for i in ids[at:]] + [stream.finish()]) == tokenizer.decode(ids)


def test_streaming_waits_for_whole_characters_and_keeps_the_space_before_a_word(kinds):
    euro = list("€".encode())
    stream = StreamDecoder(kinds("byte"))
    assert [stream.feed(i) for i in [*euro, euro[0], 65]] == ["", "", "€", "", "\ufffdA"]
    assert stream.feed(euro[0]) == "" and stream.finish() == "\ufffd"
    llama = kinds("llama2")
    hello, world = llama.encode("Hello"), llama.encode("world")
    assert llama.decode(world) == "world"
    stream = StreamDecoder(llama, hello)
    assert "".join(map(stream.feed, world)) + stream.finish() == " world"
    t5 = kinds("t5")  # drops all leading spaces, so a lone one is no context
    ids = [t5.token_id(piece) for piece in ("\u2581the", "\u2581", "\u2581the")]
    assert "".join(map(StreamDecoder(t5).feed, ids)) == t5.decode(ids) == "the  the"


@every_kind
def test_id_to_bytes_is_what_streaming_gives_in_the_middle_of_a_text(kinds, name):
    tokenizer = kinds(name)
    start = tokenizer.encode("hello")
    for i in tokenizer.encode("a plain text, read by words"):
        stream = StreamDecoder(tokenizer, start)
        assert (stream.feed(i) + stream.finish()).encode() == tokenizer.id_to_bytes(i)


# --- the libraries as oracles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_tiktoken_gives_the_ids_of_its_own_pattern(encoding, monkeypatch):
    """The library's definition of the encoding, its download replaced by the same file from disk."""
    from tiktoken_ext import openai_public

    path = shared(f"tiktoken/{encoding}.tiktoken.gz")
    ours = build(config.TiktokenTokenizer(file=path, encoding=encoding))
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ours.ranks)
    theirs = tiktoken.Encoding(**getattr(openai_public, encoding)())
    assert ours.vocab_size == theirs.n_vocab and ours.special == theirs._special_tokens
    assert (ours.bos_id, ours.eos_id) == (None, theirs.eot_token)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text) and ours.decode(ids) == theirs.decode(ids)

    check()
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_llama3_ranks_and_its_tokenizer_json_give_the_same_ids_and_special_tokens(tmp_path, kinds):
    ours = kinds("llama3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(lzma.decompress(Path(shared(f"llama3/llama3_2.{name}.xz")).read_bytes()))
    theirs = build(config.HfTokenizer(file=str(tmp_path), eos="<|end_of_text|>"))
    assert ours.special == theirs.special and ours.vocab_size == theirs.vocab_size == 128_256
    assert theirs.lossless and theirs.eos_id == ours.eos_id == 128_001
    assert theirs.token_id("<|begin_of_text|>") == ours.bos_id == 128_000

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and theirs.decode(ids) == text

    check()


def test_gpt2_merges_and_r50k_ranks_give_the_same_ids(tmp_path):
    vocab = json.loads(Path(shared("gpt2/encoder.json")).read_text())
    merges = [tuple(m.split()) for m in Path(shared("gpt2/vocab.bpe")).read_text().splitlines()[1:]]
    model = library.Tokenizer(library.models.BPE(vocab, merges))
    model.pre_tokenizer, model.decoder = library.pre_tokenizers.ByteLevel(False), library.decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "bos_token": null}')
    merged = build(config.HfTokenizer(file=str(tmp_path / "tokenizer.json")))
    ranked = build(config.TiktokenTokenizer(file=shared("tiktoken/r50k_base.tiktoken.gz"), encoding="gpt2"))
    assert merged.vocab_size == ranked.vocab_size == 50257 and merged.eos_id == ranked.eos_id == 50256
    assert merged.bos_id is ranked.bos_id is None and merged.encode_batch(CORPUS) == ranked.encode_batch(CORPUS)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        assert merged.encode(text) == ranked.encode(text)

    check()


@pytest.mark.parametrize("name", ["llama2", "mistral", "t5"])
def test_sentencepiece_gives_the_ids_and_text_of_its_library(kinds, name):
    ours = kinds(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=CONFIGS[name](None).file)
    assert ours.vocab_size == theirs.vocab_size()
    assert [-1 if i is None else i for i in (ours.bos_id, ours.eos_id, ours.pad_id)] == [
        theirs.bos_id(), theirs.eos_id(), theirs.pad_id()
    ]  # fmt: skip

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids)

    check()


@pytest.mark.parametrize("name", ["smollm2", "bert", "bpe", "wordpiece"])
def test_tokenizer_json_gives_the_ids_and_text_of_its_library(kinds, name):
    ours = kinds(name)
    theirs = library.Tokenizer.from_buffer(ours.data)
    theirs.no_truncation(), theirs.no_padding()
    specials = re.compile("|".join(map(re.escape, ours.special)))

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(text=TEXT)
    def check(text):
        text = specials.sub("", text)  # there the library would give the special token
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)

    check()


def test_wordpiece_of_a_vocabulary_is_bert_and_long_texts_are_not_cut(kinds):
    bert = kinds("bert")
    vocab = Path(shared("bert/vocab.txt")).read_text().splitlines()
    assert [vocab[i] for i in bert.encode("Unaffable tokenizers, 中!")] == [
        "una", "##ffa", "##ble", "token", "##izer", "##s", ",", "中", "!"
    ]  # fmt: skip
    assert (bert.bos_id, bert.eos_id, bert.vocab_size) == (101, 102, 30522)
    assert len(bert.encode("word " * 1000)) == 1000  # its file asks to cut at 128


def test_smollm2_takes_its_ends_from_the_file_beside_it_or_from_the_config(kinds):
    tokenizer = kinds("smollm2")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert build(config.HfTokenizer(file=shared("smollm2"), eos="<|endoftext|>")).eos_id == 0
    assert not tokenizer.lossless  # its vocabulary lacks 21 bytes
    with pytest.raises(ConfigError, match=r"tokenizer\.json: eos='</s>' is not in its vocabulary"):
        build(config.HfTokenizer(file=shared("smollm2"), eos="</s>"))


def test_a_megabyte_of_spaces_does_not_overflow_tiktoken(kinds):
    assert len(kinds("pairs").encode(" " * 1_000_000)) == 500_000
    for tail in ("", "a", "\n"):
        text = "start" + " " * 1_500_000 + tail
        assert kinds("cl100k").decode(kinds("cl100k").encode(text)) == text


# --- added tokens ------------------------------------------------------------------------------------------------

ADDED = ("<tool>", "<tool>s", "é¤", "new token", "中中")


@every_kind
@quick
@given(parts=st.lists(TEXT | st.sampled_from(ADDED), max_size=5))
def test_added_tokens_are_one_id_each_and_the_rest_keeps_its_ids(kinds, name, parts):
    old = kinds(name)
    new = _extended(old)
    ids = range(old.vocab_size, old.vocab_size + len(ADDED))
    assert [new.encode(token) for token in ADDED] == [[i] for i in ids]
    assert [new.decode([i]) for i in ids] == list(ADDED) and [new.id_to_bytes(i).decode() for i in ids] == list(ADDED)
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    text = "".join(parts)
    if name != "bert" and name != "wordpiece":  # those give words in a row the spaces they had not
        assert new.decode(new.encode(text)) == "".join(
            part if n % 2 else old.decode(old.encode(part)) for n, part in enumerate(_split(text))
        )
    plain = "".join(_split(text)[::2])
    assert any(token in plain for token in ADDED) or new.encode(plain) == old.encode(plain)


@functools.cache
def _extended(tokenizer):
    return tokenizer.extend(ADDED)


def _split(text):
    return re.split("(<tool>s|<tool>|é¤|new token|中中)", text)


@every_kind
def test_a_token_that_is_there_or_empty_cannot_be_added(kinds, name):
    tokenizer = kinds(name)
    known = next(iter(tokenizer.special))
    for tokens, message in {
        (known,): f"{re.escape(repr(known))} is already token {tokenizer.special[known]} of the vocabulary",
        ("",): "'' is empty",
        ("<n>", "<n>"): "'<n>' is given twice",
    }.items():
        with pytest.raises(ConfigError, match=message):
            tokenizer.extend(tokens)
    once = tokenizer.extend(["<n>"])
    with pytest.raises(ConfigError, match=f"'<n>' is already token {tokenizer.vocab_size}"):
        once.extend(["<n>"])
    assert once.extend(["<m>"]).encode("<m><n>") == [tokenizer.vocab_size + 1, tokenizer.vocab_size]


# --- folders and fingerprints ------------------------------------------------------------------------------------


@every_kind
def test_a_saved_folder_loads_anywhere_with_the_same_ids_and_fingerprint(kinds, name, tmp_path):
    for tokenizer in (kinds(name), _extended(kinds(name))):
        tokenizer.save(tmp_path / "here")
        shutil.move(tmp_path / "here", tmp_path / "there")
        again = load(tmp_path / "there")
        assert again.fingerprint() == tokenizer.fingerprint() and again.vocab_size == tokenizer.vocab_size
        assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert again.encode_batch(CORPUS + [*ADDED]) == tokenizer.encode_batch(CORPUS + [*ADDED])
        again.save(tmp_path / "twice")
        for file in (tmp_path / "there").iterdir():
            assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()
        shutil.rmtree(tmp_path / "there"), shutil.rmtree(tmp_path / "twice")
    assert _extended(kinds(name)).fingerprint() != kinds(name).fingerprint()


def test_fingerprints_tell_kinds_apart_and_not_a_compressed_file_from_a_plain_one(kinds, tmp_path):
    names = ("byte", "bpe", "wordpiece", "unigram", "pairs")
    assert len({kinds(name).fingerprint() for name in names}) == len(names)
    (tmp_path / "p.gz").write_bytes(gzip.compress(rank_lines(50256)))
    packed = build(config.TiktokenTokenizer(file=str(tmp_path / "p.gz"), encoding="gpt2"))
    assert packed.fingerprint() == kinds("pairs").fingerprint()
    other = build(config.TiktokenTokenizer(file=str(tmp_path / "p.gz"), encoding="r50k_base"))
    assert other.fingerprint() != packed.fingerprint()


# --- training ----------------------------------------------------------------------------------------------------

TRAINED = [config.TrainBpe(vocab=700), config.TrainUnigram(vocab=700), config.TrainWordPiece(vocab=700)]
TRAIN = """
from collections import Counter
from jaxllm.data import config, sources, tokenizers
files = config.PythonSource(package="json"), config.PythonSource(package="email")
texts = [d.text for f in files for d in sources.documents(f, max_bytes=10**7, on_error="stop", counts=Counter())]
for kind in (config.TrainBpe, config.TrainUnigram, config.TrainWordPiece):
    print(tokenizers.build(kind(vocab=700), texts).fingerprint())
"""


def test_training_gives_the_same_bytes_in_any_process_on_any_number_of_threads():
    prints = set()
    for seed, threads, parallel in (("0", "1", "false"), ("1", "4", "true"), ("2", "2", "true")):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel}
        out = subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True, check=True)
        prints.add(out.stdout)
    assert len(prints) == 1 and len(set(prints.pop().split())) == 3


@pytest.mark.parametrize("cfg", TRAINED, ids=lambda cfg: cfg.kind)
def test_training_gives_the_vocabulary_asked_for_special_tokens_first_and_learns(cfg):
    special = (*cfg.special, "<extra>")
    tokenizer = build(cfg.model_copy(update={"special": special, "add": ("<added>",)}), CORPUS)
    assert tokenizer.vocab_size == 701 and tokenizer.encode("<added>") == [700]
    assert tokenizer.special == {name: i for i, name in enumerate(special)}
    assert None not in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert len(tokenizer.encode(CORPUS[0])) < 0.5 * len(CORPUS[0])


def test_a_text_too_short_for_the_vocabulary_gives_a_smaller_one():
    for cfg in TRAINED:
        tokenizer = build(cfg, ["hello hello world"])
        assert tokenizer.vocab_size < 700 and len(tokenizer.encode("hello")) > 0


@pytest.mark.parametrize(
    ("cfg", "need"),
    [
        (config.TrainBpe(vocab=258), 259),
        (config.TrainUnigram(vocab=259), 260),
        (config.TrainUnigram(vocab=262), None),
        (config.TrainWordPiece(vocab=20), None),
    ],
)
def test_a_vocabulary_without_room_for_the_alphabet_says_how_much_it_needs(cfg, need):
    with pytest.raises(ConfigError, match=rf"tokenizer\.vocab={cfg.vocab} is too small for .* at least (\d+)") as e:
        build(cfg, CORPUS)
    least = int(str(e.value).rpartition(" ")[2])
    assert need in (None, least)
    if need is None:
        assert build(cfg.model_copy(update={"vocab": least}), CORPUS).vocab_size == least


def test_byte_level_bpe_holds_every_byte_whatever_it_learned_from():
    tokenizer = build(config.TrainBpe(vocab=300), ["aaaa"])
    assert sorted(tokenizer.id_to_bytes(i) for i in range(3, 259)) == [bytes([b]) for b in range(256)]


def test_only_the_first_megabytes_are_learned_from_and_nothing_is_an_error():
    cfg = config.TrainBpe(vocab=400, sample_mb=0.001)
    endless = (text for _ in iter(int, 1) for text in CORPUS)
    assert build(cfg, endless).fingerprint() == build(cfg, CORPUS[:1]).fingerprint()
    for nothing in ([], ["", " \n"]):
        for cfg in TRAINED:
            with pytest.raises(DataError, match="no text to train a tokenizer on"):
                build(cfg, nothing)


@pytest.mark.parametrize("kind", [config.TrainBpe, config.TrainWordPiece])
def test_a_long_text_is_learned_from_word_by_word_wherever_it_is_cut(kind):
    words = [f" {word}" for word in ("learning  from\n\na text, it isn't 12 words: " * 700).split(" ")]
    cuts = range(0, len(words), 97)
    cfg = kind(vocab=400)
    assert (
        build(cfg, ["".join(words)]).fingerprint()
        == build(cfg, ["".join(words[i : i + 97]) for i in cuts]).fingerprint()
    )


def test_special_tokens_must_differ_and_wordpiece_needs_one_for_the_unknown():
    with pytest.raises(ConfigError, match="must be different names"):
        build(config.TrainBpe(vocab=300, special=("<a>", "<a>")), CORPUS)
    with pytest.raises(ConfigError, match=r"must hold '\[UNK\]'"):
        build(config.TrainWordPiece(vocab=300, special=("<pad>",)), CORPUS)


def test_ends_are_found_by_their_usual_names():
    tokenizer = build(config.TrainUnigram(vocab=400, special=("<x>", "<|endoftext|>", "<unk>", "a,b")), CORPUS[:1])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, None)
    assert tokenizer.special == {"<x>": 0, "<|endoftext|>": 1, "a,b": 3} and tokenizer.token_id("<unk>") == 2


# --- bad files ---------------------------------------------------------------------------------------------------


def _file_configs(path):
    return [
        config.HfTokenizer(file=path),
        config.SentencePieceTokenizer(file=path),
        config.TiktokenTokenizer(file=path, encoding="gpt2"),
    ]


@pytest.mark.parametrize("kind", range(3), ids=["hf", "sentencepiece", "tiktoken"])
def test_bad_model_files_are_named(kinds, kind, tmp_path):
    path = tmp_path / "model"
    good = [kinds("bpe").data, kinds("unigram").data, kinds("pairs").data]
    bad = {
        b"": "the tokenizer file is empty",
        b"\x00\x01garbage": None,
        b"{}": None,
        b'{"version": "1.0"}': None,
        good[kind][: len(good[kind]) // 2]: "truncated",
        gzip.compress(good[kind])[:100]: "truncated",
        good[(kind + 1) % 3]: None,
        good[(kind + 2) % 3]: None,
    }
    cfg = _file_configs(str(path))[kind]
    with pytest.raises(DataError, match="model: no such tokenizer file"):
        build(cfg)
    for data, message in bad.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"model.*{message or ''}"):
            build(cfg)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="model.*(no such tokenizer file|cannot be read)"):
        build(cfg)


def test_ranks_of_another_encoding_are_noticed(tmp_path):
    (tmp_path / "r").write_bytes(rank_lines(50256))
    for encoding in set(ENCODINGS) - {"gpt2", "r50k_base"}:
        with pytest.raises(DataError, match=f"r: 50256 tokens, but {encoding} has {ENCODINGS[encoding].ranks}"):
            build(config.TiktokenTokenizer(file=str(tmp_path / "r"), encoding=encoding))
    (tmp_path / "r").write_bytes(rank_lines(300) + b"!!! 3\n")
    with pytest.raises(DataError, match="r, line 301: b'!!! 3' is not a base64 token and its rank"):
        build(config.TiktokenTokenizer(file=str(tmp_path / "r"), encoding="gpt2"))


def test_damaged_saved_folders_are_named(kinds, tmp_path):
    with pytest.raises(DataError, match=r"no saved tokenizer: tokenizer\.yaml is missing"):
        load(tmp_path)
    kinds("bpe").save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: no such tokenizer file"):
        load(tmp_path)
    for text in ("", "kind: magic\n", "kind: [", "kind: tiktoken\n", "version: 2\nkind: byte\n"):
        (tmp_path / "tokenizer.yaml").write_text(text)
        with pytest.raises(DataError, match=r"tokenizer\.yaml: not the description of a saved tokenizer"):
            load(tmp_path)
    kinds("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('["not", "a", "mapping"]')
    with pytest.raises(DataError, match=r"tokenizer_config\.json: must be an object, got list; mend it"):
        build(config.HfTokenizer(file=str(tmp_path)))


def test_a_vocabulary_with_gaps_is_not_extended(tmp_path):
    model = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "a": 5}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build(config.HfTokenizer(file=str(tmp_path)))
    assert tokenizer.vocab_size == 6 and tokenizer.decode([0, 3, 5]) == "[UNK] a"
    with pytest.raises(DataError, match="its vocabulary of 6 ids has gaps"):
        tokenizer.extend(["<n>"])
