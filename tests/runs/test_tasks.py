"""Tasks of lm-evaluation-harness on a task of our own, against log-likelihoods that are computed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import admm_prune
from admm_prune.cli.app import app
from admm_prune.errors import UserError
from admm_prune.models.loading import load
from admm_prune.runs.evaluate import evaluate_tasks
from admm_prune.verify.report import Verdict
from admm_prune.verify.run import verify_folder
from tests.runs.html_page import read_page

ROWS = [
    {"question": "the cat sat on a", "choices": [" mat", " question"], "answer": 0},
    {"question": "to be or not to", "choices": [" be", " mat and cat"], "answer": 0},
    {"question": "the mat is", "choices": [" moved and not", " on"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the task "mats", multiple choice on three local questions."""
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "mats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "mats.yaml").write_text(
        f"""
task: mats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place / "mats.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 3}}
"""
    )
    return place


def chosen(model: torch.nn.Module, tokenizer: object, row: dict) -> int:
    """The choice of the largest log-likelihood given the question, BOS before it."""
    scores = []
    for choice in row["choices"]:
        given = tokenizer(row["question"], add_special_tokens=True)["input_ids"]
        whole = tokenizer(row["question"] + choice, add_special_tokens=True)["input_ids"]
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[i - 1, whole[i]].detach()) for i in range(len(given), len(whole))))
    return int(torch.tensor(scores).argmax())


def test_accuracy_is_what_the_likelihoods_say(model_folder: Path, tasks: Path) -> None:
    found = evaluate_tasks(str(model_folder), ["mats"], folder=tasks, device="cpu")
    loaded = load(str(model_folder), device="cpu")
    expected = sum(chosen(loaded.model, loaded.tokenizer, row) == row["answer"] for row in ROWS) / len(ROWS)
    assert found["results"]["mats"]["acc,none"] == pytest.approx(expected)
    assert found["versions"] == {"mats": 3}
    assert found["shots"] == {"mats": 0}
    assert found["limit"] is None
    json.dumps(found)


def prune(model_folder: Path, text_file: Path, **how: Any) -> Any:
    common: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "samples": 2, "eval_samples": 2, "device": "cpu"}
    return admm_prune.prune(model_folder, data=str(text_file), **common, **how)


def test_a_run_evaluates_its_pruned_model(model_folder: Path, text_file: Path, tasks: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"tasks": "mats", "task_folder": tasks, "shots": 0}
    report = prune(model_folder, text_file, out=tmp_path / "out", **how)
    saved = evaluate_tasks(str(tmp_path / "out"), ["mats"], folder=tasks, shots=0, device="cpu")
    assert report.tasks == saved
    assert report.tasks["results"]["mats"].keys() == {"acc,none", "acc_stderr,none"}
    assert "evaluating the tasks" in [phase.name for phase in report.phases]
    assert admm_prune.load_report(tmp_path / "out").tasks == report.tasks
    recipe = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert (recipe["tasks"], recipe["task_folder"], recipe["shots"]) == (["mats"], str(tasks), 0), "0 is not left out"
    assert "| mats | acc | 0 | " in (tmp_path / "out/README.md").read_text()
    plain = prune(model_folder, text_file, out=tmp_path / "plain")
    assert plain.tasks is None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    verified = verify_folder(tmp_path / "out", quick=True, device="cpu")
    assert verified.verdict is Verdict.VERIFIED
    assert "admm_prune.json: tasks" in verified.fingerprinted


