"""Makes the problems of the collection from named models and texts, and compares their hashes with the manifest.

    python -m collection.build [--layers PATTERN] [--subset small] [--model DIR --text FILE]
                               [--stories-model DIR --stories-text FILE] [--write-manifest]

The embedded model and its text are in the package; SmolLM2-135M-Instruct and stories260K are given as folders. Files
that the manifest `problems.json` marks as committed are written to `problems/`, the others to `built/`, next to this
module. On the same machine, with the same versions and one thread, the hashes are the same. Elsewhere the rounding may
differ; the command reports this, and existing records can be compared up to a relative difference of 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from admm_prune.errors import UserError
from collection import checker
from collection.capture import DAMPING, Layer, dense, retargeted, row_problems
from collection.files import write_problem

FOLDER = Path(__file__).resolve().parent
MANIFEST = FOLDER / "problems.json"
SUBSETS = ("small", "standard", "large")
SPARSITIES = (50, 70, 90)
CORE = ("row-50", "unstructured-70", "2of4")  # of every layer
ROWS = {8: 512, 16: 512, 32: 256, 64: 96}  # entries of a row problem -> rows of each model
SAME_ENERGY = 1e-6  # relative: layers whose tr(W H W^T) differs by less are the same up to the rounding of sums
COMMITTED_BELOW = 300_000  # bytes of a layer of the larger models, beyond the story model and the row problems


Retargets = tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Source:
    """A model and the text that it is calibrated on, and which of its layers are problems.

    Args:
        blocks: of which every matrix is taken; the second one with every set.
        retargets: (block, matrices) after a pruned prefix.
    """

    name: str
    model: str
    text: str
    tokens: int
    blocks: tuple[int, int, int]
    retargets: Retargets


def sources(given: argparse.Namespace) -> list[Source]:
    """Those whose model is given."""
    matrices = ("q_proj", "gate_proj", "down_proj")
    found = [Source("embedded", "embedded", "embedded", 8192, (0, 2, 3), ((2, matrices), (3, matrices)))]
    if given.stories_model:
        retargets: Retargets = ((2, matrices), (4, matrices))
        found.append(Source("stories260k", given.stories_model, given.stories_text, 8192, (0, 2, 4), retargets))
    if given.model:
        retargets = ((15, ("q_proj", "gate_proj")),)
        found.append(Source("smollm2-135m", given.model, given.text, 8192, (0, 15, 29), retargets))
    return found


def sets(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """The sets of a matrix by name, with exact counts; those of `names`, or all that fit its shape (rows, width)."""
    rows, width = shape
    found: dict[str, dict[str, Any]] = {}
    for percent in SPARSITIES:
        left = 1 - percent / 100
        found[f"row-{percent}"] = {"kind": "row", "keep": round(left * width)}
        found[f"unstructured-{percent}"] = {"kind": "unstructured", "keep": round(left * rows * width)}
        if rows % 4 == 0 and width % 4 == 0:
            tiles = rows * width // 16
            found[f"block4x4-{percent}"] = {"kind": "block", "height": 4, "width": 4, "keep": round(left * tiles)}
        found[f"columns-{percent}"] = {"kind": "group", "width": 1, "keep": round(left * width)}
    for keep, of in ((2, 4), (4, 8)):
        if width % of == 0:
            found[f"{keep}of{of}"] = {"kind": "N:M", "keep": keep, "of": of}
    return {name: given for name, given in found.items() if names is None or name in names}


def layers_of(source: Source) -> Iterator[tuple[str, dict[str, Any], NDArray[np.float32], NDArray[np.float32]]]:
    """(id, entry of the manifest without its hash, W, H) for every problem file of a source."""
    origin = {"model": source.name, "tokens": source.tokens, "ridge": f"{DAMPING:g} of the mean diagonal"}
    whole: list[Layer] = []
    for layer in dense(source.model, source.text, source.tokens, source.blocks):
        whole.append(layer)
        names = None if layer.block == source.blocks[1] else CORE
        identity = f"{source.name}.{layer.block}.{layer.module}"
        yield identity, {**origin, **_entry(layer, sets(layer.weight.shape, names))}, layer.weight, layer.hessian
    for width, count in ROWS.items():
        if source.name == "stories260k":
            break
        weight, hessian = row_problems(whole, width, count, seed=width)
        budgets = {f"row-{p}": {"kind": "row", "keep": round((1 - p / 100) * width)} for p in (50, 70)}
        entry = {"module": "rows", "block": None, "tokens": source.tokens, "shape": [count, width], "sets": budgets}
        yield f"{source.name}.rows{width}", {**origin, **entry}, weight, hessian
    for block, modules in source.retargets:
        for layer in retargeted(source.model, source.text, source.tokens, block, modules):
            identity = f"{source.name}.{layer.block}.{layer.module}.retargeted"
            yield identity, {**origin, **_entry(layer, sets(layer.weight.shape, CORE))}, layer.weight, layer.hessian


def _entry(layer: Layer, budgets: Mapping[str, Any]) -> dict[str, Any]:
    shape = list(layer.weight.shape)
    return {"module": layer.module, "block": layer.block, "tokens": layer.tokens, "shape": shape, "sets": budgets}


def subset_of(source: str, entry: Mapping[str, Any]) -> tuple[str, bool]:
    """(subset, whether the file is committed)."""
    rows, width = entry["shape"]
    size = 4 * (rows * width + width * (width + 1) // 2)
    if entry["module"] == "rows":  # the trees that prove wider rows to 1 % are larger than everything else
        return ("small", True) if width <= 32 else ("standard", False)
    if source == "stories260k":
        return "small", True
    if source == "embedded":
        return ("small", True) if size < COMMITTED_BELOW else ("standard", False)
    return ("standard" if "proj" in entry["module"] and entry["module"][0] in "qkvo" else "large"), False


def manifest() -> dict[str, dict[str, Any]]:
    """The layers by id."""
    if not MANIFEST.exists():
        return {}
    content: dict[str, dict[str, Any]] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return content


def problem_ids(subset: str | None = None) -> list[str]:
    """'<layer>/<set>' for all problems, or those of a subset."""
    return [
        f"{layer}/{name}"
        for layer, entry in manifest().items()
        if subset in (None, entry["subset"])
        for name in entry["sets"]
    ]


def built(subset: str | None, pattern: str) -> Iterator[checker.Problem]:
    """The problems of a subset whose ids match a pattern; of files that are not built, a line on stderr."""
    for identity in problem_ids(subset):
        if fnmatch(identity, pattern):
            try:
                yield load(identity)
            except UserError as error:
                print(error, file=sys.stderr)


def place_of(layer: str) -> Path:
    """Where the file of a layer is, or would be built.

    Raises:
        UserError: there is no such layer.
    """
    entry = manifest().get(layer)
    if entry is None:
        raise UserError(f"no layer '{layer}' in the collection: {MANIFEST.name} lists them")
    return FOLDER / ("problems" if entry["committed"] else "built") / f"{layer}.safetensors"


def load(problem: str) -> checker.Problem:
    """A problem of the collection by its id, from its file, as `problems_of`.

    Raises:
        UserError: no such problem, its file is not built, or it has other content.
    """
    layer, _, name = problem.partition("/")
    problems = problems_of(layer)
    if problem not in problems:
        raise UserError(f"{layer} has no set '{name}': {', '.join(manifest()[layer]['sets'])}")
    return problems[problem]


def problems_of(layer: str) -> dict[str, checker.Problem]:
    """The problems of a layer by id, whose data and sets are those of the manifest; in a matrix that is not committed
    the data may differ by rounding.

    Raises:
        UserError: no such layer, its file is not built, or it has other content.
    """
    path = place_of(layer)
    if not path.exists():
        raise UserError(f"{layer} is not built: python -m collection.build --layers {layer}, with its model and text")
    try:
        problems = checker.load_problems(path)
    except checker.CheckError as error:
        raise UserError(str(error)) from error
    entry = manifest()[layer]
    if _fingerprints_in(problems) != entry["fingerprints"] and not _is_rebuilt(problems, entry):
        strict = entry["committed"] or next(iter(problems.values())).is_stack
        how = "and such a file must be the same to the bit" if strict else "by more than rounding: build it again"
        raise UserError(f"{path} has another SHA-256 than the manifest, {how}")
    return problems


def _is_rebuilt(problems: Mapping[str, checker.Problem], entry: Mapping[str, Any]) -> bool:
    """Whether these are the problems of an entry of the manifest up to rounding."""
    sets = {name.partition("/")[2]: problem.set for name, problem in problems.items()}
    first = next(iter(problems.values()))
    return _is_rounded(first.weight, first.hessian, sets, entry)


def _is_rounded(weight: NDArray[Any], hessian: NDArray[Any], sets: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether these data are those of an entry up to rounding. Never so for committed files, nor for stacks, whose rows
    all have the energy 1."""
    if entry["committed"] or "energy" not in entry or hessian.ndim != 2:
        return False
    if sets != entry["sets"] or list(weight.shape) != entry["shape"]:
        return False
    return bool(abs(_energy(weight, hessian) - entry["energy"]) <= SAME_ENERGY * entry["energy"])


