"""What the exhaustive command has found is written to docs/chaos.md when all of it has passed."""

import platform
from datetime import date
from pathlib import Path

import pytest
from chaos.runs import SHORT, undisturbed_run

REPORT = Path(__file__).parents[2] / "docs" / "chaos.md"
SECTIONS = ("Kills", "World sizes", "Failures")
COMMAND = "python -m pytest -m exhaustive tests/chaos"
_findings: dict[str, list[str]] = {}


@pytest.fixture(scope="session")
def undisturbed(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a short run that nothing has happened to."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), shards, **SHORT)


@pytest.fixture
def findings() -> dict[str, list[str]]:
    """Return lines of the report by section, which the exhaustive tests add to."""
    return _findings


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus or any(section not in _findings for section in SECTIONS):
        return
    import torch

    lines = [
        "# Chaos",
        "",
        f"Made by `{COMMAND}` on {date.today()}:",
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU. Written if all checks passed.",
        "Network and data are tiny: what happens to files, processes and numbers does not depend on size.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}", "", *_findings[section]]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
