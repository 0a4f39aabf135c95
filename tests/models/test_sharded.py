"""A model sharded over processes: the rows of the whole model, gathered a block at a time, with what became of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Runtime, Task
from admm_prune.methods.elsa.engine import teacher_of
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.loading import LoadedModel, fingerprint, load, open_on_disk, save
from admm_prune.models.parallel import World
from admm_prune.models.sharded import ShardedModel
from admm_prune.models.streaming import IN_MEMORY, ModelOnDisk
from admm_prune.models.structure import decoder_blocks
from benchmarks.sharded_memory import Run, peaks, sizes_of, write_model
from tests.models.tiny_models import build
from tests.solvers.test_sparse_adam_sharded import in_processes

IDS = torch.tensor([[0, 5, 17, 42, 99]])
# A tied head; an untied one and biases; transposed matrices; experts that files keep one by one.
FAMILIES = ("llama", "llama-untied", "gpt2", "mixtral")
DAMAGED = "damaged"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A process group of this process: all rows are in it, and collectives are called nevertheless."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield World.current()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder of each family, and one with a weight that is damaged in its last row."""
    place = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save(LoadedModel(build(family), tokenizer, family), place / family, {})
    shutil.copytree(place / "llama", place / DAMAGED)
    path = place / DAMAGED / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    return place


def opened(folder: Path, world: World) -> tuple[ModelOnDisk, ShardedModel]:
    offloading = open_on_disk(str(folder)).offloading
    assert isinstance(offloading, ModelOnDisk)
    return offloading, ShardedModel(offloading.model, offloading, world)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def resident(model: nn.Module) -> set[str]:
    """The names of the parameters that are not on the meta device."""
    return {name for name, x in model.named_parameters(remove_duplicate=False) if not x.is_meta}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_are_the_model(family: str, folders: Path, alone: World) -> None:
    whole = load(str(folders / family)).model
    _, sharded = opened(folders / family, alone)
    assert torch.equal(logits(sharded.sharded), logits(whole))
    assert torch.equal(logits(sharded.copy(torch.float32)), logits(whole))
    assert resident(sharded.model) == set()
    with ExitStack() as stack:
        stack.enter_context(sharded.outside())
        stack.enter_context(sharded.outside())  # as evaluations do that record first
        for index in range(len(sharded.blocks)):
            stack.enter_context(sharded.block(index))
        assert torch.equal(logits(sharded.model), logits(whole))
    assert resident(sharded.model) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_in_another_dtype_is_the_teacher_of_one_process(family: str, folders: Path, alone: World) -> None:
    whole = load(str(folders / family)).model
    _, sharded = opened(folders / family, alone)
    copied, expected = sharded.copy(torch.bfloat16), teacher_of(whole, torch.bfloat16)
    assert {name: x.dtype for name, x in copied.named_buffers()} == {n: x.dtype for n, x in whole.named_buffers()}
    assert {x.dtype for x in copied.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(copied), logits(expected))


def test_only_what_is_entered_is_gathered(folders: Path, alone: World) -> None:
    _, sharded = opened(folders / "llama", alone)
    with sharded.block(1):
        assert resident(sharded.model) == {
            f"model.layers.1.{name}" for name, _ in sharded.blocks[1].module.named_parameters()
        }
    with sharded.outside():
        assert resident(sharded.model) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
        assert sharded.model.get_parameter("lm_head.weight") is sharded.model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_reach_the_shards_and_the_original(family: str, folders: Path, alone: World, tmp_path: Path) -> None:
    on_disk, sharded = opened(folders / family, alone)
    teacher = sharded.copy(torch.float32)
    dense = load(str(folders / family)).model
    view = sharded.blocks[1].weights[0]
    with sharded.block(1):
        view.write(torch.zeros(view.shape))
    with sharded.outside():
        sharded.model.get_input_embeddings().weight[3] = 0.5
    expected = load(str(folders / family)).model
    changed = next(one for one in decoder_blocks(expected)[1].weights if one.name == view.name)
    changed.write(torch.zeros(view.shape))
    expected.get_input_embeddings().weight[3] = 0.5
    assert torch.equal(logits(sharded.sharded), logits(expected))
    assert torch.equal(logits(teacher), logits(dense)), "the copy has weights of its own"
    sharded.copy_to(dense)
    assert torch.equal(logits(dense), logits(expected))
    sharded.write_to(on_disk, tmp_path, {})
    on_disk.save(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(reloaded), logits(expected))


