import pytest
import yaml
from templates import AUTOENCODER, BASE

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


@pytest.fixture
def sweep_path(write_config, tmp_path):
    write_config(AUTOENCODER, "autoencoder.yaml")
    base = {key: value for key, value in BASE.items()}
    base["model"] = {"num_classes": 2}
    write_config(base, "base.yaml")
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | {"root": str(tmp_path / "runs")}))
    return path
