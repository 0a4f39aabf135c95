"""Runs with weights of tokens: in memory, from disk, broken off and resumed, in plans and as layers; nothing else."""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import admm_prune
from admm_prune import LayerReconstruction, TokenContext, Unstructured
from admm_prune.errors import UserError
from admm_prune.methods.base import Task
from admm_prune.methods.registry import composed
from admm_prune.methods.target import Target
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.plan import plan as plans
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.blockwise import GRAMS, SCORES, pruning_stages
from admm_prune.runs.layer import capture_layer
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.statistics import SUM_BYTES
from tests.plan.test_plan import text
from tests.plugged_in import plugged_in
from tests.runs.interruption import Interruption

__all__ = ["plugged_in"]  # a fixture

HOW: dict[str, Any] = {"sparsity": 0.5, "samples": 6, "eval_samples": 1, "device": "cpu", "method": "sparsegpt"}


class Both(LayerReconstruction):
    """s_t = loss_t / (1 + |y_t|^2): a Gram of its own for every matrix, and scores."""

    needs_outputs: ClassVar[bool] = True

    @staticmethod
    def token_scores(logits: Tensor, following: Tensor) -> Tensor:
        return cross_entropy(logits, following, reduction="none")

    @staticmethod
    def token_weights(inputs: Tensor, context: TokenContext) -> Tensor:
        return context.scores / (1 + context.outputs.square().sum(1))


def example() -> Any:
    return importlib.import_module("loss_weighted_reconstruction").LossWeightedReconstruction


