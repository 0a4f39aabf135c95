"""Weights of tokens that depend on outputs, tokens or logits: against the model's own forward, sequence by sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences, pack
from admm_prune.data.sources import Corpus
from admm_prune.errors import UserError
from admm_prune.models import capture, losses
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.statistics import TokenContext, TokenWeighting
from tests.models.tiny_models import LLAMA, STORIES, VOCABULARY, build, inputs_of, one_by_one, prune_half

FAMILIES = ["llama-untied", "gpt2", "falcon", "gemma2"]


def loss(logits: Tensor, following: Tensor) -> Tensor:
    return cross_entropy(logits, following, reduction="none")


def by_scores(inputs: Tensor, context: TokenContext | None) -> Tensor:
    assert context is not None
    return context.scores


def by_outputs(inputs: Tensor, context: TokenContext | None) -> Tensor:
    assert context is not None
    return 1 / (1 + context.outputs.double().square().sum(1))


OUTPUTS = TokenWeighting(by_outputs, needs_context=True, needs_outputs=True)
SCORES = TokenWeighting(by_scores, needs_context=True, score=loss)


@pytest.fixture(params=["documents", "windows"])
def text(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Sequences:
    """Padded batches of documents, or windows with a BOS in them."""
    return pack(Corpus("x", STORIES), tokenizer, length=16, packing=request.param, batch_size=3)


def losses_of(model: nn.Module, text: Sequences) -> list[Tensor]:
    """-log p of the token after each one, sequence by sequence; 0 before a BOS and at the end."""
    result = []
    for row in text.rows:
        log_p = model(input_ids=row.ids[None]).logits[0].double().log_softmax(-1)
        values = -log_p[:-1].gather(1, row.ids[1:, None])[:, 0]
        result.append(torch.cat([values.masked_fill(row.ids[1:] == text.bos, 0), values.new_zeros(1)]))
    return result


def outputs_of(model: nn.Module, view: WeightView, text: Sequences) -> Tensor:
    """What leaves a matrix in the model's own forward, by its formula."""
    outputs = inputs_of(model, view.module, one_by_one(text)) @ view.read().T
    return outputs if view.bias is None else outputs + view.bias


def near(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.double().abs().max()) or 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_that_of_every_token(family: str, text: Sequences) -> None:
    """Inputs and outputs are those behind the pruned blocks, scores those of the dense model."""
    model = build(family)
    blocks, dense_losses = decoder_blocks(model), losses_of(model, text)
    seen: dict[str, dict[tuple[int, int], tuple[Tensor, ...]]] = {}

    def watch(inputs: Tensor, context: TokenContext | None) -> Tensor:
        assert context is not None
        keys = zip(context.sequences.tolist(), context.positions.tolist(), strict=True)
        columns = (inputs, context.outputs, context.ids, context.scores, context.scored)
        seen.setdefault(context.weight, {}).update(zip(keys, zip(*columns, strict=True), strict=True))
        return torch.ones(len(inputs))

    weighting = TokenWeighting(watch, needs_context=True, needs_outputs=True, score=loss)
    stream = BlockStream(model, blocks, text, "cpu", weighting=weighting, validation_fraction=0.3)
    stream.collect(0)
    for view in blocks[0].weights:
        view.write(prune_half(view.read()))
    stream.advance(0)
    seen.clear()
    stream.collect(1)
    assert list(seen) == [view.name for view in blocks[1].weights]
    every = [(number, position) for number, row in enumerate(text.rows) for position in range(len(row.ids))]
    followed = [x for row in text.rows for x in [*(row.ids[1:] != text.bos).tolist(), False]]
    for view in blocks[1].weights:
        tokens = seen[view.name]
        assert sorted(tokens) == every, "every token once, in all parts of the text"
        inputs, outputs, ids, scores, scored = (
            torch.stack(column) for column in zip(*(tokens[k] for k in every), strict=True)
        )
        near(inputs, inputs_of(model, view.module, one_by_one(text)))
        near(outputs, outputs_of(model, view, text))
        near(scores, torch.cat(dense_losses))
        assert torch.equal(ids, torch.cat([row.ids for row in text.rows]))
        assert scored.tolist() == followed
        assert (scores[~scored] == 0).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_outputs_give_every_matrix_its_own_gram(family: str, stories: Sequences) -> None:
    model = build(family)
    block = decoder_blocks(model)[0]
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu", weighting=OUTPUTS, validation_fraction=0.3)
    collected = stream.collect(0)
    assert [[view.name for view in shared.weights] for shared in collected] == [[view.name] for view in block.weights]
    validation = stories.split(0.3)[1]
    for shared in collected:
        for gram, part in ((shared.statistics.gram, stories), (shared.statistics.validation, validation)):
            x = inputs_of(model, shared.weights[0].module, one_by_one(part)).double()
            weights = 1 / (1 + outputs_of(model, shared.weights[0], part).double().square().sum(1))
            assert gram is not None
            near(gram, (x * weights[:, None]).T @ x)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_losses_share_a_gram_as_unweighted_ones_do(family: str, text: Sequences) -> None:
    model = build(family)
    blocks, weights = decoder_blocks(model), torch.cat(losses_of(model, text))
    plain = BlockStream(model, blocks, text, "cpu").collect(0)
    weighted = BlockStream(model, blocks, text, "cpu", weighting=SCORES).collect(0)
    assert [shared.weights for shared in weighted] == [shared.weights for shared in plain]
    for shared in weighted:
        x = inputs_of(model, shared.weights[0].module, one_by_one(text)).double()
        near(shared.statistics.gram, (x * weights[:, None]).T @ x)
        assert shared.statistics.tokens == text.tokens


