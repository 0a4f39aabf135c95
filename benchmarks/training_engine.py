"""Training by the methods' engine compared with a plain loop: tokens per second, memory, time by phase and its floors.

    python -m benchmarks.training_engine OUT [--model DIR] [--batch-size 4] [--length 256] [--repeats 5]

The plain loop calls the model, computes the cross-entropy of its logits, and uses `clip_grad_norm_` and
`AdamW(fused=True)`, with the same model, batches and autocast. The engine runs `Trainer.step` with SparseAdam: on a
fixed support ("masked"), and while ADMM couples x and z ("admm"). Their steps alternate in one process, each on its own
copy of the weights; dual updates, one every 32 steps, are timed separately. Times are CPU times on a CPU, which other
work affects least, and wall-clock times on a GPU. The phases of a step are measured afterwards, with the device
synchronized at every phase.

The floor of a phase is the time of its operations at the rate of large products of this device in the precision used,
or of its bytes at the rate of a copy. The memory is the peak of a run of a method according to torch's allocator,
compared with the estimate of `admm-prune plan`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from admm_prune import SparseAdam
from admm_prune.data.sequences import Row, Sequences
from admm_prune.methods.base import Task
from admm_prune.methods.elsa.engine import Engine, teacher_of
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.elsa.trainer import Trainer, trainable
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.loading import load
from admm_prune.models.losses import Distillation, next_token_loss
from admm_prune.ops import backend
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.training import training_stages
from admm_prune.solvers import sparse_adam
from benchmarks.machine import headline, machine, write_results

_SPARSITY, _INTERVAL = 0.5, 32
_MEMORY_OF = "elsa-published"  # a method with an anchor: the largest state
PHASES = ("forward", "loss", "backward", "clip", "penalty", "optimizer")


class PlainLoop:
    """What a training script does."""

    def __init__(self, model: nn.Module, engine: Engine, sequences: Sequences, batch_size: int) -> None:
        self.model, self._device = model, next(model.parameters()).device
        self._engine = engine
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        rows = torch.stack([row.ids for row in sequences.rows]).to(self._device)
        self._batches = list(rows.split(batch_size))
        self._done = 0

    def step(self) -> None:
        ids = self._batches[self._done % len(self._batches)]
        with self._engine.autocast(self._device):
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def trainer(
    model: nn.Module, engine: Engine, sequences: Sequences, batch_size: int, *, masked: bool, distilled: bool = False
) -> Trainer:
    """The engine with SparseAdam, as the methods that train make it."""
    how: dict[str, Any] = {"freeze": 1.0} if masked else {"interval": _INTERVAL}
    fused = not backend.uses_triton(next(model.parameters()))
    optimizer = SparseAdam(model, sparsity=_SPARSITY, lr=1e-5, fused=fused, **how)
    dtype = engine.dtype(next(model.parameters()).device)
    loss = Distillation(teacher_of(model, dtype)) if distilled else next_token_loss
    return Trainer(model, optimizer, loss, sequences, steps=1 << 20, batch_size=batch_size, seed=0, engine=engine)


def random_text(vocabulary: int, rows: int, length: int) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(Row(torch.randint(vocabulary, (length,), generator=generator), length) for _ in range(rows))
    return Sequences(drawn, "windows", length, None, 8)


class Clock:
    """Seconds of the processor, or of the clock once a GPU is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        if self._device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds(self, call: Callable[[], Any]) -> float:
        began = self.now()
        call()
        return self.now() - began


