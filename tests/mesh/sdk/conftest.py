"""Fixtures of the tests of the SDK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mesh.sdk import declared
from tests.mesh.sdk.data import Reference
from tests.mesh.sdk.world import User, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    """The mesh that all these tests share."""
    found = World(tmp_path_factory.mktemp("sdk"), tiny_model)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def user(world: World) -> Iterator[User]:
    """A tenant of the test's own."""
    with world.user() as found:
        yield found


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Reference:
    """The same model in plain transformers."""
    return Reference(tiny_model)


@pytest.fixture(autouse=True)
def calls_what_it_declares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test must call the methods that it says it shows."""
    methods = getattr(request.function, "methods", ())
    called = declared.record_calls(monkeypatch)
    yield
    missing = [method for method in methods if method not in called]
    assert not missing, f"declared, and not called: {', '.join(missing)}"
