"""Wrong input: status 2, one line on stderr that says what is wrong, silence on stdout, nothing on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from admm_prune.runs.journal import folder
from tests.cli.outcome import Command, Refused

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


TARGETS = [
    (["--sparsity", "1.2"], "sparsity must lie between 0 and 1, not 1.2"),
    (["--sparsity", "-0.1"], "sparsity must lie between 0 and 1, not -0.1"),
    (["--sparsity", "nan"], "sparsity must lie between 0 and 1, not nan"),
    (["--sparsity", "abc"], "sparsity must be a number from 0 to 1, not 'abc'"),
    (["--pattern", "5:4"], "pattern 5:4 must keep from 1 to 4 of every 4"),
    (["--pattern", "0:4"], "pattern 0:4 must keep from 1 to 4 of every 4"),
    (["--pattern", "2-4"], "pattern must be N:M"),
    (["--pattern", "2:7"], "pattern 2:7 needs a width that 7 divides, not"),
]


STREAMING = [
    (["--resume"], "nothing to resume: there is no "),
    (["--stream", "--method", "elsa"], "cannot stream: elsa trains all weights at once"),
    (["--stream", "--method", "struprune-padded"], "cannot stream: struprune-padded pads to the widest block"),
    (["--stream", "--method", "wanda", "--model", "./nowhere"], "./nowhere: there is no such model folder"),
    (["--activation-memory", "-1"], "'--activation-memory'"),
]


@pytest.mark.parametrize(("arguments", "reason"), STREAMING, ids=lambda value: str(value)[:30])
def test_what_can_neither_be_streamed_nor_resumed(
    refused: Refused, run: tuple[object, ...], arguments: list[str], reason: str
) -> None:
    refused(reason, *run, "--sparsity", "0.5", "--out", "out", *arguments)


def test_a_journal_in_the_way(command: Command, run: tuple[object, ...], place: Path) -> None:
    header = place / "out.partial/header"
    header.parent.mkdir()
    header.write_text("not ours")
    for more, reason in (
        ([], "contains an unfinished run: continue with --resume"),
        (["--resume"], "header is damaged: the journal cannot be trusted; delete"),
    ):
        outcome = command(*run, "--sparsity", "0.5", "--out", "out", *more)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert reason in outcome.err
        assert header.read_text() == "not ours"
        assert not (place / "out").exists()


@pytest.mark.parametrize(("target", "reason"), TARGETS, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.parametrize("name", ["run", "compare", "solve"])
def test_a_wrong_target(
    refused: Refused, name: str, target: list[str], reason: str, run: tuple[object, ...], layer_file: Path
) -> None:
    start = ("solve", layer_file) if name == "solve" else (name, *run[1:], "--out", "out")
    refused(reason, *start, *target)


@pytest.mark.parametrize("target", [[], ["--sparsity", "0.5", "--pattern", "2:4"]])
@pytest.mark.parametrize("name", ["run", "solve"])
def test_not_exactly_one_target(
    refused: Refused, name: str, target: list[str], run: tuple[object, ...], layer_file: Path
) -> None:
    start = ("solve", layer_file) if name == "solve" else (*run, "--out", "out")
    refused("give either a sparsity such as 0.7 or a pattern such as 2:4", *start, *target)


OPTIONS = [
    (["--method", "nonesuch"], "unknown method 'nonesuch': choose one of magnitude, wanda"),
    (["--packing", "tight"], "packing must be auto, documents, windows or segments, not 'tight'"),
    (["--dtype", "int8"], "dtype must be float32, bfloat16 or float16, not 'int8'"),
    (["--device", "tpu"], "device must be auto, cpu or cuda, not 'tpu'"),
    (["--ridge", "inf"], "ridge must be 'auto' or a finite number that is not negative, not inf"),
    (["--ridge", "-1"], "ridge must be 'auto' or a finite number that is not negative, not -1"),
    (["--ridge", "much"], "ridge must be 'auto' or a finite number that is not negative, not much"),
    (["--samples", "0"], "Invalid value for '--samples'"),
    (["--eval-samples", "0"], "Invalid value for '--eval-samples'"),
    (["--length", "1"], "Invalid value for '--length'"),
    (["--length", "65"], "length 65 is beyond the model's context of 64 tokens"),
    (["--seed", "-1"], "Invalid value for '--seed'"),
    (["--seed", "x"], "Invalid value for '--seed'"),
    (["--bogus", "1"], "No such option: --bogus"),
]


@pytest.mark.parametrize(("option", "reason"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_wrong_option(refused: Refused, run: tuple[object, ...], option: list[str], reason: str) -> None:
    refused(reason, *run, "--sparsity", "0.5", "--out", "out", *option)


@pytest.mark.parametrize(
    ("name", "option", "reason"),
    [
        ("compare", ["--methods", "wanda,nonesuch"], "unknown method 'nonesuch'"),
        ("compare", ["--methods", " , "], "give at least one method"),
        ("compare", ["--sparsity", "0.5,1.2"], "sparsity must lie between 0 and 1, not 1.2"),
        ("compare", ["--dtype", "int8"], "dtype must be"),
        ("eval", ["--packing", "tight"], "packing must be"),
        ("eval", ["--dtype", "int8"], "dtype must be"),
        ("eval", ["--samples", "0"], "Invalid value for '--samples'"),
        ("capture", ["--packing", "tight"], "packing must be"),
        ("capture", ["--dtype", "int8"], "dtype must be"),
        (
            "capture",
            ["--weight", "lm_head.weight"],
            "has no block matrix 'lm_head.weight'; in its first block there are",
        ),
    ],
)
def test_a_wrong_option_of_the_other_commands(
    refused: Refused, model_folder: Path, text_file: Path, name: str, option: list[str], reason: str
) -> None:
    start = {
        "compare": ("--model", model_folder, "--sparsity", "0.5", "--out", "out"),
        "eval": (model_folder,),
        "capture": ("--model", model_folder, "--weight", UP, "--out", "layer.safetensors"),
    }
    refused(reason, name, *start[name], "--data", text_file, *option)


@pytest.mark.parametrize("name", ["run", "compare", "eval", "capture", "solve"])
def test_no_cuda_device(
    refused: Refused, name: str, run: tuple[object, ...], layer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    starts: dict[str, tuple[object, ...]] = {
        "run": (*run, "--sparsity", "0.5", "--out", "out"),
        "compare": ("compare", *run[1:], "--sparsity", "0.5", "--out", "out"),
        "eval": ("eval", run[2]),
        "capture": ("capture", *run[1:], "--weight", UP, "--out", "new.safetensors"),
        "solve": ("solve", layer_file, "--sparsity", "0.5"),
    }
    refused("there is no CUDA device here: use --device cpu", *starts[name], "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prune"], "No such command 'prune'"),
        (["--bogus"], "No such option: --bogus"),
        (["run", "--sparsity", "0.5"], "name the folder to write with --out"),
        (["compare", "--sparsity", "0.5"], "Missing option '--out'"),
        (["capture", "--out", "f"], "Missing option '--weight'"),
        (["eval"], "Missing argument"),
        (["solve"], "Missing argument"),
        (["list", "extra"], "unknown kind 'extra': choose one of methods, "),
        (["list", "modules", "extra"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(refused: Refused, arguments: list[str], reason: str) -> None:
    refused(reason, *arguments)


@pytest.mark.parametrize("name", ["run", "compare", "eval", "capture", "plan", "reproduce", "bench"])
def test_a_model_folder_that_is_missing_or_is_none(refused: Refused, place: Path, text_file: Path, name: str) -> None:
    (place / "empty").mkdir()
    (place / "file").write_text("weights")
    for model, reason in (
        ("no/such/folder", "no/such/folder: there is no such model folder"),
        ("./missing", "./missing: there is no such model folder"),
        ("missing/", "missing/: there is no such model folder"),
        ("~/no-such-folder", "~/no-such-folder: there is no such model folder"),
        ("nowhere.gguf", "nowhere.gguf: there is no such file"),
        ("dir/nowhere.GGUF", "dir/nowhere.GGUF: there is no such file"),
        ("~/no-such.gguf", "~/no-such.gguf: there is no such file"),
        ("dir/model.safetensors", "dir/model.safetensors: there is no such file"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x: there is no such home folder"),
        (" ", "the name of the model is empty"),
        ("a" * 300, "a: no file or folder can have a name this long"),
        ("empty", "empty: not a model folder: it has no config.json"),
        ("file", "file: a file, not a model folder"),
    ):
        rest = {
            "eval": (model, "--data", text_file),
            "capture": ("--model", model, "--weight", UP, "--out", "f", "--data", text_file),
            "reproduce": ("wanda", "--model", model, "--data", text_file, "--out", "out"),
            "bench": ("inference", model),
        }.get(name, ("--model", model, "--sparsity", "0.5", "--out", "out", "--data", text_file))
        refused(reason, name, *rest)
        if name == "run":
            refused(reason, name, *rest, "--stream")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(
    refused: Refused, place: Path, model_folder: Path, text_file: Path, bad: float
) -> None:
    shutil.copytree(model_folder, place / "damaged")
    tensors = load_file(place / "damaged/model.safetensors")
    tensors[UP][0, 0] = bad
    save_file(tensors, place / "damaged/model.safetensors", {"format": "pt"})
    refused(
        f"the weight {UP} has NaN or Inf",
        "run", "--model", "damaged", "--data", text_file, "--sparsity", "0.5", "--out", "out",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["run", "compare", "eval", "capture"])
@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("empty.txt", b"", "empty.txt: the text is empty"),
        ("blank.txt", b" \n<|endoftext|>\n ", "blank.txt: the text is empty"),
        ("binary.txt", bytes(range(256)), "binary.txt: not a text file"),
        ("zeros.txt", b"text\0text", "zeros.txt: not a text file"),
        ("broken.jsonl", b'{"text": "a"}\n{broken', "broken.jsonl: line 2 is not JSON"),
        ("text.docx", b"PK", "text.docx: unknown kind of file '.docx'"),
    ],
)
def test_a_text_that_cannot_be_read(
    refused: Refused, place: Path, model_folder: Path, name: str, file: str, content: bytes, reason: str
) -> None:
    (place / file).write_bytes(content)
    rest = {
        "eval": (model_folder,),
        "capture": ("--model", model_folder, "--weight", UP, "--out", "f"),
    }.get(name, ("--model", model_folder, "--sparsity", "0.5", "--out", "out"))
    refused(reason, name, *rest, "--data", file)


def test_a_text_that_is_missing_or_shorter_than_one_sequence(refused: Refused, place: Path, model_folder: Path) -> None:
    (place / "short.txt").write_text("the cat sat")
    run = ("run", "--model", model_folder, "--sparsity", "0.5", "--out", "out")
    refused("the text is shorter than one sequence", *run, "--data", "short.txt")
    refused("missing.txt: there is no such file", *run, "--data", "missing.txt")
    plan = ("plan", "--model", model_folder, "--sparsity", "0.5")
    for command in (run, plan):
        for name in ("no/such/text", "./missing", "missing/", "https://host/stories"):
            refused(f"{name}: there is no such file or folder", *command, "--data", name)
        refused("~nobody-of-this-name/x: there is no such home folder", *command, "--data", "~nobody-of-this-name/x")


@pytest.mark.parametrize("name", ["run", "compare"])
def test_an_output_folder_that_cannot_be(refused: Refused, place: Path, run: tuple[object, ...], name: str) -> None:
    (place / "foreign").mkdir()
    (place / "foreign/thesis.tex").write_text("years of work")
    (place / "file").write_text("a file")
    (place / "link").symlink_to("foreign")
    for out, reason in (
        ("foreign", "foreign exists and was not written by admm-prune"),
        ("file", "file is a file or a link, not a folder"),
        ("link", "link is a file or a link, not a folder"),
        ("file/below", "file is not a writable folder"),
        ("/proc/nonesuch/out", "/proc is not a writable folder"),
        (run[2], "is, or holds, the input"),
    ):
        refused(reason, name, *run[1:], "--sparsity", "0.5", "--out", out)


@pytest.mark.parametrize("name", ["run", "compare"])
def test_the_root_of_the_file_system_is_no_output(refused: Refused, name: str) -> None:
    refused("/ is the root of the file system", name, "--model", "embedded", "--sparsity", "0.5", "--out", "/")


def test_the_working_folder_is_no_output(refused: Refused, run: tuple[object, ...]) -> None:
    refused(". is the folder you are in, or holds it", *run, "--sparsity", "0.5", "--out", ".")


def test_a_folder_without_permission_is_no_output(
    refused: Refused, run: tuple[object, ...], layer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, as whom the tests may run: the refusal of the system is played."""

    def denied(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.tempfile, "mkdtemp", denied)
    reason = "is not a writable folder (Permission denied)"
    refused(reason, *run, "--sparsity", "0.5", "--out", "out")
    refused(reason, "solve", layer_file, "--sparsity", "0.5", "--out", "v.safetensors")
    refused(reason, "capture", *run[1:], "--weight", UP, "--out", "new.safetensors")


