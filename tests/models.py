"""The models that every law is checked against. Each is there for one difficulty, its name."""

from __future__ import annotations

from tests.cases.aliases import ALIASES
from tests.cases.ambience import AMBIENCE
from tests.cases.initialisers import INITIALISERS
from tests.cases.layers import LAYERS
from tests.cases.randomness import RANDOMNESS
from tests.cases.reads import READS

THEMES = (LAYERS, INITIALISERS, ALIASES, RANDOMNESS, READS, AMBIENCE)
MODELS = tuple(case for theme in THEMES for case in theme.cases)
