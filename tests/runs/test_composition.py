"""Runs put together in Python: which weights, which solver, which set, which objective; and what does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import admm_prune
from admm_prune import ADMM, Blocks, Groups, LayerReconstruction, NofM, RowWise, SparseGPT, Unstructured
from admm_prune.errors import UserError
from admm_prune.runs.results import Report
from admm_prune.verify.run import verify_folder

Prune = Callable[..., Report]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ALL = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", *MLP]


@pytest.fixture
def prune(model_folder: Path, text_file: Path) -> Prune:
    def call(**how: Any) -> Report:
        return admm_prune.prune(model_folder, **{"data": str(text_file), "samples": 12, "device": "cpu", **how})

    return call


def sparsities(report: Report) -> dict[str, float]:
    return {layer.name.removesuffix(".weight"): layer.sparsity for layer in report.layers}


@pytest.fixture(scope="module")
def dense(model_folder: Path) -> dict[str, Tensor]:
    return load_file(model_folder / "model.safetensors")


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("how", "chosen"),
    [
        ({"targets": "LlamaMLP"}, lambda name: ".mlp." in name),
        ({"targets": ["Linear"], "ignore": ["re:.*down_proj"]}, lambda name: "down_proj" not in name),
        ({"ignore": "re:model.layers.0"}, lambda name: "layers.1." in name),
        ({"targets": ["re:.*[qk]_proj$", "model.layers.1.mlp.up_proj"]},
         lambda name: name.endswith(("q_proj", "k_proj", "1.mlp.up_proj"))),
        ({"ignore": ["model.layers.1.mlp.up_proj.weight", "LlamaAttention"]},
         lambda name: ".mlp." in name and "1.mlp.up" not in name),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gradual"])
def test_only_what_is_chosen_is_touched(
    prune: Prune, tmp_path: Path, dense: dict[str, Tensor], method: str, how: dict[str, Any], chosen: Any
) -> None:
    steps = {"steps": 2} if method == "gradual" else {}
    report = prune(method=method, sparsity=0.5, out=tmp_path / "out", **how, **steps)
    found = sparsities(report)
    assert {name.partition("layers.")[2] for name in found} == {f"{i}.{name}" for i in (0, 1) for name in ALL}
    assert all((abs(value - 0.5) < 0.01) == chosen(name) for name, value in found.items()), found
    assert all(value == 0.0 for name, value in found.items() if not chosen(name))
    saved = load_file(tmp_path / "out/model.safetensors")
    if method != "gradual":  # which trains everything
        left = [name for name in found if not chosen(name)]
        assert all(torch.equal(saved[f"{name}.weight"], dense[f"{name}.weight"]) for name in left)
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []
    page = (tmp_path / "out/report.html").read_text()
    assert "not selected: left unchanged" in page


def test_overrides_give_layers_targets_of_their_own(prune: Prune, tmp_path: Path) -> None:
    overrides = {"re:.*down_proj": 0.25, "re:.*layers.1.*_proj": "2:4", "LlamaAttention": 0.75, "re:.*v_proj": "dense"}
    report = prune(method="sparsegpt", sparsity=0.5, overrides=overrides, out=tmp_path / "out")
    found = sparsities(report)

    def expected(name: str) -> float:
        if name.endswith("v_proj"):
            return 0.0
        return 0.75 if "self_attn" in name else 0.5 if "layers.1" in name else 0.25 if "down" in name else 0.5

    assert all(abs(value - expected(name)) < 0.002 for name, value in found.items()), found
    saved = load_file(tmp_path / "out/model.safetensors")
    for name in MLP:
        groups = saved[f"model.layers.1.{name}.weight"].unflatten(1, (-1, 4))
        assert int(groups.count_nonzero(dim=2).max()) <= 2
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []
    manifest = json.loads((tmp_path / "out/admm_prune.json").read_text())
    own = dict(manifest["settings"]["target"]["layers"])
    assert own["model.layers.0.mlp.down_proj.weight"] == "0.25"
    assert own["model.layers.0.self_attn.v_proj.weight"] == "dense"
    assert "model.layers.0.mlp.up_proj.weight" not in own
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('data-field="target">dense<') == 2
    manifest["settings"]["target"]["layers"] = []
    (tmp_path / "out/admm_prune.json").write_text(json.dumps(manifest))
    failures = verify_folder(tmp_path / "out", device="cpu", quick=True).failures
    assert any("v_proj.weight: 0 zeros of 512, 50% asks for 256" in failure for failure in failures)


@pytest.mark.parametrize("method", ["admm", "wanda"])
def test_weights_that_share_inputs_and_not_targets_come_out_as_by_themselves(prune: Prune, method: str) -> None:
    """Whether a solver takes q, k and v as one or one by one, each has its own target, and its own answer."""
    both = prune(method=method, sparsity=0.5, overrides={"re:.*k_proj": 0.75})
    alone = prune(method=method, sparsity=0.5)
    first = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    for name in first:
        one, other = (report.model.get_submodule(name).weight for report in (both, alone))
        assert torch.allclose(one, other, atol=1e-5)
    assert sparsities(both)["model.layers.0.self_attn.k_proj"] == pytest.approx(0.75, abs=1e-3)


def test_sparsellm_prunes_networks_whole_or_not_at_all(prune: Prune) -> None:
    report = prune(method="sparsellm", sparsity=0.5, ignore="re:.*layers.0.mlp", overrides={"re:.*down_proj": 0.25})
    found = sparsities(report)
    assert [found[f"model.layers.0.{name}"] for name in MLP] == [0.0, 0.0, 0.0]
    assert [round(found[f"model.layers.1.{name}"], 2) for name in MLP] == [0.5, 0.5, 0.25]
    assert len(report.details["feed_forward"]) == 1
    with pytest.raises(UserError, match=r"pruned as one: model.layers.0.mlp.up_proj.weight cannot be left out"):
        prune(method="sparsellm", sparsity=0.5, ignore="re:.*up_proj")
    attention = prune(method="sparsellm", sparsity=0.5, targets="LlamaMLP")
    assert sparsities(attention)["model.layers.0.self_attn.q_proj"] == 0.0


def test_elsa_leaves_the_support_of_what_is_ignored_alone(prune: Prune) -> None:
    found = sparsities(prune(method="elsa", sparsity=0.9, steps=24, ignore="re:.*down_proj"))
    assert all(abs(value - (0.0 if "down" in name else 0.9)) < 0.002 for name, value in found.items())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"targets": "re:.*nonesuch"}, "no module in LlamaForCausalLM's blocks matches 're:.*nonesuch': "),
        ({"targets": "q_prj"}, r"matches 'q_prj' (did you mean 'q_proj'?): 'admm-prune list modules --model MODEL'"),
        ({"ignore": "LLamaMLP"}, "matches 'LLamaMLP' (did you mean 'LlamaMLP'?)"),
        ({"overrides": {"model.layers.9.mlp": 0.5}}, "matches 'model.layers.9.mlp' (did you mean 'model.layers."),
        ({"targets": "proj"}, "no module in LlamaForCausalLM's blocks matches 'proj'"),
        ({"targets": "re:*"}, "is no regular expression"),
        ({"targets": ""}, "an empty pattern"),
        ({"ignore": "Linear"}, "nothing is left to prune"),
        ({"overrides": {"Linear": 1.5}}, "sparsity must lie between 0 and 1"),
        ({"overrides": {"Linear": "0:4"}}, "must keep from 1 to 4"),
        ({"overrides": {"re:.*q_proj": "16:64"}}, "pattern 16:64 needs a width"),
        ({"method": "struprune", "ignore": "re:.*q_proj"}, "removes structured groups: it takes no targets"),
        ({"method": "elsa", "overrides": {"re:.*q_proj": 0.7}}, "trains all weights to one target"),
        ({"method": "gradual", "overrides": {"re:.*q_proj": 0.7}}, "trains all weights to one target"),
        ({"method": "wanda", "solver": ADMM()}, "wanda is a solver itself"),
        ({"method": "gradual", "solver": ADMM()}, "gradual takes no solver"),
        ({"method": "struprune", "constraint": RowWise(0.5)}, "struprune takes no constraint"),
        ({"method": "sparsellm", "problem": LayerReconstruction}, "sparsellm takes no problem"),
        ({"method": "elsa", "constraint": RowWise(0.5), "solver": ADMM()}, "elsa takes no solver and constraint"),
        ({"solver": ADMM}, "an object with a method solve"),
        ({"solver": "nonesuch"}, "unknown method 'nonesuch'"),
        ({"constraint": Blocks}, "Blocks is not made from a sparsity alone"),
        ({"constraint": RowWise(0.5, keep=3)}, "counts weights, which is for one matrix"),
        ({"constraint": Blocks(0.5, 5, 5)}, "tiles"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_line(prune: Prune, how: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as refusal:
        prune(**{"sparsity": 0.5, "data": "missing.txt", **how})
    assert "\n" not in str(refusal.value)


def test_a_solver_in_place_of_a_name(prune: Prune, tmp_path: Path) -> None:
    named = prune(method="sparsegpt", sparsity=0.5)
    given = prune(solver=SparseGPT(), sparsity=0.5, out=tmp_path / "out")
    assert [layer.relative_error for layer in given.layers] == [layer.relative_error for layer in named.layers]
    assert given.method == "sparsegpt"
    assert given.manifest["settings"]["solver"] == repr(SparseGPT())
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []
    short, long = (prune(solver=ADMM(max_iterations=n), sparsity=0.7) for n in (1, 32))
    assert {layer.iterations for layer in short.layers} == {1}
    assert sum(layer.relative_error or 0 for layer in long.layers) < sum(
        layer.relative_error or 0 for layer in short.layers
    )
    inner = prune(method="sparsellm", solver="wanda", sparsity=0.5)
    assert {layer.status for layer in inner.layers if "self_attn" in layer.name} == {"CLOSED_FORM"}


class Doubling:
    """A third party's solver: keeps what is largest, twice as large."""

    def solve(self, problem: Any, *, start: Any = None) -> admm_prune.Result:
        point = problem.constraint.project(problem.initial()).map(lambda x: 2 * x)
        return admm_prune.Result(solution=point, status=admm_prune.Status.CLOSED_FORM, objective=problem.value(point))


