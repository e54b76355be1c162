"""Tokens and signatures of a gateway."""

from __future__ import annotations

import jwt
import pytest

from services.gateway.signing import Signer
from shared.errors import UserError

SECRET = b"s" * 32


def test_a_token_is_recognised_by_whoever_has_the_secret_and_until_it_expires() -> None:
    signer = Signer(SECRET)
    token = signer.token({"sub": "me"})
    claims = Signer(SECRET).claims(token)
    assert claims is not None
    assert (claims["sub"], claims["exp"] - claims["iat"]) == ("me", 900)
    assert Signer(b"t" * 32).claims(token) is None
    assert signer.claims(signer.token({"sub": "me"}, seconds=-1)) is None


@pytest.mark.parametrize("token", ["", "eyJ", "a.b.c", jwt.encode({"exp": 9e9, "iat": 0}, key="", algorithm="none")])
def test_what_is_no_token_of_ours_is_nothing(token: str) -> None:
    assert Signer(SECRET).claims(token) is None


def test_a_token_without_an_end_is_nothing() -> None:
    assert Signer(SECRET).claims(jwt.encode({"sub": "me", "iat": 0}, SECRET, "HS256")) is None


def test_a_signature_is_of_one_text() -> None:
    signer = Signer(SECRET)
    assert signer.is_signature("a", signer.signature("a"))
    for signature in (signer.signature("b"), "", "ÿ", signer.signature("a").upper()):
        assert not signer.is_signature("a", signature)


def test_a_secret_that_could_be_guessed_is_refused() -> None:
    with pytest.raises(UserError, match="32 or more"):
        Signer(b"short")
