"""Arguments of wrong types and values in Python, over what a user may pass: one line, before any work."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import admm_prune
from admm_prune import GramAccumulator, LayerReconstruction, TokenContext, UserError, load_report
from admm_prune.models.loading import load
from admm_prune.runs.evaluate import evaluate_tasks
from admm_prune.runs.hub import push_to_hub
from admm_prune.runs.resolved import resolved
from admm_prune.settings import Settings


class NoFinish:
    def start(self, settings: Any) -> None: ...

    def log(self, figures: Any, step: int) -> None: ...


class Wrapped(LayerReconstruction):
    needs_outputs = True


PRUNE: list[tuple[dict[str, Any], str]] = [
    ({"targets": 5}, "targets must be a string or a sequence of strings, not 5"),
    ({"targets": None}, "targets must be a string or a sequence of strings, not None"),
    ({"targets": [5]}, "targets must be a string or a sequence of strings, not [5]"),
    ({"targets": [None]}, "targets must be a string or a sequence of strings"),
    ({"targets": b"q_proj"}, "targets must be a string or a sequence of strings, not b'q_proj'"),
    ({"targets": {"q_proj": 0.5}}, "targets must be a string or a sequence of strings, not {'q_proj': 0.5}"),
    ({"targets": [""]}, "an empty pattern"),
    ({"targets": "re:("}, "'re:(' is no regular expression"),
    ({"ignore": 5}, "ignore must be a string or a sequence of strings, not 5"),
    ({"ignore": [["q_proj"]]}, "ignore must be a string or a sequence of strings"),
    ({"overrides": [("q_proj", 0.5)]}, "overrides must be a mapping such as {'up_proj': 0.5}, not a list"),
    ({"overrides": "q_proj=0.5"}, "overrides must be a mapping such as {'up_proj': 0.5}, not a str"),
    ({"overrides": {5: 0.5}}, "a pattern for modules must be a string, not 5"),
    ({"overrides": {"q_proj": None}}, "sparsity must be a number from 0 to 1, not 'None'"),
    ({"overrides": {"q_proj": [1]}}, "sparsity must be a number from 0 to 1, not '[1]'"),
    ({"overrides": {"q_proj": float("nan")}}, "sparsity must lie between 0 and 1, not nan"),
    ({"callbacks": None}, "a callback is an object of a class derived from admm_prune.Callback, not a NoneType"),
    ({"callbacks": 5}, "a callback is an object of a class derived from admm_prune.Callback, not a int"),
    ({"callbacks": print}, "a callback is an object of a class derived from admm_prune.Callback, not a builtin"),
    ({"callbacks": [admm_prune.Callback]}, "not the class Callback"),
    ({"progress": 5}, "progress must be a function of three arguments, not 5"),
    ({"log": 5}, "log must be a string or an object with start, log and finish, not a int"),
    ({"log": NoFinish()}, "log must be a string or an object with start, log and finish, not a NoFinish"),
    ({"log": NoFinish}, "log must be a string or an object with start, log and finish, not the class NoFinish"),
    ({"log": "wandb"}, "log must be tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT, not 'wandb'"),
    ({"tasks": 5}, "tasks must be a string or a sequence of strings, not 5"),
    ({"tasks": [None]}, "tasks must be a string or a sequence of strings, not [None]"),
    ({"tasks": {"piqa": 1}}, "tasks must be a string or a sequence of strings, not {'piqa': 1}"),
    ({"tasks": ""}, "name at least one task"),
    ({"tasks": [" "]}, "name at least one task"),
    ({"tasks": "piqa", "shots": "x"}, "shots must be an integer or None, not 'x'"),
    ({"tasks": "piqa", "shots": -1}, "shots must be at least 0, not -1"),
    ({"tasks": "piqa", "task_limit": 1.5}, "task_limit must be an integer or None, not 1.5"),
    ({"tasks": "piqa", "task_limit": True}, "task_limit must be an integer or None, not True"),
    ({"tasks": "piqa", "task_folder": 5}, "task_folder must be a string or a path or None, not 5"),
    ({"tasks": "piqa", "task_folder": __file__}, "there is no such folder of tasks"),
    ({"method": 5}, "method must be a string or None, not 5"),
    ({"method": ["wanda"]}, "method must be a string or None, not ['wanda']"),
    ({"samples": "x"}, "samples must be an integer or None, not 'x'"),
    ({"samples": 1.5}, "samples must be an integer or None, not 1.5"),
    ({"seed": None}, "seed must be an integer, not None"),
    ({"out": 5}, "out must be a string or a path or None, not 5"),
    ({"bounds": "yes"}, "bounds must be True or False, not 'yes'"),
    ({"sparsity": [0.5]}, "sparsity must be a number from 0 to 1, not '[0.5]'"),
    ({"sparsity": None, "pattern": 5}, "pattern must be N:M, N kept of every M such as 2:4, not '5'"),
    ({"tokenizer": "nowhere"}, "tokenizer is for a model that is passed as a module"),
    ({"problem": 5}, "which builds no problem"),
    ({"problem": torch.nn.Linear(2, 2)}, "the problem Linear failed"),
    ({"problem": Wrapped}, "has needs_outputs, which only token_weights(inputs, context) can read"),
    ({"problem": partial(Wrapped, target_energy=None)}, "has needs_outputs, which only token_weights"),
    ({"problem": partial(LayerReconstruction, strength=2)}, "does not take the arguments that are bound to it"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "reason"), PRUNE, ids=lambda value: str(value)[:60])
def test_prune_refuses(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any, reason: str
) -> None:
    monkeypatch.setattr("admm_prune.runs.prune.Texts", None)  # no text is read
    common: dict[str, Any] = {"data": str(text_file), "sparsity": 0.5, "device": "cpu", "out": tmp_path / "out"}
    with pytest.raises(UserError) as refused:
        admm_prune.prune(model_folder, **common | {"method": "wanda"} | how)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_module_keeps_its_device_and_data_type(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = load(str(model_folder))
    how: dict[str, Any] = {"tokenizer": loaded.tokenizer, "data": str(text_file), "sparsity": 0.5}
    for wrong, reason in (
        ({"dtype": "bfloat16"}, "keeps its data type: leave dtype out"),
        ({"device": "cuda"}, "stays on its device, here cpu: leave device out"),
    ):
        with pytest.raises(UserError, match=reason):
            admm_prune.prune(loaded.model, **how, **wrong)
    for device in ("auto", "cpu"):
        assert resolved(Settings(loaded.model, device=device, **how)).device == "cpu", "whose memory is measured"


def test_a_misspelt_argument_is_named_as_in_python() -> None:
    misspelt: dict[str, Any] = {"sparcity": 0.5}
    with pytest.raises(
        TypeError, match=r"prune\(\) got an unexpected keyword argument 'sparcity' \(did you mean 'sparsity'"
    ):
        admm_prune.prune("embedded", **misspelt)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (5, "a path must be a string or a pathlib.Path, not 5"),
        (None, "a path must be a string or a pathlib.Path, not None"),
        (b"x", "a path must be a string or a pathlib.Path, not b'x'"),
        (["x"], "a path must be a string or a pathlib.Path, not ['x']"),
        ("nowhere", "nowhere is not a finished run"),
        (__file__, "is not a finished run"),
    ],
)
def test_load_report_refuses(folder: Any, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        load_report(folder)
    assert reason in str(refused.value)


@pytest.mark.parametrize("content", [b"[]", b"{", b"{}", b"null", b"\xff\xfe\x00", json.dumps({"layers": 5}).encode()])
def test_load_report_refuses_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admm_prune.json").write_bytes(content)
    with pytest.raises(UserError, match=r"admm_prune.json is not (a manifest|JSON)") as refused:
        load_report(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"repo_id": None}, "repo_id must be a string, not None"),
        ({"repo_id": 5}, "repo_id must be a string, not 5"),
        ({"token": 5}, "token must be a string or None, not 5"),
        ({"private": "yes"}, "private must be True or False or None, not 'yes'"),
        ({"revision": 5}, "revision must be a string or None, not 5"),
        ({"create_pr": 1}, "create_pr must be True or False, not 1"),
        ({"commit_message": ["x"]}, "commit_message must be a string or None, not ['x']"),
        ({"folder": 5}, "a path must be a string or a pathlib.Path, not 5"),
        ({"folder": "nowhere"}, "nowhere: there is no such folder"),
    ],
)
def test_push_refuses(how: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        push_to_hub(**{"folder": "nowhere", "repo_id": "org/tiny"} | how)
    assert reason in str(refused.value)


@pytest.mark.parametrize("tasks", [None, 5, [1], {"piqa": 1}, b"piqa"])
def test_tasks_that_are_no_names(tasks: Any) -> None:
    with pytest.raises(UserError, match="tasks must be a list of names, or names in a string with commas"):
        evaluate_tasks("embedded", tasks)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (1.0, "must be a tensor (4,), one per token, not a float"),
        ([1.0] * 4, "must be a tensor (4,), one per token, not a list"),
        (torch.ones(3), "must be of shape (4,), one per token, not (3,)"),
        (torch.ones(4, 1), "must be of shape (4,), one per token, not (4, 1)"),
        (torch.ones(4, dtype=torch.complex64), "must be real numbers in a dense tensor, not torch.complex64"),
        (torch.ones(4).to_sparse(), "must be real numbers in a dense tensor"),
        (torch.ones(4, device="meta"), "must be on cpu, where the inputs are, not on meta"),
        (torch.tensor([1.0, -1e-9, 1, 1]), "must be finite and not negative"),
        (torch.tensor([1.0, torch.nan, 1, 1]), "must be finite and not negative"),
        (torch.tensor([1.0, torch.inf, 1, 1]), "must be finite and not negative"),
    ],
)
def test_a_gram_refuses_weights(weights: Any, reason: str) -> None:
    gram = GramAccumulator(2)
    with pytest.raises(ValueError, match="token weights") as refused:
        gram.add(torch.ones(4, 2), weights)
    assert reason in str(refused.value)
    assert gram.tokens == 0


def test_a_gram_takes_masks_whole_numbers_and_weights_with_gradients() -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weights in (
        torch.tensor([True, False, True, True]),
        torch.tensor([1, 0, 1, 1]),
        torch.tensor([1.0, 0, 1, 1], requires_grad=True),
    ):
        gram = GramAccumulator(2)
        gram.add(x, weights)
        torch.testing.assert_close(gram.gram, x[[0, 2, 3]].T @ x[[0, 2, 3]])
        assert not gram.gram.requires_grad


def test_a_context_says_what_was_not_declared() -> None:
    numbers = torch.arange(3)
    context = TokenContext(weight="w", ids=numbers, positions=numbers, sequences=numbers, scored=numbers > 0)
    with pytest.raises(AttributeError, match="declare needs_outputs = True"):
        _ = context.outputs
    with pytest.raises(AttributeError, match="define token_scores"):
        _ = context.scores
