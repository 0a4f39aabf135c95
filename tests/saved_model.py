"""A tiny saved model and its text, for the tests that go from files to files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

CONTEXT = 64
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "not", "to", "be", "moved", "or", "that", "is", "question"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of 40 random words and as many random letters, each shorter than the model's context."""
    draw = random.Random(0)
    documents = [
        " ".join(draw.choice(WORDS) for _ in range(20)) + "".join(draw.choices("bcdfghjklmnpqrst", k=20))
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A random Llama of two blocks and width 32 in float32, with a byte-level BPE tokenizer. Not to be written to."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS, trainer)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return folder
