"""tiktoken rank files: byte-level BPE whose merges are ordered by the ids of their results."""

import base64
import gzip
import itertools
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tiktoken

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers.base import Spec, Tokenizer


class Encoding(NamedTuple):
    """The published facts of an encoding that its rank file does not hold."""

    pattern: str  # splits text before merging
    ranks: int  # tokens in the rank file
    special: dict[str, int]
    bos: str | None = None
    eos: str = "<|endoftext|>"
    pad: str | None = None
    normal: str | None = None  # Unicode form that text is brought into first


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    _SPACES,
])  # fmt: skip

_CL100K_SPECIAL = {
    "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}  # fmt: skip
_LLAMA3_NAMED = {  # as Llama 3.1 and later name them; the rest of 256 are reserved and numbered in order
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip
_reserved = itertools.count()
_LLAMA3_SPECIAL = {
    _LLAMA3_NAMED.get(n) or f"<|reserved_special_token_{next(_reserved)}|>": 128_000 + n for n in range(256)
}

# Qwen 1 (Bai et al. 2023, arXiv:2309.16609): tokenization_qwen.py beside its weights.
_QWEN_SPECIAL = {
    token: 151_643 + n
    for n, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))])
}

ENCODINGS = {
    "gpt2": Encoding(_GPT2, 50256, {"<|endoftext|>": 50256}),
    "r50k_base": Encoding(_GPT2, 50256, {"<|endoftext|>": 50256}),
    "p50k_base": Encoding(_GPT2, 50280, {"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(_CL100K, 100256, _CL100K_SPECIAL),
    "o200k_base": Encoding(_O200K, 199998, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "llama3": Encoding(
        _CL100K, 128_000, _LLAMA3_SPECIAL, "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
    ),
    "qwen": Encoding(QWEN, 151_643, _QWEN_SPECIAL, normal="NFC"),
}


class Tiktoken(Tokenizer):
    """Ids between the ranks and the special tokens that no token has decode to nothing."""

    file = "tokenizer.tiktoken"

    def __init__(self, spec: Spec, data: bytes, where: str = "tokenizer.tiktoken"):
        encoding = ENCODINGS[spec.encoding]
        data = decompressed(data, where)
        ranks = _ranks(data, where)
        if len(ranks) != encoding.ranks or not all(bytes([b]) in ranks for b in range(256)):
            raise DataError(
                f"{where}: {len(ranks)} tokens, but {spec.encoding} has {encoding.ranks}, every byte among them; "
                f"the file is truncated or of another encoding (known: {', '.join(ENCODINGS)})"
            )
        special = encoding.special
        self._normal, self.lossless = encoding.normal, encoding.normal is None
        self._encoding = tiktoken.Encoding(
            spec.encoding, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.ranks, self._tokens = ranks, {i: token for token, i in ranks.items()}
        size = max(*self._tokens, *special.values()) + 1
        super().__init__(spec, data, size=size, special=special, bos=encoding.bos, eos=encoding.eos, pad=encoding.pad)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._normal is not None:
            texts = [unicodedata.normalize(self._normal, text) for text in texts]
        parts = [list(_cut_spaces(text)) for text in texts]
        flat = [part for split in parts for part in split]
        ids = iter(self._encoding.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
        return [[i for _ in split for i in next(ids)] for split in parts]

    def _bytes_of(self, i: int) -> bytes:
        return self._tokens.get(i, b"")

    def _model_id(self, token: str) -> int | None:
        return self.ranks.get(token.encode())


_SPACES_AT_ONCE = 100_000
_MANY_SPACES = re.compile(rf"(?<!\s)\s{{{_SPACES_AT_ONCE + 1},}}")


def _cut_spaces(text: str) -> Iterator[str]:
    """`text` in pieces, cut only in stretches of over 100,000 spaces: at a million the library's regex overflows."""
    start = 0
    if len(text) > _SPACES_AT_ONCE:
        for run in _MANY_SPACES.finditer(text):
            for end in range(run.start() + _SPACES_AT_ONCE, run.end(), _SPACES_AT_ONCE):
                yield text[start:end]
                start = end
    yield text[start:]


def decompressed(data: bytes, where: str) -> bytes:
    try:
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (EOFError, OSError, zlib.error) as e:
        raise DataError(f"{where}: truncated or damaged gzip file ({e}); fetch it again") from None


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{where}, line {number}: {line[:40]!r} is not a base64 token and its rank") from None
    return ranks
