"""References to what is too large for a message."""

from __future__ import annotations

from shared.contracts.base import Contract


class BlobRef(Contract):
    """A blob in the store. Whoever reads it compares the checksum: weights that changed on the way are an error."""

    key: str
    """Path inside the store, `/`-separated, without a leading slash."""
    sha256: str
    """Of the content, in lower-case hexadecimal."""
    size: int
    """In bytes."""
