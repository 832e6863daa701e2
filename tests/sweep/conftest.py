import pytest
import yaml
from templates import AUTOENCODER, BASE, write_template

SWEEP = {
    "kind": "sweep",
    "name": "tiny",
    "autoencoder": "autoencoder.yaml",
    "base": "base.yaml",
    "loss_factors": [2.0, 4.0],
    "sizes": ["tiny-s", "tiny-m"],
    "size_overrides": {"tiny-m": ["optim.lr=2e-3"]},
    "evaluation": {"samples": 8, "base_steps": 2, "decoder_steps": 2, "batch_size": 4},
}


def write_sweep(folder, shards):
    saves = {"every_steps": 50}
    write_template(folder, shards, AUTOENCODER, "autoencoder.yaml", train={"steps": 200}, checkpoint=saves)
    base = BASE | {"model": {"num_classes": 2}, "checkpoint": saves}
    write_template(folder, shards, base, "base.yaml", train={"steps": 200})
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | {"root": str(folder / "runs")}))
    return path


@pytest.fixture
def sweep_path(tmp_path, shards):
    """Return the config of a tiny sweep in the test's own folder."""
    return write_sweep(tmp_path, shards)


@pytest.fixture(scope="module")
def module_sweep_path(tmp_path_factory, shards):
    """Return the config of a tiny sweep whose runs several tests share."""
    return write_sweep(tmp_path_factory.mktemp("sweep"), shards)
