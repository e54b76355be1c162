"""Fixtures of the mesh tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.local.nats_server import NatsServer
from tests.mesh.harness import Place


@pytest.fixture
def place(nats_server: NatsServer, tmp_path: Path, tiny_model: Path) -> Place:
    """Where this test's mesh lives."""
    return Place(nats_server.url, tmp_path, tiny_model)
