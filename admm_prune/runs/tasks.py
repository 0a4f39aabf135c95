"""Tasks of lm-evaluation-harness, through its own Python interface: comparable with published figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from admm_prune.errors import UserError
from admm_prune.models.loading import load
from admm_prune.runs.machine import check_dtype, pick_device


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness.

    Args:
        model: a folder, a Hub id or "embedded".
        tasks: names, of the harness or of `folder`.
        folder: with tasks of one's own, as YAML.
        shots: examples before each question; the task's own number by default.
        limit: questions per task, for a quick check: such figures are not comparable.
        batch_size: of the requests.
        seed: of all random choices of the harness.

    Returns:
        For JSON: "results" by task and metric with their standard errors, as the harness names them ("acc,none",
        "acc_norm,none"), "versions" of the tasks, "shots", "limit", and the version of "lm_eval".

    Raises:
        UserError: lm_eval is not installed, a task is unknown or needs data that are not there, the model cannot be
            loaded.
    """
    place = pick_device(device)
    check_dtype(dtype)
    if not tasks:
        raise UserError("name at least one task, such as --tasks piqa,arc_easy")
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of tasks")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"tasks need lm-evaluation-harness: pip install admm-prune[eval] ({error})") from error
    loaded = load(model, device=place, dtype=dtype)
    # The harness has thousands of task files: they are not read if all requested tasks are in the folder.
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm_eval {lm_eval.__version__} knows no task '{unknown[0]}'; tasks of your own: --task-folder")
    model_of: Any = HFLM
    evaluate: Any = lm_eval.simple_evaluate
    harness = model_of(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    try:
        found = evaluate(
            harness,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        raise UserError(f"{', '.join(tasks)}: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return {
        "results": {task: {k: v for k, v in row.items() if k != "alias"} for task, row in found["results"].items()},
        "versions": found["versions"],
        "shots": found["n-shot"],
        "limit": limit,
        "lm_eval": lm_eval.__version__,
    }