def test_a_comparison_evaluates_the_dense_and_all_pruned_models(
    model_folder: Path, text_file: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--tasks", "mats", "--task-folder", str(tasks), "--shots", "0", "--task-limit", "2")
    common = ("--data", str(text_file), "--samples", "2", "--eval-samples", "1", "--sparsity", "0.5", "--device", "cpu")
    words = ("compare", "--model", str(model_folder), "--methods", "magnitude,wanda", *common, *how)
    app([*words, "--out", str(tmp_path / "out")], standalone_mode=False)
    shown = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["mats"])
    page = read_page((tmp_path / "out/report.html").read_text()).text
    content = json.loads((tmp_path / "out/admm_prune.json").read_text())
    places = {"dense": model_folder, **{row["method"]: tmp_path / "out" / row["folder"] for row in content["rows"]}}
    found = [content["tasks"], *(row["tasks"] for row in content["rows"])]
    for place, claimed in zip(places.values(), found, strict=True):
        assert claimed == evaluate_tasks(str(place), ["mats"], folder=tasks, shots=0, limit=2, device="cpu")
    app(["eval", str(model_folder), *how, "--device", "cpu", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == found[0], "by the same options"
    figures = [one["results"]["mats"] for one in found]
    assert shown == ["mats", "acc", *(f"{one['acc,none']:.4f}" for one in figures)]
    for one in figures:
        assert f"{one['acc,none']:.4f} ± {one['acc_stderr,none']:.4f}" in " ".join(page.split())
    assert "at most 2 questions of each" in " ".join(page.split())
    verified = verify_folder(tmp_path / "out", quick=True, device="cpu")
    assert verified.verdict is Verdict.VERIFIED
    assert "admm_prune.json: tasks" in verified.fingerprinted
    content["rows"][0]["tasks"]["results"]["mats"]["acc,none"] = 0.875
    (tmp_path / "out/admm_prune.json").write_text(json.dumps(content))
    assert verify_folder(tmp_path / "out", quick=True, device="cpu").verdict is Verdict.REJECTED


def test_what_a_run_cannot_evaluate_is_refused_before_it_begins(
    model_folder: Path, text_file: Path, tasks: Path, tmp_path: Path
) -> None:
    (tasks / "lost.yaml").write_text((tasks / "mats.yaml").read_text().replace("mats", "lost"))
    for reason, how in (
        ("cannot stream: tasks need the whole model in memory", {"tasks": ["mats"], "stream": True}),
        ("lost, mats: FileNotFoundError: .*lost.jsonl", {"tasks": ["lost", "mats"]}),
        ("there is no such folder of tasks", {"tasks": "mats", "task_folder": tmp_path / "none"}),
        ("shots is of tasks: name them with tasks", {"shots": 3, "task_folder": None}),
        ("task_limit must be at least 1, not 0", {"tasks": "mats", "task_limit": 0}),
    ):
        with pytest.raises(UserError, match=reason) as refused:
            prune(model_folder, text_file, out=tmp_path / "out", **{"task_folder": tasks} | how)
        assert "\n" not in str(refused.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tasks"]


def test_what_cannot_be_evaluated_is_refused(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of tasks"):
        evaluate_tasks(str(model_folder), ["mats"], folder=tmp_path / "none", device="cpu")
    with pytest.raises(UserError, match="name at least one task"):
        evaluate_tasks(str(model_folder), [], device="cpu")


@pytest.mark.slow  # the harness reads thousands of files
def test_an_unknown_task_is_refused(model_folder: Path, tasks: Path) -> None:
    with pytest.raises(UserError, match="knows no task 'nonsense'"):
        evaluate_tasks(str(model_folder), ["nonsense"], folder=tasks, device="cpu")


def test_without_the_harness_it_says_what_to_install(model_folder: Path) -> None:
    script = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from admm_prune.runs.evaluate import evaluate_tasks\n"
        f"evaluate_tasks({str(model_folder)!r}, ['piqa'], device='cpu')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "tasks need lm-evaluation-harness: pip install 'admm-prune[eval]'" in done.stderr


@pytest.mark.parametrize("further", [[], ["--trust-remote-code"]])
def test_eval_runs_code_of_a_model_for_tasks_where_it_is_allowed(further, model_folder, tasks, monkeypatch) -> None:
    allowed = []

    def loading(source: str, *, trust_remote_code: bool, **how: Any) -> Any:
        allowed.append(trust_remote_code)
        return load(source, **how)

    monkeypatch.setattr("admm_prune.runs.evaluate.load", loading)
    monkeypatch.setattr("admm_prune.runs.evaluate.Tasks.evaluate", lambda *_, **__: {})
    arguments = ["eval", str(model_folder), "--tasks", "mats", "--task-folder", str(tasks), "--device", "cpu", "--json"]
    app([*arguments, *further], standalone_mode=False)
    assert allowed == [bool(further)]
