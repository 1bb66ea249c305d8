"""One HTML page of a model or a checkpoint, which needs no network.

The package gives the command ``report`` the data of the page (``content``: ``of_model`` and
``of_checkpoint``), and the page itself (``document``: ``page_of`` and ``written``), which includes
``page.css`` and ``page.js``. Start with ``content``.
"""

from lateinit._report.page.content import Content, of_checkpoint, of_model
from lateinit._report.page.document import Written, check_output, page_of, written

__all__ = ["Content", "Written", "check_output", "of_checkpoint", "of_model", "page_of", "written"]
