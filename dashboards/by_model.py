"""Queries of pages on which a base model is chosen."""

from __future__ import annotations

from dashboards.model import Query

MODEL = 'base_model=~"$base_model"'
CALLED = "{{base_model}}"


def recorded(name: str, legend: str = CALLED) -> Query:
    """A recorded series, by base model."""
    return Query(f"openrl:{name}{{{MODEL}}}", legend)
