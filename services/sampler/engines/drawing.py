"""Draws tokens from logits: temperature, top-k, top-p, and one stream of random numbers for every sample.

A token is drawn by inverting the cumulative distribution at one uniform number, which is exact and needs no random
number for each entry of the vocabulary. The number is a hash of (seed, sample, position): a sample's stream does not
depend on what else is computed beside it. Cumulative sums run over blocks first and then inside one block, in float64
over few numbers; nothing of the vocabulary's size is sorted unless top-k or top-p ask for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.contracts.sampling import EMPTY_LOGPROB, SamplingParams

_BLOCK = 256
_FIRST_CANDIDATES = 1024
"""Likeliest tokens looked at for top-p; 16 times as many if their mass is too small."""
_ANY_VOCABULARY = 1 << 31
"""No vocabulary has more tokens, and every tensor can hold the number."""
_SMALLEST_TEMPERATURE = 1e-30
"""Smaller ones are no normal float32. Logits that differ by more than 1e-28 are told apart nevertheless."""

# SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195), its constants as signed numbers
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def stream_key(seed: int, sample: int) -> int:
    """Return the start of the random stream of a request's sample, a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(keys: Tensor, counts: Tensor) -> Tensor:
    """Return number `counts` [n] of the streams `keys` [n], both int64: float64 in [0, 1), 53 bits each."""
    bits = keys + (counts + 1) * _GAMMA
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    bits = bits ^ _shifted(bits, 31)
    return _shifted(bits, 11).double() * 2.0**-53


def temperature_of(params: SamplingParams) -> float:
    """What logits are divided by. 1 for a greedy row, whose log-probabilities are unscaled."""
    return max(params.temperature, _SMALLEST_TEMPERATURE) if params.temperature else 1.0


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift right without copies of the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True)
class Drawing:
    """How each of n rows is drawn. None stands for work that no row asks for."""

    temperatures: Tensor | None
    """[n, 1]; 1 for greedy rows, whose logprobs are unscaled."""
    greedy: Tensor | None
    """Indices of rows at temperature 0."""
    filtered: Tensor | None
    """Indices of other rows with top-k or top-p."""
    top_k: Tensor
    """Of the filtered rows, [m, 1]; 0 for all tokens."""
    top_p: Tensor
    """Of the filtered rows, [m, 1], float64."""
    candidates: int
    """Likeliest tokens to look at first for the filtered rows."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Drawing:
        """Gather the parameters of the rows of a batch."""
        greedy = [row for row, item in enumerate(params) if item.temperature == 0]
        filtered = [
            row for row, item in enumerate(params) if item.temperature > 0 and (item.top_k > 0 or item.top_p < 1)
        ]
        scales = [temperature_of(item) for item in params]
        top_k = [min(max(params[row].top_k, 0), _ANY_VOCABULARY) for row in filtered]
        return cls(
            temperatures=torch.tensor(scales, device=device)[:, None] if any(s != 1 for s in scales) else None,
            greedy=torch.tensor(greedy, device=device) if greedy else None,
            filtered=torch.tensor(filtered, device=device) if filtered else None,
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device)[:, None],
            top_p=torch.tensor([params[row].top_p for row in filtered], dtype=torch.float64, device=device)[:, None],
            candidates=max(top_k, default=0) if all(top_k) else max(_FIRST_CANDIDATES, *top_k),
        )


def draw(logits: Tensor, drawing: Drawing, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits [n, V] (float32, overwritten) with its uniform number, `numbers` [n].

    Return tokens [n] (int64) and their log-probabilities [n] (float32) over the whole vocabulary, temperature applied,
    before top-k and top-p. A row whose logits are not finite gets a NaN log-probability.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    if drawing.temperatures is not None:
        logits.div_(drawing.temperatures)
    greedy = None if drawing.greedy is None else logits[drawing.greedy].argmax(-1)  # exp could make near ones equal
    weights = logits.exp_()  # in place: touching new memory of this size costs as much as the arithmetic
    sums = _block_sums(weights)
    totals = sums.sum(-1)
    if greedy is not None and len(greedy) == len(weights):
        tokens = greedy
    else:
        tokens = _draw_unfiltered(weights, sums, numbers)
        if drawing.filtered is not None:
            rows = drawing.filtered
            tokens[rows] = _draw_filtered(weights[rows], totals[rows, None], drawing, numbers[rows])
        if greedy is not None:
            tokens[drawing.greedy] = greedy
    return tokens, (weights.gather(1, tokens[:, None])[:, 0].double() / totals).log().float()


def likeliest(logits: Tensor, count: int, temperatures: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the `count` likeliest tokens of logits [n, V], likeliest first: ids and log-probabilities, [n, count].

    The log-probabilities are over the whole vocabulary at `temperatures` ([n, 1] or one number), and at least
    `EMPTY_LOGPROB`. `logits` are left as they are.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperatures)
    values, ids = scaled.topk(count)
    return ids, (values - total_logprob(scaled)[:, None]).clamp_(min=EMPTY_LOGPROB)


def total_logprob(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) over the last dimension.

    On CPUs this is many times as fast as `torch.logsumexp`, which is not vectorised there (torch 2.13).
    """
    best = logits.amax(-1, keepdim=True)
    return (logits - best).exp_().sum(-1).log_() + best[..., 0]


