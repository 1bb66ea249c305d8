"""Run a plan, in parallel where that pays, and put the values into the deferred tensors."""
