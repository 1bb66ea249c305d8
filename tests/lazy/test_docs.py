"""The documents on lazy modules name everything that there is."""

from __future__ import annotations

from pathlib import Path

import lateinit
from lateinit import nn, pfn_extras

DOCS = Path(__file__).parents[2] / "docs"


def test_every_public_name_is_in_the_table_of_names() -> None:
    text = (DOCS / "lazy-names.md").read_text()
    for name in nn.__all__:
        assert f"`{name}`" in text or f"`nn.{name}`" in text, name
    for name in pfn_extras.__all__:
        stem = name.removesuffix("2d").removesuffix("3d")
        assert stem in text, name


def test_the_public_face_has_the_lazy_names() -> None:
    assert {"infer_shapes", "lazy", "nn", "pfn_extras", "size"} <= set(lateinit.__all__)
