"""A small classifier of images, which measures what an edit of a bundled denoiser changes."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

CLASSES = 10


class Classifier(nn.Module):
    """Convolutions down to 4x4 or 7x7 places, a hidden layer of `width` features, one logit a class.

    Differentiable, so that it can also drive a search for directions. Images are [n, 1, size, size] in [-1, 1].

    >>> net = Classifier(size=8)
    >>> net(torch.zeros(2, 1, 8, 8)).shape, net.features(torch.zeros(2, 1, 8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    def __init__(self, size: int, width: int = 64) -> None:
        super().__init__()
        halvings = 1 if size < 16 else 2
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
        for i in range(halvings):
            layers += [nn.Conv2d(16 if i == 0 else 32, 32, 3, stride=2, padding=1), nn.ReLU()]
        side = size // 2**halvings
        self.size = size
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * side * side, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def features(self, images: Float[Tensor, "n 1 size size"]) -> Float[Tensor, "n width"]:
        """The hidden layer: a space in which distances between images mean more than between pixels."""
        return self.body(images)

    def forward(self, images: Float[Tensor, "n 1 size size"]) -> Float[Tensor, "n classes"]:
        return self.head(self.features(images))


def load_classifier(path: Path, device: torch.device) -> Classifier:
    """The classifier in a safetensors file, in fp32 and evaluation mode."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        size = int(file.metadata()["size"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    net = Classifier(size)
    net.load_state_dict(state)
    return net.to(device).eval()
