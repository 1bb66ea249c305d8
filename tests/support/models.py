"""The models that every law is checked against. Each is there for one difficulty, its name."""

from __future__ import annotations

from tests.support.cases.aliases import ALIASES
from tests.support.cases.ambience import AMBIENCE
from tests.support.cases.initialisers import INITIALISERS
from tests.support.cases.layers import LAYERS
from tests.support.cases.randomness import RANDOMNESS
from tests.support.cases.reads import READS

THEMES = (LAYERS, INITIALISERS, ALIASES, RANDOMNESS, READS, AMBIENCE)
MODELS = tuple(case for theme in THEMES for case in theme.cases)

# One for each difficulty that a torch release, a CPU or a change of ours has ever come between:
# `make quick` runs every law over these.
REPRESENTATIVE = frozenset(
    {
        "multilayer_perceptron",
        "weights_drawn_into_channels_last",
        "parametrization_removed_again",
        "truncated_normal_that_redraws",
        "linear_algebra",
        "one_parameter_under_two_names",
        "packed_projection_split_into_views",
        "odd_normals_in_every_dtype",
        "small_normals_between_large_ones",
        "generator_forked",
        "branch_on_a_drawn_value",
        "drop_path_rates_by_item",
        "tensor_written_through_its_numpy_view",
        "rotary_frequencies_not_persistent",
        "many_dtypes",
        "tensors_in_containers",
        "statistics_by_a_forward_pass",
    }
)
