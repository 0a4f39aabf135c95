"""Losses of a causal model on a batch, from the logits of a few tokens at a time.

For n tokens and a vocabulary of V, the logits, their softmax and its gradient are n x V each: 1.6 GB in float32 for
8,192 tokens and V = 49,152. Here the model's call ends at its output embedding, which is applied to chunks of tokens.
Where a gradient is needed, that of a chunk is computed with its loss, so that nothing is kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.models.structure import replaced_forward

_CHUNK = 2**25  # logits of a chunk of tokens: 128 MiB in float32
_FEWEST = 256  # tokens in a chunk: fewer make slow products
_WHOLE = 2**27  # logits of a call that returns them

Head = Callable[[Tensor], Tensor]
# The sum over the tokens of a chunk, in float64, and, if the last argument is true, its gradient by their logits.
ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
# What to compute at the output embedding, from it, its parameters, and the hidden states (n, d) of the scored tokens.
AtHead = Callable[[Head, Sequence[nn.Parameter], Tensor], Tensor]

_ends_at_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether the logits are those of the head


@dataclass(frozen=True, eq=False)
class Scored:
    """The tokens of a batch that a model is scored on.

    Attributes:
        ids: (b, L).
        positions: (n,), in the flattened batch, of the tokens before them, whose logits predict them.
        targets: (n,), the tokens themselves.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Scored:
        targets = batch.scored.flatten().nonzero().squeeze(1)
        predicted = batch.input_ids.flatten()[targets]
        return cls(batch.input_ids.to(device), (targets - 1).to(device), predicted.to(device))

    @property
    def count(self) -> int:
        return len(self.targets)


def split_rows(model: nn.Module, batch: Batch) -> list[Batch]:
    """A batch in as many rows at once as keep the logits of a call within bounds, at least one."""
    rows = rows_at_once(model, batch.input_ids.shape[1])
    return [
        Batch(ids, lengths, batch.bos)
        for ids, lengths in zip(batch.input_ids.split(rows), batch.lengths.split(rows), strict=True)
    ]


def rows_at_once(model: nn.Module, length: int) -> int:
    """Sequences of a length whose logits are within bounds, at least one."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, _WHOLE // (length * vocabulary))


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of -log p over the scored tokens of a batch, from logits in float32; 0 where there are none."""
    scored = Scored.of(batch, _device(model))
    return _with_logits(model, scored, _summed(partial(_cross_entropy, scored.targets))) / max(1, scored.count)


