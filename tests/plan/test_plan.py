"""What a plan says against what its runs take: tensors counted while the very recipes run, exactly, on small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM, PreTrainedModel

from admm_prune.data.sequences import Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Recipe, Task
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.layerwise import prune_several, prune_shared
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import RECIPES, recipe_named
from admm_prune.methods.selection import Selection
from admm_prune.methods.target import Target
from admm_prune.models.capture import SharedInput
from admm_prune.models.experts import routed
from admm_prune.models.feed_forward import feed_forwards
from admm_prune.models.losses import next_token_loss
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.models.sublayers import feed_forward_part
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.blockwise import SOLVER, Collected, _local, pruning_stages
from admm_prune.plan.counting import KINDS, Cost, Stage, Work, by_name, counted, measured_cost
from admm_prune.plan.machine import GPUS, Machine, measured_here
from admm_prune.plan.plan import make_plan
from admm_prune.plan.training import _keep_all as keep_all
from admm_prune.plan.training import training_stages
from admm_prune.plan.trials import LayerTrial, estimated, random_gram, view_of
from admm_prune.runs.prune import decide
from admm_prune.statistics import LayerStatistics
from tests.models.tiny_models import FAMILIES, build, is_mixture


def text(rows: int, length: int) -> Sequences:
    g = torch.Generator().manual_seed(0)
    drawn = tuple(Row(torch.randint(4096, (length,), generator=g), length) for _ in range(rows))
    return Sequences(drawn, "windows", length, None, 8)


def pruned_and_counted(recipe: Recipe, task: Task) -> tuple[int, Work]:
    """The bytes that pruning the embedded model holds at its peak, weights included, and the work of it."""
    model = embedded()
    weights = sum(p.nbytes for p in model.parameters())
    with counted() as counting:
        counting.know(*model.parameters(), *model.buffers())
        recipe.prune(model, task)
    return weights + counting.peak, counting.work


def give_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for a machine of given rates: measuring those of this one takes three seconds."""
    given = Machine("m", "given", dict.fromkeys(KINDS, 1e9))
    monkeypatch.setattr("admm_prune.plan.plan.measured_here", lambda *_: given)


def embedded() -> nn.Module:
    from admm_prune.models.loading import load

    model: nn.Module = load("embedded", dtype="float32").model
    return model


