"""Run recorded ops on real memory, each random one at its own place in the random stream."""
