"""A map by identity: keys that compare oddly, and keys that nobody else holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lateinit._identity import IdentityMap, distinct


class Odd:
    """Equal to everything, and not hashable."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


@pytest.mark.parametrize("make", [Odd, lambda: torch.ones(3), lambda: [1], object])
def test_keys_are_told_apart_by_identity(make: Any) -> None:
    one, other = make(), make()
    found = IdentityMap([(one, 1)])
    found[other] = 2
    assert [found[one], found[other], len(found)] == [1, 2, 2]
    found[one] = 3
    assert list(found.values()) == [3, 2]
    assert [key is one for key in found] == [True, False]
    del found[one]
    assert one not in found
    assert found.get(one, "none") == "none"
    with pytest.raises(KeyError):
        found[one]


def test_a_key_that_nobody_else_holds_keeps_its_place() -> None:
    found: IdentityMap[Any, int] = IdentityMap()
    for number in range(100):
        found[object()] = number
    assert list(found.values()) == list(range(100))


def test_distinct_objects_stay_in_order() -> None:
    a, b = torch.ones(2), torch.ones(2)
    assert [x is y for x, y in zip(distinct([b, a, b]), [b, a], strict=True)] == [True, True]
