"""Which device an engine computes on: `python -m shared.models.devices NAME` says whether this machine has it.

A program of its own too, since asking means importing torch, which the command line does not do by itself. Exit code 2
and one line if there is no such device.
"""

from __future__ import annotations

import logging
import re
import sys

import torch

from shared.errors import UserError

log = logging.getLogger("devices")


def usable(name: str) -> str:
    """The device that a configuration names; `auto`: a GPU if there is one. Raise `UserError` if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise UserError(f"device {name!r} is unknown: give auto, cpu, cuda, or cuda:1 for the second GPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(f"device {name!r}: PyTorch {torch.__version__} finds no CUDA device here: give cpu or auto")
    if int(found[1] or 0) >= count:
        raise UserError(f"device {name!r}: there are {count} CUDA devices here, counted from cuda:0")
    return name


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    try:
        usable(sys.argv[1])
    except UserError as error:
        log.error("%s", error)
        sys.exit(2)
