"""Tiny random models of every family, and what the tests measure them with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from admm_prune.data.sequences import Sequences

VOCABULARY, CONTEXT = 300, 64
STORIES = (
    "the cat sat on the mat",
    "to be or not to be, that is the question",
    "a dog",
    "the dog and the cat sat on the mat and were not to be moved",
    "not a cat",
    "naïve ☃",
    "the mat",
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def llama(tied: bool, **options: object) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def qwen3() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def mistral() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, sliding_window=8, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config)


def opt(pre_norm: bool, tied: bool) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=16 if pre_norm else 12, do_layer_norm_before=pre_norm,
        tie_word_embeddings=tied, init_std=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=CONTEXT, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(tied=True),
    "llama-untied": lambda: llama(tied=False, attention_bias=True, mlp_bias=True),
    "llama-eager": lambda: llama(tied=True, attn_implementation="eager"),
    "qwen3": qwen3,
    "mistral": mistral,
    "opt": lambda: opt(pre_norm=True, tied=True),
    "opt-post-norm-untied": lambda: opt(pre_norm=False, tied=False),
    "gpt2": gpt2,
}


def build(family: str) -> PreTrainedModel:
    """In evaluation mode, without gradients; biases and norms are random too."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def one_by_one(sequences: Sequences) -> list[Tensor]:
    """Every sequence as a batch of its own (1, n), without padding."""
    return [row.ids[None] for row in sequences.rows]


def prune_half(weight: Tensor) -> Tensor:
    """The smaller half of the entries set to zero."""
    return weight.where(weight.abs() >= weight.abs().median(), 0.0)


def inputs_of(model: nn.Module, module: nn.Module, ids: list[Tensor]) -> Tensor:
    """What enters `module` in the full model's own forward, all tokens of all sequences: (tokens, in)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in ids:
            model(input_ids=row)
    handle.remove()
    return torch.cat(seen)