@torch.no_grad()
def cross_entropy(
    model: nn.Module,
    batch: Batch,
    device: torch.device | None = None,
    *,
    sequence_losses: list[Tensor] | None = None,
) -> Tensor:
    """The sum of -log p over the scored tokens of a batch, from logits in float32: a float64 scalar on the CPU.

    Args:
        device: on which the model runs; by default that of its weights.
        sequence_losses: the sums of the single sequences, float64 on the CPU, are appended to it.
    """
    total = torch.zeros((), dtype=torch.float64)
    for piece in split_rows(model, batch):
        scored = Scored.of(piece, device or _device(model))
        token_losses = torch.zeros(scored.count, dtype=torch.float64, device=scored.targets.device)
        total += _with_logits(
            model, scored, _summed(partial(_cross_entropy, scored.targets, token_losses=token_losses))
        ).cpu()
        if sequence_losses is not None:
            rows, length = scored.ids.shape
            sums = torch.zeros(rows, dtype=torch.float64)
            sequence_losses.append(sums.index_add_(0, scored.positions.cpu() // length, token_losses.cpu()))
    return total


@torch.no_grad()
def token_scores(
    model: nn.Module, batch: Batch, score: Callable[[Tensor, Tensor], Tensor], device: torch.device | None = None
) -> Tensor:
    """Scores (b, L) of the tokens of a batch, float32 on the CPU: of the prediction that follows each; 0 without one.

    Args:
        score: from logits (m, V) of a chunk of tokens, in float32, and the tokens that follow (m,), to scores (m,).
        device: on which the model runs; by default that of its weights.
    """
    scores = []
    for piece in split_rows(model, batch):
        scored = Scored.of(piece, device or _device(model))
        values = torch.zeros(scored.count, device=scored.targets.device)
        if scored.count:
            _with_logits(model, scored, _summed(partial(_chunk_scores, scored.targets, score, values)))
        whole = torch.zeros(piece.input_ids.numel()).index_copy_(0, scored.positions.cpu(), values.cpu())
        scores.append(whole.view(piece.input_ids.shape))
    return torch.cat(scores)


@dataclass(frozen=True, eq=False)
class Distillation:
    """(1 - weight) cross-entropy + weight T^2 KL(p_teacher || p), means over the scored tokens, at temperature T; 0
    where no token is scored.

    The teacher is the dense model: its whole distribution is more informative than the token alone. It runs without
    gradients, about a third of the cost of a training step. It is called within the call of the model, so that the
    output embeddings of both can be used, also where FSDP gathers them for the call alone.

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        scored, differentiable = Scored.of(batch, _device(model)), torch.is_grad_enabled()

        def at_head(head: Head, parameters: Sequence[nn.Parameter], states: Tensor) -> Tensor:
            def at_teachers_head(teacher: Head, _: Sequence[nn.Parameter], teacher_states: Tensor) -> Tensor:
                def loss(logits: Tensor, chunk: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
                    with torch.no_grad():
                        teacher_logits = teacher(teacher_states[chunk])
                    return self._chunk(teacher_logits, scored.targets, logits, chunk, gradient)

                with torch.set_grad_enabled(differentiable):
                    return _summed(loss)(head, parameters, states)

            with torch.no_grad():
                return _with_logits(self.teacher, scored, at_teachers_head)

        return _with_logits(model, scored, at_head) / max(1, scored.count)

    def _chunk(
        self, teacher_logits: Tensor, targets: Tensor, logits: Tensor, chunk: slice, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """d/dlogits of T^2 KL(p || q), q = softmax(logits / T), is T (q - p)."""
        weight, temperature = self.weight, self.temperature
        wide = _wide(logits)
        both = [logits, teacher_logits]
        if temperature != 1.0:
            both = [x.to(wide) / temperature for x in both]
        log_q, log_p = (log_softmax(x, -1, dtype=wide) for x in both)
        del both
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(-1).double().sum().mul_(weight * temperature**2)
        if temperature == 1.0:  # both terms have one softmax
            index = targets[chunk, None]
            value -= (1.0 - weight) * log_q.gather(1, index).double().sum()
            return value, _less_targets(log_q.exp_().sub_(p, alpha=weight), index, 1.0 - weight) if gradient else None
        slope = log_q.exp_().sub_(p).mul_(weight * temperature) if gradient else None
        if weight < 1.0:
            likelihood, likelihood_slope = _cross_entropy(targets, logits, chunk, gradient)
            value += (1.0 - weight) * likelihood
            if slope is not None and likelihood_slope is not None:
                slope.add_(likelihood_slope, alpha=1.0 - weight)
        return value, slope


def holds_logits(model: nn.Module) -> bool:
    """Whether the losses of a model need all its logits at once: it changes them after its output embedding, or has
    none. Runs the model on two tokens where that is not known yet."""
    if model not in _ends_at_head:
        ids = torch.zeros(1, 2, dtype=torch.long, device=_device(model))
        with torch.no_grad():
            _at_head(model, ids, lambda *_: torch.zeros((), device=ids.device))
    return not _ends_at_head[model]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cross_entropy(
    targets: Tensor, logits: Tensor, chunk: slice, gradient: bool, token_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """d/dlogits of -log softmax(logits)_t is softmax(logits) - e_t. The losses of single tokens go to `token_losses`
    (n,), where it is given."""
    log_p, index = log_softmax(logits, -1, dtype=_wide(logits)), targets[chunk, None]
    chosen = log_p.gather(1, index).double()
    if token_losses is not None:
        token_losses[chunk] = chosen.squeeze(1).neg()
    value = chosen.sum().neg()
    if not gradient:
        return value, None
    return value, _less_targets(log_p.exp_(), index, 1.0)


def _chunk_scores(
    targets: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    logits: Tensor,
    chunk: slice,
    gradient: bool,
) -> tuple[Tensor, None]:
    """Writes the score of each token of a chunk into `scores` (n,); their sum is not used."""
    scores[chunk] = score(logits.to(_wide(logits)), targets[chunk])
    return scores.new_zeros((), dtype=torch.float64), None


def _less_targets(slope: Tensor, index: Tensor, weight: float) -> Tensor:
    """x - weight e_t, in place, for one-hot vectors e_t of the targets (m, 1)."""
    return slope.scatter_add_(1, index, slope.new_full((1, 1), -weight).expand_as(index))


def _with_logits(model: nn.Module, scored: Scored, then: AtHead) -> Tensor:
    """What `then` computes at the model's output embedding; of a model that changes its logits afterwards, from these,
    with the identity in place of the embedding.

    Raises:
        UserError: it does not give logits for every token.
    """

    def chosen(head: Head, parameters: Sequence[nn.Parameter], states: Tensor) -> Tensor:
        return then(head, parameters, states.flatten(0, 1).index_select(0, scored.positions))

    value = _at_head(model, scored.ids, chosen) if _ends_at_head.get(model, True) else None
    if value is None:
        logits = _logits(model, scored.ids)
        if logits.shape[:-1] != scored.ids.shape:
            raise UserError(
                f"{type(model).__name__} gives logits {tuple(logits.shape)} for tokens {tuple(scored.ids.shape)}, not "
                "for each of them: its predictions cannot be scored"
            )
        value = chosen(lambda logits: logits, (), logits)
    return value


def _at_head(model: nn.Module, ids: Tensor, then: AtHead) -> Tensor | None:
    """What `then` computes from the hidden states (b, L, d), in place of the output embedding, within a call of the
    model: hooks of its modules, such as those of FSDP2, see an ordinary call. The value takes the place of the logits
    of one token, followed by zeros up to their number, and its gradient goes back through them. The value is returned
    if the model returns that tensor unchanged; else, as of a model that scales, fills or cuts off some of its logits,
    None."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    values: list[Tensor] = []
    if not isinstance(head, nn.Module):
        _ends_at_head[model] = False
        return None
    forward = head.forward
    outputs: list[tuple[Tensor, int]] = []

    def replacement(states: Tensor) -> Tensor:
        if states.shape[:-1] != ids.shape:
            return forward(states)  # type: ignore[no-any-return]  # of torch
        values.append(then(forward, list(head.parameters()), states))
        # A tensor of its own, not a view, for hooks of the outputs. Without a gradient the value may be of a dtype
        # that the model would convert.
        value = values[-1] if values[-1].requires_grad else values[-1].new_zeros((), dtype=torch.float32)
        output = pad(value.view(1, 1, 1), (0, _width(head, forward, states) - 1))
        outputs.append((output, output._version))
        return output

    with replaced_forward(head, replacement):
        logits = _logits(model, ids)
    unchanged = len(outputs) == 1 and _is(logits, *outputs[0])
    _ends_at_head[model] = unchanged
    if not unchanged:
        return None
    return logits.sum() if logits.requires_grad else values[0]  # the gradient passes through the model's output


def _width(head: nn.Module, forward: Head, states: Tensor) -> int:
    """The number of logits of a token."""
    if isinstance(head, nn.Linear):
        return head.weight.shape[0]
    with torch.no_grad():
        return forward(states[:1, :1].detach()).shape[-1]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _is(x: Tensor, value: Tensor, version: int) -> bool:
    """Whether x is all of a value in its memory, and nothing has been written there since it had this version."""
    same: bool = x.shape == value.shape and x.untyped_storage()._cdata == value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    return same and value._version == version


def _summed(loss: ChunkLoss) -> AtHead:
    """The sum of a loss over all tokens: in float64, or, where it is differentiable, in the dtype of its gradient."""

    def at_head(head: Head, parameters: Sequence[nn.Parameter], states: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (states, *parameters)):
            total: Tensor = _ChunkedLoss.apply(loss, head, states, *parameters)  # type: ignore[no-untyped-call]
            return total
        return torch.stack([loss(head(states[chunk]), chunk, False)[0] for chunk in _chunks(head, states)]).sum()

    return at_head


def _chunks(head: Head, states: Tensor) -> list[slice]:
    """Runs of tokens with at most `_CHUNK` logits; an empty one where there is no token."""
    with torch.enable_grad():  # as later: autocast keeps the weight that it converts first, with or without gradient
        width = head(states[:1].detach()).shape[-1]
    rows = max(_FEWEST, _CHUNK // width)
    return [slice(start, start + rows) for start in range(0, max(1, len(states)), rows)]


class _ChunkedLoss(torch.autograd.Function):
    """The sum of a loss over chunks of tokens, with its gradients by hidden states and parameters.

    Gradients of parameters are summed over the chunks in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, head: Head, states: Tensor, *parameters: Tensor) -> Tensor:
        trained = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        states_gradient = torch.empty_like(states)
        sums: list[Tensor] = []
        values = []
        for chunk in _chunks(head, states):
            with torch.enable_grad():
                part = states[chunk].detach().requires_grad_()
                logits = head(part)
            value, slope = loss(logits.detach(), chunk, True)
            assert slope is not None
            inputs = [part, *(parameters[i] for i in trained)]
            gradients = torch.autograd.grad(logits, inputs, slope.to(logits.dtype), materialize_grads=True)
            del logits, slope
            values.append(value)
            states_gradient[chunk] = gradients[0]
            if not sums:
                sums = [gradient.to(_wide(gradient)) for gradient in gradients[1:]]
            else:
                for total, gradient in zip(sums, gradients[1:], strict=True):
                    total.add_(gradient)
        ctx.gradients = [states_gradient, *sums]
        ctx.trained = trained
        ctx.dtypes = [parameters[i].dtype for i in trained]
        ctx.count = len(parameters)
        return torch.stack(values).sum().to(_wide(states))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("the loss can be differentiated once: its gradients are not kept")
        states_gradient, *sums = (gradient.mul_(slope) for gradient in ctx.gradients)
        ctx.gradients = None
        result: list[Tensor | None] = [None] * ctx.count
        for i, total, dtype in zip(ctx.trained, sums, ctx.dtypes, strict=True):
            result[i] = total.to(dtype)
        return None, None, states_gradient, *result
