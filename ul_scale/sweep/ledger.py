"""The ledger of a sweep: its rows, read from the files of its runs. There is nothing else to lose."""

from typing import Any

from ul_scale.evaluate.metrics import picture_path, read_evaluation
from ul_scale.sweep.plan import Cell, Plan


def read_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per finished evaluation of a base model. What is not there yet is not in a row."""
    return [row for cell in plan.cells for row in _cell_rows(plan, cell)]


def _cell_rows(plan: Plan, cell: Cell) -> list[dict[str, Any]]:
    evaluation = plan.config.evaluation
    last = cell.autoencoder.train.last_step
    reconstruction = read_evaluation(cell.autoencoder_dir, last, evaluation) or {}
    metric = plan.metric
    pictures = picture_path(cell.autoencoder_dir, last, evaluation, "reconstructions")
    rows = []
    for step in cell.evaluation_steps:
        values = read_evaluation(cell.base_dir, step, evaluation)
        if values is None:
            continue
        sampling = cell.cost.forward_flops * evaluation.base_calls
        sampling += cell.autoencoder_cost.decode_flops * evaluation.decoder_steps
        row = {
            "run_id": cell.base_dir.name,
            "autoencoder_run": cell.autoencoder_dir.name,
            "loss_factor": reconstruction.get("loss_factor", cell.autoencoder.loss.loss_factor),
            "bits_per_pixel": reconstruction.get("bits_per_pixel"),
            "bits_per_pixel_ci95": reconstruction.get("bits_per_pixel_ci95"),
            "psnr": reconstruction.get("psnr"),
            "rfd": reconstruction.get(f"r{metric}"),
            "size": cell.base.model.size,
            "seed": cell.base.seed,
            "step": step,
            "final": step == cell.evaluation_steps[-1],
            "samples_seen": step * cell.base.train.batch_size,
            "parameters": cell.cost.parameters,
            "forward_flops": cell.cost.forward_flops,
            "train_flops": cell.cost.train_flops(step),
            "autoencoder_flops": cell.autoencoder_cost.train_flops(last),
            "sampling_flops": sampling,
            metric: values[metric],
            "base_bits_per_pixel": values["base_bits_per_pixel"],
            "n": values["n"],
            "samples_png": str(picture_path(cell.base_dir, step, evaluation, "samples")),
            "reconstructions_png": str(pictures) if pictures.is_file() else None,
        }
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows
