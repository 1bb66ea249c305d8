"""``python -m lateinit`` is the command ``lateinit``."""

from lateinit.cli import main

main()
