"""Shapes in signatures are checked while the tests run."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(["ul_scale.diffusion"], "beartype.beartype")
