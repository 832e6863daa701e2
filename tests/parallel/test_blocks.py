import torch
from parallel.parity import build
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.flop_counter import FlopCounterMode

from ul_scale.models.layers import ResBlock, TransformerBlock
from ul_scale.parallel.blocks import blocks_of, prepare_blocks


def test_blocks_come_in_the_order_in_which_they_run():
    stage = build("autoencoder")
    ran = []
    for block in stage.modules():
        if isinstance(block, ResBlock | TransformerBlock):
            block.register_forward_hook(lambda module, *_: ran.append(module))
    stage.decoder(torch.zeros(1, 1, 16, 16), torch.zeros(1), z=torch.zeros(1, *stage.latent_shape))
    order = blocks_of(stage)
    assert [block for block in order if block in set(ran)] == ran
    assert len(order) == sum(isinstance(m, ResBlock | TransformerBlock) for m in stage.modules())


def test_names_stay_as_they_were():
    plain, prepared = build("autoencoder"), build("autoencoder")
    prepare_blocks(prepared, activation_checkpointing="full", compiled=True)
    assert list(plain.state_dict()) == list(prepared.state_dict())


def test_a_block_that_does_not_compile_runs_as_it_is_and_one_line_says_why(monkeypatch, capsys):
    def failing(forward, **options):
        def call(*args, **kwargs):
            raise BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler\nsecond line"), None)

        return call

    monkeypatch.setattr(torch, "compile", failing)
    stage, plain = build("base"), build("base")
    prepare_blocks(stage, activation_checkpointing="none", compiled=True)
    z = torch.randn(2, *stage.latent_shape)
    label = torch.zeros(2, dtype=torch.long)
    for _ in range(2):
        torch.testing.assert_close(
            stage.net(z, torch.zeros(2), label), plain.net(z, torch.zeros(2), label), rtol=0, atol=0
        )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("parallel.compile: TransformerBlock runs uncompiled (")
    assert "no C++ compiler" in lines[0]


def test_frozen_blocks_are_not_checkpointed():
    stage = build("base on images")
    prepare_blocks(stage, activation_checkpointing="full", compiled=False)
    assert all("forward" not in vars(block) for block in stage.encoder.ordered_blocks())
    assert all("forward" in vars(block) for block in stage.net.ordered_blocks())


def test_selective_repeats_no_matrix_product_and_full_repeats_the_forward_pass():
    flops = {}
    for mode in ("none", "selective", "full"):
        stage = build("autoencoder")
        prepare_blocks(stage, activation_checkpointing=mode, compiled=False)
        with FlopCounterMode(display=False) as counter:
            stage.prior(torch.randn(2, *stage.latent_shape), torch.zeros(2)).sum().backward()
        flops[mode] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"]
