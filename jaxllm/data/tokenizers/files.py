"""Tokenizers in the folders of models: the files that there may be, what they leave out and other files say.

    tokenizer.json             whatever the tokenizers library reads
    tokenizer.model            SentencePiece, or ranks of tiktoken as Meta's LLaMA 3 has them
    spiece.model               SentencePiece, with ids as the family has them (T5, PEGASUS)
    sentencepiece.bpe.model    likewise (XLM-R, mBART)
    *.tiktoken                 ranks of tiktoken, as Qwen 1 has them
    vocab.json, merges.txt     byte-level BPE (GPT-2)
    vocab.txt                  WordPiece (BERT)

The first of these counts. Names of special tokens and tokens that were added later stand in tokenizer_config.json, or in
special_tokens_map.json and added_tokens.json.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers import unigrams
from jaxllm.data.tokenizers.base import Spec, Tokenizer, byte_alphabet, read_model
from jaxllm.data.tokenizers.beside import ROLES, Beside, Tree, added_token, read_object
from jaxllm.data.tokenizers.export import byte_level, split_by


def read_folder(folder: str | Path) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer in a folder, and the ids that it puts before every text.

    Raises:
      DataError: there is none, or it cannot be used.
    """
    folder = Path(folder)
    said = Beside(folder)
    if (folder / "tokenizer.json").is_file():
        from jaxllm.data.tokenizers.hf import read

        made = read(str(folder), None, None)
        return made, made.prefix()
    if (folder / "tokenizer.model").is_file():
        data = read_model(folder / "tokenizer.model")
        if _is_ranks(data):
            return _tiktoken(data, folder / "tokenizer.model")
        return _sentencepiece(data, folder, said)
    if found := [folder / name for name in unigrams.FILES if (folder / name).is_file()]:
        return _hugging_face(unigrams.read(found[0], said), folder, said)
    if ranks := sorted(folder.glob("*.tiktoken")):
        return _tiktoken(read_model(ranks[0]), ranks[0])
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _hugging_face(_byte_pairs(folder, said), folder, said)
    if (folder / "vocab.txt").is_file():
        return _hugging_face(_wordpiece(folder, said), folder, said)
    raise DataError(f"{folder}: no tokenizer in it; known are {', '.join(FILES)}")


