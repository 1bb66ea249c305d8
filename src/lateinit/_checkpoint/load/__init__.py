"""Load a checkpoint as ``load_state_dict`` would, tensor by tensor, all or nothing."""
