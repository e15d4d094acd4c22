"""What every tokenizer does: ids for text, text for ids, tokens added at the end, a folder of its own."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, SupportsIndex

import yaml
from pydantic import Field, model_validator

from jaxllm.core.config import Config, dump
from jaxllm.core.errors import ConfigError, DataError

SPEC = "tokenizer.yaml"  # in the folder of a saved tokenizer


class Spec(Config):
    """What `tokenizer.yaml` says of a saved tokenizer; the model file lies beside it."""

    version: int = Field(1, ge=1, le=1)  # of this format
    kind: Literal["byte", "hf", "sentencepiece", "tiktoken"]  # which library reads the model file
    encoding: str | None = None  # tiktoken: name of the split pattern and special tokens
    bos: str | None = None  # beginning-of-document token of a file that names none (hf), or another one
    eos: str | None = None  # end-of-document token, likewise
    pad: str | None = None  # padding token, likewise
    added: tuple[str, ...] = ()  # tokens after the model file's own, in the order of their ids
    control: tuple[str, ...] = ()  # those of `added` that are special

    @model_validator(mode="after")
    def _has_encoding(self):
        if self.kind == "tiktoken" and self.encoding is None:
            raise ValueError("kind tiktoken needs an encoding")
        return self


class Tokenizer:
    """Base of the kinds. A kind reads `data`, the bytes of its model file, and gives `_encode_batch`, `id_to_bytes`.

    Special tokens (padding, begin and end of document, ...) exist as ids only: no text encodes to one, and they decode
    to nothing. Added tokens are text: they are split out of the text before the model sees it, longest first.
    """

    file: str | None = None  # name of the model file in a saved folder
    lossless = True  # every text comes back from its ids, and `id_to_bytes` of the ids joins to its UTF-8

    def __init__(
        self, spec: Spec, data: bytes, *, size: int, special: Mapping[str, int],
        bos: str | None = None, eos: str | None = None, pad: str | None = None,
    ):  # fmt: skip
        ids = {token: size + n for n, token in enumerate(spec.added)}
        self.spec, self.data = spec, data
        self.special = dict(special) | {token: ids[token] for token in spec.control}
        self.vocab_size = size + len(spec.added)
        self.bos_id, self.eos_id, self.pad_id = (self.special.get(name) if name else None for name in (bos, eos, pad))
        self.added = {token: i for token, i in ids.items() if token not in spec.control}
        self._text_of_added = {i: token for token, i in self.added.items()}
        self._no_text = frozenset(self.special.values())
        self._added_pattern = _one_of(self.added)

    @functools.cached_property
    def apart(self) -> dict[str, int]:
        """Tokens that stand apart from the model of text, by their text: special and added ones."""
        return {token: i for token, i in (self.special | self.added).items() if token}

    @functools.cached_property
    def _apart_pattern(self) -> re.Pattern[str] | None:
        return _one_of(self.apart)

    def named(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token`, as far as there are any: what chat templates are told."""
        of = {i: token for token, i in self.special.items()}
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: of[i] for name, i in ends.items() if i is not None}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by the library's own batch call."""
        if self._added_pattern is None:
            return self._encode_batch(texts)
        parts = [self._added_pattern.split(text) for text in texts]  # plain, added, plain, ..., plain
        plain = iter(self._encode_batch([part for split in parts for part in split[::2]]))
        return [
            [i for n, part in enumerate(split) for i in ([self.added[part]] if n % 2 else next(plain))]
            for split in parts
        ]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` by the model of text alone: added tokens are text too."""
        return self._encode_batch([text])[0]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of `text` in which special tokens are spelled out, as chat templates write it."""
        if self._apart_pattern is None:
            return self.encode(text)
        split = self._apart_pattern.split(text)  # plain, token, plain, ..., plain
        plain = iter(self._encode_batch(split[::2]))
        return [i for n, part in enumerate(split) for i in ([self.apart[part]] if n % 2 else next(plain))]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids`. Special tokens and ids outside the vocabulary give nothing, broken UTF-8 gives U+FFFD."""
        pieces, run = [], []
        for i in (i.__index__() for i in ids):
            if i in self._text_of_added:
                pieces += [self._decode(run), self._text_of_added[i]]
                run = []
            elif 0 <= i < self.vocab_size and i not in self._no_text:
                run.append(i)
        return "".join([*pieces, self._decode(run)])

    def id_to_bytes(self, i: int) -> bytes:
        """The bytes that id `i` puts into a text; where `lossless` is false, what it puts into the middle of one."""
        if i in self._text_of_added:
            return self._text_of_added[i].encode()
        return b"" if i in self._no_text else self._bytes_of(i)

    def token_id(self, token: str) -> int | None:
        """The id whose token is `token`, as the vocabulary spells it; special and added tokens too."""
        for known in (self.special, self.added):
            if token in known:
                return known[token]
        return self._model_id(token)

    def suffix(self) -> tuple[int, ...]:
        """Ids that the model file puts after every text, such as [SEP]."""
        return ()

    def extend(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer with `tokens` at the end of the vocabulary; every old id stays.

        Raises:
          ConfigError: for an empty token and for one that is there already.
        """
        check_added(tokens, self.token_id)
        return self._extended(tuple(tokens)) if tokens else self

    def save(self, folder: str | Path) -> None:
        """Writes all that `load` needs into `folder`: `tokenizer.yaml` and the model file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file:
            (folder / self.file).write_bytes(self.data)
        (folder / SPEC).write_text(dump(self.spec), encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model file's bytes and the spec: where they lie does not count."""
        said = self.spec.model_dump(mode="json", exclude=None if self.spec.control else {"control"})
        spec = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(spec.encode() + b"\0" + self.data).hexdigest()

    def _extended(self, tokens: tuple[str, ...]) -> "Tokenizer":
        return type(self)(self.spec.model_copy(update={"added": self.spec.added + tokens}), self.data)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _bytes_of(self, i: int) -> bytes:
        raise NotImplementedError

    def _model_id(self, token: str) -> int | None:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")