def _note(seen: dict[str, Any], name: str, _: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    seen[name] = (args[0][0], output[0])


def direct(model: Any, sequences: Any, *, outputs: bool) -> dict[str, Tensor]:
    """The Grams of the first block, token by token: sum_t s_t x_t x_t^T."""
    block, grams = decoder_blocks(model)[0], {}
    for row in sequences.rows:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [view.module.register_forward_hook(partial(_note, seen, view.name)) for view in block.weights]
        logits = model(input_ids=row.ids[None]).logits[0].double()
        for hook in hooks:
            hook.remove()
        loss = -logits[:-1].log_softmax(-1).gather(1, row.ids[1:, None])[:, 0]
        loss = torch.cat([loss.masked_fill(row.ids[1:] == sequences.bos, 0), loss.new_zeros(1)])
        for name, (x, y) in seen.items():
            weights = loss / (1 + y.double().square().sum(1)) if outputs else loss
            grams[name] = grams.get(name, 0) + (x.double() * weights[:, None]).T @ x.double()
    return grams


@pytest.mark.parametrize("outputs", [False, True])
def test_the_first_block_is_solved_with_the_weighted_grams(
    outputs: bool, plugged_in: Path, model_folder: Path, text_file: Path
) -> None:
    """By the errors that the run reports: those of its weights under the Grams that are computed here."""
    problem = Both if outputs else example()
    report = admm_prune.prune(model_folder, data=str(text_file), problem=problem, **HOW)
    loaded = load(str(model_folder), device="cpu")
    sequences = Texts(TextSettings(data=str(text_file), samples=6), loaded).calibration()
    grams = direct(loaded.model, sequences, outputs=outputs)
    pruned = {view.name: view.read().double() for view in decoder_blocks(report.model)[0].weights}
    dense = {view.name: view.read().double() for view in decoder_blocks(loaded.model)[0].weights}
    for layer in report.layers[: len(grams)]:
        away, gram = pruned[layer.name] - dense[layer.name], grams[layer.name]
        error = float(((away @ gram) * away).sum() / ((dense[layer.name] @ gram) * dense[layer.name]).sum())
        assert layer.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.bitwise
@pytest.mark.sampled(1)
@pytest.mark.parametrize("stream", [True, False])
def test_from_disk_and_resumed_it_ends_in_the_same_weights(
    stream: bool, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of a resumed run are those of the dense model, not of its pruned blocks."""
    how = {**HOW, "data": str(text_file), "problem": Both}
    whole = admm_prune.prune(model_folder, out=tmp_path / "whole", stream=False, **how)
    assert whole.manifest["settings"]["problem"].endswith("test_token_weighted_runs.Both")
    records, out = Interruption(monkeypatch), tmp_path / "out"
    while not out.exists():
        with suppress(KeyboardInterrupt):
            admm_prune.prune(model_folder, out=out, stream=stream, resume=records.calls > 0, **how)
    assert records.calls == 3, "the dense figures, and two blocks"
    resumed, expected = admm_prune.load_report(out), admm_prune.load_report(tmp_path / "whole")
    assert [a.relative_error for a in resumed.layers] == [b.relative_error for b in expected.layers]
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in load_file(tmp_path / "whole/model.safetensors").items():
        assert torch.equal(tensors[name], tensor), name


def test_a_run_is_not_resumed_with_another_version_of_the_plug_in(
    plugged_in: Path, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "admm-prune-loss-weighted-reconstruction"
    how = {**HOW, "data": str(text_file), "problem": "loss-weighted", "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        Interruption(patch)
        with pytest.raises(KeyboardInterrupt):
            admm_prune.prune(model_folder, **how)
    (info,) = plugged_in.glob("admm_prune_loss_weighted*.dist-info")
    described = (info / "METADATA").read_text()
    (info / "METADATA").write_text(described.replace("Version: 0.1.0", "Version: 0.2.0"))
    with pytest.raises(UserError, match=f"was begun with {package} 0.1.0, not 0.2.0"):
        admm_prune.prune(model_folder, resume=True, **how)
    (info / "METADATA").write_text(described)
    report = admm_prune.prune(model_folder, resume=True, **how)
    assert report.manifest["environment"]["versions"][package] == "0.1.0"


def test_a_captured_layer_has_the_gram_of_its_matrix(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    weight, settings = "model.layers.0.mlp.up_proj.weight", TextSettings(data=str(text_file), samples=6)
    loaded = load(str(model_folder), device="cpu")
    texts = Texts(settings, loaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("admm_prune.methods.parts.LAYER_PROBLEMS", {"layer": LayerReconstruction, "both": Both})
        layer = capture_layer(
            str(model_folder), weight, settings, tmp_path / "l.safetensors", device="cpu", problem="both"
        )
    for gram, part in ((layer.gram, texts.calibration()), (layer.gram_holdout, texts.evaluation)):
        expected = direct(loaded.model, part, outputs=True)[weight]
        assert gram is not None
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_plan_counts_the_grams_of_every_matrix_and_the_scores() -> None:
    task = Task(target=Target(0.5), calibration=text(16, 32))
    sums, names = {}, {}
    for problem in (None, Both):
        anatomy = Anatomy.of("embedded", "float32")
        stages = pruning_stages(anatomy, composed("wanda", problem=problem), task, stream=False)
        sums[problem] = max(stage.parts[GRAMS] for stage in stages if stage.name == "statistics")
        names[problem] = {stage.name for stage in stages}
        assert {stage.parts.get(SCORES, 0) for stage in stages} == {0 if problem is None else 4 * 16 * 32}
    assert names[Both] - names[None] == {SCORES}
    views = decoder_blocks(Anatomy.of("embedded", "float32").model)[0].weights
    inputs, widths = views[0].shape[1], [view.shape[1] for view in views]
    assert sums[Both] == 2 * SUM_BYTES * sum(width**2 for width in widths)
    assert sums[None] == sums[Both] - 2 * SUM_BYTES * 3 * inputs**2, "q, k and v have one, gate and up too"


@pytest.mark.slow  # it measures the machine
def test_the_plan_of_the_command_line_takes_the_objective(plugged_in: Path) -> None:
    weighted = plans.make_plan("embedded", sparsity=0.5, samples=8, length=32, problem="loss-weighted")
    assert SCORES in {stage.name for stage in weighted.stages}
    assert json.loads(json.dumps(weighted.as_json()))["stages"][SCORES]["operations"] > 0
    with pytest.raises(UserError, match="unknown problem 'loss'"):
        plans.make_plan("embedded", sparsity=0.5, problem="loss")
    with pytest.raises(UserError, match="sparsellm takes no problem"):
        plans.make_plan("embedded", sparsity=0.5, method="sparsellm", problem="loss-weighted")


def test_a_function_that_builds_a_weighted_problem_is_refused(model_folder: Path, text_file: Path) -> None:
    """Its tokens would silently be weighted alike; with arguments bound to the class they are not."""

    def builds(*arguments: Any, **settings: Any) -> Both:
        return Both(*arguments, **settings)

    with pytest.raises(UserError, match=r"builds a Both, whose token_weights is not its own: give the class itself"):
        admm_prune.prune(model_folder, data=str(text_file), problem=builds, **HOW)
    bound = partial(Both, target_energy=None)
    reports = [admm_prune.prune(model_folder, data=str(text_file), problem=p, **HOW) for p in (bound, Both)]
    errors = [[layer.relative_error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1]
    assert reports[0].manifest["settings"]["problem"] == f"{__name__}.Both(target_energy=None)"


def test_a_solver_whose_method_weights_tokens_is_not_for_sparsellm() -> None:
    from admm_prune.methods.local import LOCAL_METHODS, with_parts
    from admm_prune.methods.sparsellm import SPARSELLM

    recipe = SPARSELLM[0].with_parts(with_parts(LOCAL_METHODS["admm"], Both), None, None)
    assert recipe is not None
    with pytest.raises(UserError, match="weights all tokens alike"):
        recipe.check(load("embedded").model, Target(0.5))


def test_the_weights_of_the_example_change_the_solution(plugged_in: Path) -> None:
    """Against least squares of the weighted tokens alone, on a given support."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (40, 3))
    logits, following = torch.randn(40, 5, generator=g), torch.randint(0, 5, (40,), generator=g)
    kind = example()
    context = TokenContext(
        weight="w",
        ids=following,
        positions=torch.arange(40),
        sequences=torch.zeros(40, dtype=torch.int64),
        scored=torch.ones(40, dtype=torch.bool),
        scores=kind.token_scores(logits, following),
    )
    weights = kind.token_weights(x, context)
    torch.testing.assert_close(weights, -logits.log_softmax(1)[torch.arange(40), following])
    gram = admm_prune.GramAccumulator(8)
    gram.add(x, weights)
    problem = kind(w, gram.gram, Unstructured(0.5), ridge=0.0)
    mask = problem.constraint.project(problem.initial()).map(lambda v: v != 0)
    solution = problem.refit(mask)["weight"]
    roots = weights.double().sqrt()[:, None]
    for row, target in zip(solution, w, strict=True):
        support = row != 0
        fitted = torch.linalg.lstsq(x[:, support] * roots, (x @ target)[:, None] * roots).solution[:, 0]
        torch.testing.assert_close(row[support], fitted, rtol=1e-5, atol=1e-7)
