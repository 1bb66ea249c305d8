"""Call every C function at the ends of memory that is exactly as long as needed, without torch.

Run by ``test_sanitizers.py`` with a build under ASan and UBSan: any access past an end, and any
undefined operation, stops the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import struct
import sys
from typing import Any

STATE, WORDS = 5056, 624
SIZES = {0: 4, 1: 8, 2: 2, 3: 2}


def loaded(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_of(used: int) -> ctypes.Array[ctypes.c_char]:
    """A seeded state (Matsumoto and Nishimura, 1998), of which some words are drawn."""
    words = [19937]
    for i in range(1, WORDS):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + i) & 0xFFFFFFFF)
    head = struct.pack("=Qii Q", 19937, WORDS + 1 - used if used else 1, 1, used)
    return memory(STATE, (head + struct.pack(f"={WORDS}Q", *words)).ljust(STATE, b"\0"))


def memory(size: int, data: bytes = b"") -> ctypes.Array[ctypes.c_char]:
    """A block of its own from malloc: PYTHONMALLOC=malloc."""
    return (ctypes.c_char * max(size, 1)).from_buffer(bytearray(data or max(size, 1)))


def main(path: str) -> None:
    k, at = loaded(path), ctypes.addressof
    counts = (1, 15, 16, 17, 31, 623, 640, 645, 2495, 2496, 2497, 5003)
    for dtype, fused, avx2 in itertools.product(SIZES, (False, True), (False, True)):
        for count, used in itertools.product(counts, (0, 1, 609, 624)):
            state, target = state_of(used), memory(count * SIZES[dtype])
            k.fill(at(state), at(target), count, False, dtype, fused, avx2, -0.3, 1e4)
            if count < 16 or dtype == 1:
                continue
            k.fill(at(state), at(target), count, True, dtype, fused, avx2, 0.1, 1e30)
            places = sorted({0, count // 2, max(count - 17, 0), count - 16, count - 1})
            indices = memory(8 * len(places), struct.pack(f"={len(places)}q", *places))
            values = memory(len(places) * SIZES[dtype])
            options = count, dtype, fused, avx2, 0.1, 0.7
            k.normal_at(at(state), at(indices), len(places), at(values), *options)
            k.normal_at(at(state), at(indices), 0, at(values), *options)
        for rows, begin, length in ((1, 0, 1), (3, 15, 2500), (7, 5, 40)):
            state, target = state_of(3), memory(rows * length * SIZES[dtype])
            shape = rows, begin, length, length + 32
            for normal in (False, True)[: 1 + (dtype != 1)]:
                k.fill_rows(at(state), at(target), *shape, normal, dtype, fused, avx2, 0.0, 1.0)
    for avx2, used in itertools.product((False, True), (0, 1, 624)):
        for words in (0, 1, 623, 624, 625, 10_000):
            state = state_of(used)
            k.pass_over(at(state), words, avx2)
        for exponent in (0, 1, 19936, 19937, 10**6, 2**63 + 1):
            state = state_of(used)
            k.leap_by(at(state), k.polynomial(exponent, avx2), 1 + used % WORDS, avx2)


if __name__ == "__main__":
    main(sys.argv[1])
