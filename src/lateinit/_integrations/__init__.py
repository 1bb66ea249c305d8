"""What lateinit knows of other libraries by name.

Model specifications such as ``transformers:gpt2``, and the names that transformers gives to
parameters in checkpoints. Each library is imported only when it is asked for.
"""
