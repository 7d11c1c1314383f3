"""The one inference loop."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.models import inputs, precise
from pipeline.models.device import Device

BATCH = 256


@torch.inference_mode()
def logits(
    model: nn.Module, pixels: inputs.Pixels, input_spec: inputs.Input, device: Device, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Centre views of `rows` (default: all) through `model` in eval mode: (row numbers, (B, C) float32 logits on the CPU).

    Batches are always full: the last one is padded with its first image and cut again. Logits change in their last digits with
    the batch size, and a result must not depend on where a shard ends.
    """
    rows = np.arange(len(pixels)) if rows is None else rows
    was_training = model.training
    model.eval()
    starts = range(0, len(rows), BATCH)

    def batch(start: int) -> Tensor:
        part = rows[start : start + BATCH]
        return pixels.gather(np.concatenate([part, np.full(BATCH - len(part), part[0])]))

    try:
        for start, raw in zip(starts, inputs.ahead(batch, starts), strict=True):
            part = rows[start : start + BATCH]
            yield part, forward(model, inputs.centre(device.batch(raw), input_spec.size), input_spec, device)[: len(part)].cpu()
    finally:
        model.train(was_training)


def forward(model: nn.Module, views: Tensor, input_spec: inputs.Input, device: Device) -> Tensor:
    """(B, 3, S, S) of 0..255 on the device -> (B, C) float32 logits."""
    with device.autocast():
        out: Tensor = model(inputs.normalise(views, input_spec))
    return out.float()


class Mirrored(nn.Module):
    """The mean logits of an image and of its mirror image, (B, 3, S, S) -> (B, classes), at twice the compute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.model(x) + self.model(x.flip(3))) / 2
        return logits


def folded(model: nn.Module) -> nn.Module:
    """The model with each batch normalisation that follows a convolution folded into it, for inference: faster on CPUs.

    Pairs are found by tracing; a model that cannot be traced is returned as it is. The input model is changed.
    """
    model.eval()
    try:
        traced = torch.fx.GraphModule(model, precise.Tracer().trace(model))
    except Exception:  # control flow that depends on data: such a model runs unfolded
        return model
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d and len(source.users) == 1:
            parent, _, name = str(source.target).rpartition(".")
            fused = fuse_conv_bn_eval(conv, norm)
            setattr(traced.get_submodule(parent), name, fused)
            modules[str(source.target)] = fused
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced


def checker(
    pixels: inputs.Pixels, labels: np.ndarray, input_spec: inputs.Input, device: Device, temperature: float = 1.0
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures a model on labelled images: `top1` in 0..1 and `nll`, the mean cross entropy in nats.

    `temperature`: at which its logits are probabilities.
    """
    wanted = torch.from_numpy(labels)

    def check(model: nn.Module) -> dict[str, float]:
        out = torch.cat([batch for _, batch in logits(model, pixels, input_spec, device)])
        top1 = (out.argmax(1) == wanted).double().mean()
        return {"top1": float(top1), "nll": float(F.cross_entropy(out / temperature, wanted))}

    return check
