"""SentencePiece files whose ids a family moves: the same ids as transformers and the sentencepiece library give."""

import json
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers import load
from jaxllm.data.tokenizers.files import has_tokenizer, read_folder
from tests.data.test_tokenizer_files import same_ids, write

TEXT = Path(json.__file__).read_text("utf-8") + "Äpfel naïve ½ Привет мир 你好世界 don't " * 20
FIRST_THREE = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
FILE = {  # class: file, ids of its control pieces, what is added to the id of a piece
    "T5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, 0),
    "XLMRoberta": ("sentencepiece.bpe.model", FIRST_THREE, 1),
    "Camembert": ("sentencepiece.bpe.model", FIRST_THREE, 4),
    "MBart": ("sentencepiece.bpe.model", FIRST_THREE | {"normalization_rule_name": "identity"}, 1),
    "MBart50": ("sentencepiece.bpe.model", FIRST_THREE, 1),
    "Pegasus": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, 103),
    "Albert": (
        "spiece.model",
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}, 0,
    ),
    "XLNet": (
        "spiece.model", FIRST_THREE | {"control_symbols": "<cls> <sep> <pad> <mask> <eod> <eop>".split()}, 0
    ),
}  # fmt: skip


def plain(kind: str, text: str) -> str:
    """What a family makes of text before its file does."""
    if kind in ("Albert", "XLNet"):
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.lower() if kind == "Albert" else text


SPECIAL = ("<", "NOTUSED", "_", "[CLS]", "[SEP]", "[MASK]")  # of tokens that transformers finds in text


def trained(path: Path, **control) -> sentencepiece.SentencePieceProcessor:
    """A small model of unigrams, written to `path`."""
    with open(path, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()), model_writer=out, model_type="unigram",
            character_coverage=0.995, minloglevel=2, **{"vocab_size": 300} | control,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("kind", FILE)
def test_a_sentencepiece_file_has_the_ids_of_its_family(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, control, moved = FILE[kind]
    library = trained(tmp_path / name, **control)
    said = {"tokenizer_class": f"{kind}Tokenizer"} | ({"src_lang": "ro_RO"} if kind.startswith("MBart") else {})
    write(tmp_path, tokenizer_config=said)
    assert has_tokenizer(tmp_path)
    ours, start = read_folder(tmp_path)
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path)
    whole = lambda text: [*start, *ours.encode(text), *ours.suffix()]
    same_ids(whole, theirs.encode, SPECIAL)
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    tokens = [f"<extra_id_{i}>" for i in (0, 99)] if kind == "T5" else ["en_XX", "zh_CN"] if "MBart" in kind else []
    if tokens:
        assert [ours.token_id(t) for t in tokens] == theirs.convert_tokens_to_ids(tokens)
    for text in ("Return a str, don't raise.", "def load(fp): object_hook is  used", "Äpfel и 你"):
        pieces = library.encode(plain(kind, text))
        assert ours.encode(text) == [theirs.unk_token_id if i == library.unk_id() else i + moved for i in pieces]
        decoded = theirs.decode(ours.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ours.encode(text)) == decoded
    ours.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.prefix(), again.encode(TEXT), again.suffix()) == (start, ours.encode(TEXT), ours.suffix())


def test_what_no_piece_has_becomes_bytes_where_the_file_says_so(tmp_path):
    library = trained(tmp_path / "spiece.model", **FILE["T5"][1], byte_fallback=True, vocab_size=600)
    write(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    ours, _ = read_folder(tmp_path)
    for text in ("a 🦩 b", "日本", "plain text"):
        assert ours.encode(text) == library.encode(text) and ours.decode(ours.encode(text)) == text
    assert library.unk_id() not in library.encode("a 🦩 b")


def test_the_family_is_known_by_the_model_where_no_tokenizer_class_is_named(tmp_path):
    trained(tmp_path / "spiece.model", **FILE["T5"][1])
    write(tmp_path, config={"model_type": "mt5"}, tokenizer_config={"extra_ids": 0})
    ours, start = read_folder(tmp_path)
    assert (ours.vocab_size, start, ours.suffix(), ours.token_id("<extra_id_0>")) == (300, (), (1,), None)
    write(tmp_path, config={"model_type": "reformer"})
    assert not has_tokenizer(tmp_path)
    with pytest.raises(DataError, match="ids of a SentencePiece model of model_type='reformer' are not known here"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"tokenizer_class": "MBartTokenizer", "src_lang": "xx_XX"}, "'xx_XX', which is put around texts, is no token"),
        ({"tokenizer_class": "T5Tokenizer", "extra_ids": -1}, "extra_ids=-1 must be a number of tokens"),
        ({"tokenizer_class": "PegasusTokenizer", "offset": "far"}, "offset='far' must be how far ids are moved"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(said, reason, tmp_path):
    trained(tmp_path / "spiece.model", **FIRST_THREE)
    write(tmp_path, tokenizer_config=said)
    with pytest.raises(DataError, match=reason):
        read_folder(tmp_path)


def test_a_file_that_is_no_model_of_unigrams_is_refused(tmp_path):
    write(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    (tmp_path / "spiece.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="not a SentencePiece model, or a truncated one"):
        read_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(DataError, match="the tokenizer file is empty"):
        read_folder(tmp_path)
