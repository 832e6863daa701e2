import math

import pytest
import torch

from ul_scale.models.text import TextConfig
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.stages.base import BaseLoss, BaseModel, BaseStage, Sampling
from ul_scale.stages.conditions import Conditions
from ul_scale.stages.noise import draw_noise

NET = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=16, blocks=1)], head_dim=8)


def make_stage(z_std=0.1, **loss):
    torch.manual_seed(0)
    stage = BaseStage(
        BaseModel(num_classes=3, net=NET),
        BaseLoss(**loss),
        latent_shape=(2, 4, 4),
        num_pixels=256,
        z_std=z_std,
    )
    for p in stage.net.parameters():  # away from the zero-initialised gates and head
        torch.nn.init.normal_(p, std=0.3)
    return stage


def batch_and_noise(stage, b=6):
    z = 0.1 * torch.randn(b, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = {
        "z_clean": z,
        "label": torch.arange(b) % 3,
        "uniform": torch.linspace(0, 1, b, dtype=torch.float64),
    }
    return batch, draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=b, batch_size=b)


def test_untrained_network_already_denoises_a_gaussian_of_its_std():
    """With F = 0 the prediction is the best linear one, so the bits are those of a Gaussian of that std."""
    stage = make_stage(z_std=0.1)
    torch.nn.init.zeros_(stage.net.head.weight)
    torch.nn.init.zeros_(stage.net.head.bias)
    n = 4096
    batch, _ = batch_and_noise(stage)
    z = 0.1 * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = {"z_clean": z, "label": torch.zeros(n, dtype=torch.long), "uniform": torch.ones(n)}
    noise = draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=n, batch_size=n)
    nats = 0.5 * math.log((1 + math.exp(5) * 0.01) / (1 + math.exp(-10) * 0.01))
    expected = 32 * nats / (256 * math.log(2))
    assert stage(batch, noise, 0)["bits_per_pixel"].mean().item() == pytest.approx(expected, rel=0.03)


def test_labels_are_dropped_by_the_samples_own_number():
    stage = make_stage(label_dropout=0.5)
    batch, noise = batch_and_noise(stage)
    unlabelled = stage({**batch, "label": torch.full((6,), -1)}, noise, 0)["loss"]
    same = stage(batch, noise, 0)["loss"] == unlabelled
    assert same.tolist() == [True, True, True, False, False, False]


def test_label_is_used_and_minus_one_means_none():
    stage = make_stage()
    z_t, log_snr = torch.randn(2, 2, 4, 4), torch.zeros(2)

    def denoised(label):
        return stage.denoise(z_t, log_snr, Conditions(label=torch.tensor([label, label])))

    torch.testing.assert_close(denoised(-1), denoised(3))
    assert not torch.allclose(denoised(-1), denoised(0))


def test_samples_end_at_the_encoders_noise_level():
    """Of a point mass at 0 the exact sampler leaves σ_0 ε: noise of std 0.0818, not the clean point."""
    stage = make_stage(z_std=1e-4)
    torch.nn.init.zeros_(stage.net.head.weight)
    torch.nn.init.zeros_(stage.net.head.bias)
    n = 200
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    labels = Conditions(label=torch.zeros(n, dtype=torch.long))
    z_0 = stage.sample(labels, Sampling(num_steps=64), generators).detach()
    assert z_0.std().item() == pytest.approx(0.0818, rel=0.05)


def test_latents_that_do_not_fit_are_named():
    net = UViTConfig(patch=2, levels=NET.levels * 2, head_dim=8)
    with pytest.raises(ValueError, match="latents of 6 × 6 do not divide by the base model's 4×"):
        BaseStage(BaseModel(net=net), BaseLoss(), latent_shape=(2, 6, 6), num_pixels=256, z_std=1.0)


def randomised(stage, std=0.3):
    for p in stage.net.parameters():
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(p.numel()))
    return stage


def text_stage(**loss):
    model = BaseModel(net=NET, text=TextConfig(width=6, max_tokens=5))
    return randomised(BaseStage(model, BaseLoss(**loss), latent_shape=(2, 4, 4), num_pixels=256, z_std=0.1))


def test_text_is_used_and_its_dropout_tells_nothing_of_it():
    stage = text_stage(label_dropout=0.5)
    batch, noise = batch_and_noise(stage)
    text = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(2))
    batch |= {"text_embedding": text, "text_mask": torch.ones(6, 5, dtype=torch.bool)}
    told = stage(batch, noise, 0)["loss"]
    other = stage(batch | {"text_embedding": text.flip(0)}, noise, 0)["loss"]
    assert (told == other).tolist() == [True, True, True, False, False, False]
    untold = stage(batch | {"text_mask": torch.zeros(6, 5, dtype=torch.bool)}, noise, 0)["loss"]
    torch.testing.assert_close(told[:3], untold[:3])


