"""Nothing of the SDK is left out, and the page says what the tests say."""

from __future__ import annotations

from tests.mesh.sdk import declared
from tests.mesh.sdk.page import COMMAND, DOCUMENT, page, untested


def test_every_public_method_of_the_sdk_is_tested() -> None:
    assert untested() == []
    counts = {
        name: sum(each.startswith(f"{name}.") for each in declared.methods_of_the_sdk()) for name in declared.CLIENTS
    }
    assert counts == {
        "ServiceClient": 16,
        "TrainingClient": 27,
        "SamplingClient": 12,
        "RestClient": 45,
        "AdminClient": 7,
        "APIFuture": 4,
    }, "another SDK: look at what is new, and say so here"


def test_the_page_is_what_the_tests_declare() -> None:
    assert DOCUMENT.read_text() == page(), f"{COMMAND} writes it anew"