@pytest.mark.parametrize("name", ["capture", "solve"])
def test_an_output_file_that_cannot_be(
    refused: Refused, place: Path, run: tuple[object, ...], layer_file: Path, name: str
) -> None:
    (place / "notes.txt").write_text("not to be lost")
    (place / "folder").mkdir()
    start = ("solve", layer_file, "--sparsity", "0.5") if name == "solve" else ("capture", *run[1:], "--weight", UP)
    for out, reason in (
        ("notes.txt", "notes.txt exists and was not written by admm-prune"),
        (layer_file, "exists and was not written by admm-prune"),
        ("folder", "folder is a folder, not a file"),
        ("none/layer.safetensors", "there is no folder none"),
        ("notes.txt/layer.safetensors", "there is no folder notes.txt"),
        ("/proc/layer.safetensors", "/proc is not a writable folder"),
    ):
        refused(reason, *start, "--out", out)


def unsymmetric(gram: torch.Tensor) -> torch.Tensor:
    return gram + gram.diagonal().mean() * torch.eye(len(gram)).roll(1, dims=1)


def with_entry(gram: torch.Tensor, value: float) -> torch.Tensor:
    changed = gram.clone()
    changed[0, 0] = value
    return changed


LAYERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no gram": (lambda t: {"weight": t["weight"]}, "has no 'gram': a layer file contains weight and gram"),
    "no weight": (lambda t: {"gram": t["gram"]}, "has no 'weight': a layer file contains weight and gram"),
    "wrong width": (lambda t: t | {"gram": t["gram"][:5, :5].contiguous()}, "gram must be 8 x 8 for a weight of"),
    "a vector": (lambda t: t | {"gram": t["gram"][0].clone()}, "gram must be 8 x 8"),
    "three dimensions": (lambda t: t | {"weight": t["weight"][None].clone()}, "weight must be a real matrix"),
    "half precision": (lambda t: t | {"gram": t["gram"].half()}, "gram must be float32 or float64"),
    "not symmetric": (lambda t: t | {"gram": unsymmetric(t["gram"])}, "gram is not symmetric"),
    "NaN": (lambda t: t | {"gram": with_entry(t["gram"], torch.nan)}, "gram contains NaN or Inf"),
    "Inf": (lambda t: t | {"gram": with_entry(t["gram"], torch.inf)}, "gram contains NaN or Inf"),
    "negative diagonal": (lambda t: t | {"gram": with_entry(t["gram"], -1.0)}, "gram has a negative diagonal"),
    "indefinite": (lambda t: t | {"gram": 1.0 - torch.eye(8) + 1e-3 * torch.eye(8)}, "gram cannot be factored"),
    "NaN held out": (
        lambda t: t | {"gram_holdout": with_entry(t["gram"], torch.nan)},
        "gram_holdout contains NaN or Inf",
    ),
    "NaN weight": (lambda t: t | {"weight": t["weight"] * torch.nan}, "weight contains NaN or Inf"),
    "target unknown": (lambda t: t | {"cross_gram": t["gram"].clone()}, "cross_gram needs target_energy"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), LAYERS.values(), ids=LAYERS)
