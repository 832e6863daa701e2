"""``ul-scale`` as a user meets it when something that is given is not what is expected."""

import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ul_scale import cli
from ul_scale.evaluate.fixed_run import fixed_run

PIXELS = {
    "kind": "fixed_autoencoder",
    "name": "pixels",
    "data": {"image_size": 16, "channels": 1, "workers": 0},
    "model": {"source": "pixels", "patch": 4},
}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Return a function that runs a command, expects it to fail, and returns its exit code and error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ul-scale", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err.removesuffix("\n")

    return run


@pytest.mark.parametrize(
    "command",
    [["evaluate"], ["evaluate", "--step", "1"], ["bitrate"], ["encode"], ["checkpoint", "list"]],
    ids=" ".join,
)
def test_a_file_is_not_a_run_directory(refusal, tmp_path, command):
    (tmp_path / "file").write_text("kind: autoencoder\n")
    code, error = refusal(*command, tmp_path / "file")
    expected = "not a run directory (no config.yaml); expected <root>/<run_id>"
    assert (code, error) == (2, f"error: {tmp_path / 'file'}: {expected}")


@pytest.mark.parametrize("command", ["evaluate", "bitrate"])
def test_credentials_are_not_printed(refusal, command):
    code, error = refusal(command, "gs://user:secret@bucket/run")
    assert code == 2 and "gs://…: is in a bucket" in error
    assert "user" not in error and "secret" not in error


def test_all_steps_are_looked_for_before_the_first_is_evaluated(refusal, write_config, shards):
    run_dir = fixed_run(str(write_config(PIXELS, data=shards)), [])
    there = sorted(run_dir.iterdir())
    code, error = refusal("evaluate", run_dir, "--step", 0, "--step", 3, "samples=4")
    assert (code, error) == (2, f"error: {run_dir}: is not trained here; step is 3, expected 0")
    assert sorted(run_dir.iterdir()) == there


def test_the_config_of_a_fixed_autoencoder_is_printed(write_config, shards):
    path: Path = write_config(PIXELS, data=shards)
    result = CliRunner().invoke(cli.app, ["config", str(path), "model.patch=8"])
    values = yaml.safe_load(result.stdout)
    assert values["kind"] == "fixed_autoencoder" and values["model"]["patch"] == 8
    assert values["loss"] == {"log_snr_max": 10.0}
