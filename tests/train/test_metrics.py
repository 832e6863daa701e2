import io
import json
import math
import re
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from rich.console import Console

from ul_scale.checkpoint.files import run_path
from ul_scale.train import metrics
from ul_scale.train.metrics import LogConfig, MetricsWriter, last_row, read_metrics, summary, time_left


def row(step, loss=1.0, **more):
    values = {"step": step, "samples_seen": 8 * step, "loss": loss, "bits_per_pixel": 0.1}
    return values | {"images_per_s": 10.0} | more


def writer(run_dir, attempt=1, start=0, **options):
    return MetricsWriter(run_dir, attempt, start=start, stop=4, run_id="run-0123456789", **options)


@pytest.fixture
def bucket():
    import fsspec

    yield run_path("memory://bucket/runs/run-0123456789")
    fsspec.filesystem("memory").store.clear()


def test_newest_attempt_wins_and_a_torn_line_is_left_out(tmp_path):
    for attempt, steps in ((2, (2, 3)), (10, (3, 4)), (1, (1, 2))):
        log = writer(tmp_path, attempt)
        for step in steps:
            log.write(row(step, attempt))
        log.close()
    with (tmp_path / "metrics" / "10.jsonl").open("a") as file:
        file.write(json.dumps(row(5, 10))[:20])
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r["attempt"]) for r in rows] == [
        (1, 1, 1),
        (2, 2, 2),
        (3, 10, 10),
        (4, 10, 10),
    ]
    assert last_row(tmp_path) == rows[-1]


def test_no_metrics_yet(tmp_path, bucket):
    for run_dir in (tmp_path, bucket):
        assert read_metrics(run_dir) == [] and last_row(run_dir) is None


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    log = writer(tmp_path)
    log.write(row(1, math.nan, grad_norm=math.inf))
    log.close()
    line = (tmp_path / "metrics" / "1.jsonl").read_text()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["loss"] is None and values["grad_norm"] is None and values["step"] == 1


def test_the_newest_row_is_found_behind_many_others(tmp_path):
    log = writer(tmp_path)
    for step in range(1, 60):
        log.write(row(step, padding="x" * 3000))
    log.close()
    assert last_row(tmp_path)["step"] == 59


def test_a_bucket_has_all_rows_after_a_flush_and_at_the_end(bucket):
    log = writer(bucket)
    log.write(row(1))
    assert read_metrics(bucket) == []
    log.flush()
    assert [r["step"] for r in read_metrics(bucket)] == [1] and last_row(bucket)["step"] == 1
    log.write(row(2))
    log.close()
    assert [r["step"] for r in read_metrics(bucket)] == [1, 2] and last_row(bucket)["step"] == 2


def test_a_bucket_is_brought_up_to_date_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(metrics, "UPLOAD_EVERY_S", 0.01)
    log = writer(bucket)
    log.write(row(1))
    for _ in range(500):
        if read_metrics(bucket):
            break
        log._mirror._closing.wait(0.01)
    assert len(read_metrics(bucket)) == 1
    log.close()


def test_a_failing_bucket_is_warned_of_once_and_gets_all_rows_later(bucket, monkeypatch, capsys):
    def unreachable(path, data):
        raise OSError(f"{path}: 503\nslow down")

    working = metrics.write_atomic
    log = writer(bucket)
    monkeypatch.setattr(metrics, "write_atomic", unreachable)
    for step in (1, 2):
        log.write(row(step))
        log.flush()
    assert read_metrics(bucket) == []
    monkeypatch.setattr(metrics, "write_atomic", working)
    log.close()
    assert len(read_metrics(bucket)) == 2
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "training goes on" in warnings[0] and "503 slow down" in warnings[0]


def test_plain_lines_say_what_matters(tmp_path, capsys):
    log = writer(tmp_path)
    log.write(row(2, 0.5, mfu=0.412, tflops_per_s_per_device=407.5, data_wait_share=0.02))
    log.close()
    first, line = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in first and "run-0123456789" in first
    assert line == (
        "step 2/4  loss 0.5000  0.1000 bits/pixel  10 images/s  41.2 % MFU  data wait 2 %  left 0:00:02"
    )


