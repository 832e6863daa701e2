"""Whatever fails around a run: a good message, nothing lost, and the same command goes on."""

import pytest
from buckets import s3_bucket
from chaos.failures import SCENARIOS, Scene

__all__ = ["s3_bucket"]

IN_SHORT = ("full disk", "late write of an attempt that was thought dead")


@pytest.mark.parametrize("name", IN_SHORT)
def test_short(name, shards, tmp_path, undisturbed, request):
    SCENARIOS[name](Scene(shards, tmp_path, undisturbed, request))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_failure(name, shards, tmp_path, undisturbed, request, findings):
    scene = Scene(shards, tmp_path, undisturbed, request)
    SCENARIOS[name](scene)
    lines = findings.setdefault(
        "Failures",
        [
            "After each, the checkpoints before it were intact, and the same command went on to an end",
            "bit for bit that of the undisturbed run. What the user is told (`…` for the folder):",
            "",
        ],
    )
    lines += [f"- {name}:", *(f"  - `{line}`" for line in dict.fromkeys(scene.said))]
