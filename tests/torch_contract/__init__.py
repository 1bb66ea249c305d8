"""What lateinit depends on inside torch, one file for each module of ``lateinit._torch``.

Each test says in a sentence what torch does and where. A release that does otherwise breaks the
test of that name here; ``tests/test_walls.py`` sees that no export goes without one.
"""
