"""Losses in chunks of tokens: equal to those of whole logits, in value and gradients, and without whole logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as library_cross_entropy
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.models import losses
from admm_prune.models.losses import Distillation, cross_entropy, holds_logits, next_token_loss
from admm_prune.plan.counting import counted
from tests.models.tiny_models import VOCABULARY, build

# gemma2 divides its logits by a constant, and takes the tanh, after its head; cohere and granite multiply them.
FAMILIES = ["llama", "llama-untied", "qwen3", "opt", "gpt2", "neox", "bloom", "falcon", "mixtral", "gemma2"]
LENGTHS = (12, 7, 2, 10)


def batch(lengths: tuple[int, ...] = LENGTHS, bos: int | None = None) -> Batch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=g)
    if bos is not None:
        ids[:, 0] = bos
    sizes = torch.tensor(lengths)
    return Batch(ids * (torch.arange(max(lengths)) < sizes[:, None]), sizes, bos)


def trainable(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return build(family).to(dtype).requires_grad_(True)


def plain_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the scored tokens, the whole model's at once; and the tokens."""
    scored = batch.scored[:, 1:]
    return model(input_ids=batch.input_ids).logits[:, :-1][scored], batch.input_ids[:, 1:][scored]


def plain(model: nn.Module, batch: Batch) -> Tensor:
    return library_cross_entropy(*plain_logits(model, batch))


def plain_distillation(teacher: nn.Module, weight: float, temperature: float) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = plain_logits(model, batch)
        with torch.no_grad():
            teacher_logits, _ = plain_logits(teacher, batch)
        divergence = kl_div(
            (logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1), reduction="batchmean"
        )
        return (1 - weight) * library_cross_entropy(logits, targets) + weight * temperature**2 * divergence

    return loss


def gradients(
    model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    value = loss(model, batch)
    (3 * value).backward()
    return value.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 3 * VOCABULARY)
    monkeypatch.setattr(losses, "_FEWEST", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [None, 1])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(family: str, bos: int | None) -> None:
    model = trainable(family, torch.float32 if family == "mixtral" else torch.float64)  # torch's grouped products
    expected = gradients(model, plain, batch(bos=bos))
    torch.testing.assert_close(gradients(model, next_token_loss, batch(bos=bos)), expected)
    assert holds_logits(model) == (family == "gemma2")
    total = cross_entropy(model, batch(bos=bos))
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(float(expected[0]) * int(batch(bos=bos).scored.sum()), rel=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_in_chunks_is_that_of_whole_logits(family: str, weight: float, temperature: float) -> None:
    model = trainable(family)
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    expected = gradients(model, plain_distillation(teacher, weight, temperature), batch())
    torch.testing.assert_close(gradients(model, Distillation(teacher, weight, temperature), batch()), expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        torch.testing.assert_close(Distillation(teacher, weight, temperature)(model, batch()).double(), expected[0])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_in_16_bits_are_not_rounded_again(temperature: float) -> None:
    teacher = trainable("llama", torch.bfloat16).requires_grad_(False)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        log_q, log_p = (
            (plain_logits(one, batch())[0].double() / temperature).log_softmax(-1) for one in (model, teacher)
        )
        exact = temperature**2 * float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        assert float(Distillation(teacher, 1.0, temperature)(model, batch())) == pytest.approx(exact, rel=2e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scale", ["logit_scale", "logits_scaling"])
def test_logits_that_are_scaled_after_the_head_are_exact(scale: str) -> None:
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    cohere = scale == "logit_scale"
    model = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.5)) if cohere else GraniteForCausalLM(
        GraniteConfig(**shape, logits_scaling=3.0)
    )  # fmt: skip
    model = model.double()
    torch.testing.assert_close(gradients(model, next_token_loss, batch()), gradients(model, plain, batch()))
    assert holds_logits(model)


class Wrapped(nn.Module):
    """A model of the same logits, without the accessor of its head."""

    def __init__(self, inside: PreTrainedModel) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config

    def forward(self, **inputs: Any) -> Any:
        return self.inside(**inputs)


class Clipped(Wrapped):
    """A model that writes to its logits: the tensor is the head's, the values are not."""

    def get_output_embeddings(self) -> nn.Module:
        return self.inside.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        out = self.inside(**inputs)
        out.logits.clamp_(max=1.0)
        return out


class Cut(Clipped):
    """A model that leaves out the logits of the rows by which its vocabulary was padded: a view of the head's."""

    def forward(self, **inputs: Any) -> Any:
        out = self.inside(**inputs)
        out.logits = out.logits[..., : VOCABULARY - 20]
        return out


class Filled(Clipped):
    """A model that never predicts some tokens."""

    def forward(self, **inputs: Any) -> Any:
        out = self.inside(**inputs)
        out.logits = out.logits.index_fill(-1, torch.tensor([VOCABULARY - 1]), -1e4)
        return out


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [Clipped, Wrapped, Cut, Filled])
def test_a_model_whose_logits_are_not_its_heads_is_noticed(kind: type[Wrapped]) -> None:
    model, text = kind(trainable("llama")), batch()
    text = Batch(text.input_ids.clamp(max=VOCABULARY - 21), text.lengths)
    torch.testing.assert_close(gradients(model, next_token_loss, text), gradients(model, plain, text))
    assert holds_logits(model)


