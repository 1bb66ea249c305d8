"""``infer_shapes``: find the sizes of lazy modules by a forward pass on shapes alone.

The pass runs on stand-ins for the model's tensors (``borrowed_model``). Each lazy module that it
calls is initialised as a trial, so that the pass can go on after it. Afterwards the model is put
back as it was, and only if the whole pass succeeded are the lazy modules initialised for good.
``protocols.py`` initialises a single module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.rnn import PackedSequence

from lateinit._identity import IdentityMap
from lateinit._integrations import is_pfn_layer
from lateinit._lazy.borrowed_model import Lending, counting_stand_in, on_meta
from lateinit._lazy.first_call import UpToEnd, mark_unknown
from lateinit._lazy.layers import LAYERS
from lateinit._lazy.mixin import trying
from lateinit._lazy.protocols import (
    close_holes,
    end_of_initialisation,
    initialise,
    is_lazy_module,
)
from lateinit._lazy.rules import evaluate_rules
from lateinit._lazy.shape_mode import ShapeMode, is_readable, needs_values, readable
from lateinit._log import log
from lateinit._rng import RandomStates
from lateinit._tensors import Reach, exchange_held, is_deferred_tensor, is_parameter, own_copy
from lateinit._torch import (
    asks_for_values,
    before_call,
    is_fake,
    is_wrapper,
    map_leaves,
    outside,
    replace_forward_pre_hook,
    restoring,
    settings_kept,
    unhurried,
    without_modes,
)
from lateinit.errors import NeedsValuesError, ShapeError, UnreachedError, listing

# By plain class, so that the rules also serve a lazy layer of torch or of pytorch-pfn-extras that
# was initialised as that class.
_RULES = {layer._plain: layer._rules for layer in LAYERS}


@restoring
@unhurried
def infer_shapes(
    module: nn.Module, /, *args: Any, strict: bool = True, real: bool = False, **kwargs: Any
) -> list[str]:
    """Infer the sizes of lazy modules by a forward pass on shapes alone, and initialise them.

    Nothing is computed and no activation is allocated. In a model that was built in a
    ``deferred()`` block, the new parameters and buffers are deferred too: nothing is allocated, and
    each module's draws are recorded at the eager twin's place in the random stream. Elsewhere they
    are allocated and drawn now, in the order of the forward pass, as a first forward pass would.
    Placeholders stay the same objects.

    Everything else stays as it was: buffers, gradients, attributes, train/eval flags, and the
    random states apart from the draws just named. Writes of the pass to objects that the model
    reaches are undone, and so are changes of the default dtype, of deterministic algorithms, of the
    thread count and of cudnn's flags. Iterators, ``functools.lru_cache`` and objects that are held
    only by weak references are not restored. If anything raises, no module has been initialised.

    Lazy modules may be those of lateinit, torch, pytorch-pfn-extras and other libraries, mixed.

    Args:
        module: the model.
        *args: example inputs for its ``forward``, real or on ``meta``; tensors may be inside
            containers. Shapes and dtypes are read, and the values of small real masks, lengths and
            indices.
        strict: raise if the pass does not reach some lazy module.
        real: run the pass with values, for a model whose control flow depends on them. The inputs
            must be real. The model's tensors are copied for the pass, and its deferred tensors are
            computed; all copies are dropped afterwards.
        **kwargs: keyword inputs.

    Returns:
        The names of the lazy modules that the pass did not reach. The list is empty unless
        ``strict=False``.

    Raises:
        UnreachedError: the pass did not reach some lazy modules.
        NeedsValuesError: the pass depends on values; the message names the line.
        ShapeError: the inputs do not fit a lazy module, or two calls of one module give it
            different sizes.
        TypeError: ``module`` is no module.

    Example:
        >>> with lateinit.deferred():
        ...     net = torch.nn.Sequential(lateinit.nn.LazyConv2d(8, 3), torch.nn.Flatten(),
        ...                               lateinit.nn.LazyLinear(10))
        >>> lateinit.infer_shapes(net, torch.empty(1, 3, 224, 224, device="meta"))
        []
        >>> net[2]
        Linear(in_features=394272, out_features=10, bias=True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"infer_shapes takes a module and its example inputs, not {type(module)}")
    names = IdentityMap((part, name) for name, part in module.named_modules())
    waiting = [part for part in module.modules() if is_lazy_module(part)]
    run = _Run(names, real)
    if waiting:
        run.forward(module, args, kwargs)
    left = [names[part] or "the module itself" for part in waiting if part not in run.done]
    if left and strict:
        raise UnreachedError(
            f"the forward pass did not reach {listing(left)}: the shapes there are not known and "
            "nothing was initialised. Pass inputs that reach them, call infer_shapes again on "
            "those parts, or pass strict=False"
        )
    run.initialise()
    close_holes(module)
    log.info("inferred the shapes of %d lazy modules; %d left", len(run.met), len(left))
    return left


