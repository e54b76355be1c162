"""Token ids and log-probabilities on the wire.

In MessagePack they are little-endian int32 and float32 bytes (a tenth of the size and time of a list), in JSON plain
lists, so that a job can be written and read by hand. In memory they are `array.array`: comparable, without numpy, and
readable by numpy and torch without a copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    _IntArray = array[int]
    _FloatArray = array[float]
else:
    _IntArray = _FloatArray = array


class Int32s(_IntArray):
    """A sequence of 32-bit signed integers."""

    def __new__(cls, values: Iterable[int] = ()) -> Int32s:
        """Raise `TypeError` for a value that is no integer and `OverflowError` for one outside of 32 bits."""
        return cast("Int32s", super().__new__(cls, "i", values))


class Float32s(_FloatArray):
    """A sequence of 32-bit floats. NaN stands for a missing value and is `null` in JSON."""

    def __new__(cls, values: Iterable[float] = ()) -> Float32s:
        """Raise `TypeError` for a value that is no number."""
        return cast("Float32s", super().__new__(cls, "f", values))


Values = Int32s | Float32s


def to_bytes(value: Any) -> bytes:
    """Encode for MessagePack; the `enc_hook` of its encoder."""
    if not isinstance(value, (Int32s, Float32s)):
        raise NotImplementedError(f"{type(value).__name__} cannot be encoded")
    return _little_endian(value).tobytes()


def to_list(value: Any) -> list[Any]:
    """Encode for JSON; the `enc_hook` of its encoder."""
    if not isinstance(value, (Int32s, Float32s)):
        raise NotImplementedError(f"{type(value).__name__} cannot be encoded")
    return value.tolist()


def decode(kind: type, value: Any) -> Any:
    """Decode bytes or a list into `kind`; the `dec_hook` of both decoders. Raise `ValueError` for anything else."""
    if kind is not Int32s and kind is not Float32s:
        raise NotImplementedError(f"{kind.__name__} cannot be decoded")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _from_bytes(kind, bytes(value))
    if not isinstance(value, list):
        raise ValueError(f"Expected `array`, got `{type(value).__name__}`")
    items: list[Any] = [float("nan") if item is None else item for item in value] if kind is Float32s else value
    try:
        return kind(items)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not {kind.__name__}: {error}") from None


def _from_bytes(kind: type[Int32s] | type[Float32s], value: bytes) -> Values:
    result = kind()
    if len(value) % result.itemsize:
        raise ValueError(f"{len(value)} bytes are not a whole number of {result.itemsize}-byte values")
    result.frombytes(value)
    return _little_endian(result)


def _little_endian(value: Values) -> Values:
    if sys.byteorder == "little":
        return value
    swapped = type(value)(value)  # type: ignore[arg-type]  # the class fits its own values
    swapped.byteswap()
    return swapped
