"""Checkpoints that differ from what `save_pretrained` writes: the same model in memory and streamed, or one refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

import admm_prune
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.checkpoint import Checkpoint, weight_bytes
from admm_prune.models.checks import check_causal
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import LoadedModel, load, open_on_disk
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.plan import make_plan
from tests.models.conftest import Make, Tensors
from tests.models.tiny_models import CONTEXT, LLAMA, VOCABULARY, build, shared_keys

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WAYS: tuple[Callable[[str], object], ...] = (load, open_on_disk, Anatomy.of)  # run and eval, run --stream, plan
DEEPSEEK = LLAMA | {
    "moe_intermediate_size": 8, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "vocab_size": VOCABULARY,
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL | {"initializer_range": 0.3, "max_position_embeddings": CONTEXT} | options))
    return LlamaForCausalLM(config).eval()


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def run_both_ways(folder: Path, text: Path) -> tuple[Any, Tensors]:
    """What a run reports and saves: the same figures and the same tensors under the same names either way."""
    reports, files = [], []
    for stream in (False, True):
        out = folder.parent / f"out-{stream}"
        how: dict[str, Any] = {"data": str(text), "samples": 4, "eval_samples": 2, "length": 32, "device": "cpu"}
        reports.append(admm_prune.prune(folder, method="magnitude", sparsity=0.3, stream=stream, out=out, **how))
        files.append(tensors_of(out))
    whole, streamed = reports
    assert (whole.dense, whole.pruned) == (streamed.dense, streamed.pruned)
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert tensor.dtype == files[1][name].dtype, name
        assert torch.equal(tensor, files[1][name]), name
    return whole, files[0]


def one_refusal(folder: Path) -> str:
    """The line that every way of opening a model ends in."""
    messages = []
    for way in WAYS:
        with pytest.raises(UserError) as caught:
            way(str(folder))
        messages.append(str(caught.value))
    assert len(set(messages)) == 1, messages
    assert "\n" not in messages[0]
    assert messages[0].startswith(str(folder))
    return messages[0]


def test_a_head_of_its_own_beside_a_config_that_ties_is_kept(saved: Make, text_file: Path) -> None:
    head = 0.3 * torch.randn(VOCABULARY, 16)
    folder = saved(llama(tie_word_embeddings=True), lambda t: t | {HEAD: head})
    _, files = run_both_ways(folder, text_file)
    assert torch.equal(files[HEAD], head)
    assert not torch.equal(files[HEAD], files[EMBEDDING])
    stock = AutoModelForCausalLM.from_pretrained(folder.parent / "out-True")
    assert torch.equal(stock.lm_head.weight, head)


def test_where_the_config_names_no_dtype_it_is_that_of_the_first_file(tmp_path: Path) -> None:
    """As `from_pretrained` does: the head is the first by name, and in the last shard."""
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    shards = sorted(tmp_path.glob("*.safetensors"))
    holding = next(path for path in shards if HEAD in load_file(path))
    assert holding != shards[0]
    for path in shards:
        if path != holding:
            save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, {"format": "pt"})
    assert Checkpoint(tmp_path, torch.device("cpu")).dtype() == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", use_safetensors=True)
    assert stock.dtype == torch.bfloat16


@pytest.mark.parametrize("held", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_a_tied_parameter_is_found_under_any_of_its_names(
    saved: Make, stories: Sequences, held: tuple[str, ...]
) -> None:
    def only(tensors: Tensors) -> Tensors:
        shared = tensors.pop(EMBEDDING)
        return tensors | {name: shared.clone() for name in held}

    folder = saved(llama(tie_word_embeddings=True), only)
    whole, streamed = load(str(folder)), open_on_disk(str(folder))
    assert whole.model.lm_head.weight is whole.model.model.embed_tokens.weight
    assert evaluate(whole.model, stories) == evaluate(streamed.model, stories, streamed.offloading)
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight


def test_a_head_that_is_neither_stored_nor_tied(saved: Make) -> None:
    folder = saved(llama(tie_word_embeddings=True), tie_word_embeddings=False)
    assert one_refusal(folder).endswith(f": incomplete: the weights lack {HEAD} (1 missing in all)")


def test_a_head_of_another_shape(saved: Make) -> None:
    folder = saved(llama(tie_word_embeddings=True), lambda t: t | {HEAD: torch.randn(VOCABULARY + 4, 16)})
    assert f"the weight {HEAD} has shape (304, 16), config.json asks for (300, 16)" in one_refusal(folder)


def test_names_without_the_prefix_of_the_class(saved: Make, text_file: Path) -> None:
    """Checkpoints of the model without its head, such as those of embedding models, beside a head that is tied."""
    folder = saved(
        llama(tie_word_embeddings=True), lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()}
    )
    run_both_ways(folder, text_file)


def two_stacks(**options: Any) -> HrmTextForCausalLM:
    """Two stacks of two layers, called in turns; queries, keys and values are stored as one matrix."""
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_layers_per_stack=2,
        num_attention_heads=2, head_dim=8, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, **options,
    )  # fmt: skip
    return HrmTextForCausalLM(config).eval()


def test_parts_of_one_stored_tensor_outside_of_the_blocks(saved: Make, text_file: Path) -> None:
    folder = saved(two_stacks(H_cycles=1, L_cycles=1, L_bp_cycles=[1]))
    _, files = run_both_ways(folder, text_file)
    assert sum(".H_module." in name and "gqkv_proj" in name for name in files) == 2


def test_blocks_that_are_called_several_times_are_refused(saved: Make) -> None:
    folder = saved(two_stacks(H_cycles=2, L_cycles=3, L_bp_cycles=[3]))
    message = one_refusal(folder)
    assert "HrmTextForCausalLM calls model.L_module.layers.0 6 times in a forward pass" in message


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(saved: Make) -> None:
    """Here the tokens that a block's indexer chose, which the next block attends to."""
    torch.manual_seed(0)
    options = DEEPSEEK | {"num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2}
    config = GlmMoeDsaConfig(
        **options, index_topk=6, index_head_dim=8, index_n_heads=2, indexer_types=["full", "shared"]
    )
    model = GlmMoeDsaForCausalLM(config).eval()
    for parameter in model.parameters():  # its class leaves some uninitialized
        nn.init.normal_(parameter, std=0.1)
    message = one_refusal(saved(model))
    assert "GlmMoeDsaForCausalLM calls blocks with what model.layers.0 computes beside the hidden states" in message


def test_hidden_states_that_change_between_blocks_are_refused() -> None:
    torch.manual_seed(0)
    model = XLMWithLMHeadModel(XLMConfig(vocab_size=VOCABULARY, emb_dim=16, n_layers=2, n_heads=4, causal=True)).eval()
    with pytest.raises(UserError, match=r"^XLM: XLM\w+ changes the hidden states between \S+\.0 and \S+\.1: such"):
        check_causal("XLM", model)


def test_blocks_that_write_to_a_mapping_in_common_are_replayed(saved: Make, text_file: Path) -> None:
    run_both_ways(saved(shared_keys()), text_file)


def test_shapes_are_checked_under_other_names_too(saved: Make) -> None:
    def wide(tensors: Tensors) -> Tensors:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return tensors | {"layers.1.mlp.up_proj.weight": torch.randn(40, 16)}

    message = one_refusal(saved(llama(), wide))
    assert "the weight layers.1.mlp.up_proj.weight has shape (40, 16), config.json asks for (24, 16)" in message


def extra_layer(number: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: (
        tensors
        | {
            f"model.layers.{number}.eh_proj.weight": torch.randn(16, 32),
            f"model.layers.{number}.mlp.experts.0.gate_proj.weight": torch.randn(8, 16),
        }
    )


def test_blocks_that_the_class_does_not_load_are_passed_over(saved: Make, stories: Sequences) -> None:
    """The prediction layer of DeepSeek-V3, number 61, which its class names in what it ignores."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK | {"num_hidden_layers": 2}))).eval()
    folder = saved(model, extra_layer(61))
    whole, streamed = load(str(folder)), open_on_disk(str(folder))
    assert len(Anatomy.of(str(folder)).blocks) == 2
    assert evaluate(whole.model, stories) == evaluate(streamed.model, stories, streamed.offloading)


def test_other_blocks_beyond_the_config_are_refused(saved: Make) -> None:
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK | {"num_hidden_layers": 2}))).eval()
    message = one_refusal(saved(model, extra_layer(2)))
    assert "the weights hold model.layers.2." in message
    assert message.endswith("but config.json asks for 2 blocks only")


def test_buffers_and_parameters_kept_in_float32_are_saved(saved: Make, text_file: Path) -> None:
    """The bias of DeepSeek-V3's router is a buffer that training sets; its class keeps it in float32."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK | {"num_hidden_layers": 2}))).eval().bfloat16()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.randn(4)
    _, files = run_both_ways(saved(model, lambda t: t | {name: bias}), text_file)
    assert torch.equal(files[name], bias)
    assert files[name].dtype == torch.float32


def in_blocks_of_8_bits(tensors: Tensors) -> Tensors:
    """Matrices of blocks as DeepSeek stores them: FP8, with a scale for every 8 x 8 entries."""
    stored: Tensors = {}
    for name, weight in tensors.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        rows, columns = weight.shape
        tiles = weight.float().reshape(rows // 8, 8, columns // 8, 8)
        scale = tiles.abs().amax((1, 3)) / 448
        stored[name] = (tiles / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    return stored


FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic", "fmt": "e4m3"}


def test_fp8_is_dequantized(saved: Make, text_file: Path) -> None:
    model = llama().bfloat16()
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    folder = saved(model, in_blocks_of_8_bits, quantization_config=FP8)
    report, files = run_both_ways(folder, text_file)
    assert files.keys() == {*before, HEAD} - {None}
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    for stream in (False, True):
        assert "quantization_config" not in json.loads((folder.parent / f"out-{stream}" / "config.json").read_text())
    kept = files["model.layers.1.mlp.up_proj.weight"].float()
    dense = before["model.layers.1.mlp.up_proj.weight"]
    torch.testing.assert_close(kept, dense.where(kept != 0, 0.0), rtol=0.07, atol=1e-3)
    assert Anatomy.of(str(folder)).weight_bytes == 2 * sum(p.numel() for p in before.values())
    assert report.sparsity == pytest.approx(0.3, abs=0.01)


def test_fp8_without_a_word_in_the_config_is_refused(saved: Make) -> None:
    message = one_refusal(saved(llama().bfloat16(), in_blocks_of_8_bits))
    assert "is stored quantized (F8_E4M3), not as floats" in message


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "format": "float-quantized"},
            "compressed-tensors",
        ),
        ({"quant_method": "higgs"}, "higgs"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "nonesuch"}, "nonesuch"),
        ({"load_in_4bit": True}, "unknown method"),
    ],
)
def test_other_quantization_is_refused_by_its_name(saved: Make, settings: dict[str, Any], method: str) -> None:
    message = one_refusal(saved(llama(), quantization_config=settings))
    assert f"its weights are quantized ({method})" in message
    assert "dequantize them and save the result" in message
    # A package to install would not help: the weights would stay quantized.
    assert method == "compressed-tensors" or "pip install" not in message
    assert method in ("compressed-tensors", "nonesuch", "unknown method") or "only floats can be pruned" in message


