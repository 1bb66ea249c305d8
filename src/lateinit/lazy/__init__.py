"""Lazy shapes: modules declared without their input sizes."""
