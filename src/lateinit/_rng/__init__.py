"""torch's CPU generator: jump over draws, count them, draw parts of a tensor.

Gives the rooms above ``jump`` (``mt19937``), the words that each op draws (``consumption``), the
state before each of a sequence of draws (``position``), and truncated normals in parts. May import
``_torch`` and the leaf modules, and knows neither programs nor deferred tensors. Every assumption
about a kernel of torch is tried once per process, and not relied on if the trial fails. Start with
``mt19937``.
"""