def test_a_damaged_layer_file(
    refused: Refused, place: Path, layer_tensors: Tensors, change: Callable[[Tensors], Tensors], reason: str
) -> None:
    save_file(change(layer_tensors), place / "layer.safetensors")
    refused(reason, "solve", "layer.safetensors", "--sparsity", "0.5", "--out", "v.safetensors")


def test_a_layer_file_that_is_none(refused: Refused, place: Path, layer_file: Path, layer_tensors: Tensors) -> None:
    (place / "layer.txt").write_text("not safetensors at all")
    refused("layer.txt is not a safetensors file", "solve", "layer.txt", "--sparsity", "0.5")
    refused("no such layer file: missing", "solve", "missing", "--sparsity", "0.5")
    refused("no such solution: missing", "solve", layer_file, "--solution", "missing", "--sparsity", "0.5")
    for solver in ("wanda", "admm"):  # the default too, where it is given
        both = ("--solver", solver, "--solution", "missing")
        refused("give either --solver or --solution", "solve", layer_file, *both, "--sparsity", "0.5")
    refused(". is a folder, not a layer file", "solve", ".", "--sparsity", "0.5")
    for energy, why in (("much", "among the metadata must be a number"), ("nan", "must be finite and not negative")):
        save_file(
            layer_tensors | {"cross_gram": layer_tensors["gram"].clone()}, place / "energy", {"target_energy": energy}
        )
        refused(why, "solve", "energy", "--sparsity", "0.5")


def test_a_ridge_that_cannot_be_chosen(refused: Refused, layer_file: Path) -> None:
    reason = "it has no gram_validation, which --ridge auto cannot choose on: give a number"
    refused(reason, "solve", layer_file, "--sparsity", "0.5", "--ridge", "auto", "--out", "v.safetensors")


def test_an_unknown_solver(refused: Refused, layer_file: Path) -> None:
    refused("unknown method 'nonesuch'", "solve", layer_file, "--solver", "nonesuch", "--sparsity", "0.5")
