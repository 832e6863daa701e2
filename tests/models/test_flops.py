import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ul_scale.models import zoo
from ul_scale.models.encoder import Encoder, EncoderConfig
from ul_scale.models.flops import activation_memory, blocks_by_tokens, forward_flops, num_parameters
from ul_scale.models.layers import TransformerBlock
from ul_scale.models.uvit import LevelConfig, UViT, UViTConfig
from ul_scale.parallel.blocks import prepare_blocks


def net_of(fields):
    levels = [LevelConfig(**level) for level in fields["levels"]]
    return UViTConfig(**(fields | {"levels": levels}))


def torch_count(module, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*args, **kwargs)
    return counter.get_total_flops()


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def assert_same_count(module, *args, **kwargs):
    assert forward_flops(module, lambda m: m(*args, **kwargs)) == torch_count(module, *args, **kwargs) > 0


def latents_of(size):
    if size.startswith("kinetics"):
        return 32, 4, 16, 16
    return (4, 8, 8) if size.startswith("tiny") else (32, 32, 32)


@pytest.mark.parametrize(
    "size", ["tiny-s", "tiny-xl", "imagenet512", "kinetics600-small", "t2i-100g", "ladder-1"]
)
def test_base_models_match_torchs_counter(size):
    shape = latents_of(size)
    text = {"text": meta(1, 77, 768), "text_mask": meta(1, 77, dtype=torch.bool)}
    told = text if size.startswith("t2i") else {"label": meta(1, dtype=torch.long)}
    with torch.device("meta"):
        net = UViT(
            net_of(zoo.BASES[size]["net"]),
            shape[0],
            video=len(shape) == 4,
            num_classes=10 if "label" in told else None,
            text_width=768 if "text" in told else None,
        )
    assert_same_count(net, meta(1, *shape), meta(1), **told)


@pytest.mark.parametrize(
    "size,x,z",
    [
        ("tiny32", (1, 32, 32), (4, 8, 8)),
        ("imagenet512", (3, 512, 512), (32, 32, 32)),
        ("kinetics600", (3, 16, 128, 128), (32, 4, 16, 16)),
    ],
)
def test_autoencoder_parts_match_torchs_counter(size, x, z):
    fields, video = zoo.AUTOENCODERS[size], len(x) == 4
    config = EncoderConfig(**fields["encoder"])
    with torch.device("meta"):
        encoder = Encoder(config, x[0], z[0], video=video)
        prior = UViT(net_of(fields["prior"]), z[0], video=video)
        decoder = UViT(
            net_of(fields["decoder"]),
            x[0],
            video=video,
            z_channels=fields["latent_channels"],
            z_downsampling=config.downsampling,
            z_time_downsampling=config.time_downsampling,
        )
    x, z, log_snr = meta(1, *x), meta(1, *z), meta(1)
    assert encoder(x).shape == z.shape and decoder(x, log_snr, z=z).shape == x.shape
    assert decoder.config.patch * 2**decoder.z_level == config.downsampling
    assert_same_count(encoder, x)
    assert_same_count(prior, z, log_snr)
    assert_same_count(decoder, x, log_snr, z=z)


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


def test_tokens_are_those_of_each_level():
    with torch.device("meta"):
        net = UViT(net_of(zoo.BASES["imagenet512"]["net"]), 32)
    assert blocks_by_tokens(net, lambda m: m(meta(1, 32, 32, 32), meta(1))) == {1024: 6, 256: 16}


class TestActivationMemory:
    """Against what the CPU's allocator has given out, and not taken back, when forward ends."""

    def net(self):
        torch.manual_seed(0)
        conv = LevelConfig(kind="conv", channels=32, blocks=3, dropout=0.1)
        vit = LevelConfig(kind="transformer", channels=64, blocks=3, dropout=0.1)
        config = UViTConfig(patch=2, levels=[conv, vit], head_dim=32)
        return UViT(config, 3, text_width=16, z_channels=2, z_downsampling=4)

    def inputs(self, device):
        return {
            "x_t": torch.ones(1, 3, 64, 64, device=device),
            "log_snr": torch.ones(1, device=device),
            "z": torch.ones(1, 2, 16, 16, device=device),
            "text": torch.ones(1, 7, 16, device=device),
            "text_mask": torch.ones(1, 7, dtype=torch.bool, device=device),
        }

    def held(self, run):
        run()  # fills the cache of positions
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = run()
        events = profiler.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]") - out.nbytes

    def test_without_checkpointing(self):
        net, given = self.net(), self.inputs("cpu")
        estimate = activation_memory(net, lambda m: m(**self.inputs("meta")))
        assert estimate.none == pytest.approx(self.held(lambda: net(**given)), rel=0.02)

    def test_autocast_keeps_products_in_bf16_and_norms_in_fp32(self):
        """Of one transformer block, by hand, in bytes per token and channel."""
        width, tokens, head_dim = 512, 1024, 64
        norms = 2 * (4 + 4 + 2)  # input, and output before and after its modulation
        attention = (
            3 * 2 + 2 * (4 + 4 + 2) + 2 + 2
        )  # q k v, q k normalised, turned and cast, out, heads joined
        mlp = 2 * 4 * 2  # before and after the activation
        gates = 2 * 2
        with torch.device("meta"):
            block = TransformerBlock(width, width, head_dim)
        x, cond = (tensor.requires_grad_() for tensor in (meta(1, tokens, width), meta(1, width)))
        memory = activation_memory(block, lambda m: m(x, cond, (32, 32)), precision="bf16")
        positions = 2 * 4 * tokens * head_dim
        expected = tokens * width * (norms + attention + mlp + gates)
        assert memory.none - positions == pytest.approx(expected, rel=0.01)

    def test_full_checkpointing_keeps_inputs_and_computes_one_block_again(self):
        net, given = self.net(), self.inputs("cpu")
        estimate = activation_memory(net, lambda m: m(**self.inputs("meta"))).full
        block = net.middle.blocks[0]  # the largest
        tokens, cond, text = torch.ones(1, 256, 64), torch.ones(1, 64), torch.ones(1, 8, 16)
        mask = torch.ones(1, 8, dtype=torch.bool)
        largest = self.held(lambda: block(tokens, cond, (16, 16), text, mask))
        checkpointed = copy.deepcopy(net)
        prepare_blocks(torch.nn.ModuleList([checkpointed]), activation_checkpointing="full", compiled=False)
        assert estimate == pytest.approx(self.held(lambda: checkpointed(**given)) + largest, rel=0.03)

    def test_a_frozen_network_keeps_nothing(self):
        net = self.net().requires_grad_(False)
        assert activation_memory(net, lambda m: m(**self.inputs("meta"))).none == 0