def test_the_size_on_disk_is_that_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    """Mistral publishes `consolidated.safetensors` beside the shards: the same weights once more."""
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for name in ("whole", "shards"):
        shards = list((tmp_path / name).glob("*.safetensors"))
        assert len(shards) == 1 if name == "whole" else len(shards) > 2
        size = sum(path.stat().st_size for path in shards)
        (tmp_path / name / "consolidated.safetensors").write_bytes(bytes(size))
        assert weight_bytes(tmp_path / name) == size
    assert weight_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertLMHeadModel(BertConfig(**SMALL)),
        lambda: RobertaForCausalLM(RobertaConfig(**SMALL)),
        lambda: BertLMHeadModel(BertConfig(**SMALL)).bfloat16(),
        lambda: llama(is_causal=False),
    ],
    ids=["bert", "roberta", "bert in bfloat16", "llama that looks both ways"],
)
def test_models_that_see_later_tokens_are_refused(saved: Make, model: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    message = one_refusal(saved(model().eval()))
    assert "is no causal language model: in " in message
    assert "tokens see later ones" in message


def test_the_same_class_as_a_decoder_is_pruned(saved: Make, text_file: Path) -> None:
    torch.manual_seed(0)
    folder = saved(BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval())
    run_both_ways(folder, text_file)
    assert Anatomy.of(str(folder)).blocks


def test_a_mixture_in_half_precision_is_causal(saved: Make) -> None:
    """Other tokens change how many rows an expert multiplies at once, and so how its sums are rounded."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4))
    folder = saved(model.eval().bfloat16())
    for way in WAYS:
        way(str(folder))


def test_cross_attention_without_an_encoder_is_refused(saved: Make) -> None:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24}
    model = BartForCausalLM(BartConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)).eval()
    message = one_refusal(saved(model))
    assert "encoder_attn.k_proj.weight is never used by BartForCausalLM on text alone: it cannot be pruned" in message


@pytest.mark.parametrize("tied", [True, False])
def test_a_tokenizer_with_more_ids_than_embeddings(saved: Make, text_file: Path, tied: bool) -> None:
    folder = saved(llama(vocab_size=200, tie_word_embeddings=tied))
    messages = set()
    for way in (load, open_on_disk, lambda source: make_plan(source, sparsity=0.5)):
        with pytest.raises(UserError) as caught:
            way(str(folder))
        messages.add(str(caught.value))
    with pytest.raises(UserError) as caught:
        make_plan(str(folder), sparsity=0.5, data=str(text_file))
    messages.add(str(caught.value))
    (message,) = messages
    assert "its tokenizer has 300 token ids, but the model has embeddings for 200" in message


def test_a_padding_token_beyond_the_embeddings_is_no_fault(
    saved: Make, text_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As in public Llama checkpoints: it never stands in a text."""
    folder = saved(llama())
    padded = PreTrainedTokenizerFast.from_pretrained(folder)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(folder)
    assert len(padded) == VOCABULARY + 1
    run_both_ways(folder, text_file)


def test_ids_beyond_the_embeddings_in_a_text(saved: Make, text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = saved(llama())
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_tokens(["the cat"])
    larger.save_pretrained(folder)
    for stream in (False, True):
        with pytest.raises(UserError, match="its tokenizer has 301 token ids, but the model has embeddings for 300"):
            admm_prune.prune(
                folder, method="magnitude", sparsity=0.3, data=str(text_file), stream=stream, length=32,
                out=folder.parent / "out", device="cpu",
            )  # fmt: skip
    with pytest.raises(UserError, match="its tokenizer has 301 token ids, but the model has embeddings for 300"):
        make_plan(str(folder), sparsity=0.5, data=str(text_file))


def given(model: object, tokenizer: object, text: Path) -> Any:
    module: Any = model
    how: dict[str, Any] = {"data": str(text), "samples": 4, "eval_samples": 2, "length": 32}
    return admm_prune.prune(module, tokenizer=tokenizer, method="magnitude", sparsity=0.5, **how)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_what_wraps_a_module_is_taken_off(
    wrap: Callable[[nn.Module], Any], tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    model = build("llama", layers=2)
    report = given(wrap(model), tokenizer, text_file)
    assert report.model is model
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def offloaded(folder: Path) -> PreTrainedModel:
    model = build("llama", layers=2)
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu",
                            "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=str(folder / "offload"),
    )  # fmt: skip
    return model.eval()


def on_meta(_: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def with_weight(weight: Tensor) -> Callable[[Path], PreTrainedModel]:
    def build_it(_: Path) -> PreTrainedModel:
        model = llama()
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
        return model

    return build_it


class Packed(Tensor):
    """As the tensors of torchao, which have the dtype of the numbers that they stand for."""


def partly_in_training(_: Path) -> PreTrainedModel:
    model = llama()
    model.model.train()
    model.training = False
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (offloaded, r"is not in memory but offloaded or on the meta device: .*stream=True"),
        (on_meta, r"is not in memory but offloaded or on the meta device: .*stream=True"),
        (
            with_weight(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)),
            r"up_proj.weight is quantized or .*\(torch.float8_e4m3fn\).*: load the model without quantization",
        ),
        (with_weight(torch.zeros(4, 4, dtype=torch.uint8)), r"up_proj.weight is quantized or .*\(torch.uint8\)"),
        (with_weight(torch.zeros(4, 4).as_subclass(Packed)), r"up_proj.weight is quantized or .*\(Packed\)"),
        (partly_in_training, r"in training mode.*call model.eval\(\)"),
        (lambda _: LlamaModel(LlamaConfig(**SMALL)).eval(), "gives no logits for the next token.*AutoModelForCausalLM"),
        (
            lambda _: LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0)).eval(),
            "gives no logits for the next token",
        ),
        (lambda _: LlamaForTokenClassification(LlamaConfig(**SMALL)).eval(), "gives no logits for the next token"),
        (lambda _: BertLMHeadModel(BertConfig(**SMALL)).eval(), "is no causal language model"),
        (lambda _: nn.Linear(4, 4).eval(), "Linear is not a model of transformers"),
        (lambda _: llama(vocab_size=200), "has 300 token ids, but the model has embeddings for 200"),
    ],
    ids=[
        "offloaded",
        "meta",
        "float8",
        "integers",
        "subclass",
        "training",
        "no head",
        "classifies text",
        "classifies tokens",
        "encoder",
        "layer",
        "ids",
    ],
)
def test_modules_that_cannot_be_pruned_in_place(
    model: Callable[[Path], nn.Module],
    reason: str,
    tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        given(model(tmp_path), tokenizer, text_file)
    assert "\n" not in str(caught.value)


def shards(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return content


@pytest.fixture
def sharded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    llama().save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_an_index_that_names_a_shard_that_is_not_there(sharded: Path) -> None:
    gone = sorted(set(shards(sharded)["weight_map"].values()))[1]
    (sharded / gone).unlink()
    assert gone in one_refusal(sharded)


def test_a_shard_that_no_index_names_is_not_read(sharded: Path, stories: Sequences) -> None:
    expected = evaluate(load(str(sharded)).model, stories)
    save_file({"model.layers.7.mlp.up_proj.weight": torch.randn(24, 16)}, sharded / "model-old.safetensors")
    streamed: LoadedModel = open_on_disk(str(sharded))
    assert evaluate(load(str(sharded)).model, stories) == expected
    assert evaluate(streamed.model, stories, streamed.offloading) == expected


def test_weights_as_pickles_alone(saved: Make) -> None:
    folder = saved(llama())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for opens in (load, open_on_disk):
        with pytest.raises(UserError, match="no safetensors weights in the folder"):
            opens(str(folder))
