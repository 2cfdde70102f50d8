"""Philox4x32, a counter-based random generator (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), on the CPU.

Its numbers are a pure function of a key and a counter, so a graphics kernel and this twin draw the same ones.
"""

from __future__ import annotations

import torch

ROUNDS = 7  # passes BigCrush (section 4 of the paper)
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: their temporaries stay in a core's cache


def noise(count: int, key: int, number: int) -> torch.Tensor:
    """``count`` uniform 32-bit numbers as int64 in [0, 2^32), for the 64-bit ``key`` and a 32-bit ``number``.

    Counter n, for n = 0, 1, ..., is (n, number, 0, 0) and gives the four numbers 4n to 4n + 3.
    """
    counters = -(-count // 4)
    result = torch.empty(counters, 4, dtype=torch.int64)
    for start in range(0, counters, _CHUNK):
        part = result[start : start + _CHUNK]
        first = torch.arange(start, start + len(part), dtype=torch.int64)
        part.copy_(torch.stack(_rounds(first, torch.full_like(first, number), key & _MASK, key >> 32 & _MASK), dim=1))
    return result.view(-1)[:count]


def _rounds(c0: torch.Tensor, c1: torch.Tensor, k0: int, k1: int) -> list[torch.Tensor]:
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(ROUNDS):
        high_a, low_a = _product(c0, _ROUND_A)
        high_b, low_b = _product(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b.bitwise_xor_(c1).bitwise_xor_(k0), low_b, high_a.bitwise_xor_(c3).bitwise_xor_(k1), low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return [c0, c1, c2, c3]


def _product(values: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``values * factor``, an unsigned number of 64 bits: int64 arithmetic wraps to the same bits."""
    product = values * factor
    return product >> 32 & _MASK, product & _MASK
