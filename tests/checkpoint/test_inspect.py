"""The checkpoint commands, in this process."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from ul_scale.checkpoint import store
from ul_scale.checkpoint.files import run_path
from ul_scale.checkpoint.inspect import check_steps, describe, human_age, human_bytes, rows
from ul_scale.checkpoint_cli import checkpoint_app


def command(*arguments):
    result = CliRunner().invoke(checkpoint_app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / trained.name)


def test_list_says_what_exists_and_why_it_is_kept(run_dir):
    lines = command("list", run_dir).stdout.splitlines()
    assert lines[0].split() == ["run", f"{run_dir.name}:", "done", "at", "step", "12"]
    assert lines[1].endswith("8, 400, power-0.050, power-0.100")
    assert lines[2].endswith("6, steps 2 to 12")
    header, *table = lines[3:]
    assert header.split() == ["step", "samples", "attempt", "world", "size", "size", "age", "kept", "format"]
    assert [line.split()[0] for line in table] == ["4", "8", "12"]
    assert "named" in table[0] and "last" not in table[0]
    assert "last" in table[1] and "(newest)" not in table[1]
    assert "12 (newest)" in table[2] and "last" in table[2] and table[2].endswith("dcp")


def test_list_as_json_can_be_computed_with(run_dir):
    os.utime(store.shard_dir(run_dir, 8).parent / "COMMIT", (1000, 1000))
    info = json.loads(command("list", run_dir, "--json").stdout)
    assert info["run_id"] == run_dir.name and info["done_at_step"] == 12
    assert info["ema_names"][0] == "8" and info["ema_snapshots"] == [2, 4, 6, 8, 10, 12]
    checkpoints = {each["step"]: each for each in info["checkpoints"]}
    assert [each["newest"] for each in info["checkpoints"]] == [False, False, True]
    assert checkpoints[4]["kept"] == ["named"] and checkpoints[12]["kept"] == ["last"]
    assert checkpoints[8]["saved_at"] == 1000 and checkpoints[8]["samples_seen"] == 64
    assert checkpoints[12]["attempt"] == 1 and checkpoints[12]["world_size"] == 1
    files = store.read_commit(run_dir, 12).files.values()
    assert checkpoints[12]["size_bytes"] == sum(each["size"] for each in files)


def test_list_of_a_run_without_checkpoints(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "SUCCESS").unlink()
    result = command("list", run_dir)
    assert "no SUCCESS yet" in result.stdout and result.stdout.endswith("no complete checkpoint\n")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        command("verify", run_dir)
    with pytest.raises(ValueError, match="not a run directory"):
        command("list", run_dir / "checkpoints")


def test_list_of_an_autoencoder_that_is_not_trained(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: fixed_autoencoder\n")
    with pytest.raises(ValueError, match="is not trained here; there are no checkpoints"):
        command("list", tmp_path)
    check_steps(tmp_path, [0])
    with pytest.raises(ValueError, match="is not trained here; step is 3, expected 0"):
        check_steps(tmp_path, [0, 3])


def test_steps_are_those_with_a_complete_checkpoint(run_dir):
    check_steps(run_dir, [4, 12])
    (store.shard_dir(run_dir, 12).parent / "COMMIT").unlink()
    with pytest.raises(ValueError, match=r"no complete checkpoint at step 12; complete: \[4, 8\]"):
        check_steps(run_dir, [4, 12])


def test_list_in_a_bucket(run_dir):
    bucket = run_path("memory://listed") / run_dir.name
    for path in run_dir.rglob("*"):
        if path.is_file():
            target = bucket / path.relative_to(run_dir).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    here, there = describe(run_dir), describe(bucket)
    assert [row[:5] for row in rows(here)] == [row[:5] for row in rows(there)]
    assert here.ema_snapshots == there.ema_snapshots


def test_verify_reads_every_file(run_dir):
    result = command("verify", run_dir, "--step", "all")
    assert result.exit_code == 0
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == [
        f"step {step}: whole" for step in (4, 8, 12)
    ]
    assert command("verify", run_dir).stdout.startswith("step 12: whole")


def test_verify_names_every_broken_file(run_dir):
    flipped, metadata = (store.shard_dir(run_dir, 8) / name for name in ("__0_0.distcp", ".metadata"))
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    metadata.unlink()
    cut = store.shard_dir(run_dir, 12) / "__0_0.distcp"
    os.truncate(cut, 10)
    result = command("verify", run_dir, "--step", "all")
    assert result.exit_code == 1
    lines = sorted(result.stdout.splitlines())
    assert len(lines) == 4
    assert f"step 12: {cut} has 10 bytes, expected" in lines[0]
    assert lines[1].startswith("step 4: whole")
    assert f"step 8: {metadata} is missing" in lines[2]
    assert f"step 8: {flipped} has sha256" in lines[3] and "expected" in lines[3]
    assert command("verify", run_dir, "--step", "4").exit_code == 0
    assert command("verify", run_dir, "--step", "8").exit_code == 1


def test_verify_says_which_steps_there_are(run_dir):
    with pytest.raises(ValueError, match=r"no complete checkpoint at step 5; complete: \[4, 8, 12\]"):
        command("verify", run_dir, "--step", "5")
    with pytest.raises(ValueError, match="--step is 'newest'; expected completed steps, or all"):
        command("verify", run_dir, "--step", "newest")


def test_convert_has_nothing_to_do_for_dcp(run_dir):
    assert "nothing to convert" in command("convert", run_dir).stdout


def test_export_by_command(run_dir, tmp_path):
    out = tmp_path / "out"
    result = command("export", run_dir, out, "--weights", "power-0.100", "--dtype", "bf16", "--step", 8)
    assert result.stdout == f"{out}: power-0.100 at step 8, bf16\n"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bf16"
    result = command("export", run_dir, out, "--ema-width", 0.07)
    assert "rebuilt from 6 snapshots" in result.stdout and "power-0.07, rebuilt at step 12" in result.stdout
    with pytest.raises(ValueError, match="expected one of them"):
        command("export", run_dir, out, "--ema-width", 0.07, "--weights", "8")


def test_ages_and_sizes():
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [human_age(s) for s in (-1, 119, 120, 7300, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
