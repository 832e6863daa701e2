import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ul_scale.models import zoo
from ul_scale.models.encoder import Encoder, EncoderConfig
from ul_scale.models.flops import forward_flops, num_parameters
from ul_scale.models.uvit import LevelConfig, UViT, UViTConfig


def net_of(fields):
    levels = [LevelConfig(**level) for level in fields["levels"]]
    return UViTConfig(**(fields | {"levels": levels}))


def torch_count(module, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*args, **kwargs)
    return counter.get_total_flops()


def meta(*shape):
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize("size", zoo.BASES)
def test_base_models_match_torchs_counter(size):
    tiny = size.startswith("tiny")
    shape = (1, 4, 8, 8) if tiny else (1, 32, 32, 32)
    with torch.device("meta"):
        net = UViT(net_of(zoo.BASES[size]["net"]), shape[1], num_classes=10)
    args = meta(*shape), meta(1), torch.zeros(1, dtype=torch.long, device="meta")
    ours = forward_flops(net, lambda net: net(*args))
    assert ours == torch_count(net, *args) > 0


@pytest.mark.parametrize(
    "size,image,grid", [("tiny32", (1, 1, 32, 32), 8), ("imagenet512", (1, 3, 512, 512), 32)]
)
def test_autoencoder_parts_match_torchs_counter(size, image, grid):
    fields = zoo.AUTOENCODERS[size]
    channels = fields["latent_channels"]
    x, z, log_snr = meta(*image), meta(1, channels, grid, grid), meta(1)
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**fields["encoder"]), image[1], channels)
        prior = UViT(net_of(fields["prior"]), channels)
        decoder = UViT(
            net_of(fields["decoder"]), image[1], z_channels=channels, z_downsampling=encoder_factor(fields)
        )
    assert encoder(x).shape == z.shape
    assert forward_flops(encoder, lambda m: m(x)) == torch_count(encoder, x) > 0
    assert forward_flops(prior, lambda m: m(z, log_snr)) == torch_count(prior, z, log_snr) > 0
    assert forward_flops(decoder, lambda m: m(x, log_snr, z=z)) == torch_count(decoder, x, log_snr, z=z) > 0


def encoder_factor(fields):
    return EncoderConfig(**fields["encoder"]).downsampling


def test_the_papers_base_model_costs_what_its_description_implies():
    # 24 d² + 4 T d per token and block: 6 blocks of 512 at 1,024 tokens and 16 of 1,024 at 256.
    with torch.device("meta"):
        net = UViT(net_of(zoo.BASES["imagenet512"]["net"]), 32, num_classes=1000)
    args = meta(1, 32, 32, 32), meta(1), torch.zeros(1, dtype=torch.long, device="meta")
    blocks = sum(
        blocks * tokens * (24 * d * d + 4 * tokens * d)
        for blocks, tokens, d in ((6, 1024, 512), (16, 256, 1024))
    )
    assert blocks == pytest.approx(159e9, rel=0.01)
    assert forward_flops(net, lambda net: net(*args)) == pytest.approx(blocks, rel=0.05)


def test_flops_scale_with_the_batch_and_leave_the_module_alone():
    linear = torch.nn.Linear(3, 5)
    assert forward_flops(linear, lambda m: m(meta(7, 3))) == 2 * 7 * 3 * 5
    assert linear.weight.device.type == "cpu" and not linear._forward_hooks
    assert num_parameters(linear) == 20