def test_logits_that_are_scaled_after_the_head_are_those_that_are_scored(stories: Sequences) -> None:
    torch.manual_seed(0)
    shape = {name: value for name, value in LLAMA.items() if name != "initializer_range"}
    config = CohereConfig(vocab_size=VOCABULARY, num_hidden_layers=1, logit_scale=0.5, initializer_range=0.3, **shape)
    model: PreTrainedModel = CohereForCausalLM(config).eval().requires_grad_(False)
    for batch in stories.batches:
        scores = losses.token_scores(model, batch, loss)
        rows = tuple(row for row in stories.rows if len(row.ids) in batch.lengths)
        near(scores[batch.mask], torch.cat(losses_of(model, replace(stories, rows=rows))))


def test_logits_are_given_in_chunks_and_in_float32(stories: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 8 * VOCABULARY)
    monkeypatch.setattr(losses, "_FEWEST", 1)
    chunks: list[Tensor] = []

    def watch(logits: Tensor, following: Tensor) -> Tensor:
        chunks.append(logits)
        return loss(logits, following)

    model = build("llama").bfloat16()
    scores = losses.token_scores(model, stories.batches[-1], watch)
    assert max(len(chunk) for chunk in chunks) == 8
    assert len(chunks) > 2
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert scores.shape == stories.batches[-1].input_ids.shape


@pytest.mark.bitwise
def test_wide_grams_apart_are_the_same_to_the_bit(stories: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_APART", 0)
    model = build("llama-untied")
    blocks = decoder_blocks(model)
    apart, together = (
        BlockStream(model, blocks, stories, "cpu", weighting=OUTPUTS, sparing=sparing).collect(0)
        for sparing in (True, False)
    )
    assert [a.weights for a in apart] == [b.weights for b in together]
    assert all(torch.equal(a.statistics.gram, b.statistics.gram) for a, b in zip(apart, together, strict=True))


def test_the_pass_ends_behind_the_last_outputs(stories: Sequences) -> None:
    """The block's own end is computed for the first batch alone."""
    model = build("llama")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu", weighting=OUTPUTS, validation_fraction=0.0)
    ends: list[int] = []
    blocks[0].module.register_forward_hook(lambda *_: ends.append(0))
    stream.collect(0)
    assert len(ends) == 1 < len(stories.batches)


def test_experts_have_no_tokens_to_read(stories: Sequences) -> None:
    model = build("mixtral")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu", weighting=SCORES)
    with pytest.raises(UserError, match=r"experts.gate_up_proj.0: token_weights with a context .* --ignore"):
        stream.collect(0)
    dense = {view.name for view in blocks[0].weights if view.expert is None}
    assert {view.name for shared in stream.collect(0, dense) for view in shared.weights} == dense
    plain = TokenWeighting(lambda inputs, _: torch.ones(len(inputs)))
    assert BlockStream(model, blocks, stories, "cpu", weighting=plain).collect(0), "inputs are known everywhere"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [(0.0, "its weighted Gram is zero"), (1e-300, "its weighted Gram is zero"), (1e300, "its weighted Gram is not")],
)
def test_weights_that_leave_no_gram_are_refused(stories: Sequences, weight: float, reason: str) -> None:
    model = build("llama")
    weighting = TokenWeighting(lambda inputs, _: torch.full((len(inputs),), weight, dtype=torch.float64))
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu", weighting=weighting)
    with pytest.raises(UserError, match=rf"q_proj.weight: {reason}"):
        stream.collect(0)


def test_a_context_that_is_written_to_is_right_for_the_next_matrix(stories: Sequences) -> None:
    def doubling(inputs: Tensor, context: TokenContext | None) -> Tensor:
        assert context is not None
        return context.scores.mul_(2)

    model = build("llama")
    blocks = decoder_blocks(model)
    weighting = TokenWeighting(doubling, needs_context=True, score=loss)
    once, twice = (BlockStream(model, blocks, stories, "cpu", weighting=one).collect(0) for one in (SCORES, weighting))
    for a, b in zip(once, twice, strict=True):
        near(b.statistics.gram, 2 * a.statistics.gram)


def test_a_part_of_the_text_without_weight_has_no_statistics(stories: Sequences) -> None:
    """An error on tokens that do not count would be 0 of 0."""
    model = build("llama")
    validation = stories.split(0.3)[1]
    held_out = torch.tensor([any(row is other for other in validation.rows) for row in stories.rows])

    def others(inputs: Tensor, context: TokenContext | None) -> Tensor:
        assert context is not None
        return (~held_out[context.sequences]).double()

    weighting = TokenWeighting(others, needs_context=True)
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu", weighting=weighting, validation_fraction=0.3)
    for shared in stream.collect(0):
        assert shared.statistics.validation is None
        assert shared.statistics.validation_tokens == 0
        assert shared.statistics.tokens == stories.tokens
