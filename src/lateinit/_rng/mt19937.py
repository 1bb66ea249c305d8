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
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_Words = npt.NDArray[np.uint32]

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_BYTES = _DEGREE // 8 + 1  # of a polynomial
_MASK = (1 << _DEGREE) - 1
_SCALES = tuple(1 << i for i in range(6))
_TWIST = 0x9908B0DF
_POSITION = struct.Struct("=ii Q")
_POSITION_AT, _WORDS_AT, _NORMALS_AT, _SIZE = 8, 24, 5016, 5056
_NORMAL_Y_AT, _NORMAL_VALID_AT = 5024, 5040

# Measured: about 1.5 ns a draw made, 0.55 ms a leap, and 0.7 ms more for a distance that is new.
_LEAP_FROM = 500_000
_SCRATCH = 1 << 16
_TWO_WORDS = (-(2**63), None)  # the range of integers for which random_ takes 64 random bits
# Measured: with 8 at once it is as fast, but takes twice the memory, which may be touched first.
_GROUP = 7
_GROUPS = -(-_DEGREE // _GROUP)


def jump(state: bytes, n: int) -> bytes:
    """The state in which a CPU generator is after `n` 32-bit draws.

    Args:
        state: `torch.Generator.get_state()` as bytes (5056 of them).
        n: how many 32-bit words are drawn; 0 or more.

    Returns:
        The 5056 bytes that torch itself would have. The seed and the cached normal samples
        are those of `state`. Below 1 ms for an `n` seen before, and one or two more for
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
    words = _untempered(_combined(_selection(blocks), _outputs(state)))
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


class _Selection(NamedTuple):
    """The runs of outputs that a polynomial selects, by the coefficients that start each.

    For each pattern of seven the first run, then for each that has more the second, and so on;
    patterns that have more runs come first.
    """

    runs: npt.NDArray[np.int16]
    rounds: tuple[int, ...]  # how many runs are firsts, seconds, ...
    places: npt.NDArray[np.intp]  # of the patterns among each round


def _combined(selection: _Selection, outputs: _Words) -> _Words:
    """XOR of the runs of 624 outputs that the polynomial selects, seven coefficients at once.

    All runs that start with the same pattern are summed as they are; only these 128 sums are then
    shifted as their patterns say, by halves.
    """
    runs = np.lib.stride_tricks.sliding_window_view(outputs, _WORDS + _GROUP)[::_GROUP]
    sums = np.zeros((1 << _GROUP, _WORDS + _GROUP), np.uint32)
    chosen, begin = selection.runs.astype(np.intp), 0
    for count in selection.rounds:
        part = sums[:count]
        np.bitwise_xor(part, runs[chosen[begin : begin + count]], out=part)
        begin += count
    sums = sums[selection.places]
    combined = np.zeros(_WORDS, np.uint32)
    for bit in reversed(range(_GROUP)):
        with_bit = sums[1 << bit : 2 << bit]
        combined ^= np.bitwise_xor.reduce(with_bit[:, bit : bit + _WORDS], axis=0)
        sums[: 1 << bit] ^= with_bit
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
def _selection(blocks: int) -> _Selection:
    """The coefficients that lead to the block `blocks` later, in groups of seven."""
    power = np.frombuffer(_power((blocks - 1) * _WORDS).to_bytes(_BYTES, "little"), np.uint8)
    bits = np.unpackbits(power, bitorder="little")[: _GROUPS * _GROUP].reshape(_GROUPS, _GROUP)
    patterns = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    counts = np.bincount(patterns, minlength=1 << _GROUP)
    runs, firsts = np.argsort(patterns, kind="stable"), np.cumsum(counts) - counts
    counts[0] = 0  # these runs count for nothing
    values = np.argsort(-counts)
    rounds = tuple(int((counts > number).sum()) for number in range(counts.max()))
    ordered = [runs[firsts[values[:count]] + number] for number, count in enumerate(rounds)]
    return _Selection(np.concatenate(ordered).astype(np.int16), rounds, np.argsort(values))


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
    1 + T**(2**i) over GF(2). `T**(2**i)` moves down by 623 * 2**i and more, so few i matter.
    """
    quotient = poly >> _DEGREE
    for scale in _SCALES:
        quotient ^= _times_tail(quotient, scale)
    high = quotient << _DEGREE
    return (poly ^ high ^ _times_tail(high, 1) ^ quotient) & _MASK


def _times_tail(poly: int, scale: int) -> int:
    """`poly` * (T + x**-D)**`scale`, without negative powers; `scale` is a power of two.

    With u = x**623 + x**396, P is x * u**32, and x * u**k, k = 31 - i, for every set bit i < 31
    of the twist matrix's last row, and 1 for its bit 31. So with v = 1 + x**-227, T + x**-D is
    x**-7264, and v**k * x**(-623 * (32 - k)) for each k. By Horner's rule that takes 33 shifts;
    written out T has 134 terms.
    """
    total = 0
    for shifts, down in _horner(scale):
        for shift in shifts:
            total ^= total >> shift
        total ^= poly >> down
    return total


@cache
def _horner(scale: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Horner's rule for T: the powers of v to multiply by, as shifts, and the term to add then."""
    powers = [31 - bit for bit in range(31) if _TWIST >> bit & 1]
    gap, block = _WORDS - _MIDDLE, _WORDS - 1
    steps, last = [], powers[0]
    for power in (*powers, 0):
        shifts = (gap << bit for bit in range(5) if last - power >> bit & 1)
        # What comes last is no power of v: v**32 is 1 + x**-7264, the 1 is no part of T.
        down = block * (32 - power) if power else 32 * gap
        steps.append((tuple(scale * shift for shift in shifts), scale * down))
        last = power
    return tuple(steps)


@cache
def _spread() -> npt.NDArray[np.uint16]:
    """Every byte with a zero bit put after each of its bits."""
    spread = [sum((byte >> bit & 1) << 2 * bit for bit in range(8)) for byte in range(256)]
    return np.array(spread, "<u2")
