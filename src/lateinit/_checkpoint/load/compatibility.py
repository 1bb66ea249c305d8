"""Check whether a checkpoint fits a module, and raise all problems in one error.

``fit`` checks the result of a dry run. The texts of all mismatches are here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._checkpoint.formats import Reader, StoredTensor
from lateinit._checkpoint.load.dry_run import Rehearsal
from lateinit._distributed import Box, parts_of
from lateinit._identity import IdentityMap, distinct
from lateinit._integrations import left_out
from lateinit._lazy import known_shape, show
from lateinit._tensors import Found, find_tensors, is_deferred_tensor, window_key
from lateinit._torch import as_bytes, is_dtensor
from lateinit.errors import MismatchError, listing

# The message of `Module._load_from_state_dict` (torch/nn/modules/module.py).
_SIZES = re.compile(
    r"size mismatch for (.+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[(.*?)\]\)\."
)
# The similarity from which on a name is suggested; stricter than difflib's default, 0.6.
_NEAR = 0.75
# The most source names that a message shows for one tensor.
_MOST_SOURCES = 3
# The most names for which a similar name is searched: each is compared with all others, which takes
# long for a large model.
_MOST_SEARCHED = 20


@dataclass(frozen=True, slots=True)
class Fit:
    """Which tensors are loaded, and which are not.

    Attributes:
        loaded: the names that get their values from the checkpoint.
        missing: the names that the checkpoint lacks.
        unexpected: the names that the module lacks.
        repeated: the indices of copies that give a tied tensor the same value again.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    repeated: frozenset[int]


class TensorNames:
    """The tensors of a module by name, with the names of each tied tensor."""

    def __init__(self, module: nn.Module) -> None:
        self.distinct: list[Found] = list(find_tensors(module))
        self.found: dict[str, Found] = {n: f for f in self.distinct for n in f.names}
        self._keys: IdentityMap[Tensor, Any] = IdentityMap()
        self._together: dict[Any, list[str]] = {}
        for name, found in self.found.items():
            self._together.setdefault(self.key(found.tensor), []).append(name)

    def key(self, tensor: Tensor) -> Any:
        """A key that is equal for tensors that show the same memory in the same way."""
        try:
            return self._keys[tensor]
        except KeyError:
            plain = not is_lazy(tensor) and not is_dtensor(tensor)
            whole = plain and tensor.layout is torch.strided
            key = self._keys[tensor] = window_key(tensor) if whole else id(tensor)
            return key

    def of(self, tensor: Tensor) -> list[str]:
        """All names of a tensor, including those that are tied to it."""
        return self._together.get(self.key(tensor), [])

    def saved(self) -> list[str]:
        """The names that a state dict holds."""
        return [n for n, f in self.found.items() if f.kind != "attribute" and f.persistent]


def fit(
    module: nn.Module,
    names: TensorNames,
    reader: Reader,
    rehearsal: Rehearsal,
    wanted: Callable[[Tensor], torch.dtype],
    *,
    strict: bool,
) -> Fit:
    """Check the result of a dry run, and raise all of its problems at once.

    Args:
        module: the module.
        names: its tensors.
        reader: the checkpoint.
        rehearsal: the dry run.
        wanted: returns the dtype that a tensor will have.
        strict: whether module and checkpoint must have the same names.

    Raises:
        MismatchError: anything does not fit.
    """
    hint = ""
    problems = [_as_told(message, reader) for message in rehearsal.wrong]
    problems += _kinds(names, reader, rehearsal, wanted)
    problems += _unwritable(names, rehearsal)
    keys = {names.key(target) for target, source in rehearsal.copies if source is not None}
    keys |= {names.key(target) for target in rehearsal.replaced}
    repeated, differing = _tied(names, reader, rehearsal)
    problems += differing
    loaded = [n for n, f in names.found.items() if names.key(f.tensor) in keys]
    done = set(loaded)
    missing = [n for n in dict.fromkeys(rehearsal.missing) if n not in done]
    unexpected = list(dict.fromkeys(rehearsal.unexpected))
    # If no name of the checkpoint is in the model, that is a mistake even with strict=False.
    strange = reader.entries.keys() <= set(unexpected)
    if (missing or unexpected) and (strict or strange):
        strangers, hint = _strangers(module, names, reader, missing, unexpected)
        problems += strangers
    if rehearsal.failure is not None and not problems:
        problems.append(str(rehearsal.failure))
    if problems:
        count = len(problems)
        raise MismatchError(
            f"{reader} does not fit {type(module).__name__}, which is left as it was; "
            f"{count} problem{'s' * (count != 1)}:\n  "
            + "\n  ".join([*problems, *filter(None, [hint])])
        )
    missing = list(dict.fromkeys([*missing, *(n for n in names.saved() if n not in done)]))
    return Fit(tuple(loaded), tuple(missing), tuple(unexpected), repeated)


def _as_told(message: str, reader: Reader) -> str:
    """Reword torch's message about a size, with the names in the file."""
    found = _SIZES.fullmatch(message)
    if found is None:
        return message
    name, theirs, ours = found.groups()
    origins = reader.origins.get(name, [name])
    source = "" if origins == [name] else f" (from {listing(origins, _MOST_SOURCES)})"
    return f"{name}: the checkpoint has the shape ({theirs}){source}, the model ({ours})"