def turns(runs: dict[str, Any], clock: Clock, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, after one that allocates the state."""
    for run in runs.values():
        run.step()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        for name in order:
            seconds[name].append(clock.seconds(runs[name].step))
    return seconds


@contextmanager
def timed_phases(run: Trainer, clock: Clock) -> Generator[dict[str, float]]:
    """Seconds by phase of the steps within it.

    The loss is what happens at the output embedding; its gradients are computed there. Norms belong to "clip".
    """
    spent = dict.fromkeys((*PHASES, "backward_pass", "step"), 0.0)
    head = cast("Any", run.model).get_output_embeddings()
    began: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            start = clock.now()
            try:
                return function(*args, **how)
            finally:
                spent[name] += clock.now() - start

        return call

    with ExitStack() as stack:

        def patched(owner: Any, attribute: str, name: str) -> None:
            original = getattr(owner, attribute)
            was_own = attribute in vars(owner)
            setattr(owner, attribute, timed(name, original))
            stack.callback(lambda: setattr(owner, attribute, original) if was_own else delattr(owner, attribute))

        before = head.register_forward_pre_hook(lambda *_: began.append(clock.now()))
        after = head.register_forward_hook(
            lambda *_: spent.__setitem__("loss", spent["loss"] + clock.now() - began.pop())
        )
        stack.callback(before.remove)
        stack.callback(after.remove)
        patched(run, "objective", "forward")
        patched(run, "backward", "backward_pass")
        patched(run.optimizer, "step", "step")
        patched(run.optimizer, "_step_adam", "optimizer")
        patched(sparse_adam, "total_norm", "clip")
        patched(sparse_adam, "clip", "clip")
        yield spent
    spent["backward"] = spent.pop("backward_pass") - spent["forward"]
    spent["forward"] -= spent["loss"]
    spent["penalty"] = spent.pop("step") - spent["optimizer"] - spent["clip"]


def floors(model: Any, tokens: int, run: Trainer, rates: dict[str, float]) -> dict[str, float]:
    """Seconds by phase that this device cannot be faster than: the longer of its operations and its bytes.

    Attention between tokens is left out. A step of Adam reads and writes x, m and v and reads g; the norm reads g, and
    clipping reads and writes it; the penalty reads x and the anchor and reads and writes g; a mask reads and writes g.
    """
    head = model.get_output_embeddings().weight.numel()
    entries = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.get_input_embeddings().weight.numel()
    matrices -= 0 if model.config.tie_word_embeddings else head
    pruned = sum(mask.numel() for mask in run.optimizer.masks().values())
    operations = {"forward": 2 * matrices * tokens, "backward": 4 * matrices * tokens, "loss": 6 * head * tokens}
    moved = {
        "optimizer": 28 * entries,
        "clip": 12 * entries,
        "penalty": (8.125 if run.optimizer.frozen else 14) * pruned,
    }
    return {name: operations.get(name, 0) / rates["products"] + moved.get(name, 0) / rates["bytes"] for name in PHASES}


def measured_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Operations per second of a large product in a dtype, bytes per second of a copy that no cache holds."""
    clock, size = Clock(device), 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.rand(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "products": (lambda: a @ b, 2.0 * size**3),
        "bytes": (lambda: target.copy_(source), 8.0 * source.numel()),
    }
    rates = {}
    for name, (call, work) in calls.items():
        call()
        rates[name] = work / median(clock.seconds(call) for _ in range(9))
    return rates


def memory(arguments: argparse.Namespace, engine: Engine) -> dict[str, float]:
    """Bytes at the peak of a short run of a method: by the allocator, and as planned."""
    device = torch.device(arguments.device)
    recipe = recipe_named(_MEMORY_OF, engine=engine)
    assert isinstance(recipe, Trained)
    recipe = replace(recipe, steps=2, batch_size=arguments.batch_size, lr=1e-5)
    anatomy = Anatomy.of(arguments.model, "float32")
    text = random_text(anatomy.model.config.vocab_size, 4 * arguments.batch_size, arguments.length)
    task = Task(target=Target(_SPARSITY), calibration=text)
    planned = training_stages(anatomy, recipe, task, arguments.device)[0]
    model = load(arguments.model, dtype="float32", device=arguments.device).model
    weights = sum(p.nbytes for p in model.parameters())

    def project(session: Session, target: Target) -> None:
        raise NotImplementedError

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        recipe.run(model, task, project=project)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            recipe.run(model, task, project=project)
        records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = weights + max(accumulate(e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())))
    return {"measured": peak, "planned": planned.bytes, "weights": weights, "parts": dict(planned.parts)}  # type: ignore[dict-item]