def test_a_solver_of_anybodys_making(prune: Prune, dense: dict[str, Tensor]) -> None:
    report = prune(solver=Doubling(), sparsity=0.5)
    assert report.method == "Doubling"
    name = "model.layers.0.mlp.up_proj.weight"
    weight = report.model.get_parameter(name).detach()
    assert torch.equal(weight, torch.where(weight != 0, 2 * dense[name], 0.0))


@pytest.mark.parametrize(
    "constraint",
    [RowWise(0.5), Unstructured(0.625), NofM(1, 4), Blocks(0.5, 4, 4), Groups(0.5, 8)],
    ids=lambda constraint: type(constraint).__name__,
)
def test_a_sparse_set_in_place_of_a_sparsity(prune: Prune, tmp_path: Path, constraint: Any) -> None:
    report = prune(method="magnitude", constraint=constraint, out=tmp_path / "out")
    for layer in report.layers:
        assert constraint.contains(admm_prune.Point(weight=report.model.get_parameter(layer.name).detach()))
    asked = 0.75 if isinstance(constraint, NofM) else constraint.sparsity
    assert report.target == ("1:4" if isinstance(constraint, NofM) else f"{100 * asked:g}%")
    assert report.sparsity == pytest.approx(asked, abs=0.02)
    verified = verify_folder(tmp_path / "out", device="cpu", quick=True)
    assert (verified.failures, verified.unchecked) == ([], [])  # also sets that counts alone cannot check are asked


