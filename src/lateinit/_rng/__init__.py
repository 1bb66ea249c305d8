"""torch's CPU generator: jump over draws, count them, draw parts of a tensor.

Nothing here knows of programs or deferred tensors. What is assumed of torch's kernels is tried once
in each process, and not used where the trial fails.
"""
