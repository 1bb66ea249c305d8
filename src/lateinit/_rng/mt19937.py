"""Move the state of a CPU generator over any number of draws, without making them.

torch's CPU generator is the Mersenne Twister MT19937 (aten/src/ATen/core/MT19937RNGEngine.h). It is
linear over GF(2): the words that follow n draws later are an XOR of words that follow now. Which
ones is given by the coefficients of x**n modulo the characteristic polynomial of the recurrence.

Source: M. Matsumoto and T. Nishimura, "Mersenne Twister: A 623-Dimensionally
Equidistributed Uniform Pseudo-Random Number Generator", ACM TOMACS 8(1), 1998, for the
generator and its polynomial; H. Haramoto et al., "Efficient Jump Ahead for F2-Linear Random
Number Generators", INFORMS JoC 20(3), 2008, for jumping by a polynomial.
"""

import ctypes
import hashlib
import struct
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lateinit import _native
from lateinit._torch import without_modes

_Words = npt.NDArray[np.uint32]

# The parameters of MT19937: words of state, the middle word of the recurrence, the degree.
_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_BYTES = _DEGREE // 8 + 1  # of a polynomial
_MASK = (1 << _DEGREE) - 1
# T**(2**i) for i < 6 suffices in _reduced(): T**64 would move a quotient, whose degree is below
# _DEGREE, down by at least 623 * 64, so nothing would be left of it.
_SCALES = tuple(1 << i for i in range(6))
_TWIST = 0x9908B0DF  # the last row of the twist matrix
# Byte offsets in a state (aten/src/ATen/CPUGeneratorImpl.cpp): left, seeded and next; the 624
# words, 8 bytes each; the cached normals, of which y (double) and its flag are used.
_POSITION = struct.Struct("=ii Q")
_POSITION_AT, _WORDS_AT, _NORMALS_AT, STATE_BYTES = 8, 24, 5016, 5056
_NORMAL_Y_AT, _NORMAL_VALID_AT = 5024, 5040

