"""A shuffle that needs no list: the same for ever, for any size, one item at a time.

A Feistel network over the smallest square of a power of two that holds `size`, walked along until it hits a number
below `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): four steps on average at most.
"""

from __future__ import annotations

from hashlib import blake2b

ROUNDS = 4


def permuted(position: int, size: int, key: str) -> int:
    """The number at `position` of a permutation of range(size) that `key` picks.

    Raise `IndexError` outside of `0 <= position < size`.
    """
    if not 0 <= position < size:
        raise IndexError(f"position {position} is outside of a permutation of {size}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    number = _network(position, half_bits, key)
    while number >= size:
        number = _network(number, half_bits, key)
    return number


def digest(text: str) -> int:
    """64 bits that depend on all of `text`, the same in every process and version."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _network(number: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = number >> half_bits, number & mask
    for step in range(ROUNDS):
        left, right = right, left ^ (_mixed(key, step, right, half_bits) & mask)
    return left << half_bits | right


def _mixed(key: str, step: int, value: int, bits: int) -> int:
    wide = digest(f"{key}/{step}/{value}")
    # More than 64 bits a half only for spaces beyond 2**128.
    return wide if bits <= 64 else wide * (1 << 64) + digest(f"{key}/{step}/{value}/more")
