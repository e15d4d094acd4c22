"""Training of tokenizers: the same texts and settings give the same bytes, on any number of cores."""

import io
import re
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data import config
from jaxllm.data.tokenizers.base import Spec, Tokenizer, byte_alphabet, check_added
from jaxllm.data.tokenizers.hf import HuggingFace

_ROLES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "bos": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
}


def train(cfg: config.TrainBpe | config.TrainUnigram | config.TrainWordPiece, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer learned from the first `sample_mb` of `texts`, of at most `vocab` tokens: fewer if the text is short.

    Begin and end of document and padding are the special tokens with a name usual for them, such as <bos>, </s>, [PAD].

    Raises:
      ConfigError: for a vocabulary too small for the special tokens and the alphabet.
      DataError: for texts without text.
    """
    check(cfg)
    sample = _sample(texts, cfg.sample_mb * 1e6)
    match cfg:
        case config.TrainBpe():
            return _bpe(cfg, sample)
        case config.TrainUnigram():
            return _unigram(cfg, sample)
        case config.TrainWordPiece():
            return _wordpiece(cfg, sample)


def check(cfg: config.TrainBpe | config.TrainUnigram | config.TrainWordPiece) -> None:
    """Returns if nothing in the config alone rules this tokenizer out; some faults only the text shows.

    Raises:
      ConfigError: for special and added tokens that clash, and a vocabulary too small for any text.
    """
    if len(set(cfg.special)) < len(cfg.special) or "" in cfg.special:
        raise ConfigError(f"tokenizer.special={list(cfg.special)} must be different names, none empty")
    match cfg:
        case config.TrainBpe():
            _fits(cfg, 256, "256 bytes")
        case config.TrainUnigram():
            _fits(cfg, 257 - ("<unk>" in cfg.special), "<unk> and 256 bytes")
        case config.TrainWordPiece():
            if "[UNK]" not in cfg.special:
                raise ConfigError(f"tokenizer.special={list(cfg.special)} must hold '[UNK]', what unknown words become")
            _fits(cfg, 1, "one character")
    check_added(cfg.add, {name: i for i, name in enumerate(cfg.special)}.get)


def _bpe(cfg: config.TrainBpe, sample: list[str]) -> HuggingFace:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab,
        min_frequency=2,
        special_tokens=list(cfg.special),
        initial_alphabet=sorted(byte_alphabet()),  # every byte, so that no text is unknown
        show_progress=False,
    )
    model.train_from_iterator(_pieces(sample), trainer)
    return _hugging_face(cfg, model)


def _wordpiece(cfg: config.TrainWordPiece, sample: list[str]) -> HuggingFace:
    """In two passes, since the library numbers `##x` in the order of a randomly seeded hash map.

    The first pass only collects the alphabet; the second is given it, sorted, as if it were special tokens.
    """

    def trained(size: int, first: list[str]) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        model.normalizer = normalizers.BertNormalizer(lowercase=cfg.lowercase)
        model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False)
        model.train_from_iterator(_pieces(sample), trainer)
        return model

    alphabet = sorted(trained(1, []).get_vocab())
    _fits(cfg, len(alphabet), f"{len(alphabet)} characters")
    model = trained(cfg.vocab, [*cfg.special, *(c for c in alphabet if c not in cfg.special)])
    whole = tokenizers.Tokenizer(models.WordPiece(model.get_vocab(), unk_token="[UNK]"))
    whole.normalizer, whole.pre_tokenizer = model.normalizer, model.pre_tokenizer
    whole.decoder = decoders.WordPiece()
    whole.add_special_tokens(list(cfg.special))
    return _hugging_face(cfg, whole)


def _unigram(cfg: config.TrainUnigram, sample: list[str]) -> Tokenizer:
    """By the sentencepiece trainer: that of `tokenizers` gives another vocabulary in each process.

    Nothing is normalised and rare characters fall back to bytes, so nothing is unknown. Lines are learned one by one:
    a newline is a byte.
    """
    import sentencepiece

    from jaxllm.data.tokenizers.spm import SentencePiece

    unknown = "<unk>" if "<unk>" in cfg.special else None
    roles = _roles(cfg.special)
    ids = {role: cfg.special.index(roles[role]) if role in roles else -1 for role in _ROLES}
    ids["unk"] = cfg.special.index(unknown) if unknown else len(cfg.special)
    pieces = {f"{role}_piece": name for role, name in (roles | {"unk": "<unk>"}).items()}
    named = {*roles.values(), "<unk>"}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(line for text in sample for line in text.split("\n")),
            model_writer=model,
            model_type="unigram",
            vocab_size=cfg.vocab,
            hard_vocab_limit=False,  # short texts give fewer
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            max_sentence_length=4 * _PIECE,
            control_symbols=[name for name in cfg.special if name not in named],  # take the ids left free, in order
            num_threads=4,  # fixed: sums are grouped by thread, so the number is part of the result
            minloglevel=2,
            **{f"{role}_id": i for role, i in ids.items()},
            **pieces,
        )
    except RuntimeError as e:
        if (need := re.search(r"required_chars\. \d+ vs (\d+)", str(e))) is None:
            raise
        raise ConfigError(
            f"tokenizer.vocab={cfg.vocab} is too small for the characters of this text: at least {need[1]}"
        ) from None
    return SentencePiece(Spec(kind="sentencepiece"), model.getvalue())


_PIECE = 4096  # characters learned from at once: the trainers' time grows with the square of the longest word
_CUT = re.compile(rf"(?s).{{1,{_PIECE}}}(?=\s\S|\Z)|.{{1,{_PIECE}}}")


def _pieces(texts: Iterable[str]) -> Iterable[str]:
    """The texts in pieces of at most 4096 characters: cut before a space, and inside a word only if it is longer."""
    return (piece[0] for text in texts for piece in _CUT.finditer(text))


def _sample(texts: Iterable[str], size: float) -> list[str]:
    sample, taken = [], 0
    for text in texts:
        sample.append(text)
        taken += len(text.encode())
        if taken >= size:
            break
    if not any(text.strip() for text in sample):
        raise DataError("no text to train a tokenizer on: the training split is empty; add files or lower `validation`")
    return sample


def _fits(cfg: config.TrainBpe | config.TrainUnigram | config.TrainWordPiece, alphabet: int, what: str) -> None:
    need = len(cfg.special) + alphabet
    if cfg.vocab < need:
        room = f"{len(cfg.special)} special tokens and {what}"
        raise ConfigError(f"tokenizer.vocab={cfg.vocab} is too small for {room}: at least {need}")


def _roles(special: tuple[str, ...]) -> dict[str, str]:
    """Role -> the special token that has it, by name."""
    found = {role: next((n for n in names if n in special), None) for role, names in _ROLES.items()}
    return {role: name for role, name in found.items() if name}


def _hugging_face(cfg: config.TrainBpe | config.TrainWordPiece, model: tokenizers.Tokenizer) -> HuggingFace:
    return HuggingFace(Spec(kind="hf", **_roles(cfg.special)), model.to_str().encode())
