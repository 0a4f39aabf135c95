"""ELSA compared with its baselines, with the same number of passes over the same text and the same loss.

    python -m benchmarks.surrogate_free OUT --model embedded --steps 256 [--sparsity 0.5,0.9] [--pattern 2:4,4:8]
    python -m benchmarks.surrogate_free OUT --model DIR --data FILE --eval-data FILE --steps 512 --seeds 3

ELSA runs with its defaults. Baselines use the best of their measured learning rate and five others. It is searched with
seed 0 (downhill from the middle of the grid, until the rates on both sides are worse) and used for the other seeds.
`--distillation 0,0.5` trains every method with each of these weights of the distillation loss. The seed determines the
sample of text, its order and the random rounding of bfloat16 models. Products are in float32 on every processor. Each
row is written as soon as it is measured, and the same command continues where it stopped; use a new folder if the code
has changed. OUT has runs.csv, surrogate_free.txt and surrogate_free.json; `--report` only writes the last two again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from admm_prune.methods.base import Recipe, Task
from admm_prune.methods.elsa.baselines import DensitySchedule, Staged
from admm_prune.methods.elsa.elsa import Elsa
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target, parse_targets, target_named
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from benchmarks.journal import Journal, Record, number
from benchmarks.machine import headline, machine, write_results

KEY = ("model", "target", "method", "steps", "distillation", "lr", "seed")
COLUMNS = ("perplexity", "dense", "sparsity", "tokens", "used_lr", "primal_residual", "seconds", "notes")
RATES = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
BASELINES = ("admm-finetuned", "gradual", "staged")


@dataclass(frozen=True, kw_only=True)
class Apart(Elsa):
    """The layers' solution becomes z at the stages, and x stays dense."""

    def project(self, session: Session, target: Target) -> None:
        weights = {view.parameter_name: session.trained.get_parameter(view.parameter_name) for view in session.views}
        x = {name: weight.detach().clone() for name, weight in weights.items()}
        super().project(session, target)
        if not session.trainer.optimizer.frozen:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(x[name])


@dataclass(frozen=True, kw_only=True)
class LayersAtTheEnd(Elsa):
    """The last part has the layers' solution for x, and its support, instead of the support of z."""

    def _fix_support(self, session: Session, target: Target) -> None:
        Staged.project(self, session, target)


# elsa with an update of z and u every 4 steps, or every step as by default, and one of its parts exchanged or removed.
_every_4 = partial(Elsa, interval=4)
ABLATIONS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _every_4(name="elsa, updates every 4 steps"),
        Apart(name="elsa, x dense at the stages", interval=4),
        LayersAtTheEnd(name="elsa, layers at the end", interval=4),
        _every_4(name="elsa, rho 0", rho=0.0),
        _every_4(name="elsa, a third of rho", rho=Elsa.rho / 3),
        _every_4(name="elsa, three times rho", rho=3 * Elsa.rho),
        _every_4(name="elsa, ten times rho", rho=10 * Elsa.rho),
        Elsa(name="elsa, updates every step"),
        Elsa(name="elsa, updates every step, a third of rho", rho=Elsa.rho / 3),
        Elsa(name="elsa, updates every step, three times rho", rho=3 * Elsa.rho),
        Elsa(name="elsa, updates every step, 1.7 times rho", rho=1.7 * Elsa.rho),
        Elsa(name="elsa, updates every step, frozen for the last three quarters", frozen=0.75),
        Elsa(name="elsa, updates every step, 1.5 times the rate", lr_multiplier=1.5),
        Elsa(name="elsa, updates every step, twice the rate", lr_multiplier=2.0),
        Elsa(name="elsa, updates every step, stages nearer to each other", schedule=DensitySchedule(ratio=0.7)),
        Elsa(name="elsa, updates every step, target reached earlier", schedule=DensitySchedule(until=0.3)),
        Elsa(name="elsa, updates every 2 steps", interval=2),
        Elsa(name="elsa, updates every 32 steps", interval=32),
        _every_4(name="elsa, by magnitude", power=0.0),
        _every_4(name="elsa, in the metric F^(1/2)", power=0.25),
        _every_4(name="elsa, frozen for the last quarter", frozen=0.25),
        _every_4(name="elsa, frozen for the last three quarters", frozen=0.75),
        _every_4(name="elsa, one stage", schedule=None),
        _every_4(name="elsa, layers by magnitude", projection=LOCAL_METHODS["magnitude"]),
        _every_4(name="elsa, layers by sparsegpt", projection=LOCAL_METHODS["sparsegpt"]),
        _every_4(name="elsa, u in bfloat16", anchor="bfloat16"),
        _every_4(name="elsa, half the rate", lr_multiplier=0.5),
        _every_4(name="elsa, twice the rate", lr_multiplier=2.0),
        Staged(name="staged, layers by magnitude", projection=LOCAL_METHODS["magnitude"]),
        Staged(name="staged, layers by sparsegpt", projection=LOCAL_METHODS["sparsegpt"]),
    )
}


