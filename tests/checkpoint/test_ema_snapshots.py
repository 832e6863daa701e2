import json

import numpy as np
import pytest
import torch

from ul_scale.checkpoint import ema_snapshots
from ul_scale.checkpoint.ema_snapshots import (
    compact,
    ema_name,
    exponent,
    fit,
    posthoc_average,
    save_snapshot,
    snapshot_steps,
)
from ul_scale.checkpoint.files import run_path

GRID = np.linspace(0, 1, 400_001)
KEPT = [0.05, 0.1]


def profile(width, step, at):
    gamma = exponent(width)
    return np.where(at <= step, (gamma + 1) * (at / step) ** gamma / step, 0)


@pytest.mark.parametrize("width,gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(width, gamma):
    assert exponent(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.001, 0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_is_the_standard_deviation_of_the_profile(width):
    weights = profile(width, 1.0, GRID)
    weights /= weights.sum()
    mean = weights @ GRID
    assert np.sqrt(weights @ (GRID - mean) ** 2) == pytest.approx(width, rel=2e-3)


def test_fit_is_the_least_squares_fit_of_the_profiles():
    """Against a fit on a fine grid, by numpy's own least squares: the same coefficients, and error."""
    steps, widths = np.repeat([25, 50, 75, 100], 2), np.tile(KEPT, 4)
    coefficients, error = fit(steps, widths, 100, 0.075)
    at = GRID * 100
    profiles = np.stack([profile(w, t, at) for t, w in zip(steps, widths)], 1)
    wanted = profile(0.075, 100, at)
    last = profiles[:, -1:]  # the coefficients sum to 1: the last is what the others leave
    direct = np.linalg.lstsq(profiles[:, :-1] - last, wanted - last[:, 0], rcond=None)[0]
    np.testing.assert_allclose(coefficients[:-1], direct, atol=2e-3)
    assert coefficients.sum() == pytest.approx(1)
    distance = np.linalg.norm(profiles @ coefficients - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(distance, rel=1e-2)


def test_more_snapshots_fit_better_without_growing_coefficients():
    errors = []
    for count in (8, 32, 128, 512):
        steps = np.arange(1, count + 1) * 100
        coefficients, error = fit(np.repeat(steps, 2), np.tile(KEPT, count), count * 100, 0.15)
        errors.append(error)
        assert np.abs(coefficients).sum() < 2
    assert errors[0] < 0.04 and errors[2] < 2e-4 and max(errors[2:]) < 2e-4
    assert fit(np.repeat(steps, 2), np.tile(KEPT, count), count * 100, 0.05)[1] < 1e-3


def track(walk, width):
    """Return the average of a walk at every step, directly, in float64."""
    average, result = np.zeros(walk.shape[1]), []
    for step, row in enumerate(walk, 1):
        beta = (1 - 1 / step) ** (exponent(width) + 1)
        average = beta * average + (1 - beta) * row
        result.append(average)
    return np.array(result)


@pytest.fixture(scope="module")
def walk():
    """Return 1600 steps of weights that move as much as they are large."""
    rng = np.random.default_rng(0)
    return 0.3 + 0.01 * rng.normal(size=(1600, 64)).cumsum(0)


@pytest.fixture(scope="module")
def run_dir(walk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_all(folder, walk)
    return folder


def save_all(run_dir, walk):
    tracked = {width: track(walk, width) for width in KEPT}
    for step in range(100, 1601, 100):
        averages = {
            ema_name(width): compact(
                {"a": torch.tensor(t[step - 1][:60]), "b.c": torch.tensor(t[step - 1][60:])}
            )
            for width, t in tracked.items()
        }
        save_snapshot(run_dir, step, step * 8, averages)


def joined(rebuilt):
    assert all(value.dtype == torch.float32 for value in rebuilt.average.values())
    return torch.cat([rebuilt.average["a"], rebuilt.average["b.c"]]).double().numpy()


def test_a_width_that_was_kept_is_itself(run_dir, walk):
    for width in KEPT:
        rebuilt = posthoc_average(run_dir, width)
        assert rebuilt.step == 1600 and rebuilt.num_snapshots == 16 and rebuilt.error < 1e-4
        direct = track(walk, width)[-1]
        np.testing.assert_allclose(joined(rebuilt), direct, rtol=1e-3, atol=1e-6)  # fp16


@pytest.mark.parametrize(
    "width,step,tolerance", [(0.07, None, 0.02), (0.15, None, 0.02), (0.2, 1200, 0.05), (0.03, 1600, 0.2)]
)
def test_other_widths_are_near_what_tracking_them_gives(run_dir, walk, width, step, tolerance):
    """The tolerance is a share of how far that average is from the newest weights."""
    rebuilt = posthoc_average(run_dir, width, step)
    direct = track(walk, width)[(step or 1600) - 1]
    distance = np.linalg.norm(direct - walk[(step or 1600) - 1])
    assert np.linalg.norm(joined(rebuilt) - direct) < tolerance * distance
    assert rebuilt.error < tolerance


def test_too_few_snapshots_are_told_by_the_error(run_dir):
    assert posthoc_average(run_dir, 0.25, 100).error > 0.2
    assert posthoc_average(run_dir, 0.07, 1650).error > posthoc_average(run_dir, 0.07, 1600).error * 5


def test_files_are_small_and_say_what_they_hold(run_dir):
    from safetensors import safe_open

    assert snapshot_steps(run_dir) == list(range(100, 1601, 100))
    with safe_open(run_dir / "ema_snapshots" / "step_00000100.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == [f"power-{w:.3f}/{p}" for w in KEPT for p in ("a", "b.c")]
        metadata = file.metadata()
        assert metadata["step"] == "100" and metadata["samples_seen"] == "800"
        assert json.loads(metadata["widths"]) == KEPT
        assert file.get_tensor("power-0.050/a").dtype == torch.float16


def test_in_a_bucket_it_is_the_same(run_dir, walk):
    bucket = run_path("memory://ema-snapshots/run")
    save_all(bucket, walk)
    assert snapshot_steps(bucket) == snapshot_steps(run_dir)
    ours, theirs = posthoc_average(bucket, 0.07, 800), posthoc_average(run_dir, 0.07, 800)
    assert np.array_equal(joined(ours), joined(theirs)) and ours.error == theirs.error


def test_negligible_snapshots_are_not_read(run_dir, monkeypatch):
    read = []
    monkeypatch.setattr(ema_snapshots, "_add", lambda total, path, coefficients: read.append(path.name))
    posthoc_average(run_dir, 0.05)
    assert read == ["step_00001600.safetensors"]


def test_a_step_that_is_repeated_leaves_its_snapshot(tmp_path):
    first = {"power-0.050": compact({"w": torch.ones(2)})}
    save_snapshot(tmp_path, 4, 32, first)
    save_snapshot(tmp_path, 4, 32, {"power-0.050": compact({"w": torch.zeros(2)})})
    assert posthoc_average(tmp_path, 0.05).average["w"].tolist() == pytest.approx([1, 1])


def test_values_that_fp16_cannot_hold_stay_as_they_are():
    stored = compact({"small": torch.ones(2), "large": torch.tensor([1e6, 1.0])})
    assert stored["small"].dtype == torch.float16
    assert stored["large"].dtype == torch.float32 and stored["large"][0] == 1e6
    with pytest.raises(FloatingPointError, match="the EMA of w is not finite"):
        compact({"w": torch.tensor([1.0, float("nan")])})


def test_bad_input_is_named(run_dir, tmp_path):
    with pytest.raises(ValueError, match="no EMA snapshot; expected a run with ema.power_widths"):
        posthoc_average(tmp_path, 0.05)
    with pytest.raises(ValueError, match="no EMA snapshot up to step 99.*from step 100 on"):
        posthoc_average(run_dir, 0.05, 99)
    with pytest.raises(ValueError, match="EMA width is 0.3"):
        posthoc_average(run_dir, 0.3)
