"""Pre-train an encoder without labels: SimCLRv2's contrastive task (arXiv 2006.10029, section 2; SimCLR: 2002.05709)."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed
import torch.distributed.nn.functional
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline import artifact, checkpoint, device, fit, group, images, manifest, models, network, predict, stage
from pipeline.params import Machine, Section

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
MONITORED = 10_000  # images that the k-nearest neighbours and the linear probe learn from, at most
PROBE_DECAY = 1e-3
Share = Annotated[float, Field(ge=0, le=1)]


class TwoViews(Section):
    """How each of an image's two views is drawn: crop, flip, colour, grey, blur, in this order.

    `scale`, `ratio`: share of the area and aspect of the crop. `strength`: s of SimCLR's colour jitter, 1 for ImageNet, 0.5 for
    CIFAR: with probability `jitter`, brightness, contrast and saturation are scaled by 1 +- 0.8 s, and the hue is turned by
    up to +- 0.2 s of the circle. `grey`, `blur`: probabilities; the blur's sigma is 0.1 to 2 pixels (SimCLR: blur 0.5, none
    for CIFAR).
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    strength: Annotated[float, Field(ge=0, le=1.25)] = 0.5
    jitter: Share = 0.8
    grey: Share = 0.2
    blur: Share = 0.0


class Memory(Section):
    """MoCo's memory as SimCLRv2 adds it: the last `size` outputs of a moving average of the network (decay `ema`) are further
    negatives of every view."""

    size: PositiveInt = 65_536
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999


class Pretrain(Section):
    """`images` is read by dvc.yaml: the images to learn from. `labelled` adds the labelled ones, their labels unread.

    `head_layers`, `head_out`: the projection head, 3 layers in SimCLRv2 and 2 in SimCLR, and its outputs. `temperature`: 0.1
    for ImageNet, 0.5 for CIFAR. `neighbours`: k of the monitor. The negatives of a view are those of its whole batch, on all
    processes; with `training.accumulate` those of its piece.
    """

    images: str
    model: network.Network
    labelled: bool = True
    views: TwoViews = TwoViews()
    head_layers: Annotated[int, Field(ge=2, le=3)] = 3
    head_out: PositiveInt = 128
    temperature: PositiveFloat = 0.1
    memory: Memory | None = None
    neighbours: PositiveInt = 20
    training: fit.Training
    note: str | None = None


def run(
    params: Pretrain,
    *,
    train: Path,
    holdout: Path,
    chosen: Path,
    out: Path,
    seed: int,
    scratch: Path,
    journal: stage.Journal,
    machine: Machine,
) -> stage.Metrics:
    """Minimise NT-Xent between the views of each image; write the encoder with its projection head as the model directory `out`.

    No label trains anything: those of `train` and `holdout` serve the monitor alone, which says ten times in a run how well
    the k nearest neighbours and a linear probe on `train`'s features classify `holdout`. Raises TrainingError, ModelError.
    """
    seen, labelled, _ = manifest.to_learn(chosen, train, params.labelled)
    held_out = manifest.read(holdout)
    on = device.pick(machine)
    given = params.model.input
    torch.manual_seed(seed)
    encoder = _encoder(params.model)
    model = on.place(Contrastive(models.Projected(encoder, params.head_layers, params.head_out), params.memory))
    cores = machine.cores(machine.workers)

    def contrast(model: nn.Module, batch: fit.Batch) -> Tensor:
        both = batch.views.transpose(0, 1).flatten(0, 1)  # 2B, 3, S, S
        projected, memory = model(images.normalise(both, given))
        return nt_xent(projected, params.temperature, memory)

    known = manifest.balanced(labelled, MONITORED / len(labelled), 0) if len(labelled) > MONITORED else labelled
    check = monitor(
        images.load(known, given.side, cores, machine.memory_gb, "monitor"),
        known.labels(),
        images.load(held_out, given.side, cores, machine.memory_gb, "holdout"),
        held_out.labels(),
        params.neighbours,
        given,
        on,
    )
    model, history = fit.fit(
        model,
        contrast,
        images.load(seen, given.side, cores, machine.memory_gb, "images"),
        two_views(given.size, params.views, seed),
        params.training,
        seed=seed,
        device=on,
        scratch=scratch,
        journal=journal,
        label="pre-training",
        check=check,
        checkpoint_minutes=machine.checkpoint_minutes,
    )
    assert isinstance(model, Contrastive)
    cost = 2 * models.macs_of_training(model.projected, given.size)
    if model.memory is not None:
        cost += models.macs(model.memory.average, given.size)
    description = checkpoint.Description(
        params.model.arch,
        (),
        given.model_dump(mode="json"),
        dict(params.model.options),
        projection={"layers": params.head_layers, "out": params.head_out},
    ).trained(params.training.steps, params.training.batch, 0, len(seen), params.note, macs=cost)
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, model.projected, description, history)
    facts = {"steps": params.training.steps, "images": len(seen), "parameters": models.parameters_of(model)}
    return facts | fit.final(history)


