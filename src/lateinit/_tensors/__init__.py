"""Deferred tensors: how they are recognised, found, and made real.

Gives the rooms above a slot for each deferred storage (``slots``), a walk over the tensors of a
module (``walk``), a handle on a deferred tensor and its values (``deferred``), and the exchange
that puts real storage into an existing tensor object (``realize``). ``object_graph`` finds all
objects that a module reaches, and ``undo`` restores them after a trial run. May import ``_replay``
and the rooms below it. Start with ``slots``, which decides whether a tensor is deferred.
"""

from lateinit._tensors.cast import AS_RECORDED, Cast, Real, device_to_move_to
from lateinit._tensors.casts import (
    AS_IT_IS,
    Casting,
    Casts,
    Device,
    Devices,
    DTypes,
    casting,
    device_of,
)
from lateinit._tensors.copying import attributes, copied_by_deepcopy
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.init_rules import NO_RULES, Rules, call_rules, rule_states
from lateinit._tensors.initialisers import Init, Initialiser, initialiser, told
from lateinit._tensors.object_graph import Reach, exchange_held, exchanged
from lateinit._tensors.realize import (
    SharedStorage,
    adopt,
    adopt_uninitialized,
    realize_now,
    share_real_storage,
    show,
)
from lateinit._tensors.selection import (
    Only,
    Wanted,
    bind,
    bound_in,
    by_globs,
    ends_in,
    select,
    shards_in,
    unbind,
    wanted_in,
)
from lateinit._tensors.slots import (
    ON_META,
    PLAIN_CLASSES,
    Guarded,
    GuardedShard,
    Slot,
    address_of,
    attach,
    described,
    held,
    is_deferred_tensor,
    is_of_waiting,
    is_ordinary,
    is_parameter,
    original_class,
    slot_of,
    take_place,
    unguard,
    waits,
)
from lateinit._tensors.storage import DeferredStorage
from lateinit._tensors.values import own_copy
from lateinit._tensors.walk import (
    Found,
    Kind,
    find_tensors,
    is_placeholder,
    modules_by_name,
    modules_in,
    own_tensors,
    window_key,
)

__all__ = [
    "AS_IT_IS",
    "AS_RECORDED",
    "NO_RULES",
    "ON_META",
    "PLAIN_CLASSES",
    "Cast",
    "Casting",
    "Casts",
    "DTypes",
    "Deferred",
    "DeferredStorage",
    "Device",
    "Devices",
    "Found",
    "Guarded",
    "GuardedShard",
    "Init",
    "Initialiser",
    "Kind",
    "Only",
    "Reach",
    "Real",
    "Rules",
    "SharedStorage",
    "Slot",
    "Wanted",
    "address_of",
    "adopt",
    "adopt_uninitialized",
    "attach",
    "attributes",
    "bind",
    "bound_in",
    "by_globs",
    "call_rules",
    "casting",
    "copied_by_deepcopy",
    "described",
    "device_of",
    "device_to_move_to",
    "ends_in",
    "exchange_held",
    "exchanged",
    "find_tensors",
    "held",
    "initialiser",
    "is_deferred_tensor",
    "is_of_waiting",
    "is_ordinary",
    "is_parameter",
    "is_placeholder",
    "modules_by_name",
    "modules_in",
    "original_class",
    "own_copy",
    "own_tensors",
    "realize_now",
    "rule_states",
    "select",
    "shards_in",
    "share_real_storage",
    "show",
    "slot_of",
    "take_place",
    "told",
    "unbind",
    "unguard",
    "waits",
    "wanted_in",
    "window_key",
]
