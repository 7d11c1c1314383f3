"""SimCLRv2's contrastive task (arXiv 2006.10029, section 2; SimCLR: 2002.05709): views, loss, memory."""

import copy
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from pipeline.learning import crops
from pipeline.learning.loop import group
from pipeline.learning.views import Draws, Views
from pipeline.models import architectures
from pipeline.store.params import Section

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
Share = Annotated[float, Field(ge=0, le=1)]


class TwoViews(Section):
    """How each of an image's two views is drawn: crop, flip, colour, grey, blur, in this order (SimCLR, appendix A)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """The smallest and the largest share of the canvas's area that a crop has."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The smallest and the largest aspect of a crop, width by height."""
    flip: bool = True
    """Mirror half of the views."""
    strength: Annotated[float, Field(ge=0, le=1.25)] = 0.5
    """s of SimCLR's colour jitter: brightness, contrast and saturation are scaled by 1 ± 0.8 s, the hue is turned by up to ±
    0.2 s of the circle. 1 for ImageNet, 0.5 for CIFAR."""
    jitter: Share = 0.8
    """How probable that jitter is."""
    grey: Share = 0.2
    """How probable a grey view is."""
    blur: Share = 0.0
    """How probable a blur is, of sigma 0.1 to 2 pixels. SimCLR: 0.5, none for CIFAR."""


class Memory(Section):
    """MoCo's memory as SimCLRv2 adds it: outputs of a moving average of the network are further negatives of every view."""

    size: PositiveInt = 65_536
    """How many outputs, the last ones, one per image."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average."""


