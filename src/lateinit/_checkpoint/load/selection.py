"""Select the tensors of a module in a checkpoint that holds more, or has longer names.

A training run saves a module's state dict inside another dict: ``{"model": ..., "optimizer":
...}``, ``{"state_dict": ...}``. The names in it may begin with the names of wrappers: ``module.``,
``model.``. The keys and the prefix together are the *stem*: everything before a name of the module.
The stem is found automatically if only one fits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from lateinit._checkpoint.formats import Reader, Renamed
from lateinit._torch import without_wrappers
from lateinit.errors import MismatchError, candidates, listing

Rename = Callable[[str], str | None] | Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The arguments ``key=``, ``prefix=`` and ``rename=``; None for those to find automatically.

    Attributes:
        key: the keys that lead to the state dict, joined by dots; empty for the outermost dict.
        prefix: the prefix of its names that the module's names lack.
        rename: maps a name to its new name, or to None to leave the tensor out.
    """

    key: str | None = None
    prefix: str | None = None
    rename: Rename | None = None

    def __post_init__(self) -> None:
        for what, value in (("key", self.key), ("prefix", self.prefix)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{what}: a string is meant, not {type(value)}")
        if not (self.rename is None or callable(self.rename) or isinstance(self.rename, Mapping)):
            raise TypeError(f"rename: a function or a dict is meant, not {type(self.rename)}")

    def __bool__(self) -> bool:
        return (self.key, self.prefix, self.rename) != (None, None, None)

    def renamed(self, name: str) -> str | None:
        """The new name of a tensor."""
        if self.rename is None:
            return name
        new = self.rename(name) if callable(self.rename) else self.rename.get(name, name)
        if new is not None and not isinstance(new, str):
            raise TypeError(f"rename: {name!r} became a {type(new)}; a string or None is meant")
        return new

    def check_all_used(self, names: Collection[str], reader: Reader) -> None:
        """Raise if ``rename`` is a dict with a key that is not in ``names``."""
        lost = [] if callable(self.rename) else [n for n in self.rename or () if n not in names]
        if lost:
            raise MismatchError(
                f"rename: {reader} has no {listing(map(repr, lost))}; near: "
                f"{candidates(lost[0], names)}"
            )


AS_FOUND = Choice()


def selected(kind: str, ours: Collection[str], reader: Reader, choice: Choice) -> Reader | None:
    """The part of a checkpoint that belongs to a module, under the module's names.

    Args:
        kind: the class of the module, for messages.
        ours: the names of its state dict.
        reader: the checkpoint.
        choice: the arguments of the caller.

    Returns:
        The part; None if that would be the whole checkpoint unchanged, or if no name fits.

    Raises:
        MismatchError: several parts fit, or none at the place that the caller names, or none in any
            dict of the checkpoint.
    """
    known = {without_wrappers(name): name for name in ours}
    fitting: dict[str, dict[str, str]] = {}  # the module's names by those in the files, by stem
    for name in _all_names(reader):
        for begin, rest in _divided(name, reader, choice):
            new = choice.renamed(rest)
            own = None if new is None else known.get(without_wrappers(new))
            if own is not None:
                fitting.setdefault(begin, {})[name] = own
                break
    stem = _stem(kind, reader, choice, fitting)
    if stem is None:
        return None
    names, rests = _named(reader, choice, stem, fitting.get(stem, {}))
    choice.check_all_used(rests, reader)
    if all(new == old for new, old in names.items()) and len(names) == len(_all_names(reader)):
        return None
    part = Renamed(reader, names)
    part.under = stem
    prefix = _parts(stem, reader.homes.get(next(iter(names.values()), ""), ""))[1]
    if prefix and choice.prefix is None:
        part.hint = f"(prefix={prefix!r} leaves out what does not begin with it)"
    return part


def _named(
    reader: Reader, choice: Choice, stem: str, fitting: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """The names in the files of all entries of the fitting dicts, by their new names.

    Names that ``rename`` maps are included.
    """
    homes = {reader.homes.get(name, "") for name in fitting}
    names: dict[str, str] = {}
    rests: set[str] = set()
    for name in _all_names(reader):
        home = reader.homes.get(name, "")
        if homes and home not in homes:
            continue
        rest = dict(_divided(name, reader, choice)).get(stem)
        if rest is None and homes and choice.prefix is None and choice.rename is None:
            rest = _parts(name, home)[1]  # not in the module: reported as unexpected
        if rest is None:
            continue
        rests.add(rest)
        new = fitting.get(name) or choice.renamed(rest)
        if new is not None and new in names:
            raise MismatchError(f"{reader} has two tensors for {new!r}: {names[new]} and {name}")
        if new is not None:
            names[new] = name
    return names, rests


def _all_names(reader: Reader) -> dict[str, None]:
    return dict.fromkeys([*reader.entries, *reader.aliases, *reader.objects])


def _divided(name: str, reader: Reader, choice: Choice) -> Iterator[tuple[str, str]]:
    """Each way to divide a name into stem and rest that the caller allows; longest rest first."""
    home = reader.homes.get(name, "")
    # ``rename`` gets the names as they are in the files.
    text = name if choice.rename is not None else without_wrappers(name)
    prefix = choice.prefix
    if prefix is None and choice.rename is not None:
        prefix = ""
    elif prefix is not None and choice.rename is None:
        prefix = without_wrappers(prefix)
    anywhere = prefix is not None and not f".{prefix}".endswith(".")
    for end in range(len(text)):
        if end and text[end - 1] != "." and not anywhere:
            continue
        key, before = _parts(text[:end], home)
        if choice.key in (None, key) and prefix in (None, before):
            yield text[:end], text[end:]


def _parts(stem: str, home: str) -> tuple[str, str]:
    """The keys and the prefix in the stem of a name that is in the dict ``home``."""
    while home and not stem.startswith(f"{home}."):
        home = home.rpartition(".")[0]
    return home, stem[len(home) + 1 :] if home else stem


def _stem(
    kind: str, reader: Reader, choice: Choice, fitting: dict[str, dict[str, str]]
) -> str | None:
    """The stem that fits the module; None if none does, in a checkpoint of one dict."""
    if "" in fitting:
        return ""  # the checkpoint as it is, as for load_state_dict
    every = {new for found in fitting.values() for new in found.values()}
    most = max((len(set(found.values())) for found in fitting.values()), default=0)
    best = [stem for stem, found in fitting.items() if len(set(found.values())) == most]
    if len(best) == 1 and most == len(every):
        return best[0]
    if best:
        told = [f"{_said(stem, reader, fitting[stem])}: {most} names" for stem in best]
        raise MismatchError(
            f"{reader} has {len(best)} parts that fit {kind}, which is left as it was: "
            f"{listing(told)}. Name the one to load: load_checkpoint(..., "
            f"{_said(best[0], reader, fitting[best[0]])})"
        )
    if choice.key is not None or choice.prefix is not None:
        stem = f"{choice.key}." * bool(choice.key) + (choice.prefix or "")
        if any(stem in dict(_divided(name, reader, choice)) for name in _all_names(reader)):
            return stem  # names that do not fit are reported later, as for any checkpoint
    elif not reader.homes:
        return "" if choice else None
    raise MismatchError(
        f"{reader} has no name of {kind}"
        f"{' there' * bool(choice)}, which is left as it was. It holds {_contents(reader)}. Name "
        "what to load by key=, what its names begin with by prefix=, or rename them by rename="
    )


def _said(stem: str, reader: Reader, found: Mapping[str, str]) -> str:
    key, prefix = _parts(stem, reader.homes.get(next(iter(found)), ""))
    given = [f"key={key!r}"] * bool(reader.homes) + [f"prefix={prefix!r}"] * bool(prefix)
    return ", ".join(given)


def _contents(reader: Reader) -> str:
    """The dicts of a checkpoint that hold tensors, each with the number of them."""
    found: dict[str, list[str]] = {}
    for name in reader.entries:
        home = reader.homes.get(name, "")
        found.setdefault(home, []).append(name[len(home) + 1 :] if home else name)
    return listing(
        f"key={home!r} with {len(names)} tensors ({listing(names, 2)})"
        for home, names in sorted(found.items(), key=lambda item: -len(item[1]))
    )
