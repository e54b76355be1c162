"""Writes the golden bytes of messages that have none yet: `python -m tests.contracts.write_golden`.

Bytes that are there are never written again: they stand for what earlier versions have put into streams and buckets.
"""

from __future__ import annotations

from pathlib import Path

from shared import wire
from tests.contracts.examples import MESSAGES, RECORDS

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    for name, (_, message) in MESSAGES.items():
        _write(GOLDEN / f"{name}.msgpack", wire.encode(message, json=False))
        _write(GOLDEN / f"{name}.json", wire.encode(message, json=True))
    for name, (_, value) in RECORDS.items():
        _write(GOLDEN / f"record_{name}.json", wire.encode(value, json=True))


def _write(path: Path, body: bytes) -> None:
    if not path.exists():
        path.write_bytes(body)


if __name__ == "__main__":
    main()
