"""What lateinit knows of other libraries: specifications, names, and which code needs values.

``model_specs`` turns a text such as ``transformers:gpt2`` into a constructor, for the command.
``transformers_names`` has the names under which ``transformers`` saves a model, for
``_checkpoint``. ``saved_files`` has the names of the files. ``accelerate_maps`` uses accelerate's
device maps and hooks. ``float32_modules`` lists the tensors that ``transformers`` and ``diffusers``
keep in float32. ``offloading`` lists the code that reads a tensor's device to move it, and the code
that sends its values. ``pfn_extras`` recognises the lazy layers of pytorch-pfn-extras.
The room may import only ``errors`` and the other leaves. A library is imported only when a
specification asks for it. Start with ``model_specs.py``.
"""

from lateinit._integrations.accelerate_maps import Disk, has_accelerate, inferred
from lateinit._integrations.float32_modules import in_float32
from lateinit._integrations.offloading import NEEDS_VALUES, SEES_RECORDED, before_sending
from lateinit._integrations.pfn_extras import is_pfn_class, is_pfn_layer
from lateinit._integrations.saved_files import config_text, weights_stem
from lateinit._integrations.transformers_names import (
    Conversion,
    left_out,
    preferred_name,
    tied_targets,
)

__all__ = [
    "NEEDS_VALUES",
    "SEES_RECORDED",
    "Conversion",
    "Disk",
    "before_sending",
    "config_text",
    "has_accelerate",
    "in_float32",
    "inferred",
    "is_pfn_class",
    "is_pfn_layer",
    "left_out",
    "preferred_name",
    "tied_targets",
    "weights_stem",
]
