"""Move the state of a CPU generator over any number of draws, without making them.

torch's CPU generator is the Mersenne Twister MT19937, which is linear over GF(2): the words
that follow n draws later are a fixed XOR of the words that follow now, given by the
coefficients of x**n modulo the characteristic polynomial of the recurrence.

Source: M. Matsumoto and T. Nishimura, "Mersenne Twister: A 623-Dimensionally
Equidistributed Uniform Pseudo-Random Number Generator", ACM TOMACS 8(1), 1998, for the
generator and its polynomial; H. Haramoto et al., "Efficient Jump Ahead for F2-Linear Random
Number Generators", INFORMS JoC 20(3), 2008, for jumping by a polynomial.
"""

import struct
from collections.abc import Iterable
from functools import cache, lru_cache, reduce
from itertools import takewhile
from operator import xor

import numpy as np
import numpy.typing as npt
import torch

_Words = npt.NDArray[np.uint32]

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_BYTES = _DEGREE // 8 + 1  # of a polynomial
_TWIST = 0x9908B0DF
_POSITION = struct.Struct("=ii Q")
_POSITION_AT, _WORDS_AT, _NORMALS_AT, _SIZE = 8, 24, 5016, 5056
_NORMAL_Y_AT, _NORMAL_VALID_AT = 5024, 5040

# Measured: about 1.8 ns a draw made, 1 ms a leap, so that they cost the same near 5e5 draws.
_LEAP_FROM = 500_000
_SCRATCH = 1 << 16
_TWO_WORDS = (-(2**63), None)  # the range of integers for which random_ takes 64 random bits
# Measured: 16 patterns of 4 coefficients, and rows that together stay within the L2 cache.
_GROUP, _ROWS = 4, 256


def jump(state: bytes, n: int) -> bytes:
    """The state in which a CPU generator is after `n` 32-bit draws.

    Args:
        state: `torch.Generator.get_state()` as bytes (5056 of them).
        n: how many 32-bit words are drawn; 0 or more.

    Returns:
        The 5056 bytes that torch itself would have. The seed and the cached normal samples
        are those of `state`. About 1 ms at most for an `n` seen before, and a few more for
        another; the global generator is not used, and threads may call this at once.

    Raises:
        ValueError: if `n` is negative, or `state` is no state of a CPU generator.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = state_of(generator)
        >>> _ = torch.empty(1000).uniform_(generator=generator)
        >>> jump(start, 1000) == state_of(generator)
        True
    """
    if n < 0:
        raise ValueError(f"a generator cannot be moved by {n} draws: it only moves forward")
    drawn = _drawn(state)
    if n == 0:
        return state
    blocks, last = divmod(drawn + n - 1, _WORDS)
    if blocks and (n < _LEAP_FROM or not _leaps_agree()):
        return _step(state, n)
    return _placed(_leap(state, blocks) if blocks else state, last + 1)


def move(generator: torch.Generator, n: int) -> None:
    """Let a CPU generator pass over `n` 32-bit draws: `jump`, in place."""
    if n < _LEAP_FROM:
        _draw(generator, n)
    else:
        set_state(generator, jump(state_of(generator), n))


def generator_at(state: bytes) -> torch.Generator:
    """A new CPU generator in the given state."""
    generator = torch.Generator(device="cpu")
    set_state(generator, state)
    return generator


def set_state(generator: torch.Generator, state: bytes) -> None:
    """Put a generator, of any device, into a state."""
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def state_of(generator: torch.Generator) -> bytes:
    """The state of a generator, of any device, as bytes."""
    return bytes(generator.get_state().numpy().tobytes())


def has_normal(state: bytes) -> bool:
    """Whether the second sample of a pair of normals is cached in `state`."""
    return any(state[_NORMAL_VALID_AT : _NORMAL_VALID_AT + 4])


