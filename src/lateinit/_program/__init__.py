"""The recorded construction as plain data, and planning on it.

A program is a sequence of ops over numbered storages. A plan says which of its ops must run to give
some storages their values.
"""
