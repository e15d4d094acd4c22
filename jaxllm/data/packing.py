"""Documents into rows of one length. Pure numpy; the same documents give the same rows.

Every token of a document is a target exactly once: `first` (BOS, or what stands for it) is the first input, and
inputs are the targets shifted right by one. A row's `bytes` are those of the text its targets stand for: a document
shares its bytes over its targets by cumulative rounding, so that rows sum to the text exactly.
"""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 2**20  # tokens that are laid out at a time: bounds the memory, whatever the documents' length
WINDOW = 2**22  # tokens of whole documents among which the best fit is sought


class Piece(NamedTuple):
    """A document, or what is left of one: its first input, its targets, and the bytes of their text."""

    first: int
    targets: np.ndarray
    bytes: int


def pack(
    documents: Iterable[tuple[np.ndarray, int]],
    length: int,
    first: int,
    split_long: bool = True,
    counts: Counter | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of packed rows `[R, length]` (and `bytes` `[R]`) of documents given as (targets, bytes of text).

    With `split_long` documents follow each other without gaps, and one that passes the end of a row goes on in the
    next as a new segment. Otherwise a document stays whole in one row, the fullest that has room for it (best fit
    decreasing: Ding et al. 2024, arXiv:2404.10830, section 3); what is longer than a row is cut off and counted in
    `counts` as `cut_documents`, `cut_tokens`, `cut_bytes`.
    """
    pieces = (Piece(first, targets, size) for targets, size in documents if len(targets))
    if split_long:
        yield from _concatenated(pieces, length)
    else:
        yield from _fitted(pieces, length, Counter() if counts is None else counts)


def _concatenated(pieces: Iterable[Piece], length: int) -> Iterator[dict[str, np.ndarray]]:
    rows = max(1, BLOCK // length)
    block, room = [], rows * length
    for piece in pieces:
        while len(piece.targets) >= room:
            head, piece = _split(piece, room)
            yield _lay([*block, head], length)
            block, room = [], rows * length
        if len(piece.targets):
            block.append(piece)
            room -= len(piece.targets)
    if block:
        yield _lay(block, length)


def _fitted(pieces: Iterable[Piece], length: int, counts: Counter) -> Iterator[dict[str, np.ndarray]]:
    window, tokens = [], 0
    for piece in pieces:
        if len(piece.targets) > length:
            piece, rest = _split(piece, length)
            counts.update(cut_documents=1, cut_tokens=len(rest.targets), cut_bytes=rest.bytes)
        window.append(piece)
        tokens += len(piece.targets)
        if tokens >= WINDOW:
            yield _lay_fitted(window, length)
            window, tokens = [], 0
    if window:
        yield _lay_fitted(window, length)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices, each of at most `capacity`: longest first, into the fullest bin with room (best fit decreasing).

    Bins are ordered by their first index, so that the first rows are those of the first documents.
    """
    rooms: list[int] = []  # the distinct rooms that are left, sorted
    having: dict[int, list[list[int]]] = {}  # room -> bins that have it
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        k = bisect.bisect_left(rooms, lengths[i])
        if k == len(rooms):
            room, members = capacity, []
            bins.append(members)
        else:
            room = rooms[k]
            members = having[room].pop()
            if not having[room]:
                del rooms[k], having[room]
        members.append(i)
        left = room - lengths[i]
        if left and left not in having:
            bisect.insort(rooms, left)
        if left:
            having.setdefault(left, []).append(members)
    return sorted(sorted(members) for members in bins)


def _lay_fitted(window: list[Piece], length: int) -> dict[str, np.ndarray]:
    bins = best_fit([len(p.targets) for p in window], length)
    pieces = [window[i] for members in bins for i in members]
    sizes = np.array([len(p.targets) for p in pieces])
    of_row = np.array([len(members) for members in bins])
    before = np.cumsum(sizes) - sizes  # begins, had the rows no padding between them
    row = np.repeat(np.arange(len(bins)), of_row)
    return _lay(pieces, length, row * length + before - before[np.cumsum(of_row) - of_row][row])


def _lay(pieces: list[Piece], length: int, begins: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Rows that hold each piece from its place in `begins` (rows end to end); by default one after the other."""
    sizes = np.array([len(p.targets) for p in pieces])
    before = np.cumsum(sizes) - sizes
    begins = before if begins is None else begins
    rows = -(-int(begins[-1] + sizes[-1]) // length)
    targets = np.zeros(rows * length, np.int32)
    filled = np.zeros(rows * length, bool)
    places = np.repeat(begins - before, sizes) + np.arange(sizes.sum())
    targets[places] = np.concatenate([p.targets for p in pieces])
    filled[places] = True

    tokens = np.zeros_like(targets)
    tokens[1:] = targets[:-1]
    tokens[begins] = [p.first for p in pieces]
    opens = np.zeros_like(filled)  # where a segment begins
    opens[begins] = opens[::length] = True

    opens, filled = opens.reshape(rows, length), filled.reshape(rows, length)
    column = np.arange(length, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(opens, column, 0), axis=1)
    return {
        "tokens": tokens.reshape(rows, length) * filled,
        "targets": targets.reshape(rows, length),
        "positions": positions * filled,
        "documents": np.cumsum(opens, axis=1, dtype=np.int32) * filled,
        "weights": filled.astype(np.float32),
        "bytes": np.diff(_bytes_before(np.arange(rows + 1) * length, pieces, begins, sizes)).astype(np.int32),
    }


def _bytes_before(places: np.ndarray, pieces: list[Piece], begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Bytes of the text of all targets that lie before each place."""
    of_text = np.array([p.bytes for p in pieces])
    total = np.cumsum(of_text) - of_text
    j = np.maximum(np.searchsorted(begins, places, side="right") - 1, 0)
    return total[j] + of_text[j] * np.minimum(places - begins[j], sizes[j]) // sizes[j]


def _split(piece: Piece, at: int) -> tuple[Piece, Piece]:
    head = piece.bytes * at // len(piece.targets)
    tail = Piece(int(piece.targets[at - 1]), piece.targets[at:], piece.bytes - head)
    return Piece(piece.first, piece.targets[:at], head), tail
