"""The peak memory of each process when 1, 2 or 4 processes train one model together.

    python -m benchmarks.sharded_memory OUT.json [--processes 1 2 4] [--blocks 30] [--steps 2] [--whole]

The model has random weights in float32, the shape of SmolLM2-135M (30 blocks of width 576, a vocabulary of 49152, the
head tied to the embedding), and the tokenizer of the embedded model. Every process counts the bytes of all tensors that
are alive, before and after every operation of torch, while it opens the model, evaluates it, prunes it by `elsa`
(layer-wise projection, training with a teacher, a copy of the best model), evaluates it again and saves it. Resident
memory is also measured, by the high-water mark of the kernel. With --whole every process loads the whole model, as with
`run --no-stream`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from admm_prune.methods.base import Journal, Runtime, Task
from admm_prune.methods.elsa.elsa import Elsa
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import EMBEDDED, load, open_on_disk, save
from admm_prune.models.parallel import World
from admm_prune.runs.machine import PeakMemory, return_freed_memory
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from benchmarks.machine import headline, machine

if TYPE_CHECKING:
    from transformers import LlamaConfig

LENGTH, SEQUENCES, BATCH = 32, 24, 4
_MIB = 2**20


@dataclass(frozen=True)
class Run:
    """Steps of training; whether every process loads the whole model."""

    steps: int = 2
    whole: bool = False


class Scratch(Journal):
    """Keeps weights in a folder, and no checkpoints."""

    keeps = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scratch(self) -> Path:
        return self._folder


class LiveTensors(TorchDispatchMode):
    """Within it the bytes of all tensors off the meta device that torch's operations take or return are counted.

    A storage counts once, from when it is first seen until it is freed, as large as it is then: FSDP2 resizes its
    storages. What an operation holds only while it runs is not seen.

    Attributes:
        total, peak: bytes now; the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            resized = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return resized

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._see(args, kwargs)
        result = func(*args, **kwargs)
        self._see(result)
        return result

    def _see(self, *values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                tensor = value._local_tensor if isinstance(value, DTensor) else value
                if tensor.device.type != "meta":
                    self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.total += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.total)

    def _forget(self, key: int) -> None:
        self.total -= self._sizes.pop(key, 0)


def write_model(folder: Path, **shape: int) -> LlamaConfig:
    """Writes a random Llama of SmolLM2-135M's shape with a tokenizer, and a text beside it.

    Args:
        shape: fields of the config that differ.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2 * LENGTH} | shape
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    load(EMBEDDED).tokenizer.save_pretrained(folder)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=3)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=40)) for _ in range(100)))
    return config


def measured(rank: int, processes: int, folder: Path, model: Path, how: Run) -> None:
    """A run in this process, one of several; the first leaves the peaks of all in a file."""
    os.environ.update(MASTER_ADDR="localhost", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    load(EMBEDDED)  # imports what the run would
    return_freed_memory()
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    world = World.current()
    recipe = recipe_named("elsa", steps=how.steps)
    assert isinstance(recipe, Elsa)
    recipe = replace(recipe, lr=1e-3, batch_size=BATCH, projection=LOCAL_METHODS["wanda"])
    text = TextSettings(data=str(model / "text.txt"), length=LENGTH, packing="windows", eval_samples=BATCH)
    with PeakMemory() as resident, LiveTensors() as tensors:
        loaded = (load if how.whole or processes == 1 else open_on_disk)(str(model))
        texts = Texts(text, loaded)
        evaluate(loaded.model, texts.evaluation, loaded.offloading, world=world)
        task = Task(target=Target(0.7), calibration=texts.calibration(SEQUENCES))
        recipe.prune(loaded.model, task, Runtime(offloading=loaded.offloading, world=world, journal=Scratch(folder)))
        evaluate(loaded.model, texts.evaluation, loaded.offloading, world=world)
        if world.first:
            save(loaded, folder / "out", {})
    peaks = {"tensors_mib": round(tensors.peak / _MIB, 1), "resident_mib": resident.extra_mib}
    everywhere = world.all_gather(peaks)
    if rank == 0:
        (folder / "peaks.json").write_text(json.dumps(everywhere))
    if processes > 1:
        dist.destroy_process_group()


def peaks(processes: int, model: Path, how: Run) -> list[dict[str, float]]:
    """Of every process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(measured, (processes, folder, model, how), nprocs=processes)
        content: list[dict[str, float]] = json.loads((folder / "peaks.json").read_text())
    return content


def sizes_of(config: LlamaConfig) -> dict[str, float]:
    """MiB of all weights, of a block, and of the embedding, in float32."""
    heads = config.num_attention_heads
    keys = config.hidden_size * config.num_key_value_heads // heads
    block = 2 * config.hidden_size * (config.hidden_size + keys + 1) + 3 * config.hidden_size * config.intermediate_size
    embedding = config.vocab_size * config.hidden_size
    parts = {"block": block, "embedding": embedding}
    parts["weights"] = config.num_hidden_layers * block + embedding + config.hidden_size
    return {f"{name}_mib": round(4 * count / _MIB, 1) for name, count in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--whole", action="store_true")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        config = write_model(Path(name), num_hidden_layers=chosen.blocks)
        how = Run(chosen.steps, chosen.whole)
        runs = {n: peaks(n, Path(name), how) for n in chosen.processes}
    facts, sizes = machine(), sizes_of(config)
    content = {"machine": facts, **asdict(how), **sizes, "processes": runs}
    chosen.out.write_text(json.dumps(content, indent=2) + "\n")
    print(headline(facts))
    print(f"{how}; MiB:", ", ".join(f"{x} {name[:-4]}" for name, x in sizes.items()))
    print("processes  tensors at the peak, MiB (each process)  resident beyond the start, MiB")
    for count, each in runs.items():
        columns = [", ".join(f"{peak[key]:.0f}" for peak in each) for key in ("tensors_mib", "resident_mib")]
        print(f"{count:9d}  {columns[0]:39s}  {columns[1]}")


if __name__ == "__main__":
    main()
