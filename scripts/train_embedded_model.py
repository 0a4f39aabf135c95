"""Trains the embedded model: a 3.8 M-parameter Llama on the source of Python's standard library.

    python scripts/train_embedded_model.py WORK_DIR [--steps 2100] [--family llama|opt]

WORK_DIR receives the tokenizer, a checkpoint every 250 steps (the same command continues from it), a log, and at the
end `model/`, a `save_pretrained` folder in bf16. Held-out modules (`admm_prune.data.sources.is_held_out`), and
the tests of such modules, are never read for training. Hidden matrices are trained by Muon, the rest by AdamW.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch
from embed_standard_library import modules as installed_modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from admm_prune.data import sources

VOCABULARY, CONTEXT, END = 4096, 512, "<|endoftext|>"


def training_documents() -> list[str]:
    """Library modules that are not held out, and tests that name no held-out module."""
    held_out = {name.split(".")[-1] for name, _ in sources.standard_library_modules() if sources.is_held_out(name)}
    subjects = lambda name: {part.removeprefix("test_").removesuffix("_test") for part in name.split(".")}  # noqa: E731
    tests = [text for name, text in installed_modules(tests=True) if held_out.isdisjoint(subjects(name))]
    return sources.standard_library_documents(held_out=False) + tests


def train_tokenizer(documents: list[str], path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the library proper; begins and ends text with one token."""
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
        bpe.train_from_iterator(documents, trainer)
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=END,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(family: str) -> nn.Module:
    if family == "opt":
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            word_embed_proj_dim=192,
            ffn_dim=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return OPTForCausalLM(config)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """One stream of tokens in which every document begins with END."""
    ids = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for document in ids for token in [0, *document.ids]])


def loss_sum(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out_bits(model: nn.Module, stream: Tensor, characters: int, limit: int | None = None) -> float:
    """Bits per character in windows of END and 511 tokens: every token is predicted exactly once."""
    model.eval()
    windows = stream.split(CONTEXT - 1)[:-1]
    chosen = windows if limit is None else windows[:: max(1, len(windows) // limit)]
    total = 0.0
    for group in torch.stack(chosen).split(16):
        total += float(loss_sum(model, nn.functional.pad(group, (1, 0))))
    model.train()
    return total / math.log(2) / characters * (stream.numel() / (len(chosen) * (CONTEXT - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", choices=("llama", "opt"), default="llama")
    parser.add_argument("--steps", type=int, default=2100)
    parser.add_argument("--decay", type=int, default=600, help="steps at the end over which the rates fall to zero")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--muon-lr", type=float, default=2e-2)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the loss: a third faster, needs a C++ compiler"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(sources.standard_library_documents(held_out=False), args.work / "tokenizer.json")
    stream = encode(tokenizer, training_documents())
    held_out_text = sources.standard_library_documents(held_out=True)
    held_out = encode(tokenizer, held_out_text)
    characters = sum(map(len, held_out_text))
    print(f"{stream.numel()} training tokens, {held_out.numel()} held out, {characters} characters", flush=True)

    model = build(args.family)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimizers = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    training_loss = torch.compile(loss_sum) if args.compile else loss_sum
    base = [args.muon_lr, args.adam_lr]
    draws = torch.Generator().manual_seed(args.seed)
    step, seconds, checkpoint = 0, 0.0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        draws.set_state(saved["draws"])
        step, seconds = saved["step"], saved["seconds"]
    log = (args.work / "log.jsonl").open("a")
    began = time.perf_counter() - seconds
    while step < args.steps:
        factor = min(1.0, (step + 1) / 100, (args.steps - step) / args.decay)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        starts = torch.randint(stream.numel() - CONTEXT, (args.batch, 1), generator=draws)
        windows = stream[starts + torch.arange(CONTEXT)]
        batch = nn.functional.pad(windows, (1, 0))  # END first, as in evaluation
        loss = training_loss(model, batch) / windows.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0 or step == args.steps:
            row = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - began)}
            if step % 250 == 0:
                row["held_out_bits_per_char"] = round(held_out_bits(model, held_out, characters, limit=64), 4)
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers],
                        "draws": draws.get_state(),
                        "step": step,
                        "seconds": row["seconds"],
                    },
                    checkpoint,
                )
            print(json.dumps(row), file=log, flush=True)
    text = "".join(held_out_text).encode()
    bits = held_out_bits(model.to(torch.bfloat16).float(), held_out, characters)
    lzma_bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / characters
    summary = {
        "held_out_bits_per_char": bits,
        "lzma_bits_per_char": lzma_bits,
        "ratio": bits / lzma_bits,
        "steps": step,
        "seconds": round(time.perf_counter() - began),
        "tokens": step * args.batch * CONTEXT,
    }
    print(json.dumps(summary), file=log, flush=True)
    folder = args.work / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # it is loaded in, as the README of the model says
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
