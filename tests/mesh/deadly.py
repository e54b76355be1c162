"""The environment service as a process, whose messages are given out again soon after it has died.

`python -m tests.mesh.deadly CONFIG`.
"""

from __future__ import annotations

import dataclasses
import os

from services.environment.api import Split, Task
from services.environment.config import EnvironmentConfig
from services.environment.service import build
from shared import topology
from shared.process import main

ACK_WAIT = 0.4
EXIT_CODE = 7


def deadly(split: Split, index: int, seed: int) -> Task:
    """An environment whose first task ends the process."""
    if index == 0:
        os._exit(EXIT_CODE)
    return Task(question="Still here?", answer="yes")


if __name__ == "__main__":
    topology.GROUP_PLAYERS = dataclasses.replace(topology.GROUP_PLAYERS, ack_wait=ACK_WAIT)
    main("environment", EnvironmentConfig, build)