def test_weights_that_nothing_would_keep_are_refused(folders: Path, stories: Sequences) -> None:
    loaded = open_on_disk(str(folders / "llama"))
    task = Task(target=Target(0.5), calibration=stories)
    with pytest.raises(ValueError, match="needs a journal"):
        recipe_named("gradual").prune(loaded.model, task, Runtime(offloading=loaded.offloading))


def test_a_training_step_leaves_the_forms_in_step(folders: Path, alone: World) -> None:
    _, sharded = opened(folders / "llama", alone)
    sharded.sharded.requires_grad_(True)
    whole = load(str(folders / "llama")).model.requires_grad_(True)
    for model in (sharded.sharded, whole):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    other = load(str(folders / "llama")).model
    sharded.copy_to(other)
    for name, parameter in whole.named_parameters():
        assert torch.allclose(other.get_parameter(name), parameter, atol=1e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_does_not_depend_on_where_the_weights_are(family: str, folders: Path) -> None:
    """So that a run is resumed by another number of processes, which may read only their shards."""
    loaded = load(str(folders / family))
    assert fingerprint(loaded) == fingerprint(open_on_disk(str(folders / family)))
    decoder_blocks(loaded.model)[0].weights[0].read()[0, 0] += 1
    assert fingerprint(loaded) != fingerprint(open_on_disk(str(folders / family)))


def shards_in(rank: int, processes: int, folder: str, models: Path) -> None:
    """What each process of several finds."""
    world = World.current()
    for family in FAMILIES:
        whole = load(str(models / family)).model
        on_disk, sharded = opened(models / family, world)
        in_memory = ShardedModel(whole, IN_MEMORY, world)
        for name, parameter in whole.named_parameters():
            rows = parameter.detach().chunk(processes)  # of one row, or of three, the last processes have none
            for one in (sharded, in_memory):
                local = one.sharded.get_parameter(name).to_local()
                assert torch.equal(local, rows[rank] if rank < len(rows) else parameter[:0]), (family, name)
        assert torch.allclose(logits(sharded.sharded), logits(whole), atol=1e-6), family
        view = sharded.blocks[0].weights[0]
        with sharded.block(0):
            assert torch.equal(view.read(), decoder_blocks(whole)[0].weights[0].read())
            view.write(torch.full(view.shape, 0.25))
        sharded.write_to(on_disk, Path(folder), {})
        assert bool((on_disk.read(on_disk.model, view.parameter_name) == 0.25).any()), family
        with on_disk.block(0):
            assert bool((decoder_blocks(on_disk.model)[0].weights[0].read() == 0.25).all())
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight has NaN or Inf"):
        opened(models / DAMAGED, world)  # the last process alone reads that row


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_reads_its_rows(tmp_path: Path, folders: Path, processes: int) -> None:
    in_processes(processes, shards_in, str(tmp_path), folders)


@pytest.mark.slow
def test_the_memory_of_a_process_falls_with_their_number(tmp_path: Path) -> None:
    """Of a whole run with projections, a teacher and a result: a part of what one process needs, and what is gathered.

    Those are the weights of the embedding with their gradient, twice while it is reduced, and three blocks.
    """
    config = write_model(
        tmp_path, vocab_size=4096, hidden_size=256, intermediate_size=640, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    sizes = sizes_of(config)
    one, two, four = (peaks(n, tmp_path, Run()) for n in (1, 2, 4))
    gathered = 3 * sizes["embedding_mib"] + 3 * sizes["block_mib"]
    whole = one[0]["tensors_mib"]
    for count, several in ((2, two), (4, four)):
        for peak in several:
            assert peak["tensors_mib"] <= whole / count + gathered, (count, one, several, sizes)
    kept_whole = peaks(4, tmp_path, Run(whole=True))
    assert min(peak["tensors_mib"] for peak in kept_whole) >= four[0]["tensors_mib"] + 0.6 * sizes["weights_mib"]
