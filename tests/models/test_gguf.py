"""GGUF files: read as the model they were written from, pruned, and saved as an ordinary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import admm_prune
from admm_prune.errors import UserError
from admm_prune.models.gguf_file import dequantized
from admm_prune.models.loading import load

IDS = torch.tensor([[1, 7, 80, 200, 3, 41]])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries or keys in the order of GGUF, whose rotary embeddings turn neighbouring channels."""
    width = weight.shape[1]
    return weight.reshape(heads, 2, len(weight) // heads // 2, width).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model_folder)


def write(path: Path, model_folder: Path, more: Callable[[gguf.GGUFWriter], None] = lambda _: None) -> Path:
    """The tiny Llama of `model_folder` as a GGUF file in float32, with what `more` adds."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if n == 0 else 1 for n in range(len(tokens))])  # 3: a control token
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            part = rest.removesuffix(".weight")
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                value = interleaved(value, heads)
            writer.add_tensor(f"blk.{number}.{names[part]}.weight", np.ascontiguousarray(value))
        elif name != "lm_head.weight":
            key = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
            writer.add_tensor(key, value)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_the_model_that_was_written(gguf_file: Path, model_folder: Path, tmp_path: Path) -> None:
    loaded, original = load(str(gguf_file)), load(str(model_folder))
    assert torch.allclose(loaded.model(IDS).logits, original.model(IDS).logits, atol=1e-5)
    text = "the cat sat on a mat"
    assert loaded.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert load(str(gguf_file), dtype="bfloat16").model.dtype == torch.bfloat16
    upper = tmp_path / "TINY.GGUF"
    upper.symlink_to(gguf_file)
    assert torch.equal(load(str(upper)).model(IDS).logits, loaded.model(IDS).logits)


def test_it_is_pruned_and_saved_as_an_ordinary_folder(gguf_file: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    report = admm_prune.prune(
        model=str(gguf_file), method="wanda", sparsity=0.5, data=str(text_file), samples=4, eval_samples=2, out=out
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert getattr(stock.config, "quantization_config", None) is None
    assert torch.equal(stock(IDS).logits, report.model(IDS).logits)


@pytest.mark.parametrize(
    ("size", "message"), [(0, "not a GGUF file"), (3000, "cannot be loaded"), (-64, "cannot be loaded")]
)
def test_a_file_that_is_none_or_cut_short(gguf_file: Path, tmp_path: Path, size: int, message: str) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"cut\.gguf: {message}"):
        load(str(cut))


def test_it_is_not_streamed(gguf_file: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot stream: a GGUF file is dequantized as a whole"):
        admm_prune.prune(model=str(gguf_file), sparsity=0.5, data=str(text_file), stream=True, out=tmp_path / "out")


def test_without_its_package_it_says_what_to_install(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admm_prune.models.gguf_file.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'admm-prune\[gguf\]'"):
        load(str(gguf_file))


def tensor(name: str, *values: float) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.array(values, dtype=np.float32))


def scaled(kind: str, factor: float) -> Callable[[gguf.GGUFWriter], None]:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", factor)

    return more


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (tensor("blk.1.attn_q.bias", *range(32)), r"no place for blk\.1\.attn_q\.bias \(1 such in all\)"),
        (tensor("rope_freqs.weight", 1, 1, 8, 8), r"its positions are scaled \(rope_freqs\.weight\)"),  # Llama 3.1
        (scaled("yarn", 4.0), r"its positions are scaled \(rope\.scaling\.type yarn\)"),
    ],
)
def test_what_transformers_leaves_out_of_a_model_is_refused(
    model_folder: Path, tmp_path: Path, more: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    """Figures of what is left would be of another model."""
    with pytest.raises(UserError, match=message):
        load(str(write(tmp_path / "more.gguf", model_folder, more)))


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        (
            tensor("v.patch_embd.bias", 1, 2),
            ("1 tensors of the file are not used by the model, nor saved, such as v.patch_embd.bias",),
        ),
        (tensor("rope_freqs.weight", 1, 1, 1, 1), ()),
        (scaled("linear", 1.0), ()),
        (scaled("none", 4.0), ()),
    ],
)
def test_what_makes_no_difference_is_at_most_noted(
    model_folder: Path, tmp_path: Path, more: Callable[[gguf.GGUFWriter], None], notes: tuple[str, ...]
) -> None:
    loaded = load(str(write(tmp_path / "more.gguf", model_folder, more)))
    assert loaded.notes == notes
    assert torch.allclose(loaded.model(IDS).logits, load(str(model_folder)).model(IDS).logits, atol=1e-5)


def test_its_weights_are_dequantized_whatever_kernels_there_are(gguf_file: Path) -> None:
    """With a kernel for packed weights, transformers would leave them packed in layers that are not linear."""
    asked: list[dict[str, Any]] = []
    loads = AutoModelForCausalLM.from_pretrained

    def spied(*place: Any, **how: Any) -> Any:
        asked.append(how)
        return loads(*place, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", spied)
        model, _ = dequantized(gguf_file, None)
    if hasattr(transformers, "GgufConfig"):  # releases that have kernels for packed weights
        assert asked[0]["quantization_config"].dequantize
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None