def test_a_class_of_sets_takes_the_sparsity_and_overrides_keep_its_kind(prune: Prune) -> None:
    report = prune(method="admm", constraint=RowWise, sparsity=0.5, overrides={"re:.*up_proj": 0.75})
    for layer in report.layers:
        kept = (report.model.get_parameter(layer.name) != 0).sum(1)
        asked = 0.25 if "up_proj" in layer.name else 0.5
        assert set(kept.tolist()) == {round(asked * layer.shape[1])}


class Heavy(LayerReconstruction):
    """Reconstruction where the first input counts ten thousand times as much."""

    def __init__(self, weight: Tensor, gram: Tensor, *arguments: Any, **options: Any) -> None:
        scale = torch.ones(len(gram))
        scale[0] = 100.0
        super().__init__(weight, gram * scale * scale[:, None], *arguments, **options)


def test_an_objective_in_place_of_reconstruction(prune: Prune) -> None:
    plain, heavy = (prune(method="wanda", problem=kind, sparsity=0.5) for kind in (None, Heavy))
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = [int((report.model.get_parameter(name)[:, 0] != 0).sum()) for report in (plain, heavy)]
    assert kept[0] < kept[1] == 32
    assert heavy.manifest["settings"]["problem"].endswith("Heavy")


def test_a_module_goes_in_and_the_same_one_comes_out(model_folder: Path, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    before = [id(parameter) for parameter in model.parameters()]
    report = admm_prune.prune(
        model, tokenizer=AutoTokenizer.from_pretrained(model_folder), solver=ADMM.fast(), sparsity=0.5,
        targets="LlamaMLP", data=str(text_file),
    )  # fmt: skip
    assert report.model is model
    assert [id(parameter) for parameter in model.parameters()] == before
    assert report.sparsity == pytest.approx(0.5 * 3 * 32 * 48 / (3 * 32 * 48 + 3072), abs=1e-3)
