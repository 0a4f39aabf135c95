"""Which settings of a run a plan takes, and for which device it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from admm_prune import ADMM
from admm_prune.errors import UserError
from admm_prune.plan.counting import KINDS
from admm_prune.plan.machine import Machine
from admm_prune.plan.plan import make_plan
from admm_prune.settings import Settings, options

GIVEN: dict[str, Any] = {"sparsity": 0.5, "samples": 1, "length": 32}
# A value other than the default, of every setting of a run that has no influence on a plan.
UNUSED: dict[str, Any] = {
    "tasks": "piqa",
    "task_folder": "tasks",
    "shots": 1,
    "task_limit": 10,
    "seed": 1,
    "resume": True,
    "overwrite": True,
    "log": "tensorboard:logs",
    "tokenizer": object(),
    "progress": print,
    "callbacks": (object(),),
}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices whose speed is measured, which takes seconds."""
    devices: list[str] = []

    def measure(_: object, __: object, device: str) -> Machine:
        devices.append(device)
        return Machine("here", "", dict.fromkeys(KINDS, 1e9))

    monkeypatch.setattr("admm_prune.plan.plan.measured_here", measure)
    return devices


def test_a_plan_takes_what_its_command_has_options_for_and_a_solver() -> None:
    commands = {name: one.commands.split() for name, one in options(Settings).items()}
    assert set(UNUSED) == {name for name, of in commands.items() if "plan" not in of} - {"solver", "out"}


@pytest.mark.parametrize("name", UNUSED)
def test_a_setting_without_influence_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"a plan takes no {name}: leave it out"):
        make_plan("embedded", **GIVEN, **{name: UNUSED[name]})


@pytest.mark.parametrize("name", ["eval_data", "eval_split", "column"])
def test_settings_of_a_text_need_a_text(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--{option} is of the text: name the calibration text with --data"):
        make_plan("embedded", **GIVEN, **{name: "text"})


def test_objects_that_only_a_run_reads_are_refused() -> None:
    with pytest.raises(UserError, match="data must be the name of a text in a plan"):
        make_plan("embedded", **GIVEN, data=["some text"])
    model: Any = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="give its folder or its Hub id, not a module"):
        make_plan(model, **GIVEN)


@pytest.mark.parametrize(("solver", "name"), [("wanda", "wanda"), (ADMM.fast(), "admm")])
def test_a_plan_has_the_name_of_its_solver(solver: Any, name: str) -> None:
    plan = make_plan("embedded", **GIVEN, solver=solver)
    assert plan.method == plan.as_json()["method"] == name
    assert make_plan("embedded", **GIVEN).method == "admm"
    assert "solver:" in str(make_plan.__doc__)


def test_a_plan_is_for_the_device_of_a_run(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    """On a machine with a CUDA device that is the device, whose free memory decides whether a model is streamed."""
    weights = (model_folder / "model.safetensors").stat().st_size
    free = {"cpu": 100 * weights, "cuda": round(1.9 * weights)}
    monkeypatch.setattr("admm_prune.plan.plan.free_bytes", lambda device: free[device])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu, on_cpu = make_plan(model_folder, **GIVEN), make_plan(model_folder, **GIVEN, device="cpu")
    assert (on_gpu.stream, on_cpu.stream) == (True, False)
    assert on_gpu.limits["device"] == free["cuda"]
    assert "device" not in on_cpu.limits
    assert measured == ["cuda", "cpu"]
    make_plan(model_folder, **GIVEN, gpu="h100")
    assert measured[-1] == "cpu", "of a GPU that is not here, the data sheet is read"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA device here"):
        make_plan("embedded", **GIVEN, device="cuda")
    with pytest.raises(UserError, match="--gpu plans for a GPU, --device cpu for the processor"):
        make_plan("embedded", **GIVEN, device="cpu", gpu="h100")