@dataclass(frozen=True)
class Job:
    """One run; `lr` None leaves the rate to the recipe."""

    model: str
    recipe: Recipe
    target: Target
    lr: float | None
    seed: int

    @property
    def key(self) -> Record:
        recipe: Any = self.recipe
        return {
            "model": Path(self.model).name,
            "target": self.target.label,
            "method": recipe.name,
            "steps": str(recipe.steps) if "steps" in recipe.options else "",
            "distillation": f"{recipe.distillation:g}" if "steps" in recipe.options else "",
            "lr": "" if self.lr is None else f"{self.lr:g}",
            "seed": str(self.seed),
        }


class Bench:
    """The runs of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.journal = Journal(arguments.out / "runs.csv", COLUMNS, KEY)

    def measure(self, job: Job) -> Record:
        """The row of a job, from the journal where it is there."""
        known = self.journal.find(job.key)
        if known:
            return known[0]
        arguments = self.arguments
        loaded = load(job.model)
        loaded.model.set_attn_implementation("eager")  # twice as fast on a CPU at these sizes
        settings = TextSettings(
            data=arguments.data, eval_data=arguments.eval_data, eval_samples=arguments.eval_samples,
            length=arguments.length, packing="windows", seed=job.seed,
        )  # fmt: skip
        texts = Texts(settings, loaded)
        # The evaluation text is the same for all seeds.
        validation = Texts(replace(settings, seed=0), loaded).evaluation
        dense = evaluate(loaded.model, validation).perplexity
        task = Task(target=job.target, calibration=texts.calibration(job.recipe.samples), seed=job.seed)
        began = time.perf_counter()
        outcome = job.recipe.prune(loaded.model, task)
        seconds = time.perf_counter() - began
        training = outcome.details.get("training", {})
        updates = training.get("dual_updates")
        row = {
            "perplexity": evaluate(loaded.model, validation).perplexity,
            "dense": dense,
            "sparsity": mean(layer.sparsity for layer in outcome.layers),
            "tokens": training.get("tokens", task.calibration.tokens),
            "used_lr": training.get("lr"),
            "primal_residual": updates[-1]["primal_residual"] if updates else None,
            "seconds": seconds,
            "notes": "; ".join(outcome.notes),
        }
        self.journal.add(job.key, [row])
        print(f"{job.key} {row['perplexity']:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        return self.journal.find(job.key)[0]

    def run(self) -> None:
        arguments = self.arguments
        targets = parse_targets(arguments.sparsity, arguments.pattern)
        methods = arguments.methods.split(",")
        if arguments.methods == "ablations":
            methods = [name for name in ABLATIONS if arguments.only in name]
        for method, weight in product(methods, arguments.distillation.split(",")):
            for target in [target_named("0")] if method == "tuned-dense" else targets:
                recipe = self._recipe(method, float(weight))
                best = self._best_rate(recipe, target) if method in (*BASELINES, "tuned-dense") else None
                if best is not None:
                    both = (best, None)
                    best = min(both, key=lambda lr: self._perplexity(self._job(recipe, target, lr, 0)))
                self.measure(self._job(recipe, target, best, 0))
                for seed in range(1, arguments.seeds):
                    self.measure(self._job(recipe, target, best, seed))

    def _best_rate(self, recipe: Recipe, target: Target) -> float:
        """The best of the grid with seed 0: from its middle downhill, until the neighbours on both sides are worse."""
        perplexities: dict[int, float] = {}

        def at(i: int) -> float:
            if not 0 <= i < len(RATES):
                return math.inf
            if i not in perplexities:
                perplexities[i] = self._perplexity(self._job(recipe, target, RATES[i], 0))
            return perplexities[i]

        index = len(RATES) // 2
        while True:
            best = min((index, index + 1, index - 1), key=at)
            if best == index:
                return RATES[index]
            index = best

    def _perplexity(self, job: Job) -> float:
        return float(self.measure(job)["perplexity"])

    def _recipe(self, method: str, distillation: float) -> Recipe:
        recipe: Any = ABLATIONS[method] if method in ABLATIONS else recipe_named(method)
        if "steps" in recipe.options:
            settings: dict[str, Any] = {"steps": self.arguments.steps, "batch_size": self.arguments.batch_size}
            # "auto" is bfloat16 on some processors.
            recipe = replace(recipe, **settings, distillation=distillation, engine=Engine(precision="float32"))
        return recipe

    def _job(self, recipe: Any, target: Target, lr: float | None, seed: int) -> Job:
        if lr is not None and "steps" in recipe.options:
            recipe = replace(recipe, lr=lr)
        return Job(self.arguments.model, recipe, target, lr, seed)


Row = dict[str, Any]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each model, target, weight of distillation and method: the means over the seeds, at the method's best
    rate, of perplexities and of their ratios to what each seed's best baseline reached with the same loss."""
    rows = []
    for place in dict.fromkeys(map(_place, records)):
        group = [record for record in records if _place(record) == place]
        chosen = {method: _at_best_rate(group, method) for method in dict.fromkeys(r["method"] for r in group)}
        baselines = [chosen[name] for name in BASELINES if name in chosen]
        for method, by_seed in chosen.items():
            ratios = []
            for seed, record in by_seed.items():
                rivals = [float(other[seed]["perplexity"]) for other in baselines if seed in other]
                if rivals:
                    ratios.append(float(record["perplexity"]) / min(rivals))
            first = next(iter(by_seed.values()))
            values = [float(record["perplexity"]) for record in by_seed.values()]
            seconds = [float(record["seconds"]) for record in by_seed.values() if record["seconds"]]
            rows.append(
                {
                    **dict(zip(("model", "target", "steps", "distillation"), place, strict=True)),
                    "method": method,
                    "perplexity": mean(values),
                    "spread": max(values) - min(values),
                    "seeds": len(values),
                    "lr": number(first["lr"]),
                    "used_lr": first["used_lr"],
                    "tokens": number(first["tokens"]),
                    "sparsity": number(first["sparsity"]),
                    "primal_residual": number(first["primal_residual"]),
                    "dense": float(first["dense"]),
                    "ratio": mean(ratios) if ratios else None,
                    "seconds": mean(seconds) if seconds else None,  # of runs that were not suspended
                }
            )
    return rows


