"""The protobuf messages of the `tinker` client, from its own package.

The package imports torch where it is installed, and much else, which a gateway has no use for: 230 MiB and seconds at
each start. So the one module that the gateway needs is loaded by its path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from shared.errors import UserError

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as messages

__all__ = ["messages"]

MODULE = Path("proto") / "tinker_public_pb2.py"


def _loaded() -> ModuleType:
    package = importlib.util.find_spec("tinker")
    if package is None or not package.submodule_search_locations:
        raise UserError("the package tinker is not installed: install openrl-mesh[gateway]")
    path = Path(package.submodule_search_locations[0]) / MODULE
    spec = importlib.util.spec_from_file_location("tinker_public_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not TYPE_CHECKING:
    messages = _loaded()
