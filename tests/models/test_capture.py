from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences, pack
from admm_prune.data.sources import Corpus
from admm_prune.errors import UserError
from admm_prune.models import capture
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import decoder_blocks
from tests.models.tiny_models import build, expert_inputs, inputs_of, one_by_one, prune_half

LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
FUSED = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
SHARED = {
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "neox": FUSED,
    "bloom": FUSED,
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],  # one norm before both
    "falcon-grouped": FUSED,
    "falcon-alibi": FUSED,
    "stablelm-parallel": [[*LLAMA[0], *LLAMA[2]], ["o_proj"], ["down_proj"]],
    "mixtral": [*LLAMA[:2], *([own] for own in ["gate_up_proj", "down_proj"] * 4)],
    "qwen3-moe": [*LLAMA[:2], *([own] for own in ["gate_up_proj", "down_proj"] * 4)],
}


def near(actual: Tensor | None, expected: Tensor) -> None:
    """None stands for the Gram of no tokens, as experts may see."""
    actual = torch.zeros_like(expected) if actual is None else actual
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def gram(model: nn.Module, shared: SharedInput, sequences: Sequences) -> Tensor:
    view = shared.weights[0]
    ids = one_by_one(sequences)
    everything = bool(shared.statistics.notes)
    x = inputs_of(model, view.module, ids) if view.expert is None else expert_inputs(model, view, ids, everything)
    return x.double().T @ x.double()


def prune_block(shared_inputs: list[SharedInput]) -> None:
    for shared in shared_inputs:
        for view in shared.weights:
            view.write(prune_half(view.read()))


@pytest.mark.sampled(8)
def test_grams_are_those_of_the_full_pruned_model(
    model: PreTrainedModel, family: str, stories: Sequences, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Pruned prefix, padding, shared inputs, parts of the text: all against hooks in the model's own forward."""
    blocks = decoder_blocks(model)
    holdout = pack(Corpus("other", ("be the cat", "moved")), tokenizer, length=16)
    stream = BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3, holdout=holdout)
    validation = stories.split(0.3)[1]
    for index in range(len(blocks)):
        shared_inputs = stream.collect(index)
        names = [[view.name.split(".")[-2] for view in shared.weights] for shared in shared_inputs]
        expected = SHARED.get(family) or SHARED.get(family.partition("-")[0], LLAMA)
        assert sorted(map(sorted, names)) == sorted(map(sorted, expected))
        for shared in shared_inputs:
            statistics = shared.statistics
            near(statistics.gram, gram(model, shared, stories))
            near(statistics.validation, gram(model, shared, validation))
            near(statistics.holdout, gram(model, shared, holdout))
            if shared.weights[0].expert is None or statistics.notes:
                assert statistics.tokens == stories.tokens
                assert statistics.validation_tokens == validation.tokens
                assert statistics.holdout_tokens == holdout.tokens
        prune_block(shared_inputs)
        stream.advance(index)


