"""What a replica offers of the model that it serves."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.contracts.replicas import CONTEXT, DIRECTORY


class _ModelConfig(msgspec.Struct):
    max_position_embeddings: int | None = None


def model_offers(model_dir: Path) -> list[str]:
    """Where its files lie, and how many tokens fit into it as its own configuration says; nothing where it does not."""
    if not model_dir.is_dir():
        return []
    offers = [f"{DIRECTORY}{model_dir.resolve()}"]
    try:
        found = msgspec.json.decode((model_dir / "config.json").read_bytes(), type=_ModelConfig)
    except (OSError, msgspec.MsgspecError):
        return offers
    return [*offers, f"{CONTEXT}{found.max_position_embeddings}"] if found.max_position_embeddings else offers