@restoring
@unhurried
def observe_forward(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observer: Callable[[nn.Module], contextlib.AbstractContextManager[object]],
    *,
    real: bool = False,
) -> None:
    """Run a forward pass as ``infer_shapes`` does, and leave the model as it was, lazy modules too.

    Args:
        module: the model.
        args: the positional arguments of its ``forward``.
        kwargs: the keyword arguments.
        observer: returns the context in which the pass runs. Hooks that it registers on modules are
            removed at the end.
        real: run the pass with values.
    """
    names = IdentityMap((part, name) for name, part in module.named_modules())
    _Run(names, real, observer).forward(module, args, kwargs)


def _unobserved(_: nn.Module) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


class _Run:
    """One forward pass, in which lazy modules are initialised as a trial.

    Attributes:
        names: the name of each module.
        real: whether the pass runs with values.
        met: the lazy modules that the pass called, in order, with the shapes of their inputs.
        done: those modules, and the parts that are initialised with them.
        lending: makes the stand-ins.
    """

    def __init__(
        self, names: IdentityMap[nn.Module, str], real: bool, observer: Any = _unobserved
    ) -> None:
        self.names = names
        self.real = real
        self._observer = observer
        self.met: IdentityMap[nn.Module, tuple[Any, Any, UpToEnd | None]] = IdentityMap()
        self.done: IdentityMap[nn.Module, None] = IdentityMap()
        self.lending = Lending(self._with_values if real else counting_stand_in)
        self._memo: dict[Any, Any] = {}
        self._sizes: IdentityMap[nn.Module, dict[str, Any]] = IdentityMap()
        self._meeting: IdentityMap[nn.Module, None] = IdentityMap()

    def forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Run the pass on stand-ins, and put the model back as it was."""
        # Inputs may be objects that hold tensors, which the pass may write to as well.
        everything = module, args, kwargs
        reach, states, grad = Reach(everything), RandomStates(), torch.is_grad_enabled()
        reach.keep()
        left: list[tuple[Tensor, Tensor]] = []

        def put_back() -> None:
            try:
                reach.restore()
            finally:
                _put_values(left)
                states.restore()

        try:
            # `outside` turns gradients on; the pass must see the caller's setting.
            with outside(), settings_kept(), torch.set_grad_enabled(grad), trying(self.real):
                self._pass(reach, everything, left)
            put_back()
        except BaseException:
            put_back()
            raise

    def _pass(self, reach: Reach, everything: Any, left: list[tuple[Tensor, Tensor]]) -> None:
        module, args, kwargs = everything
        args, kwargs = self._inputs((args, kwargs))
        reach.exchange(self.lending.of)
        if self.real:
            left += self._values_left(everything, module)
        self._prepare(module)
        with self._mode(), _said_where(self.real), self._observer(module):
            module(*args, **kwargs)

    def _values_left(self, graph: Any, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors that could not be exchanged in the object that holds them, each with a copy."""
        for tensor in Reach(graph).tensors():
            if self.lending.has_original(tensor) and not tensor.is_meta:
                yield tensor, tensor.detach().clone()
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):  # a C++ object holds its tensors
                for tensor in (*part.parameters(), *part.buffers()):
                    yield tensor, tensor.detach().clone()

    def initialise(self) -> None:
        """Initialise the modules that the pass called, for good, in the order of their calls."""
        for module, (args, kwargs, end) in self.met.items():
            initialise(module, args, kwargs, end)

    def _with_values(self, tensor: Tensor) -> Tensor:
        return own_copy(tensor, self._memo, past_holes=True)

    def _trial(self, tensor: Tensor) -> Tensor:
        """The stand-in of a deferred tensor that the trial of a lazy module made."""
        return self.lending.of(tensor) if is_deferred_tensor(tensor) else tensor

    def _mode(self) -> Any:
        return contextlib.nullcontext() if self.real else ShapeMode()

    def _inputs(self, inputs: Any) -> Any:
        make = _real_input if self.real else _meta_input
        return _map_inputs(lambda tensor: self.lending.know(make(tensor)), inputs)

    def _prepare(self, module: nn.Module) -> None:
        """Let every lazy module report its first call instead of initialising itself."""
        for part in module.modules():
            if not is_lazy_module(part):
                continue
            handle = part.__dict__.get("_initialize_hook")
            # It replaces the module's own hook, so that the order of its forward pre-hooks stays.
            if isinstance(part, LazyModuleMixin) and handle is not None:
                replace_forward_pre_hook(part, handle.id, self._meet)
            elif hasattr(part, "lazy_parmeters_determined"):
                part.register_forward_pre_hook(self._meet, with_kwargs=True)
            else:  # its own hooks belong to its initialisation
                before_call(part, self._meet)

    def _meet(self, module: Any, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a lazy module: note its inputs, and initialise it as a trial."""
        if module in self.met or module in self._meeting or not is_lazy_module(module):
            return
        self._meeting[module] = None
        lazy = [part for part in module.modules() if is_lazy_module(part)]
        rules = _rules_of(module)  # before: a user's class may change when it is initialised
        shapes = _map_inputs(_shape_only, (args, kwargs))
        end = self._end(module, *((args, kwargs) if self.real else shapes))
        try:
            initialise(module, shapes[0], shapes[1], end)
        except ShapeError as error:
            raise ShapeError(f"{self.names.get(module, '') or 'the module'}: {error}") from error
        # The trial left tensors of a discarded recording. The pass goes on with stand-ins for them,
        # as for all other tensors.
        with outside():
            exchange_held(module, self._trial)
        self.met[module] = *shapes, end
        self.done.update((part, None) for part in lazy if not is_lazy_module(part))
        del self._meeting[module]
        rules = rules or _rules_of(module)
        if rules is not None:
            module.register_forward_pre_hook(self._check(rules), with_kwargs=True)
            self._check(rules)(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any) -> UpToEnd | None:
        """The end of the initialisation in a module's first call; None if it has a mixin."""
        if isinstance(module, LazyModuleMixin):
            return None
        met, done, reach = [*self.met.items()], [*self.done], Reach((module, args, kwargs))
        reach.keep()
        try:
            exchange_held(module, Lending(_another).of)
            return end_of_initialisation(module, args, kwargs, real=self.real)
        finally:
            self.met, self.done = IdentityMap(met), IdentityMap((part, None) for part in done)
            reach.restore()

    def _check(self, rules: Any) -> Any:
        """A hook for later calls of a module, which must give it the sizes of the first call."""

        def check(module: nn.Module, args: Any, kwargs: Any) -> None:
            sizes = evaluate_rules(rules, module, args, kwargs)
            first = self._sizes.setdefault(module, sizes)
            if sizes != first:
                raise ShapeError(
                    f"{self.names.get(module, '') or type(module).__name__} is called with "
                    f"{_said(first)} and again with {_said(sizes)}: one module has one size"
                )

        return check


def _put_values(left: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in left:
        if not torch.equal(tensor, values):
            with torch.no_grad():
                tensor.copy_(values)


def _another(tensor: Tensor) -> Tensor:
    return on_meta(tensor) if tensor.is_meta else tensor.detach().clone()


def _real_input(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise NeedsValuesError(
            f"real=True runs the forward pass with values, and an input of shape "
            f"{tuple(tensor.shape)} is on meta: give real example inputs"
        )
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _meta_input(tensor: Tensor) -> Tensor:
    plain = tensor.layout is torch.strided and not is_wrapper(tensor) and not is_fake(tensor)
    if plain and not is_deferred_tensor(tensor) and is_readable(tensor):
        return readable(_real_input(tensor))
    made = on_meta(tensor).requires_grad_(tensor.requires_grad)
    return nn.Parameter(made, tensor.requires_grad) if is_parameter(tensor) else made


def _rules_of(module: nn.Module) -> Any:
    """The rules by which a module was initialised, if it is a lazy layer of any library."""
    cls = type(module)
    if is_pfn_layer(module):  # these layers keep their lazy class
        cls = next((base for base in cls.__mro__ if base in _RULES), cls)
    return _RULES.get(cls) or getattr(module, "_rules", None)


def _said(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def _map_inputs(make: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Inputs in any containers, with ``make(tensor)`` in place of each tensor."""

    def made(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):  # its other tensors say how it is packed
            return leaf._replace(data=make(leaf.data))
        return make(leaf) if isinstance(leaf, Tensor) else leaf

    return map_leaves(made, inputs, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def _shape_only(tensor: Tensor) -> Tensor:
    with without_modes():
        return mark_unknown(on_meta(tensor))


@contextlib.contextmanager
def _said_where(real: bool) -> Iterator[None]:
    """Turn an error about missing values into ``NeedsValuesError`` that names the line.

    ``numpy`` and ``tolist`` fail below the dispatcher, where ``ShapeMode`` cannot intercept them.
    """
    try:
        yield
    except (NeedsValuesError, ShapeError):
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if not real and asks_for_values(error):
            raise needs_values(str(error), error) from error
        raise