def _one_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Cuts a text at these, the longest where several begin; None for none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def check_added(tokens: Sequence[str], token_id: Callable[[str], int | None]) -> None:
    """Returns if `tokens` can be added to the vocabulary that `token_id` looks them up in.

    Raises:
      ConfigError: for an empty token and for one that is there already.
    """
    for n, token in enumerate(tokens):
        if not token or token in tokens[:n]:
            raise ConfigError(f"added token {token!r} is {'given twice' if token else 'empty'}; tokens must differ")
        if (i := token_id(token)) is not None:
            raise ConfigError(f"added token {token!r} is already token {i} of the vocabulary; leave it out")


class StreamDecoder:
    """Text of ids that come one at a time: all pieces joined are `decode(context + ids)` less `decode(context)`.

    A piece ends where text is certain: bytes of an unfinished character wait for the next ids. A few ids before the
    new ones are decoded with them, since decoders drop the spaces at the very beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[SupportsIndex] = ()):
        self._decode = tokenizer.decode
        self._ids = list(context)
        self._old = len(self._ids)  # how many of the kept ids are context
        self._sent = len(self._decode(self._ids).rstrip("\ufffd"))  # characters of their text that are out already

    def feed(self, i: SupportsIndex) -> str:
        """The text that id `i` makes certain, possibly none."""
        self._ids.append(i)
        text = self._decode(self._ids)
        certain = text.rstrip("\ufffd")
        piece = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if piece.strip() and certain == text:  # nothing is left over, so the newest ids are context enough
            self._ids = self._ids[self._old :]
            self._old, self._sent = len(self._ids), len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """What was held back; U+FFFD for a character that never ended."""
        return self._decode(self._ids)[self._sent :]


def read_model(path: str | Path) -> bytes:
    """The bytes of a tokenizer's model file.

    Raises:
      DataError: for a file that is missing, unreadable or empty.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such tokenizer file") from None
    except OSError as e:
        raise DataError(f"{path}: tokenizer file cannot be read ({e.strerror}); give one that you may read") from None
    if not data:
        raise DataError(f"{path}: the tokenizer file is empty; fetch it again")
    return data


def read_spec(folder: Path) -> Spec:
    """What `tokenizer.yaml` in `folder` says."""
    path = folder / SPEC
    try:
        return Spec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{folder}: no saved tokenizer: {SPEC} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise DataError(f"{path}: not the description of a saved tokenizer ({e})") from None


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the other 68 follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
