"""What differs between architecture families by name: attributes of their configs and modules, and per-layer classes.

Everything else about a model is found from its structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from admm_prune.errors import UserError

LONGEST_DEFAULT = 2048  # with the full context of current models (131072 tokens) one batch would fill the memory

# Attributes of a config; each family has one of them.
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")
NEURONS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
ACTIVATION = ("hidden_act", "activation_function")

# Names of activations in configs, by those of `ops.activations`; any other is taken for "gelu-tanh".
ACTIVATION_NAMES: Mapping[str, str] = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}

# Attributes of modules: the size of a head (a module that has one is an attention), and numbers of heads or neurons
# that are read in the forward pass.
HEAD_SIZE = ("head_dim", "head_size")
GROUP_COUNTS = (
    "num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "intermediate_size", "ffn_dim",
)  # fmt: skip

# Attentions that keep queries, keys and values in one matrix, key head after key head with all that belongs to it:
# shapes alone cannot tell this from all queries before all keys.
GROUPED_BY_KEY_HEAD = ("GPTNeoXAttention", "FalconAttention")


def sequence_length(config: Any, length: int | None = None) -> int:
    """The tokens of a sequence: `length`, by default the model's context, at most 2048.

    Args:
        config: of a model of transformers.

    Raises:
        UserError: `length` is beyond the model's context.
    """
    text = config.get_text_config()
    if length is None:
        contexts: list[int] = [getattr(text, name) for name in CONTEXT if getattr(text, name, None)]
        return min([LONGEST_DEFAULT, *contexts])
    context = getattr(text, CONTEXT[0], None)
    if context is not None and length > context:
        raise UserError(f"length {length} is beyond the model's context of {context} tokens")
    return length


def per_layer_class(name: str) -> Any:
    """The class of `modeling_per_layer` of this name, or for the standard class of this name; None without one."""
    from admm_prune.models import modeling_per_layer

    return getattr(modeling_per_layer, f"PerLayer{name.removeprefix('PerLayer')}", None)
