"""Selecting the largest scores by a threshold: exact counts, no full sort, a fixed rule for ties.

Every function returns a boolean mask with exactly the requested count; of equal scores the lower index (row-major)
wins. On CUDA tensors Triton's kernels do the same (`ops.triton.selection`) where Triton is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from admm_prune.ops import backend

_TRITON = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of Triton's kernels; float64 uses plain torch
_WIDEST_ROW, _WIDEST_GROUP = 1 << 15, 32  # limits of Triton's kernels

_FEWEST, _MOST = 1 << 11, 1 << 14  # scores sampled to guess where the threshold lies; 1 in 64 between
_PART = 1 << 18  # scores compared at once on the CPU
_SMALL = 1 << 16  # below this many scores, one direct selection is cheaper than sampling


def threshold(score: Tensor, keep: int) -> Tensor:
    """The `keep`-th largest entry of `score`, exactly, as a tensor of no dimensions.

    Args:
        score: any shape, at least `keep` entries, without NaN.
        keep: from 1 to the number of entries.
    """
    if backend.uses_triton(score, *_TRITON):
        from admm_prune.ops.triton import selection as fused

        level, bad = fused.threshold(score.reshape(-1), keep)
        _refuse(bad)
        return level.to(score.dtype)
    return _threshold(score.reshape(-1), keep)[0]


def _threshold(flat: Tensor, keep: int) -> tuple[Tensor, int]:
    """The `keep`-th largest entry, and how many are as large or larger.

    A strided sample brackets the answer (Floyd and Rivest, Expected time bounds for selection, 1975); one pass counts
    what lies above the bracket and gathers what lies inside, so that only a small part is ever selected from.
    """
    total = flat.numel()
    if total <= _SMALL:
        return _select(flat, keep)
    size = min(max(total // 64, _FEWEST), _MOST)
    sample = flat[:: total // size | 1]  # an odd stride visits every column of a matrix whose width is a power of 2
    expected = keep / total * len(sample)
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin) + 1, int(expected + margin) + 1
    high = _select(sample, high_rank)[0] if high_rank >= 1 else sample.new_tensor(torch.inf)
    low = _select(sample, low_rank)[0] if low_rank <= len(sample) else sample.new_tensor(-torch.inf)
    above, inside = 0, []
    for part in flat.split(_PART if flat.device.type == "cpu" else total):  # small enough to stay in the cache
        over = part > high
        above += int(torch.count_nonzero(over))
        inside.append(part[(part >= low) > over])
    between = torch.cat(inside)
    if not 1 <= keep - above <= between.numel():  # the bracket missed: select from everything
        return _select(flat, keep)
    level, reaching = _select(between, keep - above)
    return level, above + reaching


def _select(values: Tensor, rank: int) -> tuple[Tensor, int]:
    """The `rank`-th largest, counted from 1, and how many reach it; every value is looked at."""
    level = values.kthvalue(values.numel() - rank + 1).values
    return level, int(torch.count_nonzero(values >= level))


def largest(score: Tensor, keep: int) -> Tensor:
    """Marks the `keep` largest entries of the whole tensor."""
    if 0 < keep < score.numel() and backend.uses_triton(score, *_TRITON):
        from admm_prune.ops.triton import selection as fused

        return _unless_nan(*fused.largest(score, keep))
    _refuse_nan(score)
    if keep <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    level, reaching = _threshold(score.reshape(-1), keep)
    mask = (score >= level).contiguous()
    if reaching > keep:
        ties = (score == level).reshape(-1).nonzero()[keep - reaching :, 0]
        mask.view(-1)[ties] = False
    return mask


def largest_of_each(score: Tensor, keep: int) -> Tensor:
    """Marks the `keep` largest entries of each of several tensors (tensors, ...)."""
    flat = score.reshape(len(score), -1)
    if flat.shape[1] > _WIDEST_ROW and 0 < keep < flat.shape[1] and backend.uses_triton(flat, *_TRITON):
        from admm_prune.ops.triton import selection as fused

        return _unless_nan(*fused.largest_of_each(flat, keep)).view(score.shape)
    if flat.shape[1] <= (_WIDEST_ROW if backend.on_device(score) else _SMALL):
        return largest_per_row(flat, keep).view(score.shape)
    return torch.stack([largest(one, keep) for one in score])  # sampling works well for large tensors


def largest_per_row(score: Tensor, keep: int) -> Tensor:
    """Marks the `keep` largest entries of every row of the last dimension."""
    width = score.shape[-1]
    if 0 < keep < width <= _WIDEST_ROW and backend.uses_triton(score, *_TRITON):
        from admm_prune.ops.triton import marking as fused

        return _unless_nan(*fused.largest_per_row(score, keep))
    _refuse_nan(score)
    if keep <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= width:
        return torch.ones_like(score, dtype=torch.bool)
    level = score.kthvalue(width - keep + 1, dim=-1, keepdim=True).values
    if not backend.on_device(score):
        mask = score >= level
        if int(torch.count_nonzero(mask)) == keep * (score.numel() // width):  # no row has ties to choose from
            return mask
    mask = score > level
    ties = score == level
    missing = keep - mask.sum(-1, keepdim=True)
    return mask | (ties & (ties.cumsum(-1) <= missing))


def largest_per_group(score: Tensor, keep: int, group: int) -> Tensor:
    """Marks the `keep` largest of every `group` consecutive entries of the last dimension.

    Small groups go through a compare network: entry i is kept when fewer than `keep` entries beat it,
    #{j < i: s_j >= s_i} + #{j > i: s_j > s_i} < keep, which takes group (group - 1) / 2 comparisons and no sort.
    """
    if group <= _WIDEST_GROUP and score.shape[-1] % group == 0 and backend.uses_triton(score, *_TRITON):
        from admm_prune.ops.triton import marking as fused

        return _unless_nan(*fused.largest_per_group(score, keep, group))
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


class skip_nan_check:  # noqa: N801  # used as a function: a generator would cost every step of a small solve 3 microseconds
    """Within it scores are not checked for NaN on a device, which avoids a synchronization.

    With NaN, masks keep the right number of entries but are meaningless: for callers that detect NaN later themselves.
    """

    def __enter__(self) -> None:
        _unchecked.append(True)

    def __exit__(self, *_: object) -> None:
        _unchecked.pop()


_unchecked: list[bool] = []


def _refuse_nan(score: Tensor) -> None:
    if score.numel():
        _refuse(torch.isnan(score.amax()))


def _unless_nan(mask: Tensor, bad: Tensor) -> Tensor:
    _refuse(bad)
    return mask


def _refuse(bad: Tensor) -> None:
    """Raises ValueError where an entry of `bad` says that a score is NaN."""
    if _unchecked and backend.on_device(bad):
        return
    if bool(bad.any()):
        raise ValueError("scores contain NaN: there is no largest")
