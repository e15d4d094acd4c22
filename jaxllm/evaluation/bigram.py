"""The byte-bigram baseline: what a table of 257 x 256 counts makes of the text that a model was trained on."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from jaxllm.core.errors import DataError
from jaxllm.data.loader import Rows, validation_rows
from jaxllm.data.manifest import Prepared

START = 256  # the context of a document's first byte


def bigram_bits_per_byte(prepared: Prepared) -> float:
    """Bits per byte of a bigram model of bytes on the held-out text, fitted on the training text of a prepared folder.

    Unlike a model's bits per byte these do not pay for the ends of documents, which favours the bigram.

    Raises:
      DataError: one of the two splits holds no text.
    """
    tasks, tokenizer = prepared.manifest["tasks"].items(), prepared.tokenizer()
    text_of = [tokenizer.id_to_bytes(i) for i in range(prepared.vocab)]
    training = ((Rows(prepared, 0, {name: 1.0}), splits["train"]["rows"]) for name, splits in tasks)
    seen = count(spans(text_of, (rows[r] for rows, n in training for r in range(n))))
    held_out = count(spans(text_of, validation_rows(prepared)))
    if not (seen.any() and held_out.any()):
        raise DataError(
            f"{prepared.path}: a bigram needs text in both splits; set `validation` above 0 and prepare again"
        )
    return float(-(held_out * np.log2(probabilities(seen))).sum() / held_out.sum())


def spans(text_of: list[bytes], rows: Iterable[dict[str, np.ndarray]]) -> Iterator[tuple[int, bytes]]:
    """The text of each document's part in each row, and before it the byte that precedes it (START: none does).

    Args:
      text_of: bytes of each id; empty for BOS and EOS, which are no text.
    """
    for row in rows:
        documents = row["documents"]
        begins = np.flatnonzero(np.diff(documents, prepend=0) * (documents > 0))
        ends = [*begins[1:], np.count_nonzero(documents)]
        for begin, end in zip(begins, ends, strict=True):
            before = text_of[row["tokens"][begin]]
            text = b"".join([text_of[i] for i in row["targets"][begin:end].tolist()])
            yield before[-1] if before else START, text


def count(texts: Iterable[tuple[int, bytes]]) -> np.ndarray:
    """How often byte b follows context a, `[257, 256]`, over (context of the first byte, text) pairs."""
    total = np.zeros(257 * 256, np.int64)
    while batch := list(itertools.islice(texts, 4096)):
        parts = [(np.frombuffer(text, np.uint8).astype(np.int64), first) for first, text in batch if text]
        if parts:
            before = np.concatenate([np.concatenate(([first], text[:-1])) for text, first in parts])
            total += np.bincount(before * 256 + np.concatenate([text for text, _ in parts]), minlength=total.size)
    return total.reshape(257, 256)


def probabilities(seen: np.ndarray) -> np.ndarray:
    """p(b | a) > 0 from counts `[257, 256]`, Witten-Bell: bigrams over unigrams over the uniform.

    A context gives up as many counts as it has seen different bytes (Witten & Bell 1991, method C, interpolated).
    """
    unigram = _interpolate(seen.sum(0, keepdims=True), np.full((1, 256), 1 / 256))
    return _interpolate(seen, unigram)


def _interpolate(seen: np.ndarray, lower: np.ndarray) -> np.ndarray:
    given_up = np.maximum((seen > 0).sum(1, keepdims=True), 1)
    return (seen + given_up * lower) / (seen.sum(1, keepdims=True) + given_up)