def _energy(weight: NDArray[Any], hessian: NDArray[Any]) -> float:
    return checker.energy(checker.Problem("", {}, weight.astype(np.float64), hessian.astype(np.float64), ""))


def fingerprints(layer: str, sets: Mapping[str, Any], digest: str) -> dict[str, str]:
    """The fingerprint of each problem of a layer by the name of its set, from the hash of its tensors."""
    return {name: checker.fingerprint_of(f"{layer}/{name}", given, digest) for name, given in sets.items()}


def _fingerprints_in(problems: Mapping[str, checker.Problem]) -> dict[str, str]:
    return {name.partition("/")[2]: problem.fingerprint for name, problem in problems.items()}


def build(given: argparse.Namespace) -> tuple[int, list[str], list[str]]:
    """(number of files written, the layers that differ from the manifest by rounding, a line for each other one whose
    data or sets are not those of the manifest)."""
    entries, rounded, differing, count = manifest(), [], [], 0
    for source in sources(given):
        known = [name for name in entries if name.startswith(f"{source.name}.")]
        if not given.write_manifest and not any(_matches(name, entries[name]["subset"], given) for name in known):
            continue
        for layer, entry, weight, hessian in layers_of(source):
            subset, committed = subset_of(source.name, entry)
            if not _matches(layer, subset, given) or not (given.write_manifest or layer in entries):
                continue
            folder = FOLDER / "problems" if committed else given.out
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{layer}.safetensors"
            stated = {name: str(entry[name]) for name in ("model", "module", "block", "tokens", "ridge")}
            listed = entries.get(layer)
            if listed and path.exists() and _is_current(path, listed["fingerprints"]):
                digest = _hash(weight, hessian)
            else:
                write_problem(path, layer, weight, hessian, entry["sets"], stated)
                digest = checker.tensor_hash(checker.read(path, "problem")[0])
                count += 1
            named = fingerprints(layer, entry["sets"], digest)
            if listed and named != listed["fingerprints"]:
                if _is_rounded(weight, hessian, entry["sets"], listed):
                    rounded.append(layer)
                else:
                    what = "sets" if digest == listed["sha256"] else "data"
                    line = f"{layer} differs from the manifest in its {what} (SHA-256 of the data {digest[:12]})"
                    differing.append(line)
            if given.write_manifest:
                place = {"subset": subset, "committed": committed}
                energy = float(f"{_energy(weight, hessian):.10g}")
                entries[layer] = {**entry, **place, "sha256": digest, "fingerprints": named, "energy": energy}
    if given.write_manifest:
        lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in entries.items()]
        MANIFEST.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return count, rounded, differing


