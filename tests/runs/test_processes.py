"""Several processes under torchrun: the result of one, one line where one fails, and a run that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from admm_prune.errors import UserError
from admm_prune.methods.base import NOTHING, Journal, Recipe, Runtime, Task
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.sparsellm import SPARSELLM
from admm_prune.methods.struprune.struprune import STRUCTURED
from admm_prune.methods.target import Target
from admm_prune.models.loading import load
from admm_prune.models.parallel import World
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import savings, sublayers
from admm_prune.problems.layer import Share
from admm_prune.runs.prune import shards_weights
from admm_prune.runs.texts import Texts
from admm_prune.settings import Settings, TextSettings
from tests.solvers.test_sparse_adam_sharded import in_processes

LINE = "admm-prune: "
SCRIPT = "import sys; from admm_prune.cli import main; sys.argv[0] = 'admm-prune'; main()"


def start(
    folder: Path, model: Path, text: Path, processes: int, method: str, *more: str, out: str = "out", samples: int = 13
) -> subprocess.Popen[str]:
    """`admm-prune run` in so many processes; 13 sequences, so that the shares are uneven."""
    script = folder / "admm_prune_main.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(torchrun if processes > 1 else [sys.executable]), str(script), "run", "--model", str(model)]
    command += ["--data", str(text), "--method", method, "--length", "32", "--packing", "windows", "--device", "cpu"]
    command += ["--eval-samples", "9", "--samples", str(samples), "--out", str(folder / out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(run: subprocess.Popen[str]) -> str:
    """What a run printed that ended well."""
    stdout, stderr = run.communicate(timeout=600)
    assert run.returncode == 0, stderr
    return stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def assert_equal(one: Path, several: Path, *, measured: bool = False) -> None:
    """The same files, but that a sharded model is written block by block; masks equal, weights and figures to rounding.

    At a rate measured on the tiny model, which is as large as its weights, Adam makes up to a whole rate of what
    rounding leaves of a gradient that vanishes: there it is the distance of all weights that is small, 1e-4 of their
    norm, as the tests at a gentle rate have each of them within 1e-5.
    """
    others = [{path.name for path in folder.iterdir() if "safetensors" not in path.name} for folder in (one, several)]
    assert others[0] == others[1]
    expected, found = weights(one), weights(several)
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        assert torch.equal(x != 0, found[name] != 0), name
        assert measured or float((x - found[name]).abs().max()) <= 1e-5 * max(1.0, float(x.abs().max())), name
    assert distance(expected, found) <= 1e-4
    reports = [json.loads((folder / "admm_prune.json").read_text()) for folder in (one, several)]
    for which, tolerance in (("dense", 1e-6), ("pruned", 1e-4)):
        assert reports[0][which]["perplexity"] == pytest.approx(reports[1][which]["perplexity"], rel=tolerance)
    layers = [[(layer["name"], layer["tokens"], layer["status"]) for layer in report["layers"]] for report in reports]
    assert layers[0] == layers[1]
    assert reports[0]["details"].get("removed") == reports[1]["details"].get("removed")


BY_BLOCK = ("wanda", "sparsegpt", "admm", *(recipe.name for recipe in (*SPARSELLM, *STRUCTURED)))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|x - y| / |x|, of all weights."""
    away = sum(float((x - other[name]).double().square().sum()) for name, x in one.items())
    return (away / sum(float(x.double().square().sum()) for x in one.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"), [*((method, ()) for method in BY_BLOCK), ("sparsellm", ("--ridge", "auto"))]
)
@pytest.mark.parametrize("processes", [2, 4])
def test_blocks_are_pruned_as_by_one_process(
    tmp_path: Path, model_folder: Path, text_file: Path, method: str, more: tuple[str, ...], processes: int
) -> None:
    how = ("--sparsity", "0.6", "--json", *more)
    for count, out in ((1, "one"), (processes, "several")):
        said = finished(start(tmp_path, model_folder, text_file, count, method, *how, out=out))
        assert len(said.splitlines()) == 1  # one process speaks
        assert json.loads(said)["method"] == method
    assert_equal(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["admm", "sparsellm", "struprune"])
def test_a_streamed_run_too(tmp_path: Path, model_folder: Path, text_file: Path, method: str) -> None:
    for count, out in ((1, "one"), (2, "several")):
        finished(start(tmp_path, model_folder, text_file, count, method, "--sparsity", "0.6", "--stream", out=out))
    assert_equal(tmp_path / "one", tmp_path / "several")


def pruned_in(rank: int, processes: int, folder: str, model: Path, text: Path, recipes: tuple[Recipe, ...]) -> None:
    """Leaves what recipes make of a model in files: its weights, and what there is to say of them."""
    world = World.current()
    for recipe in recipes:
        loaded = load(str(model))
        calibration = Texts(TextSettings(data=str(text), length=32, packing="windows"), loaded).calibration(23)
        outcome = recipe.prune(loaded.model, Task(target=Target(0.5), calibration=calibration), Runtime(world=world))
        found = {name: x.clone() for name, x in loaded.model.state_dict().items()}
        assert len(set(world.all_gather(hashlib.sha256(save(found)).hexdigest()))) == 1, "all end with the same bits"
        assert len(set(world.all_gather(json.dumps(outcome.details)))) == 1
        seconds = [savings(sublayer, "latency").tolist() for sublayer in sublayers(decoder_blocks(loaded.model)[0])]
        assert len(set(world.all_gather(str(seconds)))) == 1, "measured by one for all"
        if rank == 0:
            place = Path(folder, f"{recipe.name}-{processes}")
            save_file(found, place.with_suffix(".safetensors"))
            place.with_suffix(".json").write_text(json.dumps(outcome.details))


@pytest.mark.slow
def test_blocks_in_two_processes(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    """In a process group of one's own, without files between the processes."""
    recipes = (STRUCTURED[0], SPARSELLM[0])
    pruned_in(0, 1, str(tmp_path), model_folder, text_file, recipes)
    in_processes(2, pruned_in, str(tmp_path), model_folder, text_file, recipes)
    for recipe in recipes:
        one, two = (tmp_path / f"{recipe.name}-{count}" for count in (1, 2))
        assert_near(one.with_suffix(".safetensors"), two.with_suffix(".safetensors"))
        told = [json.loads(path.with_suffix(".json").read_text()) for path in (one, two)]
        assert told[0].get("removed") == told[1].get("removed")
        errors = [[figure["rounds"] for figure in one.get("feed_forward", [])] for one in told]
        assert errors[0] == [pytest.approx(rounds, rel=1e-6) for rounds in errors[1]]


TRAINED = [("elsa", 7), ("gradual", 7), ("elsa-published", 40)]  # measuring a rate takes six, which is one step left


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), TRAINED)
@pytest.mark.parametrize("processes", [2, 4])
def test_training_ends_as_in_one_process(
    tmp_path: Path, model_folder: Path, text_file: Path, method: str, steps: int, processes: int
) -> None:
    how = ("--sparsity", "0.7", "--steps", str(steps))
    for count, out in ((1, "one"), (processes, "several")):
        finished(start(tmp_path, model_folder, text_file, count, method, *how, out=out, samples=41))
    assert_equal(tmp_path / "one", tmp_path / "several", measured=method != "elsa-published")


class Checkpoints(Journal):
    """A journal that keeps checkpoints alone."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def checkpoints(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run of a method that trains. At this rate and without a ladder it does not amplify rounding."""

    method: str
    steps: int = 12
    lr: float | None = 2e-3  # None: as measured
    sparsity: float = 0.7
    seed: int = 0
    engine: Engine = Engine()


def trained_in(
    rank: int, processes: int, folder: str, model: Path, text: Path, how: Training, stop: int | None = None
) -> None:
    """Leaves the weights that a recipe ends with in a file; with `stop`, it ends before, with its checkpoint."""

    def progress(done: int, total: int, at_work: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    loaded = load(str(model))
    calibration = Texts(TextSettings(data=str(text), length=32, packing="windows"), loaded).calibration(41)
    recipe = recipe_named(how.method, steps=how.steps, engine=how.engine)
    assert isinstance(recipe, Trained)
    kept = f"{folder}/kept" if stop is not None or Path(folder, "kept").is_dir() else None
    task = Task(target=Target(how.sparsity), calibration=calibration, seed=how.seed)
    journal = Checkpoints(kept) if kept else NOTHING
    runtime = Runtime(world=World.current(), journal=journal, on_progress=progress)
    with nullcontext() if stop is None else suppress(KeyboardInterrupt):
        replace(recipe, lr=how.lr).prune(loaded.model, task, runtime)
    if rank == 0 and stop is None:
        save_file({n: p.detach().clone() for n, p in loaded.model.named_parameters()}, f"{folder}/{processes}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        Training(method="elsa"),
        Training(method="gradual", sparsity=0.9),
        Training(method="elsa", engine=Engine(micro_batch=1, gradient_checkpointing=True)),
    ],
)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_gentle_rate(tmp_path: Path, model_folder: Path, text_file: Path, how: Training, processes: int) -> None:
    trained_in(0, 1, str(tmp_path), model_folder, text_file, how)
    in_processes(processes, trained_in, str(tmp_path), model_folder, text_file, how)
    assert_near(tmp_path / "1", tmp_path / str(processes))


def assert_near(one: Path, several: Path) -> None:
    expected, found = load_file(one), load_file(several)
    for name, x in expected.items():
        assert torch.equal(x != 0, found[name] != 0), name
        assert float((x - found[name]).abs().max()) <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        Training(method="elsa", steps=20, lr=None, sparsity=0.9),  # down a ladder of three supports
        Training(method="gradual", steps=20, lr=None),
    ],
)
@pytest.mark.parametrize("processes", [2, 4])
def test_where_training_amplifies_rounding_several_are_as_near_as_one_is_to_itself(
    tmp_path: Path, model_folder: Path, text_file: Path, how: Training, processes: int
) -> None:
    """A step of Adam makes a whole rate of what rounding leaves of a gradient that vanishes, and a ladder chooses one
    support by what became of the weights on another. So weights that differ in their last bit end far apart in one
    process too: several may be as far from it, but nowhere near as far as the same training in another order."""
    shutil.copytree(model_folder, tmp_path / "model")
    tensors, draw = load_file(model_folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, x in tensors.items():
        up = torch.rand(x.shape, generator=draw) < 0.5
        tensors[name] = torch.where(up, torch.nextafter(x, torch.tensor(torch.inf)), x)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    runs = {"one": (model_folder, how), "bit": (tmp_path / "model", how), "order": (model_folder, replace(how, seed=1))}
    for out, (model, training) in runs.items():
        (tmp_path / out).mkdir()
        trained_in(0, 1, str(tmp_path / out), model, text_file, training)
    in_processes(processes, trained_in, str(tmp_path), model_folder, text_file, how)
    one = load_file(tmp_path / "one/1")
    several, bit, order = (
        distance(one, load_file(path)) for path in (tmp_path / str(processes), tmp_path / "bit/1", tmp_path / "order/1")
    )
    assert several <= 2 * bit, (several, bit, order)
    assert several <= 0.5 * order, (several, bit, order)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["elsa", "gradual"])
@pytest.mark.parametrize(("begun", "then"), [(2, 1), (1, 2), (2, 4)])
def test_a_checkpoint_is_read_by_another_number_of_processes(
    tmp_path: Path, model_folder: Path, text_file: Path, method: str, begun: int, then: int
) -> None:
    how = Training(method=method)
    trained_in(0, 1, str(tmp_path), model_folder, text_file, how)
    (tmp_path / "1").rename(tmp_path / "whole")
    for processes, stop in ((begun, 7), (then, None)):
        (tmp_path / "meeting").unlink(missing_ok=True)
        if processes == 1:
            trained_in(0, 1, str(tmp_path), model_folder, text_file, how, stop)
        else:
            in_processes(processes, trained_in, str(tmp_path), model_folder, text_file, how, stop)
    assert list((tmp_path / "kept/training").glob("*/values.json"))
    assert_near(tmp_path / "whole", tmp_path / str(then))


def killed_once_it_has(run: subprocess.Popen[str], there: Path, pattern: str) -> tuple[list[str], float]:
    """Kills one process of a run when a file appears: the lines of ours that the others say, and how long they take."""
    limit = time.monotonic() + 300
    while not list(there.glob(pattern)):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, stderr = run.communicate(timeout=120)
    took = time.monotonic() - began
    with pytest.raises(ProcessLookupError):  # none of the group is left
        os.killpg(run.pid, 0)
    assert run.returncode != 0
    return [line for line in stderr.splitlines() if line.startswith(LINE)], took


CHECKPOINT = "checkpoints/training/*/values.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("admm", "records/*-blocks-00000"),
        ("sparsellm", "records/*-blocks-00000"),
        ("struprune", "records/*-curves-00000"),
        ("struprune", "records/*-blocks-00000"),
        ("elsa", CHECKPOINT),
        ("elsa-published", CHECKPOINT),
    ],
)
@pytest.mark.parametrize(("processes", "then"), [(2, 2), (4, 1), (2, 4)])
def test_where_one_is_killed_all_end_and_any_number_goes_on(
    tmp_path: Path, model_folder: Path, text_file: Path, method: str, pattern: str, processes: int, then: int
) -> None:
    settings = ["--sparsity", "0.7", *(["--steps", str(dict(TRAINED)[method])] if pattern == CHECKPOINT else [])]
    finished(start(tmp_path, model_folder, text_file, 1, method, *settings, out="one", samples=41))
    run = start(tmp_path, model_folder, text_file, processes, method, *settings, samples=41)
    said, took = killed_once_it_has(run, tmp_path / "out.partial", pattern)
    assert took < 30
    assert len(said) <= 1  # torchrun may end the others before they can say anything
    assert all("--resume" in line for line in said)
    assert not (tmp_path / "out").exists()
    finished(start(tmp_path, model_folder, text_file, then, method, *settings, "--resume", samples=41))
    assert_equal(tmp_path / "one", tmp_path / "out", measured=method == "elsa")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "samples", "line"),
    [
        (("--sparsity", "1.5"), 13, "sparsity"),
        (("--sparsity", "0.5"), 3, "3 calibration sequences are too few for 4 processes: give more --samples"),
        (("--pattern", "16:32"), 13, "needs a width"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, model_folder: Path, text_file: Path, more: tuple[str, ...], samples: int, line: str
) -> None:
    run = start(tmp_path, model_folder, text_file, 4, "admm", *more, samples=samples)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode != 0
    said = [text for text in stderr.splitlines() if text.startswith(LINE)]
    assert len(said) == 1
    assert line in said[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "admm_prune_main.py"]


@pytest.mark.parametrize(
    ("method", "processes", "changes", "sharded"),
    [
        ("elsa", 2, {}, True),
        ("gradual", 4, {}, True),
        ("elsa", 1, {}, False),
        ("admm", 2, {}, False),
        ("elsa", 2, {"out": None}, False),
        ("elsa", 2, {"stream": False}, False),
    ],
)
def test_which_runs_never_hold_the_whole_model(
    model_folder: Path, method: str, processes: int, changes: dict[str, Any], sharded: bool
) -> None:
    settings = replace(Settings(model=str(model_folder), method=method, out="out"), **changes)
    assert shards_weights(settings, recipe_named(method), World(0, processes)) == sharded


def test_work_is_dealt_out_by_cost() -> None:
    world = World(1, 3)
    owners = world.assigned([1.0, 9.0, 2.0, 3.0, 4.0])
    loads = [
        sum(cost for cost, owner in zip([1.0, 9.0, 2.0, 3.0, 4.0], owners, strict=True) if owner == i) for i in range(3)
    ]
    assert sorted(loads) == [5.0, 5.0, 9.0]
    assert [len(World(i, 3).partition(range(13))) for i in range(3)] == [5, 4, 4]
    assert sorted(x for i in range(3) for x in World(i, 3).partition(range(13))) == list(range(13))


def test_a_share_knows_which_tokens_it_has() -> None:
    tokens = torch.arange(23) + 100
    places = torch.arange(23) // 4 % 3 == 1  # runs of 4, every third
    share = Share(23, places.nonzero()[:, 0])
    own = tokens[places]
    drawn = torch.randperm(23, generator=torch.Generator().manual_seed(0))[:9]
    assert torch.equal(share.taken(own, drawn), tokens[drawn] * places[drawn])  # alone: others would add theirs
    assert torch.equal(own[share.every(5)], tokens[::5][places[::5]])
    whole = Share(23)
    assert torch.equal(whole.taken(tokens, drawn), tokens[drawn])
    assert torch.equal(tokens[whole.every(5)], tokens[::5])


def test_one_process_tells_itself() -> None:
    world = World.current()
    x = torch.arange(3.0)
    assert (world.rank, world.size) == (0, 1)
    assert torch.equal(world.all_reduce(x), torch.arange(3.0))
    assert world.all_gather("a") == ["a"]
    with pytest.raises(UserError, match="wrong"):
        world.broadcast_from_rank0(lambda: (_ for _ in ()).throw(UserError("wrong")))