def test_a_model_that_gives_the_logits_of_its_last_token_alone_is_refused() -> None:
    class Last(Clipped):
        def forward(self, **inputs: Any) -> Any:
            return self.inside(**inputs, logits_to_keep=1)

    with pytest.raises(UserError, match=r"Last gives logits \(4, 1, 300\) for tokens \(4, 12\), not for each of them"):
        cross_entropy(Last(build("llama")), batch())


def test_the_head_is_as_before_after_an_error() -> None:
    model = trainable("llama-untied")
    with pytest.raises(IndexError):
        next_token_loss(model, Batch(torch.full((1, 4), 10**6), torch.tensor([4])))
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=batch().input_ids).logits.shape[-1] == VOCABULARY


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "llama-untied", "opt"])
def test_under_autocast_gradients_are_as_close_as_those_of_whole_logits(family: str) -> None:
    """bfloat16 has 8 bits: both differ from float32 alike, by more than from each other."""
    model = trainable(family, torch.float32)
    _, exact = gradients(model, plain, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, chunked = gradients(model, next_token_loss, batch())
        whole_value, whole = gradients(model, lambda m, b: plain(m, b).float(), batch())
    assert float(value) == pytest.approx(float(whole_value), rel=1e-2)
    for a, b, c in zip(chunked, whole, exact, strict=True):
        error, usual = (a - c).norm(), (b - c).norm()
        assert error <= 1.5 * usual + 1e-2 * c.norm()
        assert a.dtype == torch.float32


@pytest.mark.parametrize("distilled", [False, True])
def test_the_gradient_passes_through_the_output_of_the_model(distilled: bool) -> None:
    """FSDP2 gathers the parameters for the backward pass by a hook of the outputs, which may not be views."""
    model = trainable("llama")
    seen: list[tuple[bool, Tensor]] = []

    def watch(_: nn.Module, __: object, out: Any) -> None:
        out.logits.register_hook(lambda gradient: seen.append((out.logits._is_view(), gradient)))

    teacher = copy.deepcopy(model).requires_grad_(False)
    model.register_forward_hook(watch)
    (Distillation(teacher) if distilled else next_token_loss)(model, batch()).backward()
    assert [is_view for is_view, _ in seen] == [False]
    assert seen[0][1].shape == (1, 1, VOCABULARY)
    assert float(seen[0][1][0, 0, 0]) == pytest.approx(1 / int(batch().scored.sum()))


def test_a_frozen_head_gets_no_gradient() -> None:
    model = trainable("llama-untied")
    model.lm_head.requires_grad_(False)
    next_token_loss(model, batch()).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None


def test_a_loss_is_differentiated_once() -> None:
    model = trainable("llama")
    loss = next_token_loss(model, batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("distilled", [False, True])
def test_logits_are_never_held_whole(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary far larger than the rest, bytes beyond those of the gradients do not grow with the tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(losses, "_CHUNK", 2**16)
    monkeypatch.setattr(losses, "_FEWEST", 8)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    teacher = copy.deepcopy(model).requires_grad_(False)
    loss = Distillation(teacher) if distilled else next_token_loss
    logits = 4 * 8192 * 63 * 8

    def peak(rows: int, function: Callable[[nn.Module, Batch], Tensor]) -> int:
        model.zero_grad()
        ids = torch.randint(8192, (rows, 64), generator=torch.Generator().manual_seed(0))
        with counted() as counting:
            counting.know(*model.parameters(), *teacher.parameters(), *model.buffers(), *teacher.buffers())
            function(model, Batch(ids, torch.full((rows,), 64))).backward()
        return counting.peak

    assert peak(8, loss) - peak(1, loss) < 0.02 * logits
    assert peak(8, loss) < 0.25 * logits
    assert peak(8, plain_distillation(teacher, 0.5, 1.0) if distilled else plain) > 2 * logits