def test_hidden_states_after_the_last_block_are_those_of_the_pruned_model(stories: Sequences) -> None:
    model = build("opt")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu")
    for index in range(len(blocks)):
        prune_block(stream.collect(index))
        stream.advance(index)
    outputs: list[Tensor] = []
    blocks[-1].module.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    for part, text in zip(("calibration", "validation"), stories.split(0.15), strict=True):
        for flow, batch in zip(stream._states[part], text.batches, strict=True):
            for hidden, length, ids in zip(flow.hidden, batch.lengths, batch.input_ids, strict=True):
                model(input_ids=ids[None, :length])
                torch.testing.assert_close(hidden[:length], outputs.pop(), rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(8)
@pytest.mark.bitwise
def test_wide_grams_apart_are_the_same_to_the_bit(
    model: PreTrainedModel, family: str, stories: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order, sharing and sums are those of one pass; the block runs once more where an input is wider than others."""
    monkeypatch.setattr(capture, "_APART", 0)
    blocks = decoder_blocks(model)
    runs: list[int] = []
    observe = BlockStream._observe
    monkeypatch.setattr(BlockStream, "_observe", lambda *a, **how: (runs.append(len(a)), observe(*a, **how))[1])
    found = []
    for sparing in (False, True):
        stream = BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3, sparing=sparing)
        runs.clear()
        found.append(stream.collect(0))
        if any(view.expert is not None for view in blocks[0].weights):
            return
        wider = len({view.shape[1] for view in blocks[0].weights}) > 1
        assert len(runs) == (2 if sparing and wider else 1)
    assert [shared.weights for shared in found[0]] == [shared.weights for shared in found[1]]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.statistics.gram, other.statistics.gram)
        assert torch.equal(*(torch.as_tensor(shared.statistics.validation) for shared in (one, other)))


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics_collected_while_it_advances_are_the_same_to_the_bit(
    family: str, sparing: bool, stories: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_APART", 0)
    model = build(family)
    blocks = decoder_blocks(model)
    apart, together = (
        BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3, sparing=sparing) for _ in range(2)
    )
    for index in range(len(blocks)):
        expected, outputs = apart.collect(index), {}
        apart.advance(index)
        collected = together.collect(index, outputs=outputs, advance=True)
        assert together.position == index + 1
        for one, other in zip(collected, expected, strict=True):
            assert torch.equal(one.statistics.gram, other.statistics.gram)
            assert torch.equal(one.statistics.validation, other.statistics.validation)
        assert sum(map(len, outputs.values())) == stories.tokens
        for name, hidden in apart.activations.items():
            assert torch.equal(hidden, together.activations[name])


def test_batching_changes_nothing(stories: Sequences, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    documents = tuple(tokenizer.decode(row.ids[1:]) for row in stories.rows)
    singly = pack(Corpus("x", documents), tokenizer, length=64, packing="documents", batch_size=1)
    assert singly.token_hash == stories.token_hash
    streams = [BlockStream(model, decoder_blocks(model), text, "cpu") for text in (stories, singly)]
    for together, alone in zip(*(stream.collect(0) for stream in streams), strict=True):
        near(together.statistics.gram, alone.statistics.gram)


def test_collecting_leaves_no_hook_and_changes_no_state(stories: Sequences) -> None:
    model = build("llama")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu")
    first, second = stream.collect(0), stream.collect(0)
    assert torch.equal(first[0].statistics.gram, second[0].statistics.gram)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_that_return_tuples_are_followed(stories: Sequences) -> None:
    plain, wrapped = build("llama"), build("llama")
    blocks = decoder_blocks(wrapped)
    stream = BlockStream(wrapped, blocks, stories, "cpu")
    blocks[0].module.register_forward_hook(lambda _, __, output: (output, None))
    stream.advance(0)
    near(stream.collect(1)[0].statistics.gram, gram(plain, _second_block(plain, stories), stories))


def _second_block(model: PreTrainedModel, stories: Sequences) -> SharedInput:
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu")
    stream.advance(0)
    return stream.collect(1)[0]


def test_one_sequence_has_no_validation_part(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    single = pack(Corpus("x", ("the cat",)), tokenizer, length=16)
    statistics = BlockStream(model, decoder_blocks(model), single, "cpu").collect(0)[0].statistics
    assert statistics.validation is None
    assert statistics.tokens == single.tokens


def test_blocks_are_taken_in_order(stories: Sequences) -> None:
    model = build("llama")
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu")
    with pytest.raises(ValueError, match="the turn of block 0, not 1"):
        stream.collect(1)
    stream.advance(0)
    with pytest.raises(ValueError, match="the turn of block 1, not 0"):
        stream.advance(0)


def test_training_mode_is_refused(stories: Sequences) -> None:
    model = build("llama").train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        BlockStream(model, decoder_blocks(model), stories, "cpu")


def test_activations_that_overflow_name_their_block(stories: Sequences) -> None:
    model = build("llama")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu")
    stream.advance(0)
    blocks[1].weights[-1].parameter.fill_(1e38)
    with pytest.raises(UserError, match=r"outputs of model.layers.1 are not finite"):
        stream.collect(1)
    with pytest.raises(UserError, match=r"outputs of model.layers.1 are not finite"):
        stream.advance(1)
    model.get_input_embeddings().weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"enter model.layers.0 are not finite"):
        BlockStream(model, blocks, stories, "cpu")


class Toy(nn.Module):
    """Two blocks whose way of using their weights is given."""

    def __init__(self, use: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 4)
        self.layers = nn.ModuleList(ToyBlock(use) for _ in range(2))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)
        return hidden


class ToyBlock(nn.Module):
    def __init__(self, use: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.use = use

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.use(self.parts, hidden_states)


def toy_stream(use: Callable[[nn.ModuleDict, Tensor], Tensor], stories: Sequences) -> BlockStream:
    torch.manual_seed(0)
    model = Toy(use).eval().requires_grad_(False)
    return BlockStream(model, decoder_blocks(model), stories, "cpu")


def test_inputs_changed_in_place_between_two_weights_are_not_shared(stories: Sequences) -> None:
    def use(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = x.clone()
        first = parts["a"](x)
        return first + parts["b"](x.mul_(2))

    a, b = toy_stream(use, stories).collect(0)
    near(b.statistics.gram, 4 * a.statistics.gram)


def test_what_follows_the_last_inputs_is_computed_for_the_first_batch_alone(
    stories: Sequences, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build("llama")
    texts = tuple(tokenizer.decode(row.ids[1:]) for row in stories.rows)
    singly = pack(Corpus("x", texts), tokenizer, length=64, packing="documents", batch_size=1)
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, singly, "cpu", validation_fraction=0.0)
    ends: list[int] = []
    hook = blocks[0].weights[-1].module.register_forward_hook(lambda *_: ends.append(0))
    collected = stream.collect(0)
    assert len(ends) == 1 < len(singly.rows)
    outputs: dict[str, Tensor] = {}
    whole = stream.collect(0, outputs=outputs)
    assert len(ends) == 1 + len(singly.rows)
    hook.remove()
    assert all(torch.equal(a.statistics.gram, b.statistics.gram) for a, b in zip(collected, whole, strict=True))


def test_a_weight_that_is_called_twice_is_given_both_inputs(stories: Sequences) -> None:
    def use(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["a"](2 * parts["b"](parts["a"](x)))

    collected = {shared.weights[0].name: shared for shared in toy_stream(use, stories).collect(0)}
    tokens = sum(len(row.ids) for row in stories.rows)
    assert collected["layers.0.parts.a.weight"].statistics.tokens == 2 * tokens
    assert collected["layers.0.parts.b.weight"].statistics.tokens == tokens


def test_a_weight_that_is_never_used_is_named(stories: Sequences) -> None:
    stream = toy_stream(lambda parts, x: parts["a"](x), stories)
    with pytest.raises(UserError, match=r"layers.0.parts.b.weight is never used .* stays dense with --ignore"):
        stream.collect(0)


def test_a_weight_that_sees_some_tokens_only_is_refused(stories: Sequences) -> None:
    stream = toy_stream(lambda parts, x: parts["a"](x) + parts["b"](x[:, :1]), stories)
    with pytest.raises(UserError, match=r"layers.0.parts.b.weight reads .* not one per token"):
        stream.collect(0)


def test_a_model_that_skips_a_block_is_refused(stories: Sequences) -> None:
    model = build("llama")
    blocks = decoder_blocks(model)
    model.config.num_hidden_layers = 2
    with pytest.raises(UserError, match=r"never calls model.layers.2"):
        BlockStream(model, blocks, stories, "cpu")
