"""Tiny random models of every family, and what the tests measure them with."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from admm_prune.data.sequences import Sequences
from admm_prune.models.structure import WeightView

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
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
}  # fmt: skip
OPT = {
    "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "init_std": 0.3,
    "pad_token_id": 1,
}  # fmt: skip
FALCON = {
    "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}  # fmt: skip
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}

Family = tuple[str, dict[str, object]]  # the name of its classes, and the config's options

FAMILIES: dict[str, Family] = {
    "llama": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-eager": ("Llama", LLAMA | {"tie_word_embeddings": True, "attn_implementation": "eager"}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window_pattern": 2}),
    "phi3": ("Phi3", LLAMA | {"pad_token_id": 0}),
    "stablelm": ("StableLm", LLAMA | {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", LLAMA | {"use_parallel_residual": True, "qk_layernorm": True}),
    "olmo2": ("Olmo2", LLAMA),
    "opt": ("OPT", OPT | {"tie_word_embeddings": True}),
    "opt-post-norm-untied": (
        "OPT",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2", {"n_embd": 16, "n_head": 4, "n_inner": 24, "n_positions": CONTEXT, "initializer_range": 0.3}),
    "neox": ("GPTNeoX", LLAMA),
    "neox-sequential": ("GPTNeoX", LLAMA | {"use_parallel_residual": False}),
    "bloom": ("Bloom", {"hidden_size": 16, "n_head": 4, "initializer_range": 0.3}),
    "falcon": ("Falcon", FALCON | {"multi_query": True}),
    "falcon-grouped": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-classic": ("Falcon", FALCON | {"multi_query": False, "bias": True}),
    "falcon-alibi": ("Falcon", FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4, **EXPERTS}),
    "qwen3-moe": ("Qwen3Moe", LLAMA | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **EXPERTS}),
}

BIASED = {"attention_bias": True}
VARIANTS: dict[str, Family] = {  # of families, and families that no table names, by what their attention is like
    "llama one key head": ("Llama", LLAMA | {"num_key_value_heads": 1}),
    "llama a key for every head, biases": ("Llama", LLAMA | BIASED | {"num_key_value_heads": 4, "mlp_bias": True}),
    "llama heads wider than the model": ("Llama", LLAMA | {"head_dim": 8}),
    "mistral one key head, window": ("Mistral", LLAMA | {"num_key_value_heads": 1, "sliding_window": 4, "head_dim": 8}),
    "qwen2 window in the upper blocks": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 biases": ("Qwen3", LLAMA | BIASED | {"head_dim": 8}),
    "gemma2 one key head": ("Gemma2", GEMMA | {"num_key_value_heads": 1}),
    "gemma3 biases": ("Gemma3", GEMMA | BIASED),
    "phi3 window, part of a head turned": (
        "Phi3",
        LLAMA | {"pad_token_id": 0, "sliding_window": 4, "partial_rotary_factor": 0.5},
    ),
    "stablelm parallel": ("StableLm", LLAMA | {"use_parallel_residual": True}),
    "stablelm no biases, tied": ("StableLm", LLAMA | {"use_qkv_bias": False, "tie_word_embeddings": True}),
    "olmo2 biases": ("Olmo2", LLAMA | BIASED),
    "opt no biases, plain norms": ("OPT", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "neox no biases, tied": ("GPTNeoX", LLAMA | {"attention_bias": False, "tie_word_embeddings": True}),
    "gpt2 scaled by layer": (
        "GPT2",
        {"n_embd": 16, "n_head": 4, "n_positions": CONTEXT, "scale_attn_by_inverse_layer_idx": True},
    ),
    "falcon classic, sequential": ("Falcon", FALCON | {"multi_query": False, "parallel_attn": False}),
    "falcon classic, parallel, no biases": ("Falcon", FALCON | {"multi_query": False}),
    "falcon one key head, sequential, biases": (
        "Falcon",
        FALCON | {"multi_query": True, "parallel_attn": False, "bias": True},
    ),
    "falcon grouped, biases, one norm": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon grouped, a key for every head": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4, "tie_word_embeddings": False},
    ),
    "falcon grouped, one key head": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "cohere parallel": ("Cohere", LLAMA | BIASED | {"pad_token_id": 0}),
    "cohere2 parallel, window": ("Cohere2", LLAMA | {"pad_token_id": 0, "sliding_window": 4}),
    "phi parallel, biases": ("Phi", LLAMA),
    "gptj parallel": ("GPTJ", {"n_embd": 16, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 2}),
    "codegen parallel": ("CodeGen", {"n_embd": 16, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 2}),
    "starcoder2 biases": ("Starcoder2", LLAMA | {"use_bias": True}),
    "granite": ("Granite", LLAMA),
    "glm gate and up in one": ("Glm", LLAMA | {"head_dim": 4, "pad_token_id": 0}),
    "xglm": (
        "XGLM",
        {"d_model": 16, "ffn_dim": 24, "attention_heads": 4, "max_position_embeddings": CONTEXT, "init_std": 0.3},
    ),
    "bigcode one key head": ("GPTBigCode", {"n_embd": 16, "n_head": 4, "n_positions": CONTEXT}),
    "diffllama": ("DiffLlama", LLAMA),
    "bitnet": ("BitNet", LLAMA),
}


def family_model(family: str, layers: int) -> PreTrainedModel:
    """A random instance, as its class initializes it."""
    name, options = FAMILIES.get(family) or VARIANTS[family]
    text = "Text" if hasattr(transformers, f"{name}TextConfig") else ""
    config = getattr(transformers, f"{name}{text}Config")(
        vocab_size=VOCABULARY, num_hidden_layers=layers, bos_token_id=0, eos_token_id=0, **options
    )
    head = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "LMHeadModel"
    model: PreTrainedModel = getattr(transformers, f"{name}{head}")(config)
    return model


def shared_keys() -> PreTrainedModel:
    """Blocks of which the last two read keys and values of earlier ones, from a mapping that all are called with."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **LLAMA, head_dim=8, global_head_dim=8, sliding_window=8, vocab_size=VOCABULARY, num_hidden_layers=4,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config).eval()


def is_mixture(family: str) -> bool:
    """Whether its blocks have experts."""
    return "num_experts_per_tok" in FAMILIES[family][1]


def build(family: str, layers: int = 3) -> PreTrainedModel:
    """In evaluation mode, without gradients; biases and norms are random too."""
    torch.manual_seed(0)
    model = family_model(family, layers).eval().requires_grad_(False)
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


def expert_inputs(model: nn.Module, view: WeightView, ids: list[Tensor], everything: bool) -> Tensor:
    """What enters a matrix of an expert: the tokens that its router chose it for, or all; by the formula."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, choice, _ = args
        x = hidden if everything else hidden[(choice == view.expert).any(1)]
        if view.attribute == "down_proj":
            gate, up = (x @ module.get_parameter("gate_up_proj")[view.expert].T).chunk(2, dim=-1)
            x = nn.functional.silu(gate) * up
        seen.append(x)

    with view.module.register_forward_pre_hook(hook), torch.no_grad():
        for row in ids:
            model(input_ids=row)
    return torch.cat(seen)
