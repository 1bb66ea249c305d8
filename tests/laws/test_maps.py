"""The laws under maps of devices and dtypes: they are casts of the eager twin, in any order."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

import lateinit
from lateinit.errors import DeferredTensorError
from tests.laws.test_init_rules import some
from tests.support.building import deferred, eager, models
from tests.support.call_sequences import cast_saved
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from tests.support.cases import Case

BF = torch.bfloat16


def refused(case: Case, **options: object) -> bool:
    """Whether memory is shared across the line, so that no cast is honoured."""
    with contextlib.suppress(DeferredTensorError):
        lateinit.plan([deferred(case)], **options)
        lateinit.materialize(deferred(case), **options)
        return False
    return True


@models(lambda case: case.casts and some(case))
def test_one_dtype_is_a_cast_of_what_is_saved(case: Case) -> None:
    expected = eager(case)
    saved = [t for t in deferred(case).state_dict(keep_vars=True).values() if _is_float(t)]
    # What is real already keeps its dtype, and torch casts no inference tensor outside of its mode.
    if not saved or not all(map(lateinit.is_deferred, saved)) or refused(case, dtype=BF):
        return
    if any(p.is_inference() for p in expected.parameters()):
        return
    cast_saved(expected, BF)
    assert_same(expected, lateinit.materialize(deferred(case), dtype=BF))
    assert_same(expected, lateinit.materialize(deferred(case), dtype={"": BF}))


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@models(some)
def test_a_map_of_devices_changes_no_bit(case: Case) -> None:
    expected = eager(case)
    assert_same(expected, lateinit.materialize(deferred(case), device={"": "cpu"}))
    names = {name.rpartition(".")[0] for name, _ in expected.named_parameters()}
    given = {name: "cpu" for name in sorted(names) if name} | {"*": "cpu"}
    assert_same(expected, lateinit.materialize(deferred(case), device=given))