# The least number of draws for which a leap is faster than drawing. Measured: 1.5 ns for a draw,
# 0.55 ms for a leap, and 0.7 ms more for a distance whose polynomial is not cached.
_LEAP_FROM = 500_000
_FEW = 4_000  # up to so many draws, torch draws faster than a state is read and set again
_SCRATCH = 1 << 16  # words drawn and discarded at a time: 256 KiB stay in cache
_TWO_WORDS = (-(2**63), None)  # the range of integers for which random_ takes 64 random bits
# Coefficients combined at once. Measured: 8 are as fast, but take twice the memory, whose first
# touch costs extra.
_GROUP = 7
_GROUPS = -(-_DEGREE // _GROUP)


def jump(state: bytes, n: int) -> bytes:
    """The state of a CPU generator after `n` more 32-bit draws.

    Args:
        state: `torch.Generator.get_state()` as bytes (5056 of them).
        n: the number of 32-bit words drawn; 0 or more.

    Returns:
        The 5056 bytes of torch's own state after the draws. The seed and the cached normal samples
        are those of `state`. Takes less than 1 ms for an `n` that is cached, 1 to 2 ms more
        otherwise; natively 0.1 and 0.2 ms. Does not use the global generator; threads may call it
        at the same time.

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
    if _is_native():
        return _native.jump(state, n)
    blocks, last = divmod(drawn + n - 1, _WORDS)
    if blocks and (n < _LEAP_FROM or not _leaps_agree()):
        return _step(state, n)
    return _placed(_leap(state, blocks) if blocks else state, last + 1)


def move(generator: torch.Generator, n: int) -> None:
    """Move a CPU generator over `n` 32-bit draws: `jump`, in place."""
    if n < (_FEW if _is_native() else _LEAP_FROM):
        _draw(generator, n)
    else:
        set_state(generator, jump(state_of(generator), n))


def generator_at(state: bytes) -> torch.Generator:
    """A new CPU generator in the given state."""
    generator = torch.Generator(device="cpu")
    set_state(generator, state)
    return generator


def set_state(generator: torch.Generator, state: bytes) -> None:
    """Put a generator of any device into a state."""
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def state_of(generator: torch.Generator) -> bytes:
    """The state of a generator of any device, as bytes."""
    state = generator.get_state()
    # From raw memory, since the modes of a block would intercept numpy().
    return ctypes.string_at(state.data_ptr(), state.numel())


def state_from(key: bytes, device: torch.device) -> bytes:
    """A generator state that is a pure function of some bytes.

    On the CPU a seed has only 32 bits, so two of many generators would get equal seeds. Therefore
    all words of the state are set.
    """
    words = hashlib.shake_256(key).digest(4 * _WORDS)
    if device.type != "cpu":
        seed = int.from_bytes(words[:8], "little") >> 1
        return state_of(torch.Generator(device).manual_seed(seed))
    state = bytearray(state_of(torch.Generator().manual_seed(0)))
    struct.pack_into(f"={_WORDS}Q", state, _WORDS_AT, *struct.unpack(f"={_WORDS}I", words))
    return bytes(state)


def seed_behind(state: bytes) -> int | None:
    """The seed that a CPU generator with this state was just given; None if it has drawn since."""
    # A state begins with its seed. No draw has followed if seeding again gives the same state.
    seed = int.from_bytes(state[:8], "little")
    fresh = state_of(torch.Generator().manual_seed(seed)) == state
    return seed if fresh else None


def has_normal(state: bytes) -> bool:
    """Whether the second sample of a pair of normals is cached in `state`."""
    return any(state[_NORMAL_VALID_AT : _NORMAL_VALID_AT + 4])


def without_normal(state: bytes) -> bytes:
    """`state` without a cached second normal, as torch leaves it after using the sample."""
    # torch clears value and flag. A stale value without a flag must be cleared too: states are
    # compared byte for byte.
    if state[_NORMAL_Y_AT : _NORMAL_Y_AT + 8] == bytes(8) and not has_normal(state):
        return state
    middle = state[_NORMAL_Y_AT + 8 : _NORMAL_VALID_AT]
    return state[:_NORMAL_Y_AT] + bytes(8) + middle + bytes(4) + state[_NORMAL_VALID_AT + 4 :]


def _drawn(state: bytes) -> int:
    """The number of used words in the block of a state; after seeding, the whole block counts.

    Raises:
        ValueError: `state` is no state of a CPU generator.
    """
    if len(state) != STATE_BYTES:
        raise ValueError(f"a CPU generator's state has {STATE_BYTES} bytes; this has {len(state)}")
    # Seeding sets left to 1 and next to 0: the first draw makes a new block.
    left, _, drawn = _POSITION.unpack_from(state, _POSITION_AT)
    if (left, drawn) == (1, 0):
        return _WORDS
    if left + drawn != _WORDS + 1 or not 1 <= drawn <= _WORDS:
        raise ValueError(f"no CPU generator stands at left={left}, next={drawn}")
    return int(drawn)


def _placed(state: bytes, drawn: int) -> bytes:
    """The state with the same block of words, of which `drawn` are used."""
    _, seeded, _ = _POSITION.unpack_from(state, _POSITION_AT)
    position = _POSITION.pack(_WORDS + 1 - drawn, seeded, drawn)
    return state[:_POSITION_AT] + position + state[_WORDS_AT:]


def _step(state: bytes, n: int) -> bytes:
    """Draw `n` words with torch."""
    generator = generator_at(state)
    _draw(generator, n)
    return state_of(generator)


def _draw(generator: torch.Generator, n: int) -> None:
    """Draw `n` words: two per int64 element, one for a uint8."""
    for start in range(0, n - n % 2, _SCRATCH):
        pairs = min(_SCRATCH, n - start) // 2
        torch.empty(pairs, dtype=torch.int64, device="cpu").random_(
            *_TWO_WORDS, generator=generator
        )
    if n % 2:
        torch.empty(1, dtype=torch.uint8, device="cpu").random_(generator=generator)


@cache
def _is_native() -> bool:
    """Whether native jumps end in the same states as draws, with the installed torch."""
    with without_modes():
        return _native.can_jump()


@cache
def _leaps_agree() -> bool:
    """Whether a leap ends in the same state as draws, with the installed torch."""
    start = state_of(torch.Generator(device="cpu").manual_seed(19937))
    return _placed(_leap(start, 3), _WORDS) == _step(start, 3 * _WORDS)


def _leap(state: bytes, blocks: int) -> bytes:
    """Put the block that comes `blocks` later into `state`."""
    words = _untempered(_combined(_selection(blocks), _outputs(state)))
    return state[:_WORDS_AT] + words.astype(np.uint64).tobytes() + state[_NORMALS_AT:]


def _outputs(state: bytes) -> _Words:
    """The outputs that follow the block of `state`, as many as `_combined` reads.

    They start at the next block, since the low 31 bits of a fresh seed's word 0 are not part of the
    linear state. From the next block on, every bit is determined by it.
    """
    generator = generator_at(_placed(state, _WORDS))
    pairs = torch.empty((8 * _BYTES + _WORDS) // 2, dtype=torch.int64, device="cpu")
    pairs.random_(*_TWO_WORDS, generator=generator)
    words = pairs.numpy().view(np.uint64)
    outputs = np.empty((len(words), 2), np.uint32)
    outputs[:, 0], outputs[:, 1] = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return outputs.ravel()


class _Selection(NamedTuple):
    """The runs of outputs that a polynomial selects, grouped by patterns of seven coefficients.

    Ordered so that `_combined` needs one vectorised XOR per round: first one run of each pattern,
    then a second run of each pattern that has two, and so on. The patterns with most runs come
    first.
    """

    runs: npt.NDArray[np.int16]
    rounds: tuple[int, ...]  # the number of runs in each round
    places: npt.NDArray[np.intp]  # the place of each pattern within a round


def _combined(selection: _Selection, outputs: _Words) -> _Words:
    """XOR of the runs of 624 outputs that the polynomial selects, seven coefficients at once.

    All runs with the same pattern are first XORed unshifted. Then only these 128 sums are shifted
    by the bits of their patterns, halving their number for each bit.
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
    """The words of state behind outputs. Tempering is linear, so it can be undone at the end."""
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
    counts[0] = 0  # runs of seven zero coefficients are not selected
    values = np.argsort(-counts)
    rounds = tuple(int((counts > number).sum()) for number in range(counts.max()))
    ordered = [runs[firsts[values[:count]] + number] for number, count in enumerate(rounds)]
    return _Selection(np.concatenate(ordered).astype(np.int16), rounds, np.argsort(values))


def _power(n: int) -> int:
    """x**n modulo the characteristic polynomial; bit i is the coefficient of x**i."""
    # Square and multiply by x. The leading 14 bits of n give a power below the degree, 2**14 < D.
    bits = max(n.bit_length() - 14, 0)
    power = 1 << (n >> bits)
    for bit in reversed(range(bits)):
        power = _reduced(_squared(power) << (n >> bit & 1))
    return power


def _squared(poly: int) -> int:
    """The square over GF(2): a zero bit is put after every coefficient."""
    packed = np.frombuffer(poly.to_bytes(_BYTES, "little"), np.uint8)
    return int.from_bytes(_spread()[packed].tobytes(), "little")


def _reduced(poly: int) -> int:
    """The remainder modulo the characteristic polynomial P, for a degree below twice its degree D.

    With P = x**D * (1 + T), T a sum of negative powers, 1 / (1 + T) is the product over i of
    1 + T**(2**i), over GF(2). Since T**(2**i) moves down by at least 623 * 2**i, few i matter.
    """
    quotient = poly >> _DEGREE
    for scale in _SCALES:
        quotient ^= _times_tail(quotient, scale)
    high = quotient << _DEGREE
    return (poly ^ high ^ _times_tail(high, 1) ^ quotient) & _MASK


def _times_tail(poly: int, scale: int) -> int:
    """`poly` * (T + x**-D)**`scale`, without negative powers; `scale` is a power of two.

    With u = x**623 + x**396, P is the sum of x * u**32, of x * u**k with k = 31 - i for every set
    bit i < 31 of the twist matrix's last row, and of 1 for its bit 31. So with v = 1 + x**-227,
    T + x**-D is the sum of x**-7264 and of v**k * x**(-623 * (32 - k)) for each k. Horner's rule
    evaluates that in 33 shifts; written out, T has 134 terms.
    """
    total = 0
    for shifts, down in _horner(scale):
        for shift in shifts:
            total ^= total >> shift
        total ^= poly >> down
    return total


@cache
def _horner(scale: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The steps of Horner's rule: a power of v to multiply by, as shifts, then a term to add."""
    powers = [31 - bit for bit in range(31) if _TWIST >> bit & 1]
    gap, block = _WORDS - _MIDDLE, _WORDS - 1
    steps, last = [], powers[0]
    for power in (*powers, 0):
        shifts = (gap << bit for bit in range(5) if last - power >> bit & 1)
        # The last term is no power of v: v**32 = 1 + x**-7264, and the 1 is no part of T.
        down = block * (32 - power) if power else 32 * gap
        steps.append((tuple(scale * shift for shift in shifts), scale * down))
        last = power
    return tuple(steps)


@cache
def _spread() -> npt.NDArray[np.uint16]:
    """A table of all bytes, with a zero bit put after each bit."""
    spread = [sum((byte >> bit & 1) << 2 * bit for bit in range(8)) for byte in range(256)]
    return np.array(spread, "<u2")