def without_normal(state: bytes) -> bytes:
    """`state` with no cached second normal, as torch leaves it when the sample is used."""
    if state[_NORMAL_Y_AT : _NORMAL_Y_AT + 8] == bytes(8) and not has_normal(state):
        return state
    middle = state[_NORMAL_Y_AT + 8 : _NORMAL_VALID_AT]
    return state[:_NORMAL_Y_AT] + bytes(8) + middle + bytes(4) + state[_NORMAL_VALID_AT + 4 :]


def _drawn(state: bytes) -> int:
    """How many words of its block a state has used; a seed's own block counts as used up."""
    if len(state) != _SIZE:
        raise ValueError(f"a CPU generator's state has {_SIZE} bytes; this has {len(state)}")
    left, _, drawn = _POSITION.unpack_from(state, _POSITION_AT)
    if (left, drawn) == (1, 0):
        return _WORDS
    if left + drawn != _WORDS + 1 or not 1 <= drawn <= _WORDS:
        raise ValueError(f"no CPU generator stands at left={left}, next={drawn}")
    return int(drawn)


def _placed(state: bytes, drawn: int) -> bytes:
    """The same block of words with `drawn` of them used."""
    _, seeded, _ = _POSITION.unpack_from(state, _POSITION_AT)
    position = _POSITION.pack(_WORDS + 1 - drawn, seeded, drawn)
    return state[:_POSITION_AT] + position + state[_WORDS_AT:]


def _step(state: bytes, n: int) -> bytes:
    """Draw `n` words with torch."""
    generator = generator_at(state)
    _draw(generator, n)
    return state_of(generator)


def _draw(generator: torch.Generator, n: int) -> None:
    for start in range(0, n - n % 2, _SCRATCH):
        pairs = min(_SCRATCH, n - start) // 2
        torch.empty(pairs, dtype=torch.int64, device="cpu").random_(
            *_TWO_WORDS, generator=generator
        )
    if n % 2:
        torch.empty(1, dtype=torch.uint8, device="cpu").random_(generator=generator)


@cache
def _leaps_agree() -> bool:
    """Whether leaps and draws end alike with the torch that runs."""
    start = state_of(torch.Generator(device="cpu").manual_seed(19937))
    return _placed(_leap(start, 3), _WORDS) == _step(start, 3 * _WORDS)


def _leap(state: bytes, blocks: int) -> bytes:
    """Put the block that comes `blocks` later into `state`."""
    words = _untempered(_combined(_patterns(blocks), _outputs(state)))
    return state[:_WORDS_AT] + words.astype(np.uint64).tobytes() + state[_NORMALS_AT:]