def _encoder(wanted: network.Network) -> nn.Module:
    if wanted.pretrained == "torchvision" or wanted.source_classes is not None:
        raise models.ModelError("an encoder of `pretrain` starts at random or from `pretrained: timm`, without `source_classes`.")
    if added := {"exits", "head_layers"} & set(wanted.options):
        raise models.ModelError(f"`{added.pop()}` is no option of an encoder: leave it out of `pretrain`.")
    return models.create(wanted.arch, 0, wanted.options, wanted.pretrained == "timm")


def nt_xent(projected: Tensor, temperature: float, memory: Tensor | None = None) -> Tensor:
    """(2B, D) projections, where rows i and i + B are views of one image -> scalar (SimCLR, equation 1 and algorithm 1).

    Each view is classified against its partner among the other views of all processes and the (K, D) unit vectors of `memory`;
    a view never stands among its own candidates. The mean over the 2B views, as in the paper: the published code adds the means
    of both directions, twice as much. With several processes each returns the mean over its own views, whose average (as
    DistributedDataParallel takes of gradients) is that of one process with all of them.
    """
    with torch.autocast(projected.device.type, enabled=False):  # similarities over 0.1 need more than bfloat16's three digits
        z = F.normalize(projected.float(), dim=1)  # 2B, D
        n = len(z)
        everyone, first = z, 0
        if group.size() > 1:
            everyone = torch.cat(torch.distributed.nn.functional.all_gather(z))  # processes * 2B, D; gradients flow back
            first = group.rank() * n
        own = torch.arange(n, device=z.device)
        logits = (z @ everyone.T / temperature).index_put((own, first + own), z.new_tensor(-torch.inf))
        if memory is not None:
            logits = torch.cat([logits, z @ memory.T / temperature], 1)
        return F.cross_entropy(logits, first + own.roll(n // 2))


class Contrastive(nn.Module):
    """The network in training: (2B, 3, S, S) -> (2B, D) projections, and the (K, D) keys of its memory (None without one)."""

    def __init__(self, projected: models.Projected, memory: Memory | None) -> None:
        super().__init__()
        self.projected = projected
        self.memory = None if memory is None else Keys(projected, memory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.projected(x), None if self.memory is None else self.memory(self.projected, x)


class Keys(nn.Module):
    """A queue of the outputs of a slowly moving average of the network, one per image.

    What it holds is part of the model's state, so a resumed run finds it again.
    """

    keys: Tensor
    written: Tensor

    def __init__(self, projected: models.Projected, params: Memory) -> None:
        super().__init__()
        self.ema = params.ema
        self.average = copy.deepcopy(projected).requires_grad_(False)
        self.register_buffer("keys", torch.zeros(params.size, projected.out))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, projected: models.Projected, x: Tensor) -> Tensor:
        """The keys before this batch, (up to K, D) unit vectors; then the first view of each image goes in for the oldest."""
        before = self.keys[: int(self.written)].clone()
        torch._foreach_lerp_(list(self.average.parameters()), list(projected.parameters()), 1 - self.ema)
        new = F.normalize(self.average(x[: len(x) // 2]).float(), dim=1)
        if group.size() > 1:
            parts = [torch.empty_like(new) for _ in range(group.size())]
            torch.distributed.all_gather(parts, new)
            new = torch.cat(parts)
        new = new[: len(self.keys)]
        self.keys[(self.written + torch.arange(len(new), device=new.device)) % len(self.keys)] = new
        self.written += len(new)
        return before


def two_views(size: int, params: TwoViews, seed: int) -> images.Views:
    """The `views` of fit: (B, 3, S, S) uint8 canvases -> (B, 2, 3, size, size) of 0..255."""

    def views(raw: Tensor, rows: np.ndarray, passes: np.ndarray) -> Tensor:
        draws = images.Draws(seed, passes, rows)
        return torch.stack([view(raw, size, params, draws), view(raw, size, params, draws)], 1)

    return views


def view(raw: Tensor, size: int, params: TwoViews, draws: images.Draws) -> Tensor:
    """One view of each canvas: (B, 3, S, S) uint8 -> (B, 3, size, size) of 0..255 on the same device."""
    n, to = len(raw), raw.device
    area, aspect = draws.uniform(*params.scale), draws.uniform(*np.log(params.ratio)).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)  # B, (width, height) of the crop
    centre = torch.stack([draws.uniform(-1, 1), draws.uniform(-1, 1)], 1) * (1 - sides)
    mirror = torch.where(draws.uniform() < 0.5, -1.0, 1.0) if params.flip else torch.ones(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirror * sides[:, 0], sides[:, 1], centre
    grid = F.affine_grid(theta.to(to), [n, 3, size, size], align_corners=False)
    out = F.grid_sample(raw.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    out = jittered(out, params, draws)
    if params.blur:
        out = blurred(out, torch.where(draws.uniform() < params.blur, draws.uniform(0.1, 2.0), 0.0).to(to))
    return out


def jittered(batch: Tensor, params: TwoViews, draws: images.Draws) -> Tensor:
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


def monitor(
    known: images.Pixels,
    known_labels: np.ndarray,
    asked: images.Pixels,
    asked_labels: np.ndarray,
    neighbours: int,
    given: images.Input,
    on: device.Device,
) -> Callable[[nn.Module], Mapping[str, float]]:
    """A function that says how well an encoder's features tell the classes of `asked` apart, as top-1 in 0..1.

    `knn`: by their nearest neighbours among the features of `known`. `probe`: by a linear classifier on them.
    """
    y, wanted = torch.from_numpy(known_labels), torch.from_numpy(asked_labels)

    def check(model: nn.Module) -> Mapping[str, float]:
        assert isinstance(model, Contrastive)
        encoder = model.projected.encoder
        bank, queries = (torch.cat([f for _, f in predict.logits(encoder, p, given, on)]) for p in (known, asked))
        predicted = {"knn": nearest(bank, y, queries, neighbours), "probe": probed(bank, y, queries)}
        return {name: float((guess == wanted).double().mean()) for name, guess in predicted.items()}

    return check


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07) -> Tensor:
    """(N, F), (N,), (M, F) -> (M,): the class with most votes of the k most similar, weighted by exp(cosine / temperature).

    Wu et al. 2018, section 3.4.
    """
    bank, k = F.normalize(bank, dim=1), min(k, len(bank))
    predicted = []
    for part in F.normalize(queries, dim=1).split(1024):
        similarity, rows = (part @ bank.T).topk(k)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        predicted.append(votes.scatter_add_(1, labels[rows], (similarity / temperature).exp()).argmax(1))
    return torch.cat(predicted)


def probed(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """(N, F), (N,), (M, F) -> (M,): the classes that a logistic regression on the standardised features predicts."""
    mean, deviation = bank.mean(0), bank.std(0).clamp(min=1e-6)
    x, asked = (bank - mean) / deviation, (queries - mean) / deviation
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
        bias = torch.zeros(weight.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * PROBE_DECAY * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return (asked @ weight.detach() + bias.detach()).argmax(1)


if __name__ == "__main__":
    stage.main(run, parallel=True)
