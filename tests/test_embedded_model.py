"""The embedded model is a real one: it beats lzma on modules it never saw, writes Python, and ranks pruning methods."""

from __future__ import annotations

import lzma
from importlib.resources import files

import pytest
import torch

from admm_prune import prune
from admm_prune.data import sources
from admm_prune.data.sequences import pack
from admm_prune.data.sources import Corpus
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


def test_it_is_small_enough_to_ship() -> None:
    assert files("admm_prune").joinpath("assets/embedded/model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.slow
def test_it_beats_lzma_on_held_out_modules(embedded) -> None:
    documents = sources.standard_library_documents(held_out=True)[::6]
    text = "".join(documents)
    packed = pack(Corpus("held out", tuple(documents)), embedded.tokenizer, length=512, packing="windows")
    bits = evaluate(embedded.model, packed).bits_per_char
    reference = 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert bits <= 0.85 * reference


def test_it_writes_python(embedded) -> None:
    tokenizer = embedded.tokenizer
    prompt = [tokenizer.bos_token_id, *tokenizer.encode("for i in range(", add_special_tokens=False)]
    out = embedded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    written = tokenizer.decode(out[0, 1:])
    loop, _, rest = written.partition("\n")
    compile(f"{loop}\n    pass", "written", "exec")
    assert rest.startswith(" ")


def test_the_split_is_fixed_by_names() -> None:
    # The model was trained on this split: a change of the rule would show it held-out text.
    for name in ("asyncio.events", "collections", "configparser", "glob", "gzip", "http.server", "inspect"):
        assert sources.is_held_out(name)
    for name in ("argparse", "heapq", "json.decoder", "typing", "csv", "socket"):
        assert not sources.is_held_out(name)
    held_out = sum(sources.is_held_out(name) for name, _ in sources.standard_library_modules())
    assert 0.05 < held_out / sum(1 for _ in sources.standard_library_modules()) < 0.15


def test_the_text_is_the_same_on_every_machine() -> None:
    # The figures of README and docs are those of this text: an interpreter's own library differs between releases,
    # distributors, and the paths that it was installed to.
    documents = {held_out: sources.standard_library_documents(held_out) for held_out in (False, True)}
    assert {held_out: len(texts) for held_out, texts in documents.items()} == {False: 531, True: 76}
    prints = {held_out: Corpus("embedded", tuple(texts)).fingerprint[:16] for held_out, texts in documents.items()}
    assert prints == {False: "7bea7854170a3a95", True: "01a62186d3b21e84"}


@pytest.mark.slow  # over a minute: three methods on 28 matrices
def test_methods_rank_on_it() -> None:
    reports = {
        name: prune("embedded", method=name, sparsity=0.6, samples=16, eval_samples=12)
        for name in ("magnitude", "sparsegpt", "admm")
    }
    assert reports["admm"].pruned.perplexity < reports["sparsegpt"].pruned.perplexity
    assert reports["sparsegpt"].pruned.perplexity < reports["magnitude"].pruned.perplexity
    for report in reports.values():
        for layer in report.layers:
            out, width = layer.shape
            assert abs(layer.sparsity * out * width - 0.6 * out * width) <= 1
