"""Decoders whose blocks differ in their numbers of neurons and heads. This file is saved beside the weights of one.

A stock class builds every block alike; these build it, and then give each block the widths of its own config,
`config.per_layer_config[i]`: `intermediate_size` (`ffn_dim` in OPT), `num_attention_heads`, `num_key_value_heads`.
Written by admm-prune; needs torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)


class PerLayerLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        fit_gated(self.model.layers, config)


class PerLayerMistralForCausalLM(MistralForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        fit_gated(self.model.layers, config)


class PerLayerQwen2ForCausalLM(Qwen2ForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        fit_gated(self.model.layers, config)


class PerLayerQwen3ForCausalLM(Qwen3ForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        fit_gated(self.model.layers, config)


class PerLayerOPTForCausalLM(OPTForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.decoder.layers
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            attention: Any = layer.self_attn
            attention.num_heads = own.num_attention_heads
            heads = own.num_attention_heads * attention.head_dim
            for name in ("q_proj", "k_proj", "v_proj"):
                resize(attention, name, rows=heads)
            resize(attention, "out_proj", columns=heads)
            resize(layer, "fc1", rows=own.ffn_dim)
            resize(layer, "fc2", columns=own.ffn_dim)


def fit_gated(layers: Any, config: Any) -> None:
    for layer, own in zip(layers, config.per_layer_config, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        queries, values = (n * attention.head_dim for n in (own.num_attention_heads, own.num_key_value_heads))
        resize(attention, "q_proj", rows=queries)
        resize(attention, "k_proj", rows=values)
        resize(attention, "v_proj", rows=values)
        resize(attention, "o_proj", columns=queries)
        resize(mlp, "gate_proj", rows=own.intermediate_size)
        resize(mlp, "up_proj", rows=own.intermediate_size)
        resize(mlp, "down_proj", columns=own.intermediate_size)


def resize(module: Any, name: str, rows: int | None = None, columns: int | None = None) -> None:
    old = getattr(module, name)
    shape = columns or old.in_features, rows or old.out_features
    setattr(module, name, nn.Linear(*shape, old.bias is not None, old.weight.device, old.weight.dtype))