def _outputs(state: bytes) -> _Words:
    """The outputs that follow the block of `state`, as many as a combination reads.

    They start at the next block because the low 31 bits of a fresh seed's word 0 are not
    part of the linear state; from the next block on every bit is.
    """
    generator = generator_at(_placed(state, _WORDS))
    pairs = torch.empty((8 * _BYTES + _WORDS) // 2, dtype=torch.int64, device="cpu")
    pairs.random_(*_TWO_WORDS, generator=generator)
    words = pairs.numpy().view(np.uint64)
    outputs = np.empty((len(words), 2), np.uint32)
    outputs[:, 0], outputs[:, 1] = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return outputs.ravel()


def _combined(patterns: npt.NDArray[np.uint8], outputs: _Words) -> _Words:
    """XOR of the runs of 624 outputs that the polynomial selects, four coefficients at once."""
    width = len(outputs) - _GROUP
    table = np.zeros((1 << _GROUP, width), np.uint32)
    for bit in range(_GROUP):
        half = 1 << bit
        np.bitwise_xor(table[:half], outputs[bit : bit + width], out=table[half : 2 * half])
    runs = np.lib.stride_tricks.sliding_window_view(table, _WORDS, axis=1)
    starts = np.arange(len(patterns)) * _GROUP
    combined = np.zeros(_WORDS, np.uint32)
    for row in range(0, len(patterns), _ROWS):
        rows = slice(row, row + _ROWS)
        combined ^= np.bitwise_xor.reduce(runs[patterns[rows], starts[rows]], axis=0)
    return combined


def _untempered(outputs: _Words) -> _Words:
    """The generator's words behind its outputs; tempering is linear, so this may come last."""
    words: _Words = outputs ^ (outputs >> np.uint32(18))
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    tempered = words.copy()
    for _ in range(4):
        np.bitwise_xor(tempered, (words << np.uint32(7)) & np.uint32(0x9D2C5680), out=words)
    tempered = words.copy()
    for _ in range(2):
        np.bitwise_xor(tempered, words >> np.uint32(11), out=words)
    return words


@lru_cache(maxsize=1024)
def _patterns(blocks: int) -> npt.NDArray[np.uint8]:
    """The coefficients that lead to the block `blocks` later, in groups of four."""
    power = _power((blocks - 1) * _WORDS)
    packed = np.frombuffer(power.to_bytes(_BYTES, "little"), np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).ravel()


def _power(n: int) -> int:
    """x**n modulo the characteristic polynomial; bit i is the coefficient of x**i."""
    bits = max(n.bit_length() - 14, 0)
    power = 1 << (n >> bits)
    for bit in reversed(range(bits)):
        power = _reduced(_squared(power) << (n >> bit & 1))
    return power


def _squared(poly: int) -> int:
    """The square over GF(2): a zero between every two coefficients."""
    packed = np.frombuffer(poly.to_bytes(_BYTES, "little"), np.uint8)
    return int.from_bytes(_spread()[packed].tobytes(), "little")


def _reduced(poly: int) -> int:
    """The remainder, for a degree below twice that of the characteristic polynomial.

    With P = x**D * (1 + T), T a sum of negative powers, 1 / (1 + T) is the product of
    1 + T**(2**i) over GF(2), and such powers have no more terms than T: the quotient takes
    a few hundred shifts. `T**(2**i)` moves down by 623 * 2**i and more, so few i matter.
    """
    quotient = poly >> _DEGREE
    for down in _inverse():
        quotient = reduce(xor, (quotient >> by for by in down), quotient)
    product = reduce(xor, (quotient << by for by in _tail()), poly)
    return product & ((1 << _DEGREE) - 1)


@cache
def _tail() -> tuple[int, ...]:
    """The exponents of the characteristic polynomial below its degree, descending.

    With u = x**623 + x**396, the polynomial is x * u**32, and x * u**(31 - i) for every
    set bit i < 31 of the twist matrix's last row, and 1 for its bit 31.
    """
    powers = [32, *(31 - i for i in range(31) if _TWIST >> i & 1)]
    exponents = reduce(xor, ({1 + e for e in _binomial(k)} for k in powers), {0})
    return tuple(sorted(exponents - {_DEGREE}, reverse=True))


def _binomial(k: int) -> Iterable[int]:
    """The exponents of (x**623 + x**396)**k over GF(2): odd binomials, by Lucas's theorem."""
    step = _WORDS - _MIDDLE
    return (k * (_MIDDLE - 1) + s * step for s in range(k + 1) if s & k == s)


@cache
def _inverse() -> tuple[tuple[int, ...], ...]:
    """The downward shifts of T, T**2, T**4, ... that stay within a quotient."""
    gaps = [_DEGREE - exponent for exponent in _tail()]
    rows = (tuple(by << i for by in gaps if by << i <= _DEGREE) for i in range(_DEGREE))
    return tuple(takewhile(bool, rows))


@cache
def _spread() -> npt.NDArray[np.uint16]:
    """Every byte with a zero bit put after each of its bits."""
    spread = [sum((byte >> bit & 1) << 2 * bit for bit in range(8)) for byte in range(256)]
    return np.array(spread, "<u2")
