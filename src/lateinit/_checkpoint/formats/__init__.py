"""Checkpoint formats: read safetensors, ``torch.save`` archives and DCP folders by tensor."""
