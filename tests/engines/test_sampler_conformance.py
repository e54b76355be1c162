"""The torch engine does what every sampler engine does."""

from __future__ import annotations

from tests.engines.conformance import SamplerConformance


class TestTorch(SamplerConformance):
    """With the fixtures of `conftest`."""
