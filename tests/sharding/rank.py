"""``python -m tests.sharding.rank MODULE ...``: run a module without Python's own end.

Rarely, at the end of the interpreter, a rank whose checks have all passed is aborted with
"terminate called without an active exception": a thread of C++ needs Python's lock there, and
Python ends it (Python/ceval_gil.h: take_gil, PyThread_exit_thread). The exit status of the rank is
that of its checks.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback


def main() -> int:
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - Python would print it, and end with 1
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
