"""Tensors of a checkpoint that the model of its config has no place for: refused, passed over, or said in a note."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, PreTrainedModel

from admm_prune.models.loading import load, open_on_disk
from admm_prune.plan.anatomy import Anatomy
from admm_prune.runs.evaluate import evaluate_model
from admm_prune.settings import TextSettings
from tests.models.conftest import Make, Tensors
from tests.models.test_checkpoints import FP8, in_blocks_of_8_bits, llama, one_refusal, run_both_ways
from tests.models.tiny_models import CONTEXT, VOCABULARY


def notes(folder: Path) -> tuple[str, ...]:
    """What every way of opening a model says of it."""
    said = {load(str(folder)).notes, open_on_disk(str(folder)).notes, Anatomy.of(str(folder)).notes}
    assert len(said) == 1, said
    return said.pop()


def test_biases_that_the_config_denies_are_refused(saved: Make) -> None:
    """`from_pretrained` would drop them, and every figure would be of another model."""
    message = one_refusal(saved(llama(attention_bias=True), attention_bias=False))
    assert "the weights hold model.layers.0.self_attn.k_proj.bias, for which the model" in message
    assert "(8 such in all)" in message


def test_they_are_refused_under_names_without_the_prefix_too(saved: Make) -> None:
    def bare(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    message = one_refusal(saved(llama(attention_bias=True, tie_word_embeddings=True), bare, attention_bias=False))
    assert "the weights hold layers.0.self_attn.k_proj.bias" in message


def test_weights_outside_of_the_blocks_are_said_in_report_and_card(saved: Make, text_file: Path) -> None:
    extra = {"lm_head.bias": torch.randn(VOCABULARY), "visual.layers.0.weight": torch.randn(4, 4)}
    folder = saved(llama(), lambda tensors: tensors | extra)
    (note,) = notes(folder)
    assert note == "2 tensors of the checkpoint are not used by the model, nor saved, such as lm_head.bias"
    report, files = run_both_ways(folder, text_file)
    assert note in report.notes
    assert not extra.keys() & files.keys()
    for out in (folder.parent / "out-False", folder.parent / "out-True"):
        assert note in json.loads((out / "admm_prune.json").read_text())["notes"]
        assert f"\n- {note}\n" in (out / "README.md").read_text()


def test_weights_without_a_place_are_said_where_a_model_is_evaluated(
    saved: Make, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(llama(), lambda tensors: tensors | {"lm_head.bias": torch.randn(VOCABULARY)})
    with caplog.at_level(logging.WARNING, "admm_prune"):
        found = evaluate_model(str(folder), TextSettings(data=str(text_file), length=32, eval_samples=2), device="cpu")
    (note,) = found.notes
    assert "such as lm_head.bias" in note
    assert found.as_json()["notes"] == [note]
    assert f"note: {note}" in caplog.text


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()


def gpt_neo() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT, "window_size": 8}
    attention = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCABULARY, attention_types=attention, **sizes)).eval()


MASK = torch.ones(1, 1, CONTEXT, CONTEXT)


@pytest.mark.parametrize(
    ("model", "extra", "said"),
    [
        (llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, False),
        (gpt2, {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.bias": MASK.clone()}, False),
        (gpt_neo, {"transformer.h.0.attn.attention.bias": MASK.byte()}, False),
        (gpt_neo, {"transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)}, True),
        (llama, {"model.layers.0.self_attn.causal_mask": MASK.bool()}, True),
    ],
    ids=["frequencies", "declared by the class", "a buffer", "masked_bias", "a mask"],
)
def test_what_older_releases_saved_beside_the_weights_is_no_fault(
    saved: Make, model: type[PreTrainedModel], extra: Tensors, said: bool
) -> None:
    assert bool(notes(saved(model(), lambda tensors: tensors | extra))) is said


def test_scales_of_activations_beside_quantized_weights_are_passed_over(saved: Make) -> None:
    scales = {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    folder = saved(llama().bfloat16(), lambda t: in_blocks_of_8_bits(t) | scales, quantization_config=FP8)
    assert notes(folder) == ()
    model, config = llama(attention_bias=True).bfloat16(), {"quantization_config": FP8, "attention_bias": False}
    assert "k_proj.bias" in one_refusal(saved(model, in_blocks_of_8_bits_and_biases, **config))


def in_blocks_of_8_bits_and_biases(tensors: Tensors) -> Tensors:
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    return in_blocks_of_8_bits({name: t for name, t in tensors.items() if name not in biases}) | biases
