"""Shapes in signatures are checked while the tests run; and a tiny data set with runs to train on it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from templates import write_template

torch.set_num_threads(1)
install_import_hook(["ul_scale.diffusion"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> None:
    """Keep downloaded indexes out of the user's cache."""
    os.environ["UL_SCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, str]:
    """Return the folders of a training and a held-out set: two classes of bright squares on noise."""
    from ul_scale.data.writing.shards import write_shards
    from ul_scale.data.writing.sources import SourceOptions, find_source

    root = tmp_path_factory.mktemp("images")
    urls = {}
    for split, count in (("train", 24), ("val", 8)):
        rng = np.random.default_rng(len(split))
        for label, corner in (("left", 2), ("right", 9)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (16, 16), dtype=np.uint8)
                pixels[4:12, corner : corner + 5] = rng.integers(180, 255)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        urls[split] = str(root / "shards" / split)
        source = find_source(str(root / split), SourceOptions())
        write_shards(source, urls[split], samples_per_shard=10)
    return urls


@pytest.fixture
def write_config(tmp_path, shards):
    """Return ``write_template`` for the test's own folder and the tiny data set."""

    def write(template: dict, name: str = "config.yaml", **sections) -> Path:
        return write_template(tmp_path, shards, template, name, **sections)

    return write
