"""What ``ul-scale sweep`` does: plan, run what is missing, write the report, say where to look."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ul_scale.config import AutoencoderRun
from ul_scale.sweep.ledger import read_rows
from ul_scale.sweep.local import Interrupted, Machine, run_sweep, this_machine
from ul_scale.sweep.plan import Plan, load_sweep, plan_sweep
from ul_scale.sweep.report import summary_table, write_report
from ul_scale.sweep.summary import finding, summarise
from ul_scale.train.collapse import warn_of_loss_factor
from ul_scale.train.worker import EXIT_DONE, EXIT_RUN_AGAIN

EXIT_FAILED = 1


def run(path: str, overrides: list[str], *, slots: int | None = None, dry_run: bool = False) -> int:
    """Run what is missing of a sweep and write its report; return the exit code."""
    plan, machine, console = plan_sweep(*load_sweep(path, overrides)), this_machine(slots), Console()
    for config in plan.runs.values():
        if isinstance(config, AutoencoderRun):
            if warning := warn_of_loss_factor(config.loss, config.model):
                console.print(warning, style="yellow", highlight=False)
    missing = [node for node in plan.nodes if not node.done()]
    if dry_run:
        console.print(plan_table(plan, machine))
        return EXIT_DONE
    if not missing:
        console.print(f"sweep {plan.config.name} is done: all {len(plan.nodes)} parts are there")
    else:
        done = len(plan.nodes) - len(missing)
        console.print(
            f"sweep {plan.config.name}: {len(missing)} of {len(plan.nodes)} parts to run"
            + (f", {done} are there" if done else "")
            + f"; {machine.slots} at once, {machine.threads} thread(s) each"
        )
    try:
        failed = run_sweep(plan, machine) if missing else {}
    except Interrupted:
        console.print("interrupted; the same command continues")
        return EXIT_RUN_AGAIN
    for node_id, reason in failed.items():
        console.print(f"\n{node_id} failed: {reason}", style="red", markup=False, highlight=False)
    report_plan(plan, console)
    if failed:
        console.print(f"{len(failed)} parts failed; their logs are in {plan.directory / 'logs'}", style="red")
    return EXIT_FAILED if failed else EXIT_DONE


def report(path: str, overrides: list[str]) -> None:
    """Write the report of what is there."""
    report_plan(plan_sweep(*load_sweep(path, overrides)), Console())


def report_plan(plan: Plan, console: Console) -> Path | None:
    rows = read_rows(plan)
    if not rows:
        console.print("nothing has been evaluated yet: no report")
        return None
    page = write_report(rows, plan.directory, title=plan.config.name, meta=report_meta(plan))
    console.print(summary_table(rows, plan.metric))
    console.print(finding(summarise(rows, plan.metric)))
    console.print(f"report: {page}   (also report.json, report.csv and PNGs beside it)", soft_wrap=True)
    return page


def report_meta(plan: Plan) -> dict[str, object]:
    sweep = plan.config
    return {
        "name": sweep.name,
        "loss_factors": list(sweep.loss_factors),
        "targets_bits_per_pixel": list(sweep.targets_bits_per_pixel),
        "sizes": list(sweep.sizes),
        "seeds": list(sweep.seeds),
        "metric": plan.metric,
        "n": sweep.evaluation.samples,
        "base_steps": sweep.evaluation.base_steps,
        "decoder_steps": sweep.evaluation.decoder_steps,
    }


def plan_table(plan: Plan, machine: Machine) -> Table:
    """Return what a sweep would run, with its cost."""
    missing = [node for node in plan.nodes if not node.done()]
    table = Table(
        title=f"{plan.config.name}: {len(missing)} of {len(plan.nodes)} parts to run, "
        f"{sum(node.flops for node in missing):.3g} FLOPs; {machine.slots} at once"
    )
    for column in ("part", "kind", "steps", "FLOPs", "state"):
        table.add_column(column, justify="right" if column in ("steps", "FLOPs") else "left")
    for node in plan.nodes:
        steps = str(node.steps) if node.steps else ""
        table.add_row(node.id, node.kind, steps, f"{node.flops:.3g}", "done" if node.done() else "to run")
    return table
