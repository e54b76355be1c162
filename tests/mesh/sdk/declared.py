"""What a test says that it shows: methods of the client with the meaning of their answers, and differences.

The declarations make up docs/tinker-compatibility.md, so no line of it stands without a test. That a test calls the
methods it declares is checked while it runs.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tinker import AdminClient, APIFuture, RestClient, SamplingClient, ServiceClient, TrainingClient

CLIENTS: dict[str, type] = {
    kind.__name__: kind for kind in (ServiceClient, TrainingClient, SamplingClient, RestClient, AdminClient, APIFuture)
}
PACKAGE = __name__.rpartition(".")[0]

DEPRECATED_TOO = [
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning"),
]
"""The SDK warns of methods that will go, and of some that may change. They are tested all the same."""

Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Meaning:
    """Methods, and what a test checks of their answers."""

    methods: tuple[str, ...]
    """Each as Client.method."""
    what: str


@dataclass(frozen=True)
class Difference:
    """Where the mesh answers otherwise than the hosted service, and how."""

    subject: str
    how: str


MEANINGS: list[Meaning] = []
DIFFERENCES: list[Difference] = []


def means(what: str, *methods: str) -> Callable[[Test], Test]:
    """Say of a test what it checks of these methods, and have it fail unless it calls each of them."""

    def declare(test: Test) -> Test:
        unknown = [method for method in methods if method not in methods_of_the_sdk()]
        assert not unknown, f"the SDK has no public {', '.join(unknown)}"
        MEANINGS.append(Meaning(methods, what))
        test.methods = (*getattr(test, "methods", ()), *methods)  # type: ignore[attr-defined]
        return test

    return declare


def differs(subject: str, how: str) -> Callable[[Test], Test]:
    """Say of a test which difference it shows."""

    def declare(test: Test) -> Test:
        DIFFERENCES.append(Difference(subject, how))
        return test

    return declare


def methods_of_the_sdk() -> list[str]:
    """All public methods of the clients, as Client.method."""
    return [
        f"{client}.{name}"
        for client, kind in CLIENTS.items()
        for name in dir(kind)
        if not name.startswith("_") and callable(getattr(kind, name))
    ]


def load_all() -> None:
    """Have all tests of this package say what they show, always in the same order."""
    for module in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"{PACKAGE}.{module.stem}")


def record_calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The methods that are called from here on, except by the SDK itself."""
    called: set[str] = set()
    for client, kind in CLIENTS.items():
        for heir in _heirs(kind):
            for name, member in list(vars(heir).items()):
                if f"{client}.{name}" in _names(client):
                    monkeypatch.setattr(heir, name, _recorded(member, f"{client}.{name}", called))
    return called


@functools.cache
def _names(client: str) -> frozenset[str]:
    return frozenset(name for name in methods_of_the_sdk() if name.startswith(f"{client}."))


def _heirs(kind: type) -> Iterator[type]:
    """A class and all that inherit from it: most methods of futures are written anew by each kind of future."""
    yield kind
    heirs: list[type] = kind.__subclasses__()
    for heir in heirs:
        yield from _heirs(heir)


def _recorded(member: Any, name: str, called: set[str]) -> Any:
    function = member.__func__ if isinstance(member, staticmethod) else member

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not str(sys._getframe(1).f_globals.get("__name__", "")).startswith("tinker."):
            called.add(name)
        return function(*arguments, **keywords)

    return staticmethod(call) if isinstance(member, staticmethod) else call
