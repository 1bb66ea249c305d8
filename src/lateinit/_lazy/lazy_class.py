"""``lazy``: the lazy version of a module class.

A lazy instance has the structure of the plain class, with placeholders for its tensors
(``declare``). Once the rules give its sizes, the plain class is constructed, and the result is
moved into the instance (``transplant``), which changes its class.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lateinit._lazy.checkpoint_sizes import load_sizes
from lateinit._lazy.declare import declare, layout_of
from lateinit._lazy.mixin import LazyModuleMixin, finish, initialising
from lateinit._lazy.placeholders import UninitializedParameter
from lateinit._lazy.rules import Rule, check_rules, evaluate_rules
from lateinit._lazy.scratch_recording import Settings
from lateinit._lazy.signature import accepts_any, bind, parameters_of, without
from lateinit._lazy.transplant import Transplant
from lateinit._lazy.trials import LazySpec
from lateinit._recording import current, hole_of
from lateinit._recording.postponed import postpone
from lateinit._rng import RandomStates
from lateinit._torch import own_buffers, own_modules, own_parameters, restoring
from lateinit.errors import ShapeError, UninitializedError

M = TypeVar("M", bound=nn.Module)

# The exceptions of constructors for sizes that they refuse, such as a width that the number of
# heads does not divide.
_REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError)


class Lazy(LazyModuleMixin):
    """The base of lazy versions of classes, constructed without the sizes that rules infer.

    Until the sizes are known, an instance has the structure of the plain module, with placeholders
    for its tensors.
    """

    _plain: type[nn.Module]
    _rules: Mapping[str, Rule]
    _defaults: Mapping[str, Any] = {}
    _by_value = False
    _parameter_kind = UninitializedParameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bind(self._plain, self._rules, args, dict(kwargs))
        arguments = {**self._defaults, **given}
        rules = {name: rule for name, rule in self._rules.items() if arguments.get(name) is None}
        arguments = {name: value for name, value in arguments.items() if name not in rules}
        spec = LazySpec(self._plain, rules, arguments, Settings.now())
        if not rules:
            # Every size was given by name: this is an ordinary module from the start.
            spec.construct_on(self, {})  # type: ignore[arg-type]
            self.__class__ = self.cls_to_become or type(self)
            return
        declare(self, spec)  # type: ignore[arg-type]
        self._load_hook = self._register_load_state_dict_pre_hook(self._lazy_load_hook)  # type: ignore[attr-defined]
        self._initialize_hook = self.register_forward_pre_hook(  # type: ignore[attr-defined]
            self._infer_parameters, with_kwargs=True
        )

    @property
    def is_initialized(self) -> bool:
        """Whether the sizes are known."""
        return "_spec" not in self.__dict__

    def has_uninitialized_params(self: Any) -> bool:
        """Whether a parameter or buffer has no shape yet, in a submodule too.

        Unlike torch's, this counts submodules, which the plain class may have constructed.
        """
        held: list[dict[str, Any]] = [
            tensors
            for part in _own_modules(self)
            for tensors in (own_parameters(part), own_buffers(part))
        ]
        return any(is_lazy(tensor) for tensors in held for tensor in tensors.values())

    def initialize_parameters(self: Any, *args: Any, **kwargs: Any) -> None:
        """Infer the sizes from the arguments of a forward call, and initialise the module.

        Args:
            *args: the arguments of the forward call; only shapes are read by ``size`` rules.
            **kwargs: its keyword arguments.

        Raises:
            ShapeError: the inputs do not have the shapes that the rules expect, or the plain class
                refuses the sizes.
        """
        if not self.is_initialized:
            self._initialize(evaluate_rules(self._spec.rules, self, args, kwargs))

    def _initialising(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # _initialize opens its own, around the construction alone

    def _initialize(self: Any, sizes: Mapping[str, Any]) -> None:
        """Become an instance of the plain class with these sizes."""
        states, plain = RandomStates(), None
        try:
            plain = self._constructed(sizes)
            self._become(plain)
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            # An interrupt before the construction leaves it lazy; the next call draws again.
            if plain is None:
                states.restore()
            else:
                self._become(plain)
            raise

    def _constructed(self: Any, sizes: Mapping[str, Any]) -> nn.Module:
        spec: LazySpec = self._spec
        with initialising(self):
            try:
                return spec.construct(sizes)
            except _REFUSALS as error:
                shown = ", ".join(f"{name}={value}" for name, value in sizes.items())
                raise ShapeError(
                    f"{self._get_name()}: {spec.cls.__name__} refuses the inferred {shown}: {error}"
                ) from error

    def _become(self: Any, plain: nn.Module) -> None:
        if self.is_initialized:
            return
        layout = layout_of(self._spec)
        Transplant(layout.varying, layout.known).run(self, plain)
        self.__dict__.pop("_spec", None)

    @restoring
    def _lazy_load_hook(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Adopt the sizes of a checkpoint and initialise; no module is left half lazy."""
        if self.is_initialized:
            finish(self)  # an earlier load was interrupted before this line
            return
        try:
            sizes = load_sizes(self, layout_of(self._spec), state_dict, prefix, rest[-1])
            if sizes is not None:
                self._initialize(sizes)
                finish(self)
        except ShapeError as error:
            # The error messages of `load_state_dict`, which collects and raises them together.
            rest[-1].append(f"{prefix.rstrip('.') or 'the module'}: {error}")

    def __reduce_ex__(self: Any, proto: Any) -> Any:
        if not type(self).__dict__.get("_by_value"):
            return super().__reduce_ex__(proto)
        return _blank, (self._plain, dict(self._rules)), self.__dict__

    def extra_repr(self: Any) -> str:
        """The plain class's own text, with 0 for an unknown size, as in torch's lazy layers."""
        try:
            return str(super().extra_repr())  # type: ignore[misc]
        except Exception:  # noqa: BLE001 - a class's extra_repr may rely on sizes in any way
            return ""


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """A module and the modules below it, without those that are lazy in their own right."""
    found = [module]
    for child in own_modules(module).values():
        if child is not None and not hasattr(child, "_initialize_hook"):
            found += _own_modules(child)
    return found


