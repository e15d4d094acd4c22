"""Hugging Face `tokenizer.json` files, read by the tokenizers library."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from jaxllm.core.errors import ConfigError, DataError
from jaxllm.data.tokenizers.base import Spec, Tokenizer, byte_alphabet, read_model
from jaxllm.data.tokenizers.beside import Beside, Tree


class HuggingFace(Tokenizer):
    """Added tokens live in the file itself, so a saved folder is whole for other programs too."""

    file = "tokenizer.json"

    def __init__(self, spec: Spec, data: bytes, where: str = "tokenizer.json"):
        self._model = _tried(parsed(data, where), where)
        self._model.no_truncation()  # files made for sentence embeddings cut and pad what they encode
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that looks like a special token is text
        tree = json.loads(data)
        byte_level = (tree.get("decoder") or {}).get("type") == "ByteLevel"
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.lossless = (
            byte_level
            and tree.get("normalizer") is None
            and '"add_prefix_space": true' not in json.dumps(tree.get("pre_tokenizer"))
            and all(c in vocab for c in byte_alphabet())
        )
        self._byte_level = byte_level
        self._contents = {i: t.content for i, t in self._model.get_added_tokens_decoder().items()}
        special = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        for role in ("bos", "eos", "pad"):
            if (name := getattr(spec, role)) is not None and name not in vocab:
                raise ConfigError(f"{where}: {role}={name!r} is not in its vocabulary; name one of {sorted(special)}")
        special |= {name: vocab[name] for name in (spec.bos, spec.eos, spec.pad) if name is not None}
        size = max(vocab.values(), default=-1) + 1
        super().__init__(spec, data, size=size, special=special, bos=spec.bos, eos=spec.eos, pad=spec.pad)

    @functools.cached_property
    def apart(self) -> dict[str, int]:
        return {token: i for i, token in self._contents.items()} | self.special

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """The model that reads special tokens in text: one of its own, since threads may share this tokenizer."""
        model = parsed(self.data, self.file)
        model.no_truncation()
        model.no_padding()
        return model

    def encode_plain(self, text: str) -> list[int]:
        if self._model.normalizer is not None:
            text = self._model.normalizer.normalize_str(text)
        split = self._model.pre_tokenizer
        words = [text] if split is None else [word for word, _ in split.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._model.model.tokenize(word)]

    def encode_marked(self, text: str) -> list[int]:
        return self._marked.encode(text, add_special_tokens=False).ids

    def prefix(self) -> tuple[int, ...]:
        """Ids that the file puts before every text, such as BOS."""
        return self._around[0]

    def suffix(self) -> tuple[int, ...]:
        return self._around[1]

    @functools.cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plain, whole = (self._model.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i:][: len(plain)] == plain), None)
        return ((), ()) if at is None else (tuple(whole[:at]), tuple(whole[at + len(plain) :]))

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return super()._decode(ids) if self._byte_level else self._model.decode(ids, skip_special_tokens=False)

    def _bytes_of(self, i: int) -> bytes:
        if i in self._contents:  # the library's decoder would take the letters of `é` for bytes
            return self._contents[i].encode()
        if self._byte_level:
            return self._table.get(i, b"")
        anchor = self._model.decode([i], skip_special_tokens=False)
        return self._model.decode([i, i], skip_special_tokens=False)[len(anchor) :].encode()

    def _model_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _extended(self, tokens: tuple[str, ...]) -> "HuggingFace":
        model = parsed(self.data, "tokenizer.json")
        model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
        ids = [model.token_to_id(token) for token in tokens]
        if ids != list(range(self.vocab_size, self.vocab_size + len(tokens))):
            raise DataError(f"tokenizer.json: its vocabulary of {self.vocab_size} ids has gaps, so {tokens} got {ids}")
        return type(self)(self.spec, model.to_str().encode())

    @functools.cached_property
    def _table(self) -> dict[int, bytes]:
        alphabet = byte_alphabet()
        return {
            i: bytes(alphabet[c] for c in token)
            for token, i in self._model.get_vocab(with_added_tokens=False).items()
            if all(c in alphabet for c in token)
        }


def read(file: str, bos: str | None, eos: str | None) -> HuggingFace:
    """The tokenizer of a `tokenizer.json`, or of the folder that holds it.

    `bos`, `eos` and padding are those that `tokenizer_config.json` or `special_tokens_map.json` beside it names, unless
    given; tokens that these files and `added_tokens.json` add are added.
    """
    path = Path(file) / "tokenizer.json" if Path(file).is_dir() else Path(file)
    said = Beside(path.parent)
    data = with_added(read_model(path), said.added.items(), str(path))
    vocab = parsed(data, str(path)).get_vocab(with_added_tokens=True)
    known = {role: name for role, name in said.roles.items() if name in vocab}
    spec = Spec(kind="hf", bos=bos or known.get("bos"), eos=eos or known.get("eos"), pad=known.get("pad"))
    return HuggingFace(spec, data, str(path))


def with_added(data: bytes, tokens: Iterable[tuple[int, Tree]], where: str) -> bytes:
    """A `tokenizer.json` with these added tokens too, by id; one that is there already stays as it is.

    Raises:
      DataError: an id that the library would not give to its token.
    """
    model = parsed(data, where)
    there = {token.content for token in model.get_added_tokens_decoder().values()}
    new = {i: t for i, t in sorted(tokens) if t["content"] not in there}
    for i, token in new.items():
        sides = {key: value for key, value in token.items() if key not in ("content", "special")}
        added = tokenizers.AddedToken(token["content"], special=token["special"], **sides)
        (model.add_special_tokens if token["special"] else model.add_tokens)([added])
        if (got := model.token_to_id(token["content"])) != i:
            raise DataError(
                f"{where}: added token {token['content']!r} is said to have id {i}, but the vocabulary gives it {got}: "
                "its files are not of one tokenizer"
            )
    return model.to_str().encode() if new else data


def parsed(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except ValueError as e:
        raise DataError(f"{where}: not a Hugging Face tokenizer.json, or a truncated one ({e})") from None


def _tried(model: tokenizers.Tokenizer, where: str) -> tokenizers.Tokenizer:
    """The tokenizer, after a first text: a template that names a token that is nowhere makes the library panic then."""
    try:
        model.decode(model.encode("a b", add_special_tokens=True).ids, skip_special_tokens=False)
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":  # what Rust's panics become
            raise
        raise DataError(f"{where}: its parts do not fit each other, so it encodes no text ({e})") from None
    return model
