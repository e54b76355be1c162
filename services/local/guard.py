"""Becomes a command that ends with its parent: `python guard.py PARENT SIGNAL COMMAND...`.

A supervisor that is killed can end nobody. On Linux the kernel does it: the signal that is set here survives the
exec. That is done in a process of its own rather than between fork and exec of the supervisor, which has threads.
Elsewhere only the next `up` ends what was left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
FIRST = 3
"""Place of the command in the arguments."""


def main(arguments: list[str]) -> None:
    """Replace this process. Does not return."""
    parent, signal_number, command = int(arguments[1]), int(arguments[2]), arguments[FIRST:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:  # it ended before the kernel was told
        sys.exit(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an exec would hand that on
    os.execvp(command[0], command)  # noqa: S606 - the whole point


if __name__ == "__main__":
    main(sys.argv)
