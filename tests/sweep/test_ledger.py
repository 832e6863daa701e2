from ul_scale.evaluate.metrics import evaluation_dir, evaluation_id
from ul_scale.sweep.ledger import read_rows
from ul_scale.sweep.plan import load_sweep, plan_sweep


def write_evaluation(run_dir, step, evaluation, **values):
    import json

    folder = evaluation_dir(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metrics-{evaluation_id(evaluation)}.json"
    path.write_text(json.dumps(values | {"n": evaluation.samples}))


def test_rows_are_read_from_files_and_what_is_missing_stays_missing(sweep_path):
    plan = plan_sweep(*load_sweep(sweep_path))
    assert read_rows(plan) == []
    cell = plan.cells[0]
    evaluation = plan.config.evaluation
    write_evaluation(cell.base_dir, 50, evaluation, fd_effnet_lite0=12.0, base_bits_per_pixel=0.5)
    (row,) = read_rows(plan)
    assert row["fd_effnet_lite0"] == 12.0 and row["step"] == 50 and row["final"] is False
    assert row["samples_seen"] == 50 * 8 and row["train_flops"] == 3 * row["forward_flops"] * 50 * 8
    assert row["autoencoder_flops"] == cell.autoencoder_cost.train_flops(200)
    assert "psnr" not in row and "bits_per_pixel" not in row and "reconstructions_png" not in row
    write_evaluation(
        cell.autoencoder_dir, 200, evaluation, bits_per_pixel=0.1, bits_per_pixel_ci95=0.01, psnr=20.0,
        rfd_effnet_lite0=3.0,
    )  # fmt: skip
    (row,) = read_rows(plan)
    assert (row["bits_per_pixel"], row["psnr"], row["rfd"]) == (0.1, 20.0, 3.0)


def test_evaluations_made_in_another_way_are_not_rows(sweep_path):
    plan = plan_sweep(*load_sweep(sweep_path))
    other = plan_sweep(*load_sweep(sweep_path, ["evaluation.samples=4"]))
    cell = plan.cells[0]
    write_evaluation(cell.base_dir, 50, other.config.evaluation, fd_effnet_lite0=1.0, base_bits_per_pixel=0.5)
    assert read_rows(plan) == [] and len(read_rows(other)) == 1