def compared(arguments: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """Steps by turns, then by phase."""
    device = torch.device(arguments.device)
    model: Any = load(arguments.model, dtype="float32", device=arguments.device).model
    text = random_text(model.config.vocab_size, 4 * arguments.batch_size, arguments.length)
    clock, tokens = Clock(device), arguments.batch_size * arguments.length
    masked, admm = (copy.deepcopy(model) for _ in range(2))
    with trainable(model), trainable(masked), trainable(admm):
        runs: dict[str, Any] = {
            "plain": PlainLoop(model, engine, text, arguments.batch_size),
            "masked": trainer(masked, engine, text, arguments.batch_size, masked=True),
            "admm": trainer(admm, engine, text, arguments.batch_size, masked=False),
        }
        seconds = turns(runs, clock, arguments.repeats)
        rates = measured_rates(engine.dtype(device), device)
        phases: dict[str, Any] = {}
        for name in ("masked", "admm"):
            runs.pop("plain", None)
            with timed_phases(runs[name], clock) as spent:
                runs[name].step()
            phases[name] = {
                "seconds": {phase: spent[phase] for phase in PHASES},
                "floors": floors(model, tokens, runs[name], rates),
            }
        update = clock.seconds(lambda: runs["admm"].optimizer._update_duals(0, 1.0))
    plain = median(seconds["plain"])
    steps = {
        name: {
            "seconds": each,
            "tokens_per_second": tokens / median(each),
            "slowest": tokens / max(each),
            "fastest": tokens / min(each),
            "of_plain": plain / median(each),
        }
        for name, each in seconds.items()
    }
    return {"tokens": tokens, "rates": rates, "steps": steps, "phases": phases, "dual_update_seconds": update}


def table(content: dict[str, Any]) -> str:
    result, settings = content["result"], content["settings"]
    shape = f"{settings['batch_size']} x {settings['length']} tokens, {content['precision']}, on {settings['device']}"
    lines = [headline(content["machine"]), f"{settings['model']}, {shape}; {settings['repeats']} steps each, by turns"]
    lines += ["", f"{'':8}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'of plain':>10}"]
    for name, row in result["steps"].items():
        lines.append(
            f"{name:8}{row['tokens_per_second']:>10.1f}{row['slowest']:>10.1f}{row['fastest']:>10.1f}"
            f"{row['of_plain']:>10.3f}"
        )
    rates, floor = result["rates"], sum(result["phases"]["masked"]["floors"].values())
    share = floor * result["steps"]["masked"]["tokens_per_second"] / result["tokens"]
    lines.append("")
    lines.append(f"products: {rates['products'] / 1e9:.1f} Gop/s, copies: {rates['bytes'] / 1e9:.1f} GB/s")
    lines.append(f"masked: the floors of all phases are {share:.2f} of its time")
    lines.append(f"admm: a dual update, every {_INTERVAL} steps, takes {result['dual_update_seconds']:.2f} s more")
    lines.append("")
    lines.append(f"{'seconds':12}{'masked':>10}{'floor':>10}{'admm':>10}{'floor':>10}")
    for phase in PHASES:
        cells = [result["phases"][name][kind][phase] for name in ("masked", "admm") for kind in ("seconds", "floors")]
        lines.append(f"{phase:12}" + "".join(f"{cell:>10.3f}" for cell in cells))
    if content["memory"]:
        peak, planned = content["memory"]["measured"], content["memory"]["planned"]
        sizes = f"{peak / 2**20:.1f} MiB, planned {planned / 2**20:.1f} MiB, {planned / peak:.4f}"
        lines.append("")
        lines.append(f"memory of {_MEMORY_OF} at its peak: {sizes}")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    engine = Engine.of(arguments)
    if arguments.memory_alone:
        print(json.dumps(memory(arguments, engine)))
        return
    result = compared(arguments, engine)
    measured: dict[str, Any] = {}
    if not arguments.no_memory:  # in a process that holds nothing else
        command = [sys.executable, "-m", "benchmarks.training_engine", *(words or sys.argv[1:]), "--memory-alone"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
    left_out = ("out", "no_memory", "memory_alone")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    content = {
        "machine": machine(),
        "settings": {**settings, "model": Path(arguments.model).name},
        "precision": str(engine.dtype(torch.device(arguments.device))).removeprefix("torch."),
        "result": result,
        "memory": measured,
    }
    text = table(content)
    write_results(arguments.out, content, text)
    print(text, end="")


if __name__ == "__main__":
    main()
