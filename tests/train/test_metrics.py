import json

from ul_scale.train.metrics import MetricsWriter, last_row, read_metrics


def row(step, loss):
    return {"step": step, "loss": loss, "bits_per_pixel": 0.1, "images_per_s": 10.0}


def test_newest_attempt_wins_and_a_torn_line_is_left_out(tmp_path):
    for attempt, steps in ((2, (2, 3)), (10, (3, 4)), (1, (1, 2))):
        writer = MetricsWriter(tmp_path, attempt, start=0, stop=4, label="run")
        for step in steps:
            writer.write(row(step, attempt))
        writer.close()
    with (tmp_path / "metrics" / "10.jsonl").open("a") as file:
        file.write(json.dumps(row(5, 10))[:20])
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 10), (4, 10)]
    assert last_row(tmp_path)["step"] == 4


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == [] and last_row(tmp_path) is None