def test_without_a_known_peak_the_speed_is_in_teraflops():
    assert summary(row(1, tflops_per_s_per_device=0.01234)).endswith("10 images/s  0.0123 TFLOP/s")


def test_time_left_follows_from_the_rows_pace():
    assert time_left(row(100), 1000) == "left 0:12:00"  # 900 steps of 8 images at 10 images/s
    assert time_left(row(100) | {"images_per_s": 0.0}, 1000) == ""


@pytest.mark.parametrize("width", [60, 80, 140])
def test_on_a_terminal_a_bar_of_one_line_and_events_above_it(tmp_path, monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(
        metrics, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=width)
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = writer(tmp_path)
    log.write(row(3, 0.5, mfu=0.412, data_wait_share=0.02))
    log.event("saved step 3")
    log.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    bars = [line for line in shown if "loss 0.5000" in line]
    assert bars and all("3/4 left 0:00:01 " in line and len(line) <= width for line in bars)
    assert ("data wait 2 %" in bars[0]) == (width == 140)
    assert "saved step 3" in shown


def test_tensorboard_shows_one_curve_over_attempts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, start, steps, loss in ((1, 0, (1, 2, 3), 1.0), (2, 2, (3, 4), 2.0)):
        log = writer(tmp_path, attempt, start, log=LogConfig(tensorboard=True))
        for step in steps:
            log.write(row(step, loss))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "bits_per_pixel", "images_per_s"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_tensorboards_files_reach_a_bucket(bucket):
    log = writer(bucket, log=LogConfig(tensorboard=True))
    log.write(row(1))
    log.close()
    assert [path.name.split(".")[0] for path in (bucket / "tensorboard").iterdir()] == ["events"]


class StubWandb(types.ModuleType):
    """Takes the calls of wandb that we make."""

    class errors:
        class UsageError(Exception):
            pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="stub")
        self.rows, self.started, self.error, self.finished = [], {}, None, False

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        if self.error:
            raise self.error
        self.started = options
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.rows.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


WANDB = LogConfig(wandb_project="latents")


def test_wandb_continues_the_run_and_is_told_no_secrets(tmp_path, wandb):
    config = {"data": {"train": "s3://key:secret@bucket/a?signature=abc", "lanes": 4}, "tags": ["gs://b/c"]}
    log = writer(tmp_path, log=WANDB, config=config)
    log.write(row(1))
    log.close()
    assert wandb.started["project"] == "latents" and wandb.started["resume"] == "allow"
    assert wandb.started["id"] == "run-0123456789"
    assert wandb.started["config"] == {"data": {"train": "s3://bucket/a", "lanes": 4}, "tags": ["gs://b/c"]}
    assert wandb.rows == [row(1) | {"attempt": 1}] and wandb.finished


def test_wandb_that_is_not_set_up_is_named_before_training(tmp_path, wandb):
    wandb.error = wandb.errors.UsageError("No API key configured.\nUse `wandb login`")
    with pytest.raises(ValueError, match="log.wandb_project is latents: No API key configured. Use"):
        writer(tmp_path, log=WANDB)


def test_wandb_that_fails_later_does_not_end_training(tmp_path, wandb, capsys):
    wandb.error = ConnectionError("no route")
    log = writer(tmp_path, log=WANDB)
    log.write(row(1))
    log.close()
    assert "warning: wandb cannot be written, training goes on: no route" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("log,package", [(LogConfig(tensorboard=True), "tensorboard"), (WANDB, "wandb")])
def test_a_missing_package_names_the_extra(log, package, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"{package}, which is not installed.*pip install 'ul-scale\[{package}\]'"
    ):
        log.check()
    monkeypatch.setattr(metrics, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    with pytest.raises(ValueError, match="not installed"):  # a mere folder of that name
        log.check()
    LogConfig().check()
