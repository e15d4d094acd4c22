"""The number formats of ggml's tensors: from stored bytes to weights, and for some from weights to bytes.

A quantised row is a sequence of blocks of 32 or 256 weights, each with its own scale (ggml-common.h). The arithmetic
is that of ggml's reference in float32, operation by operation, so results agree with it to the bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike


class Kind(NamedTuple):
    """How a tensor can be stored: ggml's number for it, weights in a block, bytes of a block."""

    number: int
    block: int
    size: int


KINDS = {
    "F32": Kind(0, 1, 4), "F16": Kind(1, 1, 2), "Q4_0": Kind(2, 32, 18), "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22), "Q5_1": Kind(7, 32, 24), "Q8_0": Kind(8, 32, 34), "Q8_1": Kind(9, 32, 36),
    "Q2_K": Kind(10, 256, 84), "Q3_K": Kind(11, 256, 110), "Q4_K": Kind(12, 256, 144), "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210), "Q8_K": Kind(15, 256, 292), "IQ2_XXS": Kind(16, 256, 66), "IQ2_XS": Kind(17, 256, 74),
    "IQ3_XXS": Kind(18, 256, 98), "IQ1_S": Kind(19, 256, 50), "IQ4_NL": Kind(20, 32, 18), "IQ3_S": Kind(21, 256, 110),
    "IQ2_S": Kind(22, 256, 82), "IQ4_XS": Kind(23, 256, 136), "I8": Kind(24, 1, 1), "I16": Kind(25, 1, 2),
    "I32": Kind(26, 1, 4), "I64": Kind(27, 1, 8), "F64": Kind(28, 1, 8), "IQ1_M": Kind(29, 256, 56),
    "BF16": Kind(30, 1, 2), "TQ1_0": Kind(34, 256, 54), "TQ2_0": Kind(35, 256, 66), "MXFP4": Kind(39, 32, 17),
    "NVFP4": Kind(40, 64, 36), "Q1_0": Kind(41, 128, 18),
}  # fmt: skip
NAMES = {kind.number: name for name, kind in KINDS.items()}

PLAIN = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16), "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}  # fmt: skip
"""Kinds whose bytes are an array as it stands."""

_CHUNK = 1 << 16  # weights converted at a time: the temporaries stay in the cache


