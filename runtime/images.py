"""Pictures as ComfyUI's IMAGE tensors."""

import numpy as np
import torch
from PIL import Image


def to_image_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as IMAGE: float32 [1, H, W, 3] in 0 to 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)[None]
