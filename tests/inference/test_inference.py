"""bench inference: bytes that can be counted by hand, times that are measured, and sentences that do not flatter."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from admm_prune.errors import UserError
from admm_prune.inference import timing
from admm_prune.inference.packing import pack
from admm_prune.inference.timing import Speed, _CSRLinear, bench_inference, decode, prefill, timed
from admm_prune.models.loading import LoadedModel, load
from admm_prune.prunable import matrices
from admm_prune.runs.prune import prune
from tests.models.tiny_models import build

QUICK = {"tokens": 16, "new_tokens": 2, "repeats": 1, "batches": (1,), "device": "cpu"}


@pytest.fixture(scope="module")
def folders(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("runs")
    kinds = {
        "mask": {"method": "magnitude", "sparsity": 0.9},
        "2:4": {"method": "magnitude", "pattern": "2:4"},
        "smaller": {"method": "struprune-uniform", "sparsity": 0.4},
    }
    for name, how in kinds.items():
        prune(str(model_folder), data=str(text_file), samples=8, out=place / name, **how)
    return {name: str(place / name) for name in kinds}


def test_an_unstructured_mask_gains_nothing_as_stored(folders: dict[str, str], model_folder: Path) -> None:
    content = bench_inference(folders["mask"], str(model_folder), **QUICK)
    rows = {row["form"]: row for row in content["rows"]}
    assert list(rows) == ["dense", "as stored", "packed", "CSR kernels"]
    dense, stored, layers, csr = rows.values()
    assert layers["memory_bytes"] < 0.6 * stored["memory_bytes"]
    tensors = load_file(Path(folders["mask"]) / "model.safetensors")
    assert stored["disk_bytes"] == (Path(folders["mask"]) / "model.safetensors").stat().st_size
    assert stored["memory_bytes"] == dense["memory_bytes"]
    weights = sum(t.numel() * 4 for t in tensors.values())
    assert weights <= stored["memory_bytes"] < weights + 1024  # and a few buffers of the rotary embedding
    packed = sum(min(t.numel() * 4, int(t.count_nonzero()) * 4 + -(-t.numel() // 8)) for t in tensors.values())
    assert stored["packed_bytes"] == packed
    assert stored["zeros"] == pytest.approx(0.9, abs=0.01)
    assert csr["disk_bytes"] is None
    assert csr["memory_bytes"] < stored["memory_bytes"]
    assert all(speed["seconds"] > 0 for row in rows.values() for speed in (row["prefill"], row["decoding"][0]["speed"]))
    assert any("does not make the model smaller" in sentence for sentence in content["sentences"])
    assert any("A single repeat shows no spread" in sentence for sentence in content["sentences"])
    assert not any("times as" in sentence for sentence in content["sentences"]), "nothing is known of noise"


def test_two_of_four_says_what_was_not_measured(folders: dict[str, str]) -> None:
    content = bench_inference(folders["2:4"], **QUICK)
    assert content["rows"][0]["form"] == "as stored"
    assert any("2:4; kernels for that were not measured here: they need a CUDA" in s for s in content["sentences"])


def test_a_structured_model_is_smaller(folders: dict[str, str], model_folder: Path) -> None:
    content = bench_inference(folders["smaller"], str(model_folder), **QUICK)
    dense, stored = content["rows"]
    assert stored["parameters"] < dense["parameters"]
    assert stored["disk_bytes"] < dense["disk_bytes"]
    assert stored["memory_bytes"] < dense["memory_bytes"]
    assert any("of the parameters were removed" in sentence for sentence in content["sentences"])


def test_the_kernels_compute_the_same(folders: dict[str, str]) -> None:
    linear = torch.nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(_CSRLinear(linear)(x), linear(x))


@pytest.mark.parametrize(
    ("family", "count", "others"), [("gpt2", "0 of the 12", "Conv1D"), ("mixtral", "12 of the 36", "MixtralExperts")]
)
def test_kernels_that_take_a_part_of_the_matrices_say_so(family: str, count: str, others: str) -> None:
    """A form whose layers are all dense would be timed, and named, as what it is not."""
    model = build(family).eval().requires_grad_(False)
    for weight in matrices(model):
        weight.parameter.mul_(torch.rand(weight.parameter.shape, generator=torch.Generator().manual_seed(0)) > 0.7)
    given = LoadedModel(model, None, family)  # type: ignore[arg-type]
    made, remarks = timing._with_kernels(lambda: replace(given, model=copy.deepcopy(model)), given, "cpu")
    assert list(made) == (["packed"] if family == "gpt2" else ["packed", "CSR kernels"])
    assert remarks == [
        f"CSR kernels take {count} matrices of the blocks: they are for linear layers, not for {others}."
    ]


def test_few_zeros_are_not_said_to_make_it_smaller(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "few")
    tensors = load_file(tmp_path / "few/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = 0
    save_file(tensors, tmp_path / "few/model.safetensors", {"format": "pt"})
    content = bench_inference(str(tmp_path / "few"), **QUICK)
    assert [row["form"] for row in content["rows"]] == ["as stored", "CSR kernels"]
    (sentence,) = (s for s in content["sentences"] if "of the block weights are zeros" in s)
    assert sentence.startswith("0.0")
    assert not any("load_packed" in s or "would store" in s for s in content["sentences"])


def test_what_pack_would_store_is_that_of_the_parameters(folders: dict[str, str], tmp_path: Path) -> None:
    """Beside the bytes of the same parameters, without the buffers of the rotary embedding; -0.0 is stored."""
    packing = pack(Path(folders["mask"]), tmp_path / "archive")
    content = bench_inference(folders["mask"], **QUICK)
    tensors = load_file(Path(folders["mask"]) / "model.safetensors")
    ratio = content["rows"][0]["packed_bytes"] / sum(x.nbytes for x in tensors.values())
    assert f"in float32, in {ratio:.2f} of their bytes" in " ".join(content["sentences"])
    assert packing.tensors
    x = torch.nn.Linear(64, 64, bias=False)
    x.weight.data = torch.zeros(64, 64)
    assert timing._packed_bytes(x) == 64 * 64 // 8
    x.weight.data[0] = -0.0
    assert timing._packed_bytes(x) == 64 * 64 // 8 + 64 * 4


def test_models_in_two_dtypes(folders: dict[str, str], tmp_path: Path) -> None:
    half = load(folders["mask"], dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    unlike = "The models are not compared in one data type (dense in float32, as stored in bfloat16): give --dtype."
    content = bench_inference(str(tmp_path / "half"), folders["mask"], **QUICK)
    assert unlike in content["sentences"]
    content = bench_inference(str(tmp_path / "half"), folders["mask"], **QUICK, dtype="float32")
    assert not any("data type" in sentence for sentence in content["sentences"])


def test_several_threads_are_timed_by_the_clock(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their CPU times add up, so that tokens per second would be too few."""
    model = load(str(model_folder), device="cpu").model

    def sleep(_: object, __: int, now: timing.Clock) -> float:
        began = now()
        time.sleep(0.05)
        return now() - began

    asleep = partial(timed, sleep, {"a": model}, 1, repeats=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert asleep()["a"][0] < 0.04
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert asleep()["a"][0] >= 0.05


def test_models_take_turns(model_folder: Path) -> None:
    model = load(str(model_folder), device="cpu").model
    turns: list[str] = []

    def turn(_: object, tokens: int, __: timing.Clock) -> float:
        turns.append(f"{tokens}")
        return float(len(turns))

    times = timed(turn, {"a": model, "b": model}, 5, repeats=2)
    assert turns == ["5"] * 6
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}, "the first turn warms up"


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_is_timed_without_the_prompt(model_folder: Path, batch: int) -> None:
    model = load(str(model_folder), device="cpu").model
    lengths: list[tuple[int, int]] = []
    model.register_forward_hook(lambda _, __, out: lengths.append(tuple(out.logits.shape[:2])))
    seen = []
    decode(model, 5, lambda: seen.append(len(lengths)) or 0.0, batch=batch)
    assert [length for _, length in lengths[1:]] == [1] * 5
    assert {texts for texts, _ in lengths} == {batch}
    assert seen == [1, 6], "the clock is read after the prompt, and after five more tokens"


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        ([1.0, 1.1, 1.2], [1.3, 1.4, 1.25], True),
        ([1.3, 1.4], [1.0, 1.2], True),
        ([1.0, 1.1, 1.3], [1.2, 1.4, 1.5], False),
        ([1.0, 2.0], [1.5, 1.6], False),
        ([1.0], [2.0], False),
    ],
)
def test_what_lies_within_the_spread_is_noise(first: list[float], second: list[float], differs: bool) -> None:
    assert Speed.of({"first": first, "second": second}, "second").differs == differs
    assert not Speed.of({"first": first, "second": second}, "first").differs


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"dense": [2.0, 2.1], "as stored": [1.0, 1.9]}, "prefill 2.00 times as fast"),
        ({"dense": [1.0, 1.9], "as stored": [2.0, 2.1]}, "prefill takes 2.00 times as long"),
        ({"dense": [2.0, 2.1], "as stored": [1.0, 2.05]}, "prefill shows no difference beyond the spread"),
    ],
)
def test_a_sentence_on_speed_rests_on_the_spread(
    seconds: dict[str, list[float]],
    said: str,
    folders: dict[str, str],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clock(run: object, models: dict[str, object], *_: int) -> dict[str, list[float]]:
        return {name: seconds.get(name, [5.0, 5.0]) if run is prefill else [3.0, 3.0] for name in models}

    monkeypatch.setattr(timing, "timed", clock)
    content = bench_inference(folders["smaller"], str(model_folder), **QUICK | {"repeats": 2})
    (sentence,) = (s for s in content["sentences"] if s.startswith("as stored, beside dense"))
    assert sentence == f"as stored, beside dense: {said}; decoding of 1 shows no difference beyond the spread."
    speed = content["rows"][1]["prefill"]
    assert speed["differs"] == ("no difference" not in said)
    assert speed["range"] == (min(seconds["as stored"]), max(seconds["as stored"]))


def test_batches_and_the_plot(folders: dict[str, str], tmp_path: Path) -> None:
    content = bench_inference(folders["mask"], **QUICK | {"batches": (1, 3)}, out=tmp_path / "out")
    for row in content["rows"]:
        assert [decoding["batch"] for decoding in row["decoding"]] == [1, 3]
        for decoding in row["decoding"]:
            seconds = decoding["speed"]["seconds"]
            assert decoding["tokens_per_second"] == pytest.approx(decoding["batch"] * 2 / seconds)
    assert json.loads((tmp_path / "out/inference.json").read_text())["rows"] == json.loads(json.dumps(content["rows"]))
    plot = (tmp_path / "out/inference.svg").read_text()
    assert "<svg" in plot
    assert all(text in plot for text in ("packed", "tokens per second"))
    with pytest.raises(UserError, match="contains an earlier result: replace it with --overwrite"):
        bench_inference(folders["mask"], **QUICK, out=tmp_path / "out")
    bench_inference(folders["mask"], **QUICK, out=tmp_path / "out", overwrite=True)
    (tmp_path / "out/inference.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by admm-prune as such a file"):
        bench_inference(folders["mask"], **QUICK, out=tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="batches must be numbers of texts"):
        bench_inference(folders["mask"], **QUICK | {"batches": (0,)})


def test_a_context_that_is_too_short_is_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="its context of 64 tokens is too short"):
        bench_inference(str(model_folder), tokens=65, device="cpu")


@pytest.mark.gpu
def test_two_of_four_kernels(folders: dict[str, str]) -> None:
    content = bench_inference(folders["2:4"], **{**QUICK, "device": "cuda"}, dtype="float16")
    assert "2:4 kernels" in [row["form"] for row in content["rows"]]