def dequantise(data: np.ndarray, kind: str, dtype: DTypeLike = np.float32) -> np.ndarray:
    """The weights in whole blocks of bytes, flat; rounded from float32 where `dtype` is another.

    Raises:
      ValueError: a kind that is not in `READABLE`.
    """
    if kind not in READABLE:
        raise ValueError(f"{kind} cannot be dequantised; known: {', '.join(READABLE)}")
    with np.errstate(all="ignore"):  # a scale may hold inf or NaN, and then so do its weights
        if kind in PLAIN:
            return data.view(PLAIN[kind]).astype(dtype)
        blocks = data.view(_BLOCKS[kind])
        width = KINDS[kind].block
        weights = np.empty((len(blocks), width), dtype)
        for start in range(0, len(blocks), _CHUNK // width):
            piece = slice(start, start + _CHUNK // width)
            weights[piece] = _DEQUANTISERS[kind](blocks[piece]).reshape(-1, width)
    return weights.reshape(-1)


def quantise(weights: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of an array of floats whose rows are whole blocks, flat.

    Raises:
      ValueError: a kind that is not in `WRITABLE`, or weights that it cannot hold: too large, or inf or NaN in blocks.
    """
    if kind not in WRITABLE:
        raise ValueError(f"{kind} cannot be quantised to; known: {', '.join(WRITABLE)}")
    flat = weights.reshape(-1)
    _, width, size = KINDS[kind]
    data = np.empty(flat.size // width * size, np.uint8)
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, _CHUNK):
            piece = WRITABLE[kind](flat[start : start + _CHUNK])
            if piece is None:
                raise ValueError(f"a weight is not finite or too large for {kind}; F32 and BF16 hold every float32")
            at = start // width * size
            data[at : at + piece.nbytes] = piece.reshape(-1).view(np.uint8)
    return data


# Blocks, field by field in the order of their bytes: d scales, m is subtracted or added, q are the codes.
_BLOCKS = {
    "Q4_0": np.dtype([("d", "<f2"), ("q", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", 32)]),
    "Q2_K": np.dtype([("scales", "u1", 16), ("q", "u1", 64), ("d", "<f2"), ("m", "<f2")]),
    "Q3_K": np.dtype([("high", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)]),
    "Q5_K": np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)]),
    "Q6_K": np.dtype([("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
}


def _split(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """[n, bytes] -> [n, codes]: `run` bytes hold `run` codes in their lowest bits, the next `run` in the bits above."""
    runs = codes.reshape(len(codes), -1, run)
    out = np.empty((len(codes), runs.shape[1], 8 // bits, run), np.uint8)
    for i in range(8 // bits):
        out[:, :, i] = runs >> (bits * i) & (1 << bits) - 1
    return out.reshape(len(codes), -1)


def _scale(blocks: np.ndarray, field: str) -> np.ndarray:
    return blocks[field].astype(np.float32)[:, None]


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _scale(b, "d") * (_split(b["q"], 4, 16).view(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _scale(b, "d") * _split(b["q"], 4, 16).astype(np.float32) + _scale(b, "m")


def _five_bits(b: np.ndarray) -> np.ndarray:
    return _split(b["q"], 4, 16) | _split(b["high"], 1, 1) << 4


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _scale(b, "d") * (_five_bits(b).view(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _scale(b, "d") * _five_bits(b).astype(np.float32) + _scale(b, "m")


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b["q"].astype(np.float32) * _scale(b, "d")


def _grouped(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[n, groups] scales times [n, weights] codes -> [n, groups, weights of a group]."""
    return scales[:, :, None] * codes.reshape(*scales.shape, -1).astype(np.float32)


def _q2_k(b: np.ndarray) -> np.ndarray:
    scales = _scale(b, "d") * (b["scales"] & 15).astype(np.float32)
    mins = _scale(b, "m") * (b["scales"] >> 4).astype(np.float32)
    return _grouped(scales, _split(b["q"], 2, 32)) - mins[:, :, None]


def _q3_k(b: np.ndarray) -> np.ndarray:
    six_bits = _split(b["scales"][:, :8], 4, 8) | _split(b["scales"][:, 8:], 2, 4) << 4
    scales = _scale(b, "d") * (six_bits.view(np.int8) - np.int8(32)).astype(np.float32)
    codes = _split(b["q"], 2, 32) | _split(b["high"], 1, 32) << 2
    return _grouped(scales, codes.view(np.int8) - np.int8(4))


def _scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits.

    Four of each stand in the low bits of the first eight bytes; of the others the low nibbles stand in the last four
    bytes, the two bits above them over the first eight.
    """
    first = b["scales"][:, :8]
    others = _split(b["scales"][:, 8:], 4, 4) | first >> 6 << 4
    both = np.concatenate([(first & 63).reshape(-1, 2, 4), others.reshape(-1, 2, 4)], axis=2).astype(np.float32)
    return _scale(b, "d") * both[:, 0], _scale(b, "m") * both[:, 1]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, mins = _scales_and_mins(b)
    return _grouped(scales, _split(b["q"], 4, 32)) - mins[:, :, None]


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, mins = _scales_and_mins(b)
    return _grouped(scales, _split(b["q"], 4, 32) | _split(b["high"], 1, 32) << 4) - mins[:, :, None]


def _q6_k(b: np.ndarray) -> np.ndarray:
    codes = _split(b["q"], 4, 64) | _split(b["high"], 2, 32) << 4
    return _grouped(_scale(b, "d") * b["scales"].astype(np.float32), codes.view(np.int8) - np.int8(32))


_DEQUANTISERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
READABLE = (*PLAIN, *_DEQUANTISERS)


def _to(x: np.ndarray, dtype: type) -> np.ndarray | None:
    rounded = x.astype(dtype)
    return None if (np.isinf(rounded) & ~np.isinf(x)).any() else rounded


def _to_f32(x: np.ndarray) -> np.ndarray | None:
    return _to(x, np.float32)


def _to_f16(x: np.ndarray) -> np.ndarray | None:
    return _to(x, np.float16)


def _to_bf16(x: np.ndarray) -> np.ndarray | None:
    """Rounded to even; a NaN keeps its sign and upper bits and becomes quiet."""
    bits = x.astype(np.float32).view(np.uint32)
    nan = bits & 0x7FFFFFFF > 0x7F800000
    rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(nan, bits >> 16 | 0x40, rounded).astype(np.uint16)


def _with_scale(kind: str, d: np.ndarray, codes: np.ndarray) -> np.ndarray | None:
    blocks = np.empty(len(d), _BLOCKS[kind])
    blocks["d"], blocks["q"] = d[:, 0], codes
    return blocks if np.isfinite(blocks["d"]).all() else None


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d; 0 for a scale so small that it is stored as 0."""
    inverse = 1 / d
    return np.where(np.isinf(inverse), np.float32(0), inverse)


def _to_q8_0(x: np.ndarray) -> np.ndarray | None:
    x = x.astype(np.float32).reshape(-1, 32)
    d = np.abs(x).max(axis=1, keepdims=True) / 127
    scaled = x * _inverse(d)
    whole = np.trunc(scaled)
    whole += np.trunc(2 * (scaled - whole))  # halves away from zero, as C's roundf
    return _with_scale("Q8_0", d, whole.astype(np.int8))


def _to_q4_0(x: np.ndarray) -> np.ndarray | None:
    x = x.astype(np.float32).reshape(-1, 32)
    d = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1) / -8  # the largest becomes code 0
    codes = np.minimum(x * _inverse(d) + np.float32(8.5), 15).astype(np.uint8)
    return _with_scale("Q4_0", d, codes[:, :16] | codes[:, 16:] << 4)


WRITABLE: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16, "Q8_0": _to_q8_0, "Q4_0": _to_q4_0,
}  # fmt: skip
"""Kinds that weights can be written in."""
