"""The output of an attention block, for given probabilities: value and output projections as one bilinear problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from admm_prune.ops import precision, quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint, Problem
from admm_prune.problems.closing import Closing
from admm_prune.problems.constraints import FREE, Product, SparseSet
from admm_prune.problems.layer import AllReduce, LayerReconstruction, single_process
from admm_prune.statistics import GramAccumulator, TargetAccumulator

_TOKENS_PER_INPUT = 16  # sampled beyond: the G e d weights of V are then at most d / T = 1/16 of the T m equations
_HELD = 2  # output problems: of the values before and after a step
_MIXED_ENTRIES = 1 << 26  # of the mixed inputs of all heads that are gathered at once: tokens are sampled beyond
_LEAST_SENSITIVITY = 1e-6  # of a row of the value projection, relative to the mean


class Mixing(Protocol):
    """The linear map A from the values of the tokens to the inputs of the output projection, for given probabilities.

    Attributes:
        spans: consecutive spans of tokens that are mixed together: sequences, or batches of them.
        heads: the number H of query heads.
    """

    @property
    def spans(self) -> Sequence[slice]: ...

    @property
    def heads(self) -> int: ...

    def mix(self, span: int, values: Tensor) -> Tensor:
        """Values (n, G e) of the tokens of a span to head outputs (n, H e)."""
        ...

    def mix_several(self, span: int, several: Iterable[Tensor]) -> Iterator[Tensor]:
        """`mix` of several values, one after the other, with the same probabilities."""
        ...

    def unmix(self, span: int, mixed: Tensor) -> Tensor:
        """The adjoint: (n, H e) to (n, G e)."""
        ...


@dataclass(frozen=True)
class Probabilities:
    """A `Mixing` by explicit probabilities; consecutive query heads read one value head.

    Args:
        sequences: (H, L, L) for each sequence, row t the weights of the values of all tokens at token t.
        groups: the number G of value heads, which divides H.
    """

    sequences: Sequence[Tensor]
    groups: int

    @property
    def heads(self) -> int:
        return len(self.sequences[0])

    @cached_property
    def spans(self) -> Sequence[slice]:
        ends = accumulate((one.shape[1] for one in self.sequences), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def mix(self, span: int, values: Tensor) -> Tensor:
        probabilities = self.sequences[span]
        heads = values.unflatten(1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, 1)
        mixed: Tensor = torch.einsum("hts,she->the", probabilities, heads)
        return mixed.flatten(1)

    def mix_several(self, span: int, several: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.mix(span, values) for values in several)

    def unmix(self, span: int, mixed: Tensor) -> Tensor:
        probabilities = self.sequences[span]
        heads = torch.einsum("hts,the->she", probabilities, mixed.view(len(mixed), self.heads, -1))
        values: Tensor = heads.reshape(len(mixed), self.groups, -1, heads.shape[2]).sum(2)
        return values.flatten(1)


@dataclass(frozen=True)
class AttentionTokens:
    """Inputs X (n, d) of the value projection, targets Y (n, m) of the output projection, and how values are mixed."""

    inputs: Tensor
    targets: Tensor
    mixing: Mixing


class AttentionOutput:
    """min |sum_h A_h (X V_g(h)^T + 1 b_g^T) O_h^T + 1 b^T - Y|^2 over V (G e, d) and O (m, H e) in their sets.

    A_h are the probabilities of query head h, which reads the values of group g(h): they do not depend on V and O, so
    that the objective is exact, and quadratic in each of the two. `Coordinated`:

    "output", for a given V, is the layer reconstruction of Y from the head outputs Z = [A_h (X V_g^T + 1 b_g^T)]_h that
    V really gives. It includes the bias b where there is one.

    "value", for a given O, has the Hessian sum_hh' (O_h^T O_h') x (M_h^T M_h') with M_h = A_h X, whose terms belong to
    the groups of h and h'. Its unconstrained minimum is found by conjugate gradients, with [M_h^T M_h'] (H d, H d), or
    where that is too large with products over the tokens; the Hessian itself is never formed. Of a long text it is
    fitted to some spans, evenly, with 16 d tokens or more. The inner solver prunes it in the separable metric c_r H,
    H = sum_h |O_h|^2 M_h^T M_h / sum_h |O_h|^2 and c_r = sum_h |O_h e_r|^2 over the heads that read row r: its rows are
    scaled by sqrt(c_r) to the nearest power of two, so that a budget of the whole matrix goes where the output
    projection reads it. The weights that are left are then fitted to the objective itself.

    `Safeguarded`: once both are in their sets, a solution of a block that raises `value`, on all tokens, is rejected,
    so that `value` never rises.

    Points hold "value" (G e, d), "output" (m, H e), and "bias" (m,) where there is one.

    Args:
        weights: the dense "value" and "output".
        tokens: of calibration.
        constraints: a set for each weight.
        biases: of "value" (G e,), which is fixed, and "output" (m,); a name that is missing has none.
        validation: held-out tokens for `validation_loss`; by default the same.
        damped: ridge and damping of each weight, as in `LayerReconstruction`; none where it is missing.
        tolerance: of conjugate gradients: the residual relative to the right-hand side.
        max_iterations: of conjugate gradients.
        all_reduce: sums over all processes, each of which has its own tokens.

    The separation of attention into given probabilities and a bilinear map is classical; the formulation as a pruning
    problem, and its solution, are ours.
    """

    order: tuple[str, ...] = ("value", "output")
    widest = 8192  # H d up to which [M_h^T M_h'] is held, in place of products over the tokens at every iteration

    def __init__(
        self,
        weights: Point,
        tokens: AttentionTokens,
        constraints: Mapping[str, SparseSet],
        *,
        biases: Mapping[str, Tensor] | None = None,
        validation: AttentionTokens | None = None,
        damped: Mapping[str, tuple[float, float]] | None = None,
        tolerance: float = 1e-3,
        max_iterations: int = 40,
        all_reduce: AllReduce = single_process,
    ) -> None:
        self.weights, self.tokens, self.validation = weights, tokens, tokens if validation is None else validation
        self.constraints, self.damped, self.all_reduce = constraints, damped or {}, all_reduce
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.biases = biases or {}
        # Of the last values: an alternation needs each several times, and the attention has to be run for it.
        self._output_problems: list[tuple[Tensor, Closing]] = []
        heads = tokens.mixing.heads
        if weights["output"].shape[1] % heads:
            raise ValueError(f"{weights['output'].shape[1]} inputs of the output projection are not {heads} heads")
        self._size = weights["output"].shape[1] // heads
        if heads * self._size % len(weights["value"]) or len(weights["value"]) % self._size:
            raise ValueError(f"{len(weights['value'])} values are no heads of {self._size} for {heads} query heads")
        self.constraint: Constraint = Product({name: constraints.get(name, FREE) for name in self.initial()})

    @cached_property
    def curvature(self) -> float:
        """Half the mean diagonal of the Hessian over the weights, at the start."""
        output = self._output_problem(self.initial())
        sensitivity = float(self._sensitivity(self.weights["output"]).sum())
        total = float(output.gram.double().trace()) * len(output.weight)
        total += sensitivity * float(self._metric.double().trace())
        count = self.weights.numel()
        if "output" in self.biases:
            size = len(self.biases["output"])
            total, count = total + self._count * size, count + size
        return total / count

    def initial(self) -> Point:
        x = Point(value=self.weights["value"], output=self.weights["output"])
        return Point({**x, "bias": self.biases["output"]}) if "output" in self.biases else x

    def value(self, x: Point) -> float:
        """A difference of energies, from moments of the head outputs: accurate to their rounding in the dtype of the
        weights, relative to tr(|O| |Z^T Z| |O|^T), which exceeds |Y|^2 where heads cancel each other."""
        return self._output_problem(x).squared_error(x["output"], x.get("bias"))

    def validation_loss(self, x: Point) -> float:
        """The value on the validation tokens, relative to |Y|^2; the value itself where all targets are zero."""
        sums = torch.zeros(2, dtype=torch.float64)
        for heads, targets in self._head_outputs(x, self.validation):
            missing = heads @ x["output"].T - targets
            if "bias" in x:
                missing += x["bias"]
            sums += torch.stack([part.double().square().sum() for part in (missing, targets)]).cpu()
        loss, energy = self.all_reduce(sums).tolist()
        return float(loss / (energy or 1.0))

    def head_moments(self, x: Point) -> Tensor:
        """Z^T Z (H e, H e) of the head outputs that V really gives: what the output projection alone is pruned on."""
        gram = GramAccumulator(self.weights["output"].shape[1], self.weights["output"].device)
        for heads, _ in self._head_outputs(x, self.tokens):
            gram.add(heads)
        gram.join(self.all_reduce)
        return gram.gram.to(self.weights["output"])

    def block(self, name: str, x: Point) -> Any:  # a Problem, as in FeedForward
        return self._output_problem(x) if name == "output" else self._value_problem(x)

    def part(self, x: Point, name: str) -> Point:
        return Point(weight=x["output"] if name == "output" else x["value"] * self._scale(x["output"]))

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        weight = solution["weight"]
        if name == "value":
            return Point({**x, "value": weight / self._scale(x["output"])})
        bias = {"bias": block.bias(weight)} if "bias" in x and isinstance(block, Closing) else {}
        return Point({**x, "output": weight, **bias})

    def safeguarded(self, before: Point, after: Point, name: str) -> Point:
        """`after`, with the values fitted to the exact objective on their support; or `before`, if it is in the sets
        and its value is less, or `after` is not finite."""
        if name == "value":
            value = self.fitted_value(after["output"], after, after["value"], after["value"] != 0)
            after = Point({**after, "value": value})
        if self.constraint.contains(before):
            known = self.value(before)
            if not (after.is_finite() and self.value(after) <= known):
                return before
        return after

    def fitted_value(self, output: Tensor, x: Point, start: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """argmin over V of the value for a given O, plus c_r D_j (V_rj - W_rj)^2 with D as in `LayerReconstruction`.

        Args:
            output: O (m, H e).
            x: whose bias is taken.
            start: of conjugate gradients; the dense weights by default.
            mask: of the entries of V that may differ from zero; all by default.
        """
        dense = self.weights["value"]
        ridge, damping = self.damped.get("value", (0.0, 0.0))
        diagonal, rows = self._metric.diagonal(), self._sensitivity(output)[:, None]
        anchor = rows * (ridge * diagonal + damping * diagonal.mean())
        preconditioner = rows * diagonal + anchor
        dead = preconditioner <= 0
        inverse = preconditioner.masked_fill(dead, 1.0).reciprocal()
        allowed = ~dead if mask is None else mask & ~dead
        v = dense if start is None else start
        if mask is not None:
            v = v.where(mask, 0)
        right = self._value_correlation(output, x.get("bias")) + anchor * dense
        square = output.T @ output

        def system(v: Tensor) -> Tensor:
            return self._hessian_times(v, square) + anchor * v

        return quadratic.conjugate_gradient(system, right, v, allowed, inverse, self.tolerance, self.max_iterations)

    def _scale(self, output: Tensor) -> Tensor:
        """sqrt(c) (G e, 1), rounded to powers of two: scaling by them is exact."""
        return self._sensitivity(output).sqrt().log2().round().exp2()[:, None]

    def _sensitivity(self, output: Tensor) -> Tensor:
        """c_r = sum |O_h e_r|^2 over the heads h that read row r (G e,), positive."""
        squares = (
            output.square()
            .sum(0)
            .view(-1, self.tokens.mixing.heads * self._size // len(self.weights["value"]), self._size)
        )
        sums = squares.sum(1).flatten()
        return sums.clamp_min(max(_LEAST_SENSITIVITY * float(sums.mean()), torch.finfo(sums.dtype).tiny))

    @cached_property
    def _count(self) -> int:
        return int(self.all_reduce(torch.tensor(len(self.tokens.inputs))))

    def _chunks(
        self, tokens: AttentionTokens, numbers: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number, inputs and targets of some spans, by default of all."""
        spans = tokens.mixing.spans
        for number in range(len(spans)) if numbers is None else numbers:
            inputs, targets = tokens.inputs[spans[number]], tokens.targets[spans[number]]
            yield number, inputs.to(self.weights["value"]), targets.to(self.weights["value"])

    def _sample(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The spans that the values are fitted on."""
        return self._chunks(self.tokens, self._sampled)

    @cached_property
    def _sampled(self) -> list[int]:
        """The numbers of spans that have, evenly, at least `sample_size` tokens in all processes together."""
        size = sample_size(self._count, self.weights["value"].shape[1])
        chosen, taken, passed = [], 0, 0
        for number, span in enumerate(self.tokens.mixing.spans):
            passed += span.stop - span.start
            if taken * self._count < passed * size:
                chosen.append(number)
                taken += span.stop - span.start
        return chosen

    @cached_property
    def _scaling(self) -> float:
        """By which a sum over the sample is scaled to all tokens."""
        spans = [self.tokens.mixing.spans[number] for number in self._sampled]
        sampled = self.all_reduce(torch.tensor(sum(span.stop - span.start for span in spans)))
        return self._count / max(1, int(sampled))

    def _head_outputs(self, x: Point, tokens: AttentionTokens) -> Iterator[tuple[Tensor, Tensor]]:
        """Z (n, H e) and Y of every span."""
        for number, inputs, targets in self._chunks(tokens):
            values = inputs @ x["value"].T
            if "value" in self.biases:
                values += self.biases["value"]
            yield tokens.mixing.mix(number, values), targets

    def _output_problem(self, x: Point) -> Closing:
        """That of the given values: held until `_HELD` others were used."""
        for place, (values, known) in enumerate(self._output_problems):
            if torch.equal(values, x["value"]):
                self._output_problems.append(self._output_problems.pop(place))
                return known
        weight = self.weights["output"]
        bias = "bias" in x
        gram = GramAccumulator(weight.shape[1], weight.device, centre=bias)
        target = TargetAccumulator(weight.shape[0], weight.shape[1], weight.device, centre=bias)
        for heads, targets in self._head_outputs(x, self.tokens):
            gram.add(heads)
            target.add(heads, targets)
        constraint = self.constraints.get("output", FREE)
        gram.join(self.all_reduce)
        target.join(self.all_reduce)
        problem = Closing.of(weight, gram, target, constraint, self.damped.get("output", (0.0, 0.0)), bias=bias)
        self._output_problems = [*self._output_problems[1 - _HELD :], (x["value"].clone(), problem)]
        return problem

    def _value_problem(self, x: Point) -> LayerReconstruction:
        ridge, damping = self.damped.get("value", (0.0, 0.0))
        return LayerReconstruction(
            self.fitted_value(x["output"], x) * self._scale(x["output"]),
            self._metric,
            self.constraints.get("value", FREE),
            ridge=ridge,
            damping=damping,
        )

    def _mixed_inputs(self, number: int, inputs: Tensor, stride: int = 1) -> Tensor:
        """M_h of a span, of all heads, at every `stride`-th token: (ceil(n / stride), H, d)."""
        mixing, size = self.tokens.mixing, self._size
        groups = len(self.weights["value"]) // size
        parts, pieces = [], inputs.split(size, 1)
        several = (nn.functional.pad(one, (0, size - one.shape[1])).repeat(1, groups) for one in pieces)
        for piece, mixed in zip(pieces, mixing.mix_several(number, several), strict=True):
            some = mixed.unflatten(1, (mixing.heads, size))[::stride, :, : piece.shape[1]]
            parts.append(some if stride == 1 else some.clone())  # a view would keep all tokens in memory
        return torch.cat(parts, 2)

    @cached_property
    @precision.full()
    def _mixed_moments(self) -> tuple[Tensor, Tensor] | None:
        """[M_h^T M_h'] (H d, H d), and M_h^T times the targets and, with biases, `_constants` (H d, m [+ 1 + H]).

        The targets less the constant outputs of the dense weights. None where they are too large. In the dtype of the
        weights: its rounding changes what is proposed, which `safeguarded` rejects where it is no better.
        """
        weight = self.weights["value"]
        heads, width = self.tokens.mixing.heads, weight.shape[1]
        if heads * width > self.widest:
            return None
        gram = weight.new_zeros(heads * width, heads * width)
        columns = [slice(h * width, (h + 1) * width) for h in range(heads)]
        products = weight.new_zeros(len(gram), len(self.weights["output"]) + (1 + heads if self.biases else 0))
        for number, inputs, targets in self._sample():
            mixed = self._mixed_inputs(number, inputs).flatten(1)
            for head in columns:
                gram[head.start :, head].addmm_(mixed[:, head.start :].T, mixed[:, head])
            if self.biases:
                constants = self._constants(number, inputs)
                targets = torch.cat([targets - constants @ self._dense_constant_outputs, constants], 1)
            products.addmm_(mixed.T, targets)
        for head in columns:
            gram[head, head.stop :] = gram[head.stop :, head].T
        return self.all_reduce(gram.mul_(self._scaling)), self.all_reduce(products.mul_(self._scaling))

    @property
    def _mixed_gram(self) -> Tensor | None:
        return None if self._mixed_moments is None else self._mixed_moments[0]

    @cached_property
    def _metric(self) -> Tensor:
        """H (d, d) of the dense O, scaled to all tokens where they are sampled; of equal heads where O is zero."""
        heads, width = self.tokens.mixing.heads, self.weights["value"].shape[1]
        strength = self.weights["output"].square().sum(0).view(heads, self._size).sum(1)
        strength = strength / strength.sum() if bool(strength.any()) else torch.full_like(strength, 1 / heads)
        if self._mixed_gram is not None:
            blocks = self._mixed_gram.unflatten(0, (heads, width)).unflatten(2, (heads, width))
            metric: Tensor = torch.einsum("hihj,h->ij", blocks, strength)
            return (metric + metric.T) / 2
        gram, scaling = GramAccumulator(width, self.weights["value"].device), self._scaling
        for number, inputs, _ in self._sample():
            stride = -(-len(inputs) * heads * width // _MIXED_ENTRIES)
            mixed = self._mixed_inputs(number, inputs, stride)
            gram.add(mixed * (strength * stride * scaling).sqrt()[:, None])
        gram.join(self.all_reduce)
        return gram.gram.to(self.weights["value"])

    def value_hessian_times(self, v: Tensor, output: Tensor) -> Tensor:
        """For every group, the sum over its heads h and all heads h' of O_h^T O_h' V_g(h') M_h'^T M_h (G e, d)."""
        return self._hessian_times(v, output.T @ output)

    def _hessian_times(self, v: Tensor, square: Tensor) -> Tensor:
        """As `value_hessian_times`, with O^T O."""
        mixing, size = self.tokens.mixing, self._size
        if self._mixed_gram is not None:
            per_group = mixing.heads * size // len(v)
            heads = v.unflatten(0, (-1, size)).repeat_interleave(per_group, 0)
            pairs = torch.einsum("hikj,kjd->hikd", square.unflatten(0, (-1, size)).unflatten(2, (-1, size)), heads)
            columns = self._mixed_gram.split(v.shape[1], 1)
            each = torch.stack([one.flatten(1) @ column for one, column in zip(pairs, columns, strict=True)])
            return each.view(-1, per_group, size, v.shape[1]).sum(1).flatten(0, 1)
        total = torch.zeros_like(v, dtype=torch.float64)
        for number, inputs, _ in self._sample():
            back = mixing.unmix(number, mixing.mix(number, inputs @ v.T) @ square)
            total += (back.T @ inputs).double()
        return self.all_reduce(total.mul_(self._scaling)).to(v)

    def _value_correlation(self, output: Tensor, bias: Tensor | None) -> Tensor:
        """The right-hand side of the normal equations of V, without ridge (G e, d).

        Without biases it is sum_h O_h^T Y^T M_h over the heads of a group.
        """
        count = len(output)
        constants = self._constant_outputs(output, bias) if self.biases else None
        if self._mixed_moments is not None:
            products = self._mixed_moments[1]
            if constants is not None:
                change = constants - self._dense_constant_outputs
                products = products[:, :count] - products[:, count:] @ change
            products = products.unflatten(0, (self.tokens.mixing.heads, -1))
            heads: Tensor = torch.einsum("mhe,hdm->hed", output.unflatten(1, (-1, self._size)), products)
            groups: Tensor = heads.unflatten(0, (len(self.weights["value"]) // self._size, -1)).sum(1)
            return groups.flatten(0, 1)
        mixing, total = self.tokens.mixing, torch.zeros_like(self.weights["value"], dtype=torch.float64)
        for number, inputs, targets in self._sample():
            if constants is not None:
                targets = targets - self._constants(number, inputs) @ constants
            total += (mixing.unmix(number, targets @ output).T @ inputs).double()
        return self.all_reduce(total.mul_(self._scaling)).to(self.weights["value"])

    @cached_property
    def _dense_constant_outputs(self) -> Tensor:
        return self._constant_outputs(self.weights["output"], self.biases.get("output"))

    def _constants(self, number: int, inputs: Tensor) -> Tensor:
        """[1, A_1 1, ..., A_H 1] (n, 1 + H) of a span: what biases are multiplied with."""
        mixed = self.tokens.mixing.mix(number, inputs.new_ones(len(inputs), len(self.weights["value"])))
        return nn.functional.pad(mixed[:, :: self._size], (1, 0), value=1.0)

    def _constant_outputs(self, output: Tensor, bias: Tensor | None) -> Tensor:
        """[b, O_1 b_g(1), ..., O_H b_g(H)]^T (1 + H, m): times `_constants`, the outputs without inputs."""
        heads = output.unflatten(1, (self.tokens.mixing.heads, self._size))
        rows = heads.new_zeros(heads.shape[1], len(output))
        if "value" in self.biases:
            groups = self.biases["value"].view(-1, self._size)
            rows = torch.einsum("mhe,he->hm", heads, groups.repeat_interleave(len(rows) // len(groups), 0))
        first = output.new_zeros(len(output)) if bias is None else bias
        return torch.cat([first[None], rows])


def sample_size(tokens: int, width: int) -> int:
    """The number of tokens that the values are fitted on at least, for inputs of a width d."""
    return min(tokens, _TOKENS_PER_INPUT * width)