FILES = (
    "tokenizer.json", "tokenizer.model", *unigrams.FILES, "*.tiktoken", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


def is_tokenizer(name: str) -> bool:
    """Whether a file of this name holds a vocabulary."""
    return name in FILES or name.endswith(".tiktoken")


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_folder` would find files to read."""
    names = {p.name for p in folder.iterdir() if is_tokenizer(p.name)}
    pair = {"vocab.json", "merges.txt"}
    if not names >= pair:  # one alone is no tokenizer: Marian has the pieces of its words in other files
        names -= pair
    return unigrams.knows(folder) if names and names <= set(unigrams.FILES) else bool(names)


# --- kinds that have libraries of their own ------------------------------------------------------------------------


def _sentencepiece(data: bytes, folder: Path, said: Beside) -> tuple[Tokenizer, tuple[int, ...]]:
    from jaxllm.data.tokenizers.spm import SentencePiece

    where = str(folder / "tokenizer.model")
    plain = SentencePiece(Spec(kind="sentencepiece"), data, where)
    new = {i: t for i, t in sorted(said.added.items()) if plain.token_id(t["content"]) is None}
    if list(new) != list(range(plain.vocab_size, plain.vocab_size + len(new))):
        raise DataError(
            f"{folder}: its added tokens have ids {_shown(new)}; those of tokenizer.model end with {plain.vocab_size - 1},"
            " and they must follow one another from there"
        )
    names = tuple(t["content"] for t in new.values())
    control = tuple(t["content"] for t in new.values() if t["special"] or t["content"] in said.special)
    known = plain.special.keys() | set(control)
    roles = {role: said.role(role) for role in ("bos", "eos", "pad") if said.role(role) in known}
    made = SentencePiece(Spec(kind="sentencepiece", added=names, control=control, **roles), data, where)
    begins = said.config.get("add_bos_token", True) and made.bos_id is not None
    return made, (made.bos_id,) if begins else ()


def _tiktoken(data: bytes, path: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    from jaxllm.data.tokenizers.ranks import ENCODINGS, Tiktoken, decompressed

    count = sum(1 for line in decompressed(data, str(path)).splitlines() if line)
    fits = [name for name, encoding in ENCODINGS.items() if encoding.ranks == count]
    if not fits:
        known = ", ".join(f"{name} {encoding.ranks}" for name, encoding in ENCODINGS.items())
        raise DataError(f"{path}: {count} tokens are of no encoding that is known here: {known}")
    made = Tiktoken(Spec(kind="tiktoken", encoding=fits[0]), data, str(path))
    return made, () if made.bos_id is None else (made.bos_id,)


def _is_ranks(data: bytes) -> bool:
    token, _, rank = data[: data.find(b"\n")].partition(b" ")
    return rank.strip().isdigit() and token.isascii()


# --- kinds that become a tokenizer.json ----------------------------------------------------------------------------


def _hugging_face(
    made: tuple[Tree, Mapping[str, str | None]], folder: Path, said: Beside
) -> tuple[Tokenizer, tuple[int, ...]]:
    """`made`: the tree of a tokenizer.json, and tokens of roles that files may leave unnamed."""
    from jaxllm.data.tokenizers.hf import HuggingFace, with_added

    tree, defaults = made
    vocab = tree["model"]["vocab"]
    if isinstance(vocab, list):  # unigrams and their scores
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    roles = {role: said.role(role, defaults.get(role)) for role in ROLES}
    special = said.special | {token for token in roles.values() if token}
    tokens = {vocab[token]: added_token(token, special=True) for token in special if token in vocab} | said.added
    data = with_added(json.dumps(tree, ensure_ascii=False).encode(), tokens.items(), str(folder))
    ends = {role: roles[role] for role in ("bos", "eos", "pad")}
    ends = {"bos": ends["bos"] or roles["cls"], "eos": ends["eos"] or roles["sep"], "pad": ends["pad"]}
    known = vocab.keys() | {token["content"] for token in said.added.values()}
    spec = Spec(kind="hf", **{role: token for role, token in ends.items() if token in known})
    tokenizer = HuggingFace(spec, data, str(folder))
    start = tokenizer.prefix()
    if not start and said.config.get("add_bos_token") and tokenizer.bos_id is not None:
        start = (tokenizer.bos_id,)
    return tokenizer, start


def _byte_pairs(folder: Path, said: Beside) -> tuple[Tree, dict[str, str | None]]:
    """Byte-level BPE of vocab.json and merges.txt, split and begun as the class that tokenizer_config.json names does."""
    vocab, merges = read_object(folder / "vocab.json"), _lines(folder / "merges.txt")
    merges = [line for line in merges if line and not line.startswith("#version")]
    kind = str(said.config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    if sum(c not in vocab for c in byte_alphabet()) > 128:  # some lack a few
        raise DataError(
            f"{folder}: vocab.json has no letters for bytes, so it is not byte-level BPE; give a tokenizer.json"
        )
    if wrong := [line for line in merges if line.count(" ") != 1]:
        raise DataError(f"{folder / 'merges.txt'}: {wrong[0]!r} is not two tokens")
    space = bool(said.config.get("add_prefix_space", False))
    if kind.startswith("Qwen"):
        from jaxllm.data.tokenizers.ranks import QWEN

        form = {"split": split_by(QWEN), "normalizer": {"type": "NFC"}}
        return byte_level(vocab, merges, add_prefix_space=space, **form), dict.fromkeys(("eos", "pad"), "<|endoftext|>")
    tree = byte_level(vocab, merges, add_prefix_space=space, gpt2=True)
    if kind not in ROBERTA:
        return tree, dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
    defaults = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>"}
    defaults |= {"mask": "<mask>"}
    return _around(tree, said.role("cls", "<s>"), said.role("sep", "</s>"), vocab, twice=True), defaults


ROBERTA = ("Roberta", "Bart", "LED", "Longformer", "Mvp")  # <s> text </s>


def _wordpiece(folder: Path, said: Beside) -> tuple[Tree, dict[str, str | None]]:
    """WordPiece of vocab.txt, after BERT's cleaning and splitting."""
    vocab = {token: i for i, token in enumerate(_lines(folder / "vocab.txt"))}
    defaults = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    cls, sep, unknown = (said.role(role, defaults[role]) for role in ("cls", "sep", "unk"))
    if unknown not in vocab:
        raise DataError(f"{folder / 'vocab.txt'}: {unknown!r} is not in it, which unknown words become")
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "lowercase": said.config.get("do_lower_case", True),
            "handle_chinese_chars": said.config.get("tokenize_chinese_chars", True),
            "strip_accents": said.config.get("strip_accents"),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab,
        },
    }  # fmt: skip
    return _around(tree, cls, sep, vocab), defaults


def _around(tree: Tree, first: str | None, last: str | None, vocab: Mapping[str, int], *, twice: bool = False) -> Tree:
    """`tree` with a token before and one after every text; between two of them one, or two (`twice`)."""
    if first not in vocab or last not in vocab:
        return tree
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (first, last))
    a, b = ({"Sequence": {"id": name, "type_id": int(n and not twice)}} for n, name in enumerate("AB"))
    more = [{"SpecialToken": {"id": last, "type_id": 0 if twice else 1}}]
    known = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (first, last)}
    tree["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, a, end],
        "pair": [begin, a, end, *([end] if twice else []), b, *more], "special_tokens": known,
    }  # fmt: skip
    return tree


def _lines(path: Path) -> list[str]:
    try:
        text = read_model(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 ({e})") from None
    return text.removesuffix("\n").split("\n") if "\r\n" not in text else text.removesuffix("\r\n").split("\r\n")


def _shown(ids: Iterable[int]) -> str:
    ids = list(ids)
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
