"""Decides when a sample ends: at a token of a set, or when its text contains a string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""

_TOKENS_PER_CHARACTER = 4
"""A character of UTF-8 has up to four bytes, and a token at least one."""
_MARGIN = 8
"""More tokens than needed, for tokens without text and for decoders that treat the first token differently."""


@dataclass(frozen=True)
class StopRule:
    """When a sample ends. Without ids and strings it never does."""

    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Decode | None = None
    """Needed if there are strings."""

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of the sampled `tokens` ends the sample; the ones before it did not."""
        if tokens[-1] in self.ids:
            return True
        if not self.strings:
            return False
        assert self.decode is not None
        text = self.decode(tokens[-self._window :])
        return any(string in text for string in self.strings)

    @property
    def _window(self) -> int:
        """Number of last tokens that surely hold a string which the last token completes."""
        return _TOKENS_PER_CHARACTER * max(map(len, self.strings)) + _MARGIN


def stop_list(stop: str | Sequence[str | int] | None) -> Sequence[str | int]:
    """What `SamplingParams.stop` names; a string is one thing and not its characters."""
    return [stop] if isinstance(stop, str) else stop or ()


def stop_rule(
    stop: str | Sequence[str | int] | None, end_of_sequence: frozenset[int], decode: Decode | None
) -> StopRule:
    """Make the rule for `SamplingParams.stop`, which names all that ends a sample. None: the end-of-sequence ids."""
    if stop is None:
        return StopRule(ids=end_of_sequence)
    return StopRule(
        ids=frozenset(item for item in stop_list(stop) if isinstance(item, int)),
        strings=tuple(item for item in stop_list(stop) if isinstance(item, str)),
        decode=decode,
    )