def lazy(cls: type[M], /, **rules: Rule) -> Callable[..., M]:
    """A lazy version of a module class, constructed without the sizes that follow from its input.

    To find which parameters an instance has, and which of their dims are known already, the class
    is constructed with trial sizes in recordings that are discarded; this allocates and draws
    nothing. The first forward pass, or ``infer_shapes``, evaluates the rules, constructs the plain
    class, and moves the result into the lazy module. Parameter objects, hooks and the module itself
    stay the same objects. If the module was declared in a ``deferred()`` block, its tensors are
    then deferred and its draws take the eager twin's place in the random stream; elsewhere they are
    allocated and drawn at that moment.

    Args:
        cls: a subclass of ``torch.nn.Module``.
        **rules: for each argument of ``cls`` to infer, ``lateinit.size(dim)`` or a function that
            takes the arguments of a forward call and returns the value.

    Returns:
        A subclass of ``cls``. It takes the arguments of ``cls`` without the inferred ones (which
        may still be given by name). Its instances become instances of ``cls`` itself.

    Raises:
        RuleError: a rule names no argument of ``cls``. Constructing an instance raises it too, if
            ``cls`` cannot be constructed with trial sizes.
        TypeError: ``cls`` is no subclass of ``torch.nn.Module``.

    Example:
        >>> LazyEmbed = lateinit.lazy(torch.nn.Linear, in_features=lambda x: x.shape[-1])
        >>> layer = LazyEmbed(out_features=4)
        >>> layer.weight
        <UninitializedParameter (4, ?)>
        >>> layer(torch.zeros(2, 3)).shape, type(layer).__name__
        (torch.Size([2, 4]), 'Linear')
    """
    given: object = cls
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(f"lazy() needs a subclass of torch.nn.Module, not {cls!r}")
    names = parameters_of(cls)
    check_rules(cls, rules, [*names, *rules] if accepts_any(cls) else list(names))
    return lazy_class(cls, tuple(rules.items()), True)


Rules = tuple[tuple[str, Rule], ...]
_MADE: dict[tuple[type[nn.Module], Rules, bool], type[Any]] = {}


def lazy_class(cls: type[nn.Module], rules: Rules, by_value: bool) -> type[Any]:
    """The lazy version of a class: one class for each set of rules.

    Args:
        cls: the plain class.
        rules: pairs of an argument and its rule.
        by_value: whether the class has no importable name, so that its instances are pickled with
            the plain class and the rules.
    """
    key = cls, rules, by_value
    if key not in _MADE:
        _MADE[key] = _made(*key)
    return _MADE[key]


def _made(cls: type[nn.Module], rules: Rules, by_value: bool) -> type[Any]:
    body: dict[str, Any] = {
        **of_plain(cls),
        "_plain": cls,
        "_rules": dict(rules),
        "_by_value": by_value,
        "cls_to_become": cls,
        "__signature__": without(cls, dict(rules)),
        "__doc__": _document(cls, dict(rules)),
        "__module__": __name__,
    }
    # A layer is also an instance of torch's lazy layer, which libraries test for. `Lazy` precedes
    # it in the bases and overrides its methods.
    twin = None if by_value else getattr(nn, f"Lazy{cls.__name__}", None)
    return type(f"Lazy{cls.__name__}", (Lazy, cls) if twin is None else (Lazy, twin, cls), body)


def of_plain(cls: type[nn.Module]) -> dict[str, Any]:
    """The methods of a plain class that its lazy version overrides."""
    # torch's attention and transformer layers have the second name.
    resets = [name for name in ("reset_parameters", "_reset_parameters") if hasattr(cls, name)]
    return {"forward": _forward_of(cls), **{name: _reset_of(name) for name in resets}}


def _forward_of(cls: type[nn.Module]) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Called without the forward pre-hook that initialises, such as when `torch.fx` traces it.
        if "_spec" in self.__dict__:
            raise UninitializedError(
                f"forward of {self._get_name()}, whose sizes are not known yet, was called "
                "directly or is being traced: call lateinit.infer_shapes(model, ...) first"
            )
        return cls.forward(self, *args, **kwargs)

    return forward


def _reset_of(name: str) -> Callable[[Any], None]:
    """A method that resets parameters.

    It does nothing before the sizes are known, as in the lazy layers of torch and
    pytorch-pfn-extras. In a block it runs once they are known, with its draws at the place in the
    random stream where the eager twin draws.
    """

    def reset(self: Any) -> None:
        if self.is_initialized:
            getattr(self._plain, name)(self)
        elif current() is not None and hole_of(self) is not None:
            postpone(self, methodcaller(name))

    return reset


def _document(cls: type[nn.Module], rules: Mapping[str, Rule]) -> str:
    names = " and ".join(f"``{name}``" for name in rules)
    return (
        f"``{cls.__module__}.{cls.__name__}`` that infers {names} from its first input.\n\n"
        f"It takes the arguments of ``{cls.__name__}`` without {names}, and becomes a "
        f"``{cls.__name__}``.\n"
    )


def _blank(cls: type[nn.Module], rules: dict[str, Rule]) -> Any:
    return object.__new__(lazy_class(cls, tuple(rules.items()), True))
