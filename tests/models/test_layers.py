import pytest
import torch
import torch.nn.functional as F

from ul_scale.models.layers import (
    CrossAttention,
    TransformerBlock,
    depth_to_space,
    heads_of,
    rope,
    rope_pairs,
    rotate,
    space_to_depth,
    strides_of,
)


def random(module):
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    return module


class TestSpaceToDepth:
    @pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 4, 4)])
    def test_each_cell_becomes_the_channels_of_one_position(self, stride):
        x = torch.randn(2, 3, 4, 8, 8)
        out = space_to_depth(x, stride)
        st, sh, sw = stride
        assert out.shape == (2, 3 * st * sh * sw, 4 // st, 8 // sh, 8 // sw)
        cell = x[1, :, st : 2 * st, :sh, sw : 2 * sw] if 4 // st > 1 else x[1, :, :st, :sh, sw : 2 * sw]
        assert torch.equal(out[1, :, 1 if 4 // st > 1 else 0, 0, 1], cell.flatten())
        assert torch.equal(depth_to_space(out, stride), x)

    def test_frames_one_by_one_are_as_images(self):
        x = torch.randn(2, 3, 5, 8, 8)
        frames = torch.stack([F.pixel_unshuffle(frame, 2) for frame in x.unbind(2)], dim=2)
        assert torch.equal(space_to_depth(x, (1, 2, 2)), frames)
        assert torch.equal(space_to_depth(x[:, :, 0], (2, 2)), frames[:, :, 0])


class TestPositions:
    @pytest.mark.parametrize("head_dim,pairs", [(8, (2, 1, 1)), (32, (4, 6, 6)), (64, (8, 12, 12))])
    def test_a_video_heads_pairs_are_all_used(self, head_dim, pairs):
        assert rope_pairs(head_dim, 3) == pairs and sum(pairs) == head_dim // 2

    def test_a_head_that_cannot_be_divided_is_refused(self):
        with pytest.raises(ValueError, match="head_dim is 12; expected a multiple of 8 for a 3-D grid"):
            rope_pairs(12, 3)
        with pytest.raises(ValueError, match="width 96 must be a multiple of head_dim 64"):
            heads_of(96, 64)

    @pytest.mark.parametrize("grid", [(4, 5), (3, 4, 5)])
    def test_products_depend_on_offsets_alone(self, grid):
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 16, generator=g, dtype=torch.float64)
        cos, sin = rope(grid, 16, torch.device("cpu"))
        turned_q = rotate(q.expand(len(cos), 16), cos, sin).view(*grid, 16)
        turned_k = rotate(k.expand(len(cos), 16), cos, sin).view(*grid, 16)
        origin = turned_q[(0,) * len(grid)]
        for axis in range(len(grid)):
            step = tuple(int(axis == a) for a in range(len(grid)))
            far = tuple(size - 1 for size in grid)
            near = tuple(f - s for f, s in zip(far, step))
            one, other = origin @ turned_k[step], turned_q[near] @ turned_k[far]
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            assert not torch.isclose(one, origin @ turned_k[(0,) * len(grid)], rtol=1e-3), axis

    def test_images_positions_are_those_of_a_videos_frame_but_for_the_split(self):
        cos, _ = rope((2, 3), 8, torch.device("cpu"))
        frequencies = torch.tensor([1.0, 0.1])
        y, x = torch.tensor([0, 0, 0, 1, 1, 1.0]), torch.tensor([0, 1, 2, 0, 1, 2.0])
        expected = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], 1).cos()
        torch.testing.assert_close(cos, expected.repeat(1, 2))


class TestCrossAttention:
    def attention(self):
        return random(CrossAttention(16, 12, 8)).double()

    def test_it_is_softmax_over_the_tokens_that_are_there(self):
        net = self.attention()
        g = torch.Generator().manual_seed(1)
        x, text = (torch.randn(1, n, c, generator=g, dtype=torch.float64) for n, c in ((5, 16), (4, 12)))
        mask = torch.tensor([[True, False, True, True]])
        q = net.q(x[0]).view(5, 2, 8)
        k, v = net.kv(text[0, mask[0]]).view(3, 2, 2, 8).unbind(1)
        q, k = F.layer_norm(q, (8,)) * net.q_gain, F.layer_norm(k, (8,)) * net.k_gain
        weights = (torch.einsum("nhc,mhc->hnm", q, k) / 8**0.5).softmax(-1)
        expected = net.out(torch.einsum("hnm,mhc->nhc", weights, v).flatten(1))
        torch.testing.assert_close(net(x, text, mask)[0], expected)

    def test_a_block_adds_no_text_at_first(self):
        torch.manual_seed(0)
        block = TransformerBlock(16, 8, 8, text_width=12)
        torch.nn.init.normal_(block.modulation.weight)
        x, cond, mask = torch.randn(2, 4, 16), torch.randn(2, 8), torch.ones(2, 3, dtype=torch.bool)
        outs = [block(x, cond, (2, 2), torch.randn(2, 3, 12), mask) for _ in range(2)]
        assert torch.equal(*outs) and not torch.equal(outs[0], x)


def test_time_strides_belong_to_videos():
    assert strides_of([2, 1], 3, video=True) == [(2, 2, 2), (1, 2, 2)]
    assert strides_of([], 3, video=True) == [(1, 2, 2)] * 2
    with pytest.raises(ValueError, match=r"time_strides are \[2\], but these are images"):
        strides_of([2], 2, video=False)