def _is_current(path: Path, expected: Mapping[str, str]) -> bool:
    try:
        return _fingerprints_in(checker.load_problems(path)) == expected
    except checker.CheckError:
        return False


def _hash(weight: NDArray[np.float32], hessian: NDArray[np.float32]) -> str:
    upper = np.triu_indices(weight.shape[1])
    return checker.tensor_hash({"weight": weight, "hessian_upper": hessian[..., upper[0], upper[1]]})


def _matches(layer: str, subset: str, given: argparse.Namespace) -> bool:
    return fnmatch(layer, given.layers) and given.subset in (None, subset)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="*", help="a pattern of their ids, such as 'embedded.*'")
    parser.add_argument("--subset", choices=SUBSETS)
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--text", help="its calibration text, the validation text of WikiText-2")
    parser.add_argument("--stories-model", help="folder of stories260K")
    parser.add_argument("--stories-text", help="its calibration text, of TinyStories")
    parser.add_argument("--out", type=Path, default=FOLDER / "built", help="for the files that are not committed")
    parser.add_argument(
        "--write-manifest",
        action="store_true",
        help="take the hashes found for these layers as those of the collection",
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in another order have other bits
    if bool(given.model) != bool(given.text) or bool(given.stories_model) != bool(given.stories_text):
        parser.error("a model needs its text")
    try:
        count, rounded, differing = build(given)
    except (UserError, checker.CheckError) as error:
        sys.exit(f"build: {error}")
    print(*differing, f"{count} files written", sep="\n")
    if rounded:
        print(
            f"{len(rounded)} layers differ from the manifest by rounding ({', '.join(rounded)}): values of records can "
            "be compared, relative to tr(W H W^T) and up to 1e-5; their files are for other data"
        )
    if differing:
        sys.exit(f"build: {len(differing)} layers differ from the manifest: its records do not apply to them")


if __name__ == "__main__":
    main()
