"""Second moments of a layer's inputs, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from admm_prune.ops import backend, precision

_CHUNK = 4096  # tokens multiplied at once in float64: bounds the copy of the inputs
_PIECE = 512  # tokens multiplied at once in float32: bounds the rounding of a sum of that many products
_SHORT = 128  # tokens: for fewer, adding the product costs as much as forming it in float64
_SHORT_IF_SLOW = 16  # on devices that are slow in float64
_PANELS = 4  # column panels of a product, of which only what is on and below the diagonal is computed
_NARROWEST = 128  # columns of a panel: narrower products are slow
_TILE = 256  # rows taken from float64 at once
_CONSTANT = 1e-5  # a channel is constant where its variance is at most this multiple of its mean square
_SYMMETRY = 1e-3  # |H - H^T| allowed, relative to sqrt(H_ii H_jj): what accumulation in float32 may leave
DEAD = 1e-12  # a channel is dead when its H_jj is at most this multiple of the median


SUM_BYTES = 8  # of an entry of a Gram while it is summed up, in float64


class TokenContext:
    """Which tokens the inputs are of that an objective weights: n tokens of one batch, without pads.

    Args:
        weight: the name of the matrix that reads the inputs; the first one of those that share them.
        ids: (n,) int64, the tokens themselves.
        positions: (n,) int64, from 0 in each sequence.
        sequences: (n,) int64, the number of each token's sequence in the packed text.
        scored: (n,) bool, whether the model is scored on the token that follows: not at the end of a sequence, nor
            before a BOS.
        outputs: (n, out), of the matrix before it is pruned, with its bias.
        scores: (n,) float32, what `token_scores` of the objective gave; 0 where `scored` is False.

    All tensors are on the device of the inputs.
    """

    def __init__(
        self,
        *,
        weight: str,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        scored: Tensor,
        outputs: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        self.weight, self.ids, self.positions, self.sequences, self.scored = weight, ids, positions, sequences, scored
        self._outputs, self._scores = outputs, scores

    @property
    def outputs(self) -> Tensor:
        """Raises AttributeError unless the objective declares `needs_outputs`."""
        if self._outputs is None:
            raise AttributeError("there are no outputs: declare needs_outputs = True in the objective")
        return self._outputs

    @property
    def scores(self) -> Tensor:
        """Raises AttributeError unless the objective defines `token_scores`."""
        if self._scores is None:
            raise AttributeError("there are no scores: define token_scores in the objective")
        return self._scores


@dataclass(frozen=True)
class TokenWeighting:
    """How tokens are weighted in Gram matrices.

    Attributes:
        weigh: from inputs (n, in), and their context where it is needed, to weights s_t >= 0 (n,); None for 1.
        needs_context: whether `weigh` is given a `TokenContext`.
        needs_outputs: whether that has the outputs of the matrix: every matrix then has its own Gram.
        score: from logits (m, V) of the model before it is pruned and the tokens that follow (m,) to scores (m,).
    """

    weigh: Callable[[Tensor, TokenContext | None], Tensor] | None = None
    needs_context: bool = False
    needs_outputs: bool = False
    score: Callable[[Tensor, Tensor], Tensor] | None = None


UNWEIGHTED = TokenWeighting()


class GramAccumulator:
    """H = sum_t x_t x_t^T over all tokens seen, summed in float64, for inputs of any dtype in any batches.

    With products in float32, pieces of at most 512 tokens are multiplied in float32 and their products added up in
    float64. An entry H_ij is then accurate to about 1e-7 sqrt(H_ii H_jj) / sqrt(number of pieces), which is below the
    rounding of H itself to float32. That is not sufficient for C = H - n mu mu^T, which may be much smaller than H:
    with `centre` each piece is multiplied after its mean c is subtracted, and what c adds is added in float64,

        sum_t s_t x_t x_t^T = sum_t s_t y_t y_t^T + c q^T + q c^T + (sum_t s_t) c c^T,
        y_t = x_t - c,    q = sum_t s_t y_t.

    The squares of the y_t sum up to at most diag C, so that C_ij is as accurate with respect to sqrt(C_ii C_jj) as H_ij
    above. Inputs in float64 and sequences of fewer than 128 tokens, or 16 on GPUs that are slow in float64, are always
    multiplied in float64. On CUDA inputs in bfloat16 and float16 are not converted, unless a mean is subtracted: tensor
    cores form their exact products and add them in float32.

    Args:
        width: d, the number of input channels.
        device: where the sum lives.
        products: the dtype of the products x_t x_t^T.
        centre: whether H - n mu mu^T is needed too.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str = "cpu",
        *,
        products: torch.dtype = torch.float32,
        centre: bool = False,
    ) -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)  # lower panels alone are filled
        self._channel_sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products, self._centre = products, centre
        panel = max(_NARROWEST, -(-width // _PANELS))
        self._panels = [slice(start, min(start + panel, width)) for start in range(0, width, panel)]
        self.tokens = 0

    def add(self, inputs: Tensor, weights: Tensor | None = None, lengths: Sequence[int] | None = None) -> None:
        """Adds tokens (..., d) of any float dtype.

        Args:
            weights: s_t >= 0, one per token, so that H = sum_t s_t x_t x_t^T; the mean stays that of the inputs.
            lengths: of the sequences that the tokens belong to, one after the other; None for a single one. No piece
                has tokens of two sequences, so that H does not depend on how sequences are batched or distributed.

        Raises:
            ValueError: the last dimension is not d; weights are not one real number per token on the device of the
                inputs, finite and not negative.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        if flat.shape[1] != len(self._sum):
            raise ValueError(f"the Gram is of width {len(self._sum)}, the inputs of width {flat.shape[1]}")
        roots = None if weights is None else _roots(weights, flat)
        start = 0
        with precision.full():
            for length, dtype in _pieces(flat, lengths, self._products):
                x = flat[start : start + length]
                root = None if roots is None else roots[start : start + length, None]
                total = x.sum(0, dtype=torch.float64)
                self._channel_sum += total
                if self._centre and dtype == torch.float32:
                    x, root = self._without_mean(x, total / length, root), None
                native = x.is_cuda and x.element_size() == 2 and root is None and dtype == torch.float32
                x = x if native else x.to(dtype)
                multiply = partial(torch.mm, out_dtype=dtype) if native else torch.mm
                if root is not None:
                    x = x * root.to(dtype)
                for panel in self._panels:
                    below = slice(panel.start, None)
                    if dtype == torch.float64:
                        self._sum[below, panel].addmm_(x[:, below].T, x[:, panel])
                    else:
                        self._sum[below, panel] += multiply(x[:, below].T, x[:, panel])
                start += length
        self.tokens += len(flat)

    def _without_mean(self, x: Tensor, mean: Tensor, root: Tensor | None) -> Tensor:
        """sqrt(s_t) y_t of a piece (n, d), in float32; what its mean c adds to H is added to the sum."""
        c = mean.float()  # as it is subtracted
        y = x.float() - c
        if root is None:
            q = y.sum(0, dtype=torch.float64).add_(c, alpha=len(x) / 2)
        else:
            weights = root.square()
            q = (y * weights).sum(0).addcmul_(c.double(), weights.sum(), value=0.5)
            y = (y * root).float()
        c = c.double()
        for panel in self._panels:
            below = slice(panel.start, None)
            self._sum[below, panel].addr_(c[below], q[panel]).addr_(q[below], c[panel])
        return y

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of accumulators in other processes; `total` sums a tensor over all of them, in place."""
        total(self._sum)
        total(self._channel_sum)
        self.tokens = int(total(torch.tensor(self.tokens, device=self._sum.device)))

    @property
    def gram(self) -> Tensor:
        """H (d, d), float64, exactly symmetric."""
        return self.rows(slice(None))

    def rows(self, chosen: slice) -> Tensor:
        """Some rows of H (k, d), float64."""
        result = self._sum[chosen] + self._sum[:, chosen].T
        first, last, _ = chosen.indices(len(self._sum))
        for panel in self._panels:  # a block on the diagonal is in both summands
            rows = slice(max(panel.start, first) - first, min(panel.stop, last) - first)
            if rows.start < rows.stop:
                result[rows, panel] /= 2
        return result

    def release(self) -> None:
        """Frees the sum, the largest tensor; `mean` and `tokens` are kept."""
        self._sum = self._sum.new_empty(0, 0)

    @property
    def mean(self) -> Tensor:
        """The mean input (d,), float64; zeros before the first token."""
        return self._channel_sum / max(self.tokens, 1)


def pieces(lengths: Sequence[int]) -> list[int]:
    """Lengths of the pieces of sequences that are multiplied at once in float32."""
    return [piece for length in lengths for piece in _split(length, _PIECE)]


def _pieces(flat: Tensor, lengths: Sequence[int] | None, products: torch.dtype) -> Iterator[tuple[int, torch.dtype]]:
    """The number of tokens of each piece, and the dtype of its products."""
    short = _SHORT_IF_SLOW if backend.slow_in_float64(flat) else _SHORT
    waiting = 0  # tokens of short sequences, which are multiplied together
    for length in (len(flat),) if lengths is None else lengths:
        if length < short or torch.float64 in (products, flat.dtype):
            waiting += length
            continue
        yield from ((some, torch.float64) for some in _split(waiting, _CHUNK))
        waiting = 0
        yield from ((some, torch.float32) for some in _split(length, _PIECE))
    yield from ((some, torch.float64) for some in _split(waiting, _CHUNK))


def _split(tokens: int, most: int) -> list[int]:
    """Lengths of pieces of at most `most` tokens, as equal as possible."""
    count = -(-tokens // most)
    return [tokens // count + (k < tokens % count) for k in range(count)]


class TargetAccumulator:
    """K = sum_t y_t x_t^T, sum_t y_t and sum_t |y_t|^2 over inputs x and their targets y, summed in float64.

    Args:
        outputs: m, the number of target channels.
        width: d, the number of input channels.
        device: where the sums live.
        products: the dtype of the products y_t x_t^T, with the accuracy that `GramAccumulator` has.
        centre: whether K - n nu mu^T is needed too, for the means mu of the inputs and nu of the targets.
    """

    def __init__(
        self,
        outputs: int,
        width: int,
        device: torch.device | str = "cpu",
        *,
        products: torch.dtype = torch.float32,
        centre: bool = False,
    ) -> None:
        self.correlation = torch.zeros(outputs, width, dtype=torch.float64, device=device)
        self.total = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.energy = 0.0
        self._products, self._centre = products, centre

    def add(self, inputs: Tensor, targets: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Adds tokens x (n, d) with their targets y (n, m), of any float dtypes.

        Args:
            lengths: as in `GramAccumulator.add`.
        """
        start = 0
        with precision.full():
            for length, dtype in _pieces(inputs, lengths, self._products):
                x, y = (part[start : start + length].to(dtype) for part in (inputs, targets))
                wide = y.double()
                self.total += wide.sum(0)
                self.energy += float(wide.square().sum())
                if dtype == torch.float64:
                    self.correlation.addmm_(y.T, x)
                else:
                    if self._centre:
                        x, y = self._without_means(x, y)
                    self.correlation += y.T @ x
                start += length

    def _without_means(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A piece x - c and y - b, less its means; what those add to K is added to the sum."""
        c, b = (part.mean(0, dtype=torch.float64).float() for part in (x, y))
        x, y = x - c, y - b
        from_inputs = x.sum(0, dtype=torch.float64).add_(c, alpha=len(x))
        self.correlation.addr_(b.double(), from_inputs).addr_(y.sum(0, dtype=torch.float64), c.double())
        return x, y

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """As `GramAccumulator.join`."""
        total(self.correlation)
        total(self.total)
        self.energy = float(total(torch.tensor(self.energy, dtype=torch.float64, device=self.total.device)))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer's inputs: Grams (in, in), undamped, in float32.

    `gram` is over all calibration tokens, `validation` over a part of the same tokens (a solver may choose its ridge
    with it), `holdout` over other tokens (for reporting only: no solver reads it). `mean` (in,), float64, is the mean
    input of the calibration tokens, and `validation_mean` that of the validation tokens. `centred` is H - n mu mu^T of
    the calibration tokens, subtracted in float64: the rounding of `gram` may exceed it. `notes` are remarks on how the
    statistics were collected.
    """

    gram: Tensor
    tokens: int
    validation: Tensor | None = None
    validation_tokens: int = 0
    holdout: Tensor | None = None
    holdout_tokens: int = 0
    mean: Tensor | None = None
    validation_mean: Tensor | None = None
    centred: Tensor | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def collected(
        cls,
        calibration: GramAccumulator,
        validation: GramAccumulator | None = None,
        holdout: GramAccumulator | None = None,
        *,
        centre: bool = False,
    ) -> LayerStatistics:
        """Joins accumulators of disjoint tokens, which are empty afterwards.

        The validation tokens count as calibration tokens too.

        Args:
            centre: compute `centred` too, which takes as much memory as `gram`.
        """
        if validation is not None and validation.tokens == 0:
            validation = None
        tokens, mean = calibration.tokens, calibration.mean
        if validation is not None:
            tokens += validation.tokens
            mean = mean + (validation.mean - mean) * (validation.tokens / max(tokens, 1))
        joined = (calibration,) if validation is None else (calibration, validation)
        gram = _in_float(*joined)
        centred_gram = _in_float(*joined, mean=mean, tokens=tokens) if centre else None
        calibration.release()
        apart = [None if other is None else _in_float(other) for other in (validation, holdout)]
        for other in (validation, holdout):
            if other is not None:
                other.release()
        return cls(
            gram=gram,
            tokens=tokens,
            validation=apart[0],
            validation_tokens=0 if validation is None else validation.tokens,
            holdout=apart[1],
            holdout_tokens=0 if holdout is None else holdout.tokens,
            mean=mean,
            validation_mean=None if validation is None else validation.mean,
            centred=centred_gram,
        )

    @property
    def dead_channels(self) -> Tensor:
        """Indices of inputs that were (as good as) zero in every token."""
        return dead_channels(self.gram).nonzero()[:, 0]


def _in_float(*accumulators: GramAccumulator, mean: Tensor | None = None, tokens: int = 0) -> Tensor:
    """The sum of some Grams in float32, centred where a mean is given, without a copy of any in float64."""
    none = accumulators[0].rows(slice(0, 0))
    result = none.new_empty(none.shape[1], none.shape[1], dtype=torch.float32)
    constant = torch.zeros(len(result), dtype=torch.bool, device=result.device)
    scaled_mean = None if mean is None else mean * tokens**0.5  # so that every product is symmetric
    for start in range(0, len(result), _TILE):
        tile = slice(start, start + _TILE)
        rows = accumulators[0].rows(tile)
        for other in accumulators[1:]:
            rows += other.rows(tile)
        if scaled_mean is not None:
            squares = rows.diagonal(start).clone()
            rows.addr_(scaled_mean[tile], scaled_mean, alpha=-1)
            constant[tile] = rows.diagonal(start) <= _CONSTANT * squares
        result[tile] = rows
    return result if mean is None else _without(result, constant)


def centred(gram: Tensor, mean: Tensor, tokens: int) -> Tensor:
    """C = H - n mu mu^T in the dtype of H, symmetric; a channel that is constant up to rounding becomes exactly zero.

    The subtraction is in float64, but H is as accurate as its dtype. Where the rounding of a float32 H leaves C
    indefinite, the nearest positive semidefinite matrix is returned, at unit diagonal and in the Frobenius norm: the
    true C being semidefinite, this brings the result no farther from it (Higham, Computing a nearest symmetric
    positive semidefinite matrix, 1988). `LayerStatistics.centred` does not suffer that rounding.
    """
    mu = mean.to(gram.device, torch.float64) * tokens**0.5
    result = gram.double().addr(mu, mu, alpha=-1)
    constant = result.diagonal() <= _CONSTANT * gram.diagonal()
    return _without(_semidefinite(result, gram), constant).to(gram.dtype)


def _without(gram: Tensor, channels: Tensor) -> Tensor:
    """The Gram with some channels set to zero, in place."""
    gram[channels] = 0
    gram[:, channels] = 0
    return gram


def _semidefinite(centred_gram: Tensor, gram: Tensor) -> Tensor:
    """The centred Gram, or the nearest positive semidefinite matrix where the rounding of the Gram left none."""
    diagonal = centred_gram.diagonal()
    live = diagonal > _CONSTANT * gram.diagonal()
    scale = diagonal.masked_fill(~live, 1).sqrt()
    unit = (centred_gram / scale / scale[:, None]) * (live & live[:, None])
    allowed = len(unit) * torch.finfo(gram.dtype).eps  # what rounding the result to its dtype may bring, at most
    shifted = unit + torch.diag_embed(torch.where(live, allowed, 1.0).to(unit))
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:
        return centred_gram
    values, vectors = torch.linalg.eigh(unit)
    nearest: Tensor = (vectors * values.clamp_min(0)) @ vectors.T
    return (nearest + nearest.T).div_(2).mul_(scale).mul_(scale[:, None])


def _roots(weights: Tensor, inputs: Tensor) -> Tensor:
    """The square roots of token weights, which have to be one per token, finite and not negative."""
    check_token_values("token weights", weights, len(inputs), inputs.device)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("token weights must be finite and not negative")
    return weights.detach().double().sqrt()


def check_token_values(name: str, values: object, tokens: int, device: torch.device) -> None:
    """Raises ValueError unless `values` is a tensor (tokens,) of real numbers on a device."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor ({tokens},), one per token, not a {type(values).__name__}")
    if values.shape != (tokens,):
        raise ValueError(f"{name} must be of shape ({tokens},), one per token, not {tuple(values.shape)}")
    if values.is_complex() or values.layout is not torch.strided:
        raise ValueError(f"{name} must be real numbers in a dense tensor, not {values.dtype}, {values.layout}")
    if values.device != device:
        raise ValueError(f"{name} must be on {device}, where the inputs are, not on {values.device}")


def check_gram(name: str, gram: Tensor, width: int) -> None:
    """Raises ValueError unless `gram` can be X^T X of a layer of so many inputs: shape, numbers, symmetry, sign."""
    check_square(name, gram, width)
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(f"{name} has a negative diagonal: it is not X^T X")
    scale = diagonal.sqrt()
    tiles = [slice(start, start + _TILE) for start in range(0, width, _TILE)]  # no copy of the Gram is made
    if any(bool(((gram[t] - gram[:, t].T).abs() > _SYMMETRY * scale * scale[t, None]).any()) for t in tiles):
        raise ValueError(f"{name} is not symmetric: it is not X^T X")


def symmetric(gram: Tensor) -> Tensor:
    """(H + H^T) / 2, of the same dtype; H itself if it is exactly symmetric, without a copy."""
    tiles = [slice(start, start + _TILE) for start in range(0, len(gram), _TILE)]
    if all(torch.equal(gram[t], gram[:, t].T) for t in tiles):
        return gram
    half = gram / 2
    return half + half.T


def check_square(name: str, matrix: Tensor, width: int) -> None:
    """Raises ValueError unless `matrix` is of finite float32 or float64 numbers, width x width."""
    check_matrix(name, matrix, (width, width))


def check_matrix(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError unless `matrix` is of finite float32 or float64 numbers and this shape."""
    rows, width = shape
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, not {matrix.dtype}")
    if matrix.shape != shape:
        raise ValueError(f"{name} must be {rows} x {width} for a weight of width {width}, not {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name} contains NaN or Inf")


def check_weight(weight: Tensor) -> None:
    """Raises ValueError unless `weight` is a matrix of finite real numbers."""
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"weight must be a real matrix (out, in), not {weight.dtype} of shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight contains NaN or Inf")


def dead_channels(gram: Tensor) -> Tensor:
    """Marks the channels with H_jj <= 1e-12 * median of the non-zero diagonal; all of them where H = 0."""
    diagonal = gram.diagonal()
    alive = diagonal[diagonal > 0]
    return diagonal <= (DEAD * alive.median() if len(alive) else 0.0)
