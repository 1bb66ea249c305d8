"""Shards, ranks and meshes: which part of a tensor a rank holds, and whether the ranks agree."""
