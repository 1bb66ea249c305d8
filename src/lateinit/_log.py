"""The logger ``lateinit``: at INFO the work of each call, at DEBUG the plan that it executed.

Nothing is shown unless the user's program configures logging.
"""

import logging

log = logging.getLogger("lateinit")
log.addHandler(logging.NullHandler())
