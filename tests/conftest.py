"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.nats_server import NatsServer
from shared.blobs import BlobStore
from shared.bus import Bus


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server of the test's own."""
    server = await NatsServer.start(tmp_path / "nats")
    yield server
    await server.stop()


@pytest.fixture
async def bus(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Bus]:
    """A connection to it, with blobs in a directory."""
    connection = await Bus.connect(nats_server.url, BlobStore(str(tmp_path / "blobs")), name="test")
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with a tokenizer."""
    from tests.engines.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
