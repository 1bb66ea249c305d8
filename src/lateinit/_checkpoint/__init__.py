"""Files and models: read and write checkpoint formats, save a model, load one."""
