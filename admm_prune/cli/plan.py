"""admm-prune plan: what a run will take, before anything is loaded."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from admm_prune.cli import common
from admm_prune.settings import PlanSettings

if TYPE_CHECKING:
    from admm_prune.plan.plan import Plan


@common.logs
@common.takes("plan", PlanSettings)
def plan(json: common.Json = False, **options: Any) -> None:
    """Estimate memory, disk space and time of a run from the model's config; exit with status 2 if it does not fit.

    Example: admm-prune plan --model embedded --method admm --sparsity 0.7
    """
    from admm_prune.errors import UserError
    from admm_prune.plan.plan import make_plan

    made = make_plan(**options)
    refusal = made.refusal()
    if refusal is not None:
        raise UserError(refusal)
    if json:
        common.emit(made.as_json())
        return
    _show(made)


def _show(made: Plan) -> None:
    content = made.as_json()
    for place, memory in content["memory"].items():
        rows = [[name, f"{size / 1e6:,.1f}"] for name, size in memory["parts"].items()]
        rows.append(["at most", f"{memory['bytes'] / 1e6:,.1f}"])
        run = f"{made.method} {made.target}, {made.parameters:,} parameters"
        title = f"{run}: memory on the {place}, at '{memory['stage']}'"
        common.show_table(title, ["part", "MB"], rows)
    rows = [
        [name, f"{stage['operations'] / 1e9:,.2f}", f"{stage['seconds']:,.1f}"]
        for name, stage in content["stages"].items()
    ]
    rows.append(
        ["all", f"{sum(t['operations'] for t in content['stages'].values()) / 1e9:,.2f}", f"{made.seconds:,.1f}"]
    )
    common.show_table(f"time on {made.machine.name} ({made.machine.source})", ["stage", "10^9 operations", "s"], rows)
    sizes = {**made.disk, "at most": sum(made.disk.values())}
    if made.free_disk is not None:
        sizes["free"] = made.free_disk
    common.show_table("disk", ["what", "MB"], [[name, f"{size / 1e6:,.1f}"] for name, size in sizes.items()])
    if made.seconds >= 3600:
        print(f"{timedelta(seconds=round(made.seconds))} in all; fewer --samples or a smaller --length take less")
    for note in made.notes:
        print(note)
