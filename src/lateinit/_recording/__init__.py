"""The block: turn the construction of a model into a program.

A function mode answers what Python code asks of deferred tensors; a dispatch mode below it writes
each op into the program; patches stand in for the few functions that neither can see.
"""
