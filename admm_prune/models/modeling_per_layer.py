"""Decoders whose blocks differ in their numbers of neurons and heads. This file is saved with their weights.

A standard class builds all blocks with equal widths; these then resize each block by its own config,
`config.per_layer_config[i]`: `intermediate_size` (`ffn_dim` in OPT, `n_inner` in GPT-2, `ffn_hidden_size` in Falcon),
`num_attention_heads`, `num_key_value_heads` (`num_kv_heads` in Falcon), where heads can be removed.
Written by admm-prune; needs torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    BloomForCausalLM,
    FalconForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    StableLmForCausalLM,
)
from transformers.pytorch_utils import Conv1D


class GatedBlocks:
    """For models like Llama: queries, keys, values and output in four matrices, a gated feed-forward network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            heads, key_heads = widths.num_attention_heads, widths.num_key_value_heads
            queries, values = (n * attention.head_dim for n in (heads, key_heads))
            if hasattr(attention, "num_heads"):  # StableLM shapes by them
                attention.num_heads, attention.num_key_value_heads = heads, key_heads
            resize(attention, "q_proj", rows=queries)
            resize(attention, "k_proj", rows=values)
            resize(attention, "v_proj", rows=values)
            resize(attention, "o_proj", columns=queries)
            resize(mlp, "gate_proj", rows=widths.intermediate_size)
            resize(mlp, "up_proj", rows=widths.intermediate_size)
            resize(mlp, "down_proj", columns=widths.intermediate_size)


class PerLayerLlamaForCausalLM(GatedBlocks, LlamaForCausalLM): ...


class PerLayerMistralForCausalLM(GatedBlocks, MistralForCausalLM): ...


class PerLayerQwen2ForCausalLM(GatedBlocks, Qwen2ForCausalLM): ...


class PerLayerQwen3ForCausalLM(GatedBlocks, Qwen3ForCausalLM): ...


class PerLayerOPTForCausalLM(OPTForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.decoder.layers
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            attention: Any = layer.self_attn
            attention.num_heads = widths.num_attention_heads
            heads = widths.num_attention_heads * attention.head_dim
            for name in ("q_proj", "k_proj", "v_proj"):
                resize(attention, name, rows=heads)
            resize(attention, "out_proj", columns=heads)
            resize(layer, "fc1", rows=widths.ffn_dim)
            resize(layer, "fc2", columns=widths.ffn_dim)


class PerLayerGemma2ForCausalLM(GatedBlocks, Gemma2ForCausalLM): ...


class PerLayerGemma3ForCausalLM(GatedBlocks, Gemma3ForCausalLM): ...


class PerLayerStableLmForCausalLM(GatedBlocks, StableLmForCausalLM): ...


class PerLayerOlmo2ForCausalLM(GatedBlocks, Olmo2ForCausalLM): ...


class PerLayerPhi3ForCausalLM(Phi3ForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            resize(layer.mlp, "gate_up_proj", rows=2 * widths.intermediate_size)
            resize(layer.mlp, "down_proj", columns=widths.intermediate_size)


class PerLayerGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.gpt_neox.layers
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            heads = widths.num_attention_heads * layer.attention.head_size
            resize(layer.attention, "query_key_value", rows=3 * heads)
            resize(layer.attention, "dense", columns=heads)
            fit_dense(layer.mlp, widths.intermediate_size)


class PerLayerBloomForCausalLM(BloomForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.transformer.h
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            fit_dense(layer.mlp, widths.intermediate_size)


class PerLayerFalconForCausalLM(FalconForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.transformer.h
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            fit_dense(layer.mlp, widths.ffn_hidden_size)
            attention: Any = layer.self_attention
            if attention.multi_query and not attention.new_decoder_architecture:
                continue  # all query heads share one key head, which is kept
            attention.num_heads, attention.num_kv_heads = widths.num_attention_heads, widths.num_kv_heads
            heads, keys = (n * attention.head_dim for n in (widths.num_attention_heads, widths.num_kv_heads))
            resize(attention, "query_key_value", rows=heads + 2 * keys)
            resize(attention, "dense", columns=heads)


class PerLayerGPT2LMHeadModel(GPT2LMHeadModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.transformer.h
        for layer, widths in zip(layers, config.per_layer_config, strict=True):
            resize(layer.mlp, "c_fc", rows=widths.n_inner)
            resize(layer.mlp, "c_proj", columns=widths.n_inner)


def fit_dense(mlp: Any, neurons: int) -> None:
    resize(mlp, "dense_h_to_4h", rows=neurons)
    resize(mlp, "dense_4h_to_h", columns=neurons)


def resize(module: Any, name: str, rows: int | None = None, columns: int | None = None) -> None:
    """A layer of the same kind with another number of rows or columns, without values."""
    old = getattr(module, name)
    weight = old.weight
    if isinstance(old, Conv1D):
        new: nn.Module = Conv1D(rows or old.nf, columns or old.nx).to(device=weight.device, dtype=weight.dtype)
    else:
        shape = columns or old.in_features, rows or old.out_features
        new = type(old)(*shape, old.bias is not None, weight.device, weight.dtype)
    setattr(module, name, new)
