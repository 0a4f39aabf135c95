"""The command line called in this process, as its entry point is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from admm_prune import cli
from tests.cli.outcome import Command, Outcome, Refused, snapshot


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `admm-prune` with these arguments; an exception that `main` lets through fails the test, as a traceback."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["admm-prune", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Outcome(exit_.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def layer_tensors() -> dict[str, torch.Tensor]:
    """A layer problem of 12 outputs and 8 correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    inputs, other = (torch.randn(64, 8, generator=generator) @ mixing for _ in range(2))
    weight = torch.randn(12, 8, generator=generator)
    return {"weight": weight, "gram": inputs.T @ inputs, "gram_holdout": other.T @ other}


@pytest.fixture
def layer_file(place: Path, layer_tensors: dict[str, torch.Tensor]) -> Path:
    path = place / "layer.safetensors"
    save_file(layer_tensors, path)
    return path


@pytest.fixture
def refused(command: Command, place: Path) -> Refused:
    """Asserts that the command refuses, for the reason that contains `reason`, and leaves the working folder alone."""

    def check(reason: str, *arguments: object) -> None:
        before = snapshot(place)
        outcome = command(*arguments)
        assert outcome.status == 2
        assert outcome.out == ""
        assert outcome.err.startswith("admm-prune: ")
        assert outcome.err.endswith("\n")
        assert outcome.err.count("\n") == 1, outcome.err
        assert reason in outcome.err
        assert snapshot(place) == before

    return check


@pytest.fixture
def run(model_folder: Path, text_file: Path) -> tuple[object, ...]:
    """A run that would go well, given a target and an output."""
    return ("run", "--model", model_folder, "--data", text_file)


@pytest.fixture(scope="session")
def narrow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of one block of width 16 whose tokens are bytes. Not to be written to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("narrow")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(place)
    return place
