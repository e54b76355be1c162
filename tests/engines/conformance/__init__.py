"""What every sampler engine does, as tests that take an engine's factory: `class TestMine(SamplerConformance)`.

The tests use the fixtures `start` (a `StartAny`), `sampler_model`, `reference` (transformers' model of the same weights
in fp32), `tolerance` and `prefill`. Those of `tests/engines/conftest.py` are for the torch engine; a class for another
engine has its own `start` and `prefill`, and its own `tolerance` if it does not compute in fp32.
"""

from tests.engines.conformance.crowd import Crowd
from tests.engines.conformance.drawing import Drawing
from tests.engines.conformance.ends import Ends
from tests.engines.conformance.policies import PolicyUse
from tests.engines.conformance.refusals import Refusals
from tests.engines.conformance.scores import Scores


class SamplerConformance(Drawing, Scores, Ends, PolicyUse, Crowd, Refusals):
    """All of it."""