def _kinds(
    names: TensorNames,
    reader: Reader,
    rehearsal: Rehearsal,
    wanted: Callable[[Tensor], torch.dtype],
) -> Iterable[str]:
    """Casts that would lose more than precision: float to integer, complex to real."""
    for target, source in rehearsal.copies:
        if source is not None:
            dtype = reader.entries[source].dtype if isinstance(source, str) else source.dtype
            if not torch.can_cast(dtype, wanted(target)):
                name = next(iter(names.of(target)), source if isinstance(source, str) else "?")
                yield f"{name}: the checkpoint has the dtype {dtype}, the model {wanted(target)}"


def _unwritable(names: TensorNames, rehearsal: Rehearsal) -> Iterable[str]:
    """Tensors that torch refuses to copy into, found before the first copy is made."""
    for target in distinct(target for target, _ in rehearsal.copies):
        if is_lazy(target) or is_dtensor(target) or target.layout is not torch.strided:
            continue
        name = next(iter(names.of(target)), "?")
        sizes = zip(target.shape, target.stride(), strict=True)
        if target.numel() and any(size > 1 and stride == 0 for size, stride in sizes):
            yield f"{name}: expanded, so that its elements share memory: register a clone of it"
        frozen = target.is_inference() and not is_deferred_tensor(target)
        if frozen and not torch.is_inference_mode_enabled():
            yield f"{name}: made in inference mode, and can be changed in none but that"


def _tied(
    names: TensorNames, reader: Reader, rehearsal: Rehearsal
) -> tuple[frozenset[int], list[str]]:
    """Copies that give a tied tensor a value again, and problems where the values differ.

    If a hook takes a value from another name, nothing is compared: the last copy wins, as in torch.
    """
    first: dict[Any, str] = {}
    repeated, problems = set(), []
    for number, (target, source) in enumerate(rehearsal.copies):
        if not isinstance(source, str) or source not in names.of(target):
            continue
        key = names.key(target)
        if key not in first:
            first[key] = source
        elif not same_bits(reader, first[key], source, _held_here(target, reader.entries[source])):
            problems.append(
                f"{first[key]} and {source} are one tensor in the model, but two in the "
                "checkpoint, which differ"
            )
        elif rehearsal.plain:  # otherwise a hook may have changed the tensor in between
            repeated.add(number)
    return frozenset(repeated), problems


def _held_here(target: Tensor, source: StoredTensor) -> list[Box] | None:
    """The blocks of a tensor that this rank holds; None if not known, or if it holds all of it.

    The ranks of a mesh together hold the whole tensor; a rank that finds a difference reports it to
    the others.
    """
    if not is_dtensor(target) or tuple(target.shape) != source.shape:
        return None
    return [part.full for part in parts_of(target, source.name)]


def same_bits(reader: Reader, first: str, second: str, blocks: list[Box] | None = None) -> bool:
    """Whether a checkpoint holds the same bits under two names.

    Args:
        reader: the checkpoint.
        first: a name.
        second: another name.
        blocks: the blocks to compare, by default the whole tensors.
    """
    ours, theirs = reader.entries[first], reader.entries[second]
    if first == second:
        return True
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    if blocks is None:
        return torch.equal(as_bytes(reader.read(first)), as_bytes(reader.read(second)))
    read = partial(reader.read, alone=True)
    return all(torch.equal(as_bytes(read(first, *b)), as_bytes(read(second, *b))) for b in blocks)


def _strangers(
    module: nn.Module, names: TensorNames, reader: Reader, missing: list[str], unexpected: list[str]
) -> tuple[list[str], str]:
    """Problems with names that only module or checkpoint has, with the next step for each.

    Names that the model's class declares irrelevant are no problems.
    """
    no_need, no_use = left_out(module, missing, unexpected)
    missing = [name for name in missing if name not in no_need]
    unexpected = [name for name in unexpected if name not in no_use]
    problems = []
    for name in missing:
        found = names.found.get(name)
        shape = f", {show(known_shape(found.tensor))}," if found is not None else ""
        near = _near(name, unexpected, missing)
        problems.append(f"{name}{shape} is not in the checkpoint{near}")
    problems += [f"{n} is not in the model{_near(n, missing, unexpected)}" for n in unexpected]
    hint = reader.hint or _prefix(names.saved(), list(reader.entries))
    if not hint and missing and not unexpected:
        hint = "(strict=False initialises what is missing as its construction says)"
    return problems, (hint or "") if problems else ""


def _near(name: str, others: Collection[str], mine: list[str]) -> str:
    if mine.index(name) >= _MOST_SEARCHED:
        return ""
    near = difflib.get_close_matches(name, others, n=1, cutoff=_NEAR)
    return f"; near: {near[0]}" if near else ""


def _prefix(ours: list[str], theirs: list[str]) -> str | None:
    """Advice if the names would fit without a prefix that all names of the model have."""
    if set(ours) & set(theirs):
        return None
    for prefix in _prefixes(ours):
        if {name.removeprefix(prefix) for name in ours} & set(theirs):
            return (
                f"all names of the model start with {prefix!r}, and those of the checkpoint do "
                f"not: load it into that part, load_checkpoint(model.{prefix[:-1]}, ...)"
            )
    return None


def _prefixes(names: list[str]) -> list[str]:
    """The prefixes, each up to a dot, that all names have."""
    first, last = min(names, default=""), max(names, default="")
    ends = [i + 1 for i, letter in enumerate(first) if letter == "."]
    return [first[:end] for end in ends if last.startswith(first[:end])]
