"""An autoencoder's run with EMA snapshots, trained in seconds; tests copy it before they damage it."""

import pytest
from templates import AUTOENCODER, write_template

POWER = {"half_lives_samples": [8, 400], "power_widths": [0.05, 0.1], "snapshot_every_steps": 2}


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """Return the run directory of 12 steps, with complete checkpoints at 4, 8 and 12."""
    from ul_scale import config as configs
    from ul_scale.train import worker

    checkpoint = {"every_steps": 4, "keep_last": 2, "keep_steps": [4]}
    folder = tmp_path_factory.mktemp("trained")
    path = write_template(folder, shards, AUTOENCODER, "config.yaml", ema=POWER, checkpoint=checkpoint)
    assert worker.run(configs.load(path)) == 0
    return next((folder / "runs").iterdir())
