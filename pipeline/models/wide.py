"""Wide residual networks for small images (Zagoruyko and Komodakis 2016), on which semi-supervised learning is compared."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import precise


class WideResNet(nn.Module):
    """A classifier (B, 3, S, S) -> (B, classes) of 6 `blocks` + 4 layers: three stages of pre-activated blocks, `width` times as
    wide as 16, 32 and 64 channels, the sides halved before the second and the third."""

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels = 16
        for i, out in enumerate((16 * width, 32 * width, 64 * width), 1):
            first = PreActivated(channels, out, 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, *(PreActivated(out, out, 1) for _ in range(blocks - 1))))
            channels = out
        self.num_features = channels
        self.norm = nn.BatchNorm2d(channels)
        self.linear = precise.Float32Linear(channels, classes) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 64 width, S / 4, S / 4)."""
        x = self.conv1(x)
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, 64 width, S', S') -> (B, classes)."""
        logits: Tensor = self.linear(F.relu(self.norm(features)).mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PreActivated(nn.Module):
    """Twice normalisation, ReLU, convolution; where shapes change, what is added is a 1x1 convolution of the activated input."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if stride != 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))
