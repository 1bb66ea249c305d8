"""Save a model as safetensors, in a stream, resumable and all or nothing."""