def _place(record: Record) -> tuple[str, ...]:
    """What rows have to agree in to be compared."""
    return (record["model"], record["target"], record["steps"], record["distillation"])


def _at_best_rate(records: Sequence[Record], method: str) -> dict[str, Record]:
    """By seed, at the rate that was best with seed 0."""
    mine = [record for record in records if record["method"] == method]
    first = [record for record in mine if record["seed"] == "0"]
    best = min(first, key=lambda record: float(record["perplexity"]))["lr"]
    return {record["seed"]: record for record in mine if record["lr"] == best}


def text_table(rows: Sequence[Row], head: str) -> str:
    lines = [
        head,
        f"ratio: to the best baseline ({', '.join(BASELINES)}: best of measured, 1e-3 to 4e-2) of the same seed,",
        "text and loss, mean over the seeds; spread: of perplexities over the seeds; KD: weight of distillation;",
        "primal: |x - z| / |x| at the last dual update; lr: of the grid, or as measured, by stage.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        dense = next(row["dense"] for row in rows if row["model"] == model)
        columns = f"{'perplexity':>11}{'spread':>9}{'seeds':>6}{'ratio':>8}{'tokens':>9}{'primal':>8}{'seconds':>9}  lr"
        lines += ["", f"{model}, dense: {dense:.3f}", f"{'target':7}{'method':40}{'KD':>4}{columns}"]
        for row in (row for row in rows if row["model"] == model):
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            rate = "" if row["used_lr"] == "" else row["used_lr"]
            primal = "" if row["primal_residual"] is None else f"{row['primal_residual']:.3f}"
            lines.append(
                f"{row['target']:7}{row['method']:40}{row['distillation']:>4}{row['perplexity']:11.3f}"
                f"{row['spread']:9.3f}{row['seeds']:6}{ratio:>8}{int(row['tokens'] or 0):9}{primal:>8}"
                f"{'' if row['seconds'] is None else round(row['seconds']):>9}  {rate}"
            )
    return "\n".join(lines) + "\n"


def report(out: Path) -> None:
    """The tables of what has been measured."""
    rows = rows_of(Journal(out / "runs.csv", COLUMNS, KEY).records)
    facts = machine()
    write_results(out / "surrogate_free", {"machine": facts, "rows": rows}, text_table(rows, headline(facts)))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument(
        "--methods", default="admm,tuned-dense,admm-finetuned,gradual,staged,elsa,elsa-l", help="names, or 'ablations'"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="the ablations with this in their name")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9,0.95")
    parser.add_argument("--pattern", default="")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--distillation", default="0", help="weights of the distillation loss, for all methods")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        Bench(arguments).run()
    report(arguments.out)


if __name__ == "__main__":
    main()
