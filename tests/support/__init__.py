"""What tests share: models, both ways to build them, snapshots, random programs."""
