"""Fixtures over the tiny models, and a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences, pack
from admm_prune.data.sources import Corpus
from tests.models.tiny_models import CONTEXT, FAMILIES, STORIES, VOCABULARY, build

Tensors = dict[str, Tensor]
Make = Callable[..., Path]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return build(family)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; BOS is "<s>", token 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(STORIES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def stories(tokenizer: PreTrainedTokenizerFast) -> Sequences:
    """Seven ragged documents in batches of three."""
    return pack(Corpus("stories", STORIES), tokenizer, length=CONTEXT, packing="documents", batch_size=3)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """A model folder whose tensors and config were changed after it was saved."""

    def make(model: PreTrainedModel, tensors: Callable[[Tensors], Tensors] = dict, **config: object) -> Path:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = folder / "model.safetensors"
        save_file({n: t.contiguous() for n, t in tensors(load_file(path)).items()}, path, {"format": "pt"})
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        return folder

    return make
