import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ul_scale.evaluate.frechet import cached_features, frechet_distance, reference_path


def gaussian(n, mean, std, seed):
    """Draw n samples whose mean and (diagonal) covariance are exact, where std is not 0; needs n > rank."""
    g = torch.Generator().manual_seed(seed)
    rank = int((std > 0).sum())
    x = torch.randn(n, rank, generator=g, dtype=torch.float64)
    q, _ = torch.linalg.qr(x - x.mean(0))
    samples = torch.zeros(n, len(std), dtype=torch.float64)
    samples[:, std > 0] = q * (n - 1) ** 0.5 * std[std > 0]
    return samples + mean


def correlated(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + torch.randn(d, generator=g).double()


@pytest.mark.parametrize(("n", "m", "rank"), [(200, 300, 16), (17, 40, 16), (9, 12, 8)])
def test_diagonal_gaussians_have_their_closed_form(n, m, rank):
    g = torch.Generator().manual_seed(3)
    mean_a, mean_b, std_a, std_b = torch.rand(4, 16, generator=g, dtype=torch.float64)
    std_a[rank:], std_b[rank:] = 0, 0  # with n < d a covariance is singular
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    distance = frechet_distance(gaussian(n, mean_a, std_a, 0), gaussian(m, mean_b, std_b, 1))
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_disjoint_supports_add_up():
    std_a, std_b = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    std_a[:4], std_b[4:] = 2, 3
    distance = frechet_distance(gaussian(5, 0, std_a, 0), gaussian(5, 0, std_b, 1))
    assert distance == pytest.approx(4 * 4 + 4 * 9, rel=1e-12)


def test_it_is_a_distance():
    a, b = correlated(50, 80, 0), correlated(70, 80, 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(80 * 0.25)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a[torch.randperm(50)], b))


@pytest.mark.parametrize(("n", "d"), [(400, 48), (60, 48)])
def test_it_agrees_with_the_matrix_square_root(n, d):
    a, b = correlated(n, d, 0).numpy(), correlated(n + 30, d, 1).numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "d", "rel"), [(300, 64, 1e-9), (40, 64, 1e-4)])
def test_it_agrees_with_torchmetrics(n, d, rel):
    a, b = correlated(n, d, 0), correlated(n, d, 1)
    module = torch.nn.Identity()
    module.num_features = d
    peer = FrechetInceptionDistance(feature=module, normalize=True)
    peer.update(a, real=True)
    peer.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(peer.compute().item(), rel=rel)


def test_float32_features_are_summed_in_float64():
    a, b = correlated(100, 20, 0).float(), correlated(100, 20, 1).float()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_a_thousand_images_take_a_moment():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, 1280, generator=g)
    start = time.perf_counter()
    frechet_distance(a, b)
    assert time.perf_counter() - start < 1.5


def test_bad_features_are_named():
    good = torch.randn(10, 4)
    with pytest.raises(ValueError, match=r"second features: 1 of 10 images"):
        frechet_distance(good, torch.cat([good[:9], torch.full((1, 4), torch.nan)]))
    with pytest.raises(ValueError, match=r"first features.*\(1, 4\)"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        frechet_distance(good, good[:, :3])


def test_features_are_computed_once_and_kept(tmp_path):
    path = reference_path(tmp_path / "features", network="fd_effnet_lite0", fingerprint="ab12", n=7)
    assert path.name == "fd_effnet_lite0-ab12-7.npy"
    first = cached_features(path, lambda: torch.arange(21.0).view(7, 3))
    second = cached_features(path, lambda: pytest.fail("computed again"))
    assert torch.equal(first, second) and second.dtype == torch.float32
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_processes_that_start_together_share_the_file(tmp_path):
    path, barrier = tmp_path / "features.npy", Barrier(4)

    def compute():
        barrier.wait(10)
        return torch.ones(500, 64)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cached_features(path, compute), range(4)))
    assert all(torch.equal(result, torch.ones(500, 64)) for result in results)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not features", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_is_written_anew(tmp_path, content):
    path = tmp_path / "features.npy"
    path.write_bytes(content)
    cached_features(path, lambda: torch.ones(2, 2))
    assert torch.equal(cached_features(path, lambda: pytest.fail("computed again")), torch.ones(2, 2))


def test_a_failed_computation_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        cached_features(tmp_path / "features.npy", lambda: (_ for _ in ()).throw(RuntimeError("no data")))
    assert not list(tmp_path.iterdir())