def tiny(family: str, device: str) -> nn.Module:
    """A random model of two blocks."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    with torch.device(device):
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2)).eval()
        if family == "opt":
            return OPTForCausalLM(OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32)).eval()
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)).eval()


def allocated(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave out at most, inside of kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        kept = run()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in told.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    del kept
    return peak


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_counted_bytes_are_those_of_the_allocator(name: str) -> None:
    def layer() -> SharedInput:
        return SharedInput((view_of(torch.randn(192, 128)),), LayerStatistics(random_gram(128), 256))

    task = Task(target=Target(0.5), calibration=text(1, 2))
    method = LOCAL_METHODS[name]
    prune_shared(layer(), method, task)  # what only the first call allocates
    shared = layer()
    seen = allocated(lambda: prune_shared(shared, method, task))
    shared = layer()
    with counted() as counting:
        counting.know(shared.statistics.gram, shared.weights[0].parameter)
        prune_shared(shared, method, task)
    assert counting.peak == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_without_data_the_same_is_counted_as_with_it(family: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        model = tiny(family, device)
        batch = Sequences((Row(torch.arange(32), 32),) * 4, "windows", 32, None, 4).batches[0]
        with counted() as counting:
            counting.know(*model.parameters(), *model.buffers())
            next_token_loss(model, batch).backward()
        found.append((counting.peak, counting.work.operations, counting.work.counts["traffic"]))
    (peak, operations, traffic), meta = found
    assert meta[0] == pytest.approx(peak, rel=0.02)
    assert meta[1] == operations
    assert meta[2] == pytest.approx(traffic, rel=0.1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", ["sparsegpt", "struprune", *(pytest.param(name, marks=pytest.mark.slow) for name in ("admm", "sparsellm"))]
)
def test_the_plan_of_a_block_wise_method_is_what_its_run_holds(name: str) -> None:
    recipe, calibration = recipe_named(name), text(8, 256)
    task = Task(target=Target(0.5), calibration=calibration)
    stages = pruning_stages(Anatomy.of("embedded", "float32"), recipe, task, stream=False)
    planned = max(stage.bytes for stage in stages)
    held, work = pruned_and_counted(recipe, task)
    assert planned == pytest.approx(held, rel=0.1)
    done = sum((stage.work for stage in stages), Work()).operations
    assert done == pytest.approx(work.operations, rel=0.3)


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection.of(targets="mlp"),
        Selection.of(ignore="layers.0", overrides={"down_proj": 0.25, "q_proj": "2:4", "layers.2.self_attn": "dense"}),
    ],
    ids=["all", "targets", "overrides"],
)
@pytest.mark.parametrize("name", ["wanda", pytest.param("sparsellm", marks=pytest.mark.slow)])
def test_the_plan_counts_the_matrices_that_are_pruned(name: str, selection: Selection) -> None:
    anatomy = Anatomy.of("embedded", "float32")
    recipe, task = (
        recipe_named(name),
        Task(target=selection.applied(anatomy.model, Target(0.5)), calibration=text(8, 256)),
    )
    stages = pruning_stages(anatomy, recipe, task, stream=False)
    held, work = pruned_and_counted(recipe, task)
    assert max(stage.bytes for stage in stages) == pytest.approx(held, rel=0.1)
    done = sum((stage.work for stage in stages), Work()).operations
    assert done == pytest.approx(work.operations, rel=0.05 if name == "wanda" else 0.2)


def test_a_plan_takes_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "samples": 8, "length": 256, "eval_samples": 1}
    give_rates(monkeypatch)
    every, some = make_plan("embedded", **how), make_plan("embedded", **how, ignore="mlp")
    work = [by_name(list(plan.stages))["statistics"].operations for plan in (every, some)]
    assert work[1] < 0.75 * work[0]  # no Gram of the down projections, and their inputs are not computed
    with pytest.raises(UserError, match=r"matches 'mpl' .*'mlp'"):
        make_plan("embedded", **how, targets="mpl")


def hybrid() -> PreTrainedModel:
    """A block of linear attention, which has no structured groups, and one of attention, with a network each."""
    torch.manual_seed(0)
    config = OlmoHybridConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return OlmoHybridForCausalLM(config).eval()


def test_sparsellm_is_planned_wherever_a_run_reads_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_rates(monkeypatch)
    monkeypatch.setattr("admm_prune.plan.blockwise.estimated", lambda _: Cost(peak=1))  # not what is tested
    model = hybrid()
    model.save_pretrained(tmp_path)
    networks = feed_forwards(model, decoder_blocks(model))
    assert [network_names(block) for block in decoder_blocks(model)] == [
        {view.name for view in network.weights} for network in networks
    ]
    plan = make_plan(model=str(tmp_path), method="sparsellm", sparsity=0.5, samples=4, length=16, eval_samples=2)
    assert "solver of the network" in {stage.name for stage in plan.stages}


@pytest.mark.parametrize("family", [family for family in FAMILIES if not is_mixture(family)])
def test_the_network_of_a_plan_is_that_of_a_run(family: str) -> None:
    model = build(family, layers=1)
    (block,) = decoder_blocks(model)
    assert network_names(block) == {view.name for view in feed_forwards(model, [block])[0].weights}


def network_names(block: Block) -> set[str]:
    part = feed_forward_part(block)
    assert part is not None
    return {view.name for view in (*part.inner, part.output)}


def mixture(family: str, device: str) -> PreTrainedModel:
    """A random mixture of eight experts, two blocks."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    with torch.device(device):
        if family == "mixtral":
            config = MixtralConfig(**shape, intermediate_size=96, num_key_value_heads=2, num_local_experts=8)
            return MixtralForCausalLM(config).eval()
        experts = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_key_value_heads=2, **experts)).eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_the_plan_of_a_mixture_of_experts_is_what_its_run_holds(family: str, name: str) -> None:
    """As if the router sent every expert as many tokens as any other: here it is drawn at random."""
    recipe, task = recipe_named(name), Task(target=Target(0.5), calibration=text(16, 256))
    plan = mixture(family, "meta")
    stages = pruning_stages(Anatomy(family, plan, decoder_blocks(plan)), recipe, task, stream=False)
    model = mixture(family, "cpu")
    weights = sum(p.nbytes for p in model.parameters())
    with counted() as counting, torch.no_grad():
        counting.know(*model.parameters(), *model.buffers())
        recipe.prune(model, task)
    assert max(stage.bytes for stage in stages) == pytest.approx(weights + counting.peak, rel=0.1)
    done = sum((stage.work for stage in stages), Work()).operations
    assert done == pytest.approx(counting.work.operations, rel=0.3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_mixture_of_experts_does_the_work_that_is_counted_without_data(family: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        model = mixture(family, device)
        with counted() as counting, torch.no_grad():
            counting.know(*model.parameters(), *model.buffers())
            for batch in text(4, 64).batches:
                next_token_loss(model, batch)
        found.append(counting.work.operations)
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["elsa-published", *(pytest.param(name, marks=pytest.mark.slow) for name in ("elsa", "elsa-l", "gradual"))]
)
def test_the_plan_of_a_method_that_trains_is_what_its_run_holds(name: str) -> None:
    recipe = recipe_named(name, steps=16)
    assert isinstance(recipe, Trained)
    task = Task(target=Target(0.5), calibration=text(24, 64))
    stages = training_stages(Anatomy.of("embedded", "float32"), recipe, task)
    planned = max(stage.bytes for stage in stages)
    held, _ = pruned_and_counted(recipe, task)
    assert planned == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize(
    ("name", "how", "dtype"),
    [
        ("gradual", {}, "float32"),
        pytest.param("gradual", {"precision": "bf16"}, "float32", marks=pytest.mark.slow),
        pytest.param("gradual", {"micro_batch": 2}, "float32", marks=pytest.mark.slow),
        pytest.param("gradual", {"gradient_checkpointing": True}, "float32", marks=pytest.mark.slow),
        pytest.param(
            "elsa",
            {"precision": "bf16", "gradient_checkpointing": True, "micro_batch": 3},
            "float32",
            marks=pytest.mark.slow,
        ),
        pytest.param("elsa", {}, "bfloat16", marks=pytest.mark.slow),
        pytest.param("elsa-l", {"precision": "bf16"}, "bfloat16", marks=pytest.mark.slow),
        pytest.param("elsa-published", {}, "float32", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_of_a_method_that_trains_is_what_the_allocator_gives(
    name: str, how: dict[str, Any], dtype: str
) -> None:
    """Within 3 %, in every setting of the engine."""
    recipe = recipe_named(name, engine=Engine(**how))
    assert isinstance(recipe, Trained)
    recipe = replace(recipe, steps=3, lr=1e-3)
    task = Task(target=Target(0.5), calibration=text(24, 128))
    planned = training_stages(Anatomy.of("embedded", dtype), recipe, task)[0]
    model: Any = embedded().to(getattr(torch, dtype))
    weights = sum(p.nbytes for p in model.parameters())
    assert planned.bytes == pytest.approx(
        weights + allocated(lambda: recipe.run(model, task, project=keep_all)), rel=0.03
    )
    assert planned.parts["gradients"] == 4 * model.num_parameters()
    assert ("anchors" in planned.parts) == name.startswith("elsa")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elsa", "gradual", "staged"])
def test_the_plan_of_a_method_that_trains_counts_the_products_of_all_its_steps(name: str) -> None:
    """Also of the evaluations after its projections, of which the trial of three steps has fewer."""
    recipe = recipe_named(name)
    assert isinstance(recipe, Trained)
    recipe = replace(recipe, steps=12, lr=1e-3)
    task = Task(target=Target(0.9), calibration=text(24, 64))
    planned = training_stages(Anatomy.of("embedded", "float32"), recipe, task)[0].work
    with counted() as counting:
        recipe.run(embedded(), task, project=keep_all)
    assert planned.counts["products_float32"] == pytest.approx(counting.work.counts["products_float32"], rel=1e-3)
    assert planned.counts["traffic"] == pytest.approx(counting.work.counts["traffic"], rel=0.2)


@pytest.mark.slow
def test_elsa_solves_the_layer_problems_as_often_as_staged() -> None:
    """At the end it fixes the support that it has."""

    def work(name: str) -> list[Work]:
        recipe = replace(recipe_named(name), steps=3, lr=1e-3)
        assert isinstance(recipe, Trained)
        task = Task(target=Target(0.9), calibration=text(24, 128))
        return [stage.work for stage in training_stages(Anatomy.of("embedded", "float32"), recipe, task)[1:]]

    assert work("elsa") == work("staged")


@pytest.mark.slow
def test_a_large_problem_takes_what_small_ones_foretell() -> None:
    trial = LayerTrial(LOCAL_METHODS["admm"], Target(0.5), None, (1024,), 1024, torch.float32, validation=True)
    foretold, counted_ = estimated(trial), trial(1.0, False)
    assert foretold.peak == pytest.approx(counted_.peak, rel=0.1)


def test_work_scales_by_kind() -> None:
    work = Work.of(products_float32=8.0, factor_float64=1.0, traffic=4.0, calls=3.0)
    assert work.scaled(2.0).counts == {"products_float32": 64.0, "factor_float64": 8.0, "traffic": 16.0, "calls": 3.0}
    assert (work + work).counts == (work * 2).counts
    assert work.operations == 9.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_machine_has_a_rate_for_every_kind_of_work(device: str) -> None:
    here = measured_here(device=device)
    assert set(here.rates) == set(KINDS) - {"tokenize"}
    assert all(rate > 0 for rate in here.rates.values())
    twice = Machine("twice", "", {kind: 2 * rate for kind, rate in here.rates.items()})
    work = Work.of(products_float32=1e9, disk_read=1e6)
    assert twice.seconds(work) == pytest.approx(here.seconds(work) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_method_has_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give_rates(monkeypatch)
    sparsity = 0 if name == "tuned-dense" else 0.5
    steps = 16 if isinstance(RECIPES[name], Trained) else None
    plan = make_plan("embedded", method=name, sparsity=sparsity, samples=16, length=32, steps=steps)
    assert plan.refusal() is None
    assert plan.seconds > 0
    weights = plan.weight_bytes
    assert all(stage.bytes > weights for stage in plan.stages)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("gpu", GPUS)
def test_several_gpus_hold_less_each_and_take_less_time(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give_rates(monkeypatch)
    how = {"method": "elsa-published", "sparsity": 0.5, "samples": 16, "length": 32, "steps": 16, "gpu": gpu}
    one, eight = (make_plan("embedded", **how, gpus=gpus) for gpus in (1, 8))  # type: ignore[arg-type]
    assert eight.peak("device").bytes < one.peak("device").bytes
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert one.peak("host").parts.keys() <= {"interpreter and libraries", "activations between blocks"}


def test_a_model_is_planned_as_a_run_would_read_it(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block from the folder whose weights would fill the memory, unless that is chosen."""
    give_rates(monkeypatch)
    how: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "samples": 4}
    weights = (model_folder / "model.safetensors").stat().st_size
    for free, streams in ((1.9 * weights, True), (2.1 * weights, False)):
        monkeypatch.setattr("admm_prune.plan.plan.free_bytes", lambda _, free=free: round(free))
        monkeypatch.setattr("admm_prune.runs.prune.free_bytes", lambda _, free=free: round(free))
        plan = make_plan(model_folder, **how)
        assert plan.stream == streams == decide("auto", model_folder, recipe_named("wanda"), True, round(free))
        assert any("--no-stream" in note for note in plan.notes) == streams
        chosen = {choice: make_plan(model_folder, **how, stream=choice) for choice in (True, False)}
        assert [one.stream for one in chosen.values()] == [True, False]
        assert not any("--no-stream" in note for one in chosen.values() for note in one.notes)
    assert not make_plan(model_folder, **how | {"method": "struprune-padded"}, gpu="h100", device_memory=0.001).stream
    monkeypatch.setattr("admm_prune.runs.prune.weight_bytes", lambda _: 10**6)
    assert [make_plan(model_folder, **how, gpu="h100", device_memory=gb).stream for gb in (0.001, 0.003)] == [
        True,
        False,
    ]


def test_parts_that_a_run_takes_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    give_rates(monkeypatch)
    how: dict[str, Any] = {"method": "admm", "sparsity": 0.5, "samples": 4, "length": 32}
    plan = make_plan("embedded", **how, constraint="row-wise", bounds=True)
    assert any("--bounds is not counted" in note for note in plan.notes)
    with pytest.raises(UserError, match="struprune takes no constraint"):
        make_plan("embedded", **how | {"method": "struprune"}, constraint="row-wise")


@pytest.mark.parametrize(
    ("method", "advises"),
    [
        ("elsa", True),
        ("staged", True),
        ("gradual", True),
        ("elsa-published", True),
        ("elsa-l", False),
        ("tuned-dense", False),
    ],
)
def test_less_state_is_advised_where_a_method_has_moments_in_full(
    method: str, advises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_rates(monkeypatch)
    stage = Stage(name="training", parts={"weights": 4, "Adam's moments": 8}, work=Work.of())
    plan = replace(make_plan("embedded", method="wanda", sparsity=0.5, samples=1, length=32), method=method)
    refused = replace(plan, stages=(stage,), limits={"host": 1}).refusal()
    assert refused is not None
    assert ("use elsa-l" in refused) == advises


@pytest.mark.parametrize(("method", "advises"), [("wanda", True), ("struprune", True), ("struprune-padded", False)])
def test_streaming_is_advised_where_a_method_streams(
    method: str, advises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_rates(monkeypatch)
    stage = Stage(name="statistics", parts={"weights": 8}, work=Work.of())
    plan = replace(make_plan("embedded", method="wanda", sparsity=0.5, samples=1, length=32), method=method)
    refused = replace(plan, stages=(stage,), limits={"host": 1}).refusal()
    assert refused is not None
    assert ("use --stream, which" in refused) == advises


def test_what_does_not_fit_is_told_with_its_part_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    give_rates(monkeypatch)
    plan = make_plan("embedded", method="wanda", sparsity=0.5, samples=8, length=64, memory=100)
    assert plan.refusal() is None
    refused = replace(plan, limits={"host": 10**6}).refusal()
    assert refused is not None
    assert "wanda does not fit" in refused
    assert "GB on the host, 0.00 GB are available; at stage '" in refused


def test_experts_that_are_solved_in_batches_are_counted_so() -> None:
    """A solver that takes six matrices of a shape at once is given what its batch is bound to, on any device."""
    task = Task(target=Target(0.7), calibration=text(4, 32))
    views = [view_of(torch.randn(96, 32)) for _ in range(6)]

    def planned(method: str, device: str) -> int:
        walk: Any = SimpleNamespace(parts=1, device=torch.device(device))
        collected = Collected([((view,), 32) for view in views], Cost(), 0)
        stages = _local(collected, LOCAL_METHODS[method], task, 1, walk)
        return max(stage.parts[SOLVER] for stage in stages if stage.name == "solver")

    inputs = [SharedInput((view,), LayerStatistics(random_gram(32), 64)) for view in views]
    with counted() as counting, measured_cost(counting) as found, torch.no_grad():
        counting.know(*(one.statistics.gram for one in inputs), *(view.parameter for view in views))
        prune_several(inputs, LOCAL_METHODS["admm"], task)
    assert found.peak <= planned("admm", "cpu") == planned("admm", "cuda") <= 2 * found.peak
    assert planned("admm", "cpu") > 2 * planned("sparsegpt", "cpu")


def test_a_plan_tells_experts_from_other_matrices_of_their_shape() -> None:
    """On the meta device no matrix has an address: a head's output and an expert may be of one shape."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config).eval()
    block = decoder_blocks(model)[0]
    experts = {number: view for number, view in enumerate(block.weights) if view.expert is not None}
    seen: list[int] = []
    x = torch.empty(3, 32, device="meta")
    with routed(
        experts, lambda number, _: seen.append(number), lambda: torch.ones(3, dtype=torch.bool), everything=False
    ):
        for view in block.weights:
            if view.expert is None and view.shape[1] == 32:
                view.module(x)
    assert seen == []


def test_the_sign_of_a_value_is_no_answer_about_it() -> None:
    with counted():
        x = torch.empty(4, 4, device="meta")
        assert bool(torch.isfinite(torch.where(x > 0, x, 0 * x) * (x > 0)).all())
        assert not bool((x > 0).any())
