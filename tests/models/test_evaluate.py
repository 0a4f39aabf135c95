from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from admm_prune.data.sequences import Row, Sequences, pack
from admm_prune.data.sources import Corpus
from admm_prune.errors import UserError
from admm_prune.models import evaluate as module
from admm_prune.models import losses
from admm_prune.models.evaluate import evaluate, sparsity
from admm_prune.models.structure import decoder_blocks
from tests.models.tiny_models import STORIES, build, one_by_one, prune_half


@pytest.mark.sampled(8)
def test_padded_batches_score_like_one_sequence_at_a_time(model: PreTrainedModel, stories: Sequences) -> None:
    total = 0.0
    for ids in one_by_one(stories):
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total -= log_p.gather(1, ids[0, 1:, None]).sum().item()
    result = evaluate(model, stories)
    tokens = stories.tokens - len(STORIES)  # all but BOS
    assert (result.tokens, result.characters) == (tokens, sum(map(len, STORIES)))
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result.bits_per_char == pytest.approx(total / math.log(2) / sum(map(len, STORIES)), rel=1e-5)


def test_windows_score_every_token_once_and_no_separator(tokenizer: PreTrainedTokenizerFast) -> None:
    """Token by token: a call of the model for every single prediction."""
    model, length = build("llama"), 10
    stream: list[int] = []
    for story in STORIES:
        stream += ([0] if stream else []) + tokenizer.encode(story, add_special_tokens=False)
    total, scored = 0.0, 0
    for position, token in enumerate(stream):
        if token == 0:
            continue
        window = position - position % (length - 1)
        seen = torch.tensor([[0, *stream[window:position]]])
        total -= model(input_ids=seen).logits[0, -1].double().log_softmax(-1)[token].item()
        scored += 1
    result = evaluate(model, pack(Corpus("x", STORIES), tokenizer, length=length, packing="windows", batch_size=4))
    assert (result.tokens, result.characters) == (scored, sum(map(len, STORIES)))
    assert result.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


def test_the_standard_error_is_that_of_resampled_sequences(
    tokenizer: PreTrainedTokenizerFast, stories: Sequences
) -> None:
    """Against the delta method written out per sequence, and against a bootstrap over the sequences."""
    model = build("llama")
    result = evaluate(model, stories)
    losses, counts = [], []
    for ids in one_by_one(stories):
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None]).sum().item())
        counts.append(ids.shape[1] - 1)
    loss, count = torch.tensor(losses).double(), torch.tensor(counts).double()
    mean, m = loss.sum() / count.sum(), len(losses)
    expected = mean.exp() * (m / (m - 1) * (loss - mean * count).square().sum()).sqrt() / count.sum()
    assert result.perplexity_error == pytest.approx(float(expected), rel=1e-4)
    draws = torch.randint(m, (4000, m), generator=torch.Generator().manual_seed(0))
    resampled = (loss[draws].sum(1) / count[draws].sum(1)).exp().std()
    assert result.perplexity_error == pytest.approx(float(resampled), rel=0.35)
    one = pack(Corpus("x", STORIES[:1]), tokenizer, length=64, packing="documents")
    assert evaluate(model, one).perplexity_error is None


def test_evaluation_repeats_to_the_bit(stories: Sequences) -> None:
    assert evaluate(build("qwen3"), stories) == evaluate(build("qwen3"), stories)


def test_logits_are_held_for_few_rows_at_once(stories: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = evaluate(model, stories)
    monkeypatch.setattr(losses, "_WHOLE", 1)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    assert evaluate(model, stories).perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert rows == [1] * len(STORIES)


def test_the_protocol_says_what_was_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate(build("llama"), pack(Corpus("x", STORIES), tokenizer, length=6, packing="documents"))
    assert result.truncated_tokens > 0
    assert f"cut at 6 tokens ({result.truncated_tokens} lost)" in result.protocol
    assert "\n" not in result.protocol


def test_a_model_that_overflows_earns_its_perplexity(stories: Sequences) -> None:
    model = build("llama-untied")
    model.lm_head.weight.mul_(1e6)
    assert evaluate(model, stories).perplexity == math.inf
    assert evaluate(model, stories).perplexity_error is None
    model.lm_head.weight.fill_(torch.nan)
    assert math.isnan(evaluate(model, stories).perplexity)


def test_sparsity_counts_exact_zeros() -> None:
    model = build("llama")
    blocks = decoder_blocks(model)
    assert sparsity(blocks) == 0.0
    view = blocks[1].weights[0]
    view.write(prune_half(view.read()))
    assert (view.read() == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    total = sum(nn.Module.get_parameter(model, v.name).numel() for block in blocks for v in block.weights)
    assert sparsity(blocks) == pytest.approx((view.parameter == 0).sum().item() / total)


def test_segments_give_the_perplexity_of_published_code(tokenizer: PreTrainedTokenizerFast) -> None:
    """As the scripts of GPTQ, SparseGPT and Wanda: exp(sum_i loss_i L / (n L)), loss_i the model's own on segment i."""
    model, length = build("llama"), 8
    whole = torch.tensor(tokenizer("\n\n".join(STORIES))["input_ids"])
    count = len(whole) // length
    losses = []
    for i in range(count):
        ids = whole[None, i * length : (i + 1) * length]
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()) * length)
    result = evaluate(model, pack(Corpus("stories", STORIES), tokenizer, length=length, packing="segments"))
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / (count * length)), rel=1e-5)
    assert result.packing == "segments"
    assert "1 shorter at the end dropped" in result.protocol


@pytest.mark.sampled(8)
def test_a_continuation_is_the_greedy_one(model: PreTrainedModel) -> None:
    prompt = torch.arange(1, 6)
    ids = model.generate(
        prompt[None], attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=7, min_new_tokens=7,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert module.continued(model, prompt, 7).tolist() == ids[0, 5:].tolist()


def test_a_text_without_a_token_to_score_is_refused() -> None:
    rows = tuple(Row(torch.tensor([1, 1, 1]), 3) for _ in range(2))
    with pytest.raises(UserError, match="no token to score"):
        evaluate(build("llama"), Sequences(rows, "documents", 3, 1, 2))