def _block_sums(weights: Tensor) -> Tensor:
    """Return the sums of weights [n, V] over blocks of `_BLOCK` entries (the last may be shorter), float64."""
    blocks, rest = divmod(weights.shape[1], _BLOCK)
    sums = weights[:, : blocks * _BLOCK].view(len(weights), blocks, _BLOCK).sum(-1)
    if rest:
        sums = torch.cat([sums, weights[:, -rest:].sum(-1, keepdim=True)], -1)
    return sums.double()


def _draw_unfiltered(weights: Tensor, sums: Tensor, numbers: Tensor) -> Tensor:
    """Find the block of each row's token and then the token in it."""
    ends = sums.cumsum(-1)
    target = numbers * ends[:, -1]
    block = _first_above(ends, target)
    start = ends.gather(1, block) - sums.gather(1, block)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, places.clamp(max=last)).masked_fill(places > last, 0).double().cumsum(-1)
    token = block * _BLOCK + _first_above(inside, target - start[:, 0])
    return token[:, 0].clamp_(max=last)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return for each row of cumulative [n, k] the first index whose value is above `target` [n], as [n, 1].

    Since the target is kept below the last value, an entry that adds nothing is never chosen, whatever the rounding.
    """
    last = cumulative[:, -1]
    below = torch.minimum(target.clamp(min=0), torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(cumulative, below[:, None], right=True)
    return index.clamp_(max=cumulative.shape[1] - 1)  # only a row of NaN gets that far


def _draw_filtered(weights: Tensor, totals: Tensor, drawing: Drawing, numbers: Tensor) -> Tensor:
    """Draw from the likeliest tokens of weights [m, V]: first top-k, then top-p of what is left."""
    count = drawing.candidates
    while True:
        count = min(count, weights.shape[1])
        values, indices = weights.topk(count)
        kept, enough = _kept(values.double(), totals, drawing)
        if count == weights.shape[1] or bool(enough.all()):
            return indices.gather(1, _first_above(kept.cumsum(-1), numbers * kept.sum(-1)))[:, 0]
        count *= 16


def _kept(values: Tensor, totals: Tensor, drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Return the candidates' weights [m, count], in falling order, with 0 for those left out; and if they suffice."""
    places = torch.arange(values.shape[1], device=values.device)
    limited = drawing.top_k > 0
    values = values.masked_fill(limited & (places >= drawing.top_k), 0)
    ends = values.cumsum(-1)
    mass = drawing.top_p * torch.where(limited, ends[:, -1:], totals)
    kept = values.masked_fill((ends - values >= mass) & (places > 0), 0)
    return kept, limited | (ends[:, -1:] >= mass)
