"""Exports give the stage that evaluation restores, without the trainer, from disks and buckets."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from templates import BASE, write_template

from ul_scale.checkpoint.convert import export
from ul_scale.checkpoint.ema_snapshots import posthoc_average
from ul_scale.checkpoint.files import run_path
from ul_scale.checkpoint.store import BrokenCheckpoint
from ul_scale.exported import load_exported

WITHOUT_TRAINER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        blocked = ("ul_scale.train", "ul_scale.data", "ul_scale.config", "ul_scale.checkpoint", "ray",
                   "deepspeed", "webdataset", "omegaconf", "fsspec", "pyarrow")
        if any(name == each or name.startswith(each + ".") for each in blocked):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
from ul_scale.exported import load_exported
stage = load_exported(sys.argv[1])
torch.save(stage(**torch.load(sys.argv[2])), sys.argv[3])
"""


def outputs_without_trainer(folder, inputs, tmp_path):
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", WITHOUT_TRAINER, folder, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "outputs.pt")


def inputs_of(stage, batch):
    spec, size = stage.noise_spec, len(next(iter(batch.values())))
    noise = {f"t/{name}": torch.rand(size) for name in spec.times}
    noise |= {f"eps/{name}": torch.randn(size, *shape) for name, shape in spec.eps.items()}
    return {"batch": batch, "noise": noise, "step": 5}


def silent(_):
    pass


def test_an_exported_autoencoder_is_the_one_that_is_evaluated(trained, tmp_path):
    from ul_scale.evaluate.restore import restore_autoencoder

    config = export(trained, tmp_path / "out")
    stage = restore_autoencoder(trained, 12)[1]
    inputs = inputs_of(stage, {"x": torch.randn(3, 1, 16, 16)})
    expected, found = stage(**inputs), outputs_without_trainer(tmp_path / "out", inputs, tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    origin = config["provenance"]
    assert origin["run_id"] == trained.name and origin["step"] == 12 and origin["weights"] == "8"
    assert origin["code"]["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_an_exported_base_model_needs_no_latents(trained, shards, tmp_path):
    from ul_scale import config as configs
    from ul_scale.evaluate.encode import encode
    from ul_scale.evaluate.restore import restore_base
    from ul_scale.train import worker

    root = tmp_path / "runs"
    shutil.copytree(trained, root / trained.name)
    encode(root / trained.name, 12)
    template = BASE | {"autoencoder": {"run": trained.name, "step": 12}}
    path = write_template(tmp_path, shards, template, "base.yaml", train={**BASE["train"], "steps": 4})
    assert worker.run(configs.load(path)) == 0
    run_dir = next(each for each in root.iterdir() if each.name.startswith("tiny-base"))
    stage = restore_base(run_dir, 4)[1]
    shutil.rmtree(root / trained.name / "latents")
    config = export(run_dir, tmp_path / "out")
    assert config["data"]["z_std"] == stage.z_std.item() != 1
    batch = {
        "z_clean": torch.randn(3, 2, 4, 4),
        "label": torch.tensor([0, 1, 0]),
        "uniform": torch.tensor([0.5, 0.5, 0.0]),
    }
    inputs = inputs_of(stage, batch)
    expected, found = stage(**inputs), outputs_without_trainer(tmp_path / "out", inputs, tmp_path)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def parameters_of(run_dir, out, **options):
    config = export(run_dir, out, log=silent, **options)
    return config, dict(load_exported(out).named_parameters())


def test_each_set_of_weights_is_there_by_name(trained, tmp_path):
    sets = {}
    for weights in ("model", "8", "400", "power-0.050", "power-0.100"):
        config, sets[weights] = parameters_of(trained, tmp_path / weights, weights=weights)
        assert config["provenance"]["weights"] == weights
    first = {name: values["encoder.stem.weight"] for name, values in sets.items()}
    assert len({value.sum().item() for value in first.values()}) == 5
    _, earlier = parameters_of(trained, tmp_path / "earlier", weights="model", step=4)
    assert not torch.equal(earlier["encoder.stem.weight"], first["model"])
    # In a run this short the narrow average is nearer to the newest weights than the wide one.
    near, far = ((first[f"power-{w}"] - first["model"]).norm() for w in ("0.050", "0.100"))
    assert 0 < near < far


def test_an_average_of_any_width_is_rebuilt(trained, tmp_path):
    said = []
    config = export(trained, tmp_path / "out", ema_width=0.07, log=said.append)
    found = dict(load_exported(tmp_path / "out").named_parameters())
    expected = posthoc_average(trained, 0.07)
    assert found.keys() == expected.average.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.average.items())
    assert config["provenance"]["profile_error"] == expected.error
    assert len(said) == 1 and "width 0.07 at step 12, rebuilt from 6 snapshots" in said[0]
    # A width that was tracked is what the checkpoint has, but for fp16.
    _, tracked = parameters_of(trained, tmp_path / "tracked", weights="power-0.050")
    _, rebuilt = parameters_of(trained, tmp_path / "rebuilt", ema_width=0.05)
    for name, value in tracked.items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype,rtol", [("bf16", 2**-8), ("fp16", 2**-11)])
def test_smaller_types_are_rounded_once(trained, tmp_path, dtype, rtol):
    _, exact = parameters_of(trained, tmp_path / "fp32")
    _, rounded = parameters_of(trained, tmp_path / dtype, dtype=dtype)
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", dtype)}
    assert size[dtype] < 0.65 * size["fp32"]
    with safe_open(tmp_path / dtype / "model.safetensors", framework="pt") as file:
        assert (
            file.get_tensor("encoder.stem.weight").dtype
            == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        )
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], value, rtol=rtol, atol=1e-7)


def test_from_a_bucket_it_is_the_same_file(trained, tmp_path):
    bucket = run_path("memory://exports") / trained.name
    for path in trained.rglob("*"):
        if path.is_file():
            target = bucket / path.relative_to(trained).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for name, options in (("ema", {}), ("rebuilt", {"ema_width": 0.07})):
        export(trained, tmp_path / name / "disk", log=silent, **options)
        export(bucket, tmp_path / name / "bucket", log=silent, **options)
        files = [tmp_path / name / origin / "model.safetensors" for origin in ("disk", "bucket")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    run_dir = tmp_path / trained.name
    shutil.copytree(trained, run_dir)
    shard = next((run_dir / "checkpoints" / "step_00000012").rglob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match=shard.name):
        export(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run_dir, tmp_path / "out", step=8)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"weights": "41"}, "no weights '41'; expected one of ema, model, 8, 400, power-0.050, power-0.100"),
        ({"step": 5}, r"no complete checkpoint at step 5; complete: \[4, 8, 12\]"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of fp32, bf16, fp16"),
        ({"ema_width": 0.3}, "EMA width is 0.3"),
        ({"ema_width": 0.1, "step": 1}, "no EMA snapshot up to step 1"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        export(trained, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_no_run_directory(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        export(tmp_path, tmp_path / "out")


def test_what_is_not_an_export_is_named(trained, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not an export"):
        load_exported(out)
    export(trained, out)
    config = json.loads((out / "config.json").read_text())
    for change, message in (
        ({"format": 2}, "format is 2; expected 1"),
        ({"loss": config["loss"] | {"later": 1}}, "does not fit this version of ul_scale: .*later"),
        ({"data": {}}, "does not fit this version of ul_scale: 'image_size'"),
    ):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_exported(out)
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    tensors["other"] = tensors.pop("encoder.stem.bias")
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 tensors are missing and 1 are unknown, such as encoder\.stem\.bias"
    ):
        load_exported(out)
