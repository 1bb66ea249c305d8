"""The logger ``lateinit``: at INFO what each call did, at DEBUG the plan that it ran.

Nothing is shown unless the program sets logging up.
"""

import logging

log = logging.getLogger("lateinit")
log.addHandler(logging.NullHandler())