VIDEO_LATENT = (2, 4, 4, 4)


def video_stage(**loss):
    net = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=16, blocks=1)], head_dim=16)
    model = BaseModel(net=net, given_frames=5)
    return randomised(
        BaseStage(model, BaseLoss(**loss), latent_shape=VIDEO_LATENT, num_pixels=4096, z_std=0.1)
    )


def video_batch(stage, b=6):
    generator = torch.Generator().manual_seed(1)
    batch = {
        "z_clean": 0.1 * torch.randn(b, *VIDEO_LATENT, generator=generator),
        "z_given": 0.1 * torch.randn(b, 2, 2, 4, 4, generator=generator),
        "uniform": torch.linspace(0, 1, b, dtype=torch.float64),
    }
    return batch, draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=b, batch_size=b)


def test_given_frames_are_used_and_dropped_with_their_mask():
    stage = video_stage(label_dropout=0.5)
    batch, noise = video_batch(stage)
    told = stage(batch, noise, 0)["loss"]
    other = stage(batch | {"z_given": batch["z_given"].flip(0)}, noise, 0)["loss"]
    assert (told == other).tolist() == [True, True, True, False, False, False]
    # A latent of zeros that is given is another thing than none.
    blank = stage(batch | {"z_given": torch.zeros_like(batch["z_given"])}, noise, 0)["loss"]
    untold = stage(batch | {"uniform": torch.zeros(6)}, noise, 0)["loss"]
    assert not torch.isclose(blank[3:], untold[3:]).any()


def test_on_the_fly_the_given_frames_are_encoded_alone():
    """What comes after the given frames changes z_clean, and nothing that the model is told."""

    class MeanOverFour(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.avg_pool3d(x, (4, 4, 4))

    stage = video_stage()
    x = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, :, 5:] += 1.0
    first, second = (stage.encode({"x": each}, MeanOverFour()) for each in (x, later))
    assert first["z_given"].shape == (2, 2, 2, 4, 4)
    torch.testing.assert_close(first["z_given"], second["z_given"], rtol=0, atol=0)
    assert not torch.allclose(first["z_clean"][:, :, 1], second["z_clean"][:, :, 1])  # frames 4 to 7
    repeated = x[:, :, [4, 4, 4, 4]]
    torch.testing.assert_close(first["z_given"][:, :, 1:], MeanOverFour()(repeated))


def test_latent_frames_that_do_not_divide_are_named():
    net = UViTConfig(patch=1, levels=NET.levels * 2, head_dim=16, time_strides=[2])
    with pytest.raises(ValueError, match="latents of 3 frames do not divide by the base model's 2×"):
        BaseStage(BaseModel(net=net), BaseLoss(), latent_shape=(2, 3, 4, 4), num_pixels=768, z_std=1.0)


def test_given_frames_need_videos():
    with pytest.raises(ValueError, match="model.given_frames is 5, but the latents are of images"):
        BaseStage(
            BaseModel(net=NET, given_frames=5), BaseLoss(), latent_shape=(2, 4, 4), num_pixels=256, z_std=1.0
        )


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_guided_samples_do_not_depend_on_their_batch(sampler):
    stage, sampling = make_stage(), Sampling(sampler=sampler, num_steps=3, guidance=2.0)

    def sampled(numbers):
        generators = [torch.Generator().manual_seed(i) for i in numbers]
        return stage.sample(Conditions(label=torch.tensor(numbers) % 3), sampling, generators).detach()

    whole = sampled([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat([sampled([0]), sampled([1, 2, 3])]), whole, rtol=1e-4, atol=1e-5)


def test_importance_sampling_of_times_leaves_the_expected_loss():
    """For data of std 1, which it assumes, the loss also varies less."""
    n, means, variances = 4096, {}, {}
    z = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = {"z_clean": z, "label": torch.zeros(n, dtype=torch.long), "uniform": torch.ones(n)}
    for how in ("uniform", "importance"):
        stage = make_stage(z_std=1.0, time_sampling=how)
        torch.nn.init.zeros_(stage.net.head.weight)
        torch.nn.init.zeros_(stage.net.head.bias)
        noise = draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=n, batch_size=n)
        loss = stage(batch, noise, 0)["loss"]
        means[how], variances[how] = loss.mean().item(), loss.var().item()
    assert means["importance"] == pytest.approx(means["uniform"], rel=0.02)
    assert variances["importance"] < 0.8 * variances["uniform"]
