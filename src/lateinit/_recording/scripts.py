"""Have no scripted module saved without its values.

torch/csrc/jit/serialization/export_module.cpp writes the bytes of tensors in C++, and of those on
``meta`` none; it calls no op that would be heard.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from lateinit._recording.after_block import needs_values
from lateinit._recording.watched import Watched
from lateinit._tensors import is_deferred_tensor, realize_now, waits
from lateinit._torch import constants_of_script, held_by_script, tell_of_script_saves


def _give_values(module: nn.Module) -> None:
    scripts = list(module.modules())
    held = held_by_script(scripts)
    late = [t for one in held for t in one.tensors() if is_deferred_tensor(t)]
    constants = [t for script in scripts for t in constants_of_script(script)]
    # Nothing can be given to a constant of a graph, as ``materialize`` says.
    refused = [*filter(is_deferred_tensor, constants), *filter(waits, late)]
    if refused:
        raise needs_values("torch.jit.save", refused[0])
    for tensor in late:
        realize_now(tensor)
    for one in held if late else ():
        one.put_back()


# The methods of scripted modules have no hooks, so they are replaced.
watch_script_saves = Watched(
    partial(tell_of_script_saves, _give_values), partial(tell_of_script_saves, None)
).add
"""Look at each scripted module that is saved while the tensors of a program are deferred."""