def nt_xent(projected: Tensor, temperature: float, memory: Tensor | None = None) -> Tensor:
    """(2B, D) projections, where rows i and i + B are views of one image -> scalar (SimCLR, equation 1 and algorithm 1).

    Each view is classified against its partner among the other views of all processes and the (K, D) unit vectors of `memory`;
    a view never stands among its own candidates. The mean over the 2B views, as in the paper: the published code adds the means
    of both directions, twice as much. With several processes each returns the mean over its own views, whose average (as
    DistributedDataParallel takes of gradients), weighted by their images, is that of one process with all of them.
    """
    with torch.autocast(projected.device.type, enabled=False):  # similarities over 0.1 need more than bfloat16's three digits
        z = F.normalize(projected.float(), dim=1)  # 2B, D
        everyone, own = group.gathered(z), group.places(len(z)).to(z.device)  # 2B of all processes, D
        rows = torch.arange(len(z), device=z.device)
        logits = (z @ everyone.T / temperature).index_put((rows, own), z.new_tensor(-torch.inf))
        if memory is not None:
            logits = torch.cat([logits, z @ memory.T / temperature], 1)
        return F.cross_entropy(logits, (own + len(everyone) // 2) % len(everyone))


class Contrastive(nn.Module):
    """The network in training: (2B, 3, S, S) -> (2B, D) projections, and the (K, D) keys of its memory (None without one)."""

    def __init__(self, projected: architectures.Projected, memory: Memory | None, pieces: int = 1) -> None:
        super().__init__()
        self.projected = projected
        self.memory = None if memory is None else Keys(projected, memory, pieces)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.projected(x), None if self.memory is None else self.memory(self.projected, x)


class Keys(nn.Module):
    """A queue of the outputs of a slowly moving average of the network, one per image.

    The average moves before the first of the `pieces` in which a step's batch comes. What it holds is
    part of the model's state, so a resumed run finds it again.
    """

    keys: Tensor
    written: Tensor

    def __init__(self, projected: architectures.Projected, params: Memory, pieces: int = 1) -> None:
        super().__init__()
        self.ema = params.ema
        self.pieces, self.piece = pieces, 0  # checkpoints lie between steps, where the piece is the first
        self.average = copy.deepcopy(projected).requires_grad_(False)
        self.register_buffer("keys", torch.zeros(params.size, projected.out))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, projected: architectures.Projected, x: Tensor) -> Tensor:
        """The keys before this batch, (up to K, D) unit vectors; then the first view of each image goes in for the oldest."""
        before = self.keys[: int(self.written)].clone()
        if self.piece == 0:
            torch._foreach_lerp_(list(self.average.parameters()), list(projected.parameters()), 1 - self.ema)
        self.piece = (self.piece + 1) % self.pieces
        new = F.normalize(self.average(x[: len(x) // 2]).float(), dim=1)
        new = group.gathered(new)[: len(self.keys)]
        self.keys[(self.written + torch.arange(len(new), device=new.device)) % len(self.keys)] = new
        self.written += len(new)
        return before


def two_views(size: int, params: TwoViews, seed: int, aspects: np.ndarray) -> Views:
    """Make the `views` of fit: (B, 3, S, S) uint8 canvases -> (B, 2, 3, size, size) of 0..255.

    `aspects`: (N,) width over height of all images, whose canvases hold them squeezed.
    """

    def views(raw: Tensor, rows: np.ndarray, passes: np.ndarray) -> Tensor:
        draws = Draws(seed, passes, rows)
        of = torch.from_numpy(aspects[rows]).float()
        return torch.stack([view(raw, size, params, draws, of), view(raw, size, params, draws, of)], 1)

    return views


def view(raw: Tensor, size: int, params: TwoViews, draws: Draws, aspects: Tensor) -> Tensor:
    """Make a view of each canvas: (B, 3, S, S) uint8 -> (B, 3, size, size) of 0..255 on the same device.

    `aspects`: (B,) width over height of the images that the canvases were squeezed from.
    """
    found = crops.boxes(draws, aspects, params.scale, params.ratio)
    flip = draws.uniform() < 0.5 if params.flip else torch.zeros(len(raw), dtype=torch.bool)
    out = crops.resampled(raw, found, size, flip)
    out = jittered(out, params, draws)
    if params.blur:
        out = blurred(out, torch.where(draws.uniform() < params.blur, draws.uniform(0.1, 2.0), 0.0).to(raw.device))
    return out


def jittered(batch: Tensor, params: TwoViews, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue, grey, each linear in the pixel: one 3 x 4 matrix per image, one product, one clamp.

    torchvision's jitter clamps after each of them and draws their order. The hue turns around the grey axis, in the plane of
    chrominance (YIQ), which leaves the luma as it is.
    """
    n, strength = len(batch), params.strength
    on = draws.uniform() < params.jitter

    def factor(reach: float) -> Tensor:
        return torch.where(on, draws.uniform(max(0, 1 - reach), 1 + reach), 1.0).view(n, 1, 1)

    brightness, contrast, saturation = (factor(0.8 * strength) for _ in range(3))
    turn = torch.where(on, draws.uniform(-0.2 * strength, 0.2 * strength), 0.0) * 2 * torch.pi
    grey = draws.uniform() < params.grey
    luma = YIQ[0].expand(n, 3, 3)  # each channel becomes the luma
    rotation = torch.eye(3).repeat(n, 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 2, 1] = turn.sin()
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    colour = torch.linalg.inv(YIQ) @ rotation @ YIQ @ torch.lerp(luma, torch.eye(3), saturation)
    colour = torch.where(grey[:, None, None], luma @ colour, colour)
    pixels = batch.flatten(2)  # B, 3, H * W
    # Contrast scales around the mean luma of the brightened image; all that follows leaves that grey as it is.
    mean = (
        (brightness.to(batch.device) * pixels).mean(2, keepdim=True).mul(YIQ[0].view(3, 1).to(batch.device)).sum(1, keepdim=True)
    )
    matrix = (contrast * brightness * colour).to(batch.device)
    return torch.baddbmm((1 - contrast).to(batch.device) * mean, matrix, pixels).clamp_(0, 255).view_as(batch)


def blurred(batch: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of each image with its own `sigma` (B,) in pixels, 0 for none; the window is a tenth of the side."""
    n, size = len(batch), batch.shape[-1]
    radius = max(1, size // 20)
    offsets = torch.arange(-radius, radius + 1, device=batch.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # B * 3, window
    planes = F.pad(batch, [radius] * 4, mode="reflect").reshape(1, 3 * n, size + 2 * radius, size + 2 * radius)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=3 * n)
    return F.conv2d(planes, kernel[:, None, None, :], groups=3 * n).view_as(batch)
