"""The record of one packed row: about 2 bytes a token where the vocabulary allows, checked by CRC-32.

Little-endian: crc32 of the rest, version, flags, number of segments, of targets, bytes of text; then the segments'
lengths, first inputs and (if any is not 0) start positions as uint32; the targets as uint16, or uint32 where one
needs it; and, if any is not 1, the weights as float32. Inputs are the targets shifted right within each segment,
so a segment's first input is all of them that has to be kept.
"""

import struct
import zlib

import numpy as np

from jaxllm.core.errors import DataError

_HEADER = struct.Struct("<IHHIII")
_CRC = 4  # bytes at the start that the checksum leaves out
VERSION = 1
_STARTS, _WIDE, _WEIGHTS = 1, 2, 4


def encode(row: dict[str, np.ndarray]) -> bytes:
    """The record of a row: arrays of length T named as in a batch, padding (document 0) at the end, and its `bytes`."""
    n = int(np.count_nonzero(row["documents"]))
    documents, positions, weights = row["documents"][:n], row["positions"][:n], row["weights"][:n]
    targets = row["targets"][:n]
    begins = np.flatnonzero(np.diff(documents, prepend=0))
    lengths = np.diff(begins, append=n)
    starts = positions[begins]
    wide = bool(n) and int(targets.max()) > 0xFFFF
    flags = _STARTS * bool(starts.any()) | _WIDE * wide | _WEIGHTS * bool((weights != 1).any())
    parts = [lengths.astype("<u4"), row["tokens"][begins].astype("<u4")]
    parts += [starts.astype("<u4")] if flags & _STARTS else []
    parts += [targets.astype("<u4" if wide else "<u2")]
    parts += [weights.astype("<f4")] if flags & _WEIGHTS else []
    body = b"".join(p.tobytes() for p in parts)
    rest = _HEADER.pack(0, VERSION, flags, len(begins), n, int(row["bytes"]))[_CRC:] + body
    return struct.pack("<I", zlib.crc32(rest)) + rest


def decode(record: bytes, length: int) -> dict[str, np.ndarray]:
    """The row of a record, padded to `length`: what `encode` was given.

    Raises:
      DataError: the record is damaged, of a newer version, or of rows longer than `length`.
    """
    if len(record) < _HEADER.size or zlib.crc32(record[_CRC:]) != struct.unpack_from("<I", record)[0]:
        raise DataError(f"a packed row of {len(record)} bytes is damaged: its checksum does not fit")
    _, version, flags, segments, n, size = _HEADER.unpack_from(record)
    if version != VERSION:
        raise DataError(f"a packed row has version {version}; this jaxllm reads version {VERSION}")
    if n > length:
        raise DataError(f"a packed row holds {n} tokens where rows of {length} were expected")
    at = _HEADER.size

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal at
        at += np.dtype(dtype).itemsize * count
        return np.frombuffer(record, dtype, count, at - np.dtype(dtype).itemsize * count)

    lengths, firsts = take("<u4", segments).astype(np.int64), take("<u4", segments)
    starts = take("<u4", segments) if flags & _STARTS else 0
    begins = np.cumsum(lengths) - lengths
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "documents")}
    row["targets"][:n] = take("<u4" if flags & _WIDE else "<u2", n)
    row["tokens"][1:n] = row["targets"][: max(n - 1, 0)]
    row["tokens"][begins] = firsts
    row["positions"][:n] = np.arange(n) - np.repeat(begins - starts, lengths)
    row["documents"][:n] = np.repeat(np.arange(1, segments + 1), lengths)
    row["weights"] = np.zeros(length, np.float32)
    row["weights"][:n] = take("<f4", n) if flags & _WEIGHTS else 1
    row["bytes"] = np.int32(size)
    return row
