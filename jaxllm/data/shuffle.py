"""A shuffled order that is computed, not stored: any place of any epoch at once, the same on every machine."""

import math

ROUNDS = 8  # Luby & Rackoff (1988) need 4 for large domains; small ones need more to look even
_WORD = 2**64 - 1


def shuffled(i: int, n: int, key: int) -> int:
    """Where a permutation of range(n), chosen by the 64-bit `key`, sends i.

    A Feistel network over pairs of digits to the base ceil(sqrt n); what it sends beyond n goes through it again
    (cycle walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), for less than every second i.
    """
    base = math.isqrt(n - 1) + 1
    while True:
        left, right = divmod(i, base)
        for r in range(ROUNDS):
            left, right = right, (left + _mix(key + (right * ROUNDS + r) * 0x9E3779B97F4A7C15)) % base
        i = left * base + right
        if i < n:
            return i


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014, figure 16)."""
    x = (x ^ (x & _WORD) >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
