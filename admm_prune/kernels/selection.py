"""Selecting the largest scores by a threshold: exact counts, no full sort, one stated rule for ties.

Every function returns a boolean mask with exactly the count asked. Among equal scores the lower index (row-major) wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST, _MOST = 1 << 11, 1 << 14  # scores sampled to guess where the threshold lies; 1 in 64 between
_SMALL = 1 << 16  # below this many scores, one direct selection is cheaper than sampling


def threshold(score: Tensor, keep: int) -> Tensor:
    """The `keep`-th largest entry of `score`, exactly, as a tensor of no dimensions.

    A strided sample brackets the answer (Floyd and Rivest, Expected time bounds for selection, 1975); one pass counts
    what lies above the bracket and one gathers what lies inside, so that only a small part is ever selected from.

    Args:
        score: any shape, at least `keep` entries, without NaN.
        keep: from 1 to the number of entries.
    """
    flat = score.reshape(-1)
    total = flat.numel()
    if total <= _SMALL:
        return flat.kthvalue(total - keep + 1).values
    size = min(max(total // 64, _FEWEST), _MOST)
    stride = total // size | 1  # odd, so that it meets every column of a matrix whose width is a power of 2
    sample = flat[::stride]
    ordered = sample.sort(descending=True).values
    expected = keep / total * len(sample)
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin), int(expected + margin)
    high = ordered[high_rank] if high_rank >= 0 else ordered[0].new_tensor(torch.inf)
    low = ordered[low_rank] if low_rank < len(sample) else ordered[0].new_tensor(-torch.inf)
    above = int(torch.count_nonzero(flat > high))
    inside = flat[(flat >= low) & (flat <= high)]
    rank = keep - above  # of the answer among `inside`, counted from the largest
    if not 1 <= rank <= inside.numel():  # the sample misled: select from everything
        return flat.kthvalue(total - keep + 1).values
    return inside.kthvalue(inside.numel() - rank + 1).values


def largest(score: Tensor, keep: int) -> Tensor:
    """Marks the `keep` largest entries of the whole tensor."""
    _refuse_nan(score)
    if keep <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    level = threshold(score, keep)
    mask = (score >= level).contiguous()
    excess = int(torch.count_nonzero(mask)) - keep
    if excess:
        ties = (score == level).reshape(-1).nonzero()[-excess:, 0]
        mask.view(-1)[ties] = False
    return mask


def largest_per_row(score: Tensor, keep: int) -> Tensor:
    """Marks the `keep` largest entries of every row of the last dimension."""
    _refuse_nan(score)
    width = score.shape[-1]
    if keep <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= width:
        return torch.ones_like(score, dtype=torch.bool)
    level = score.kthvalue(width - keep + 1, dim=-1, keepdim=True).values
    mask = score > level
    ties = score == level
    missing = keep - mask.sum(-1, keepdim=True)
    return mask | (ties & (ties.cumsum(-1) <= missing))


def largest_per_group(score: Tensor, keep: int, group: int) -> Tensor:
    """Marks the `keep` largest of every `group` consecutive entries of the last dimension.

    Small groups go through a compare network: entry i is kept when fewer than `keep` entries beat it,
    #{j < i: s_j >= s_i} + #{j > i: s_j > s_i} < keep, which takes group (group - 1) / 2 comparisons and no sort.
    """
    _refuse_nan(score)
    grouped = score.unflatten(-1, (-1, group))
    if group > 8:
        return largest_per_row(grouped, keep).flatten(-2)
    columns = grouped.unbind(-1)
    beaten = torch.zeros(grouped.shape, dtype=torch.uint8, device=score.device)
    for i in range(group):
        for j in range(i):
            earlier_wins = columns[j] >= columns[i]
            beaten[..., i] += earlier_wins
            beaten[..., j] += ~earlier_wins
    return (beaten < keep).flatten(-2)


def _refuse_nan(score: Tensor) -> None:
    if score.numel() and bool(torch.isnan(score.amax())):
        raise ValueError("scores contain NaN: there is no largest")
