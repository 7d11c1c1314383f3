"""Several training processes that work as one: each takes its part of every batch, and the result is that of one process.

torchrun starts them, on one machine by `machine.processes`, on several by hand. The first one writes; the others only compute.
"""

import atexit
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness import ranks

BatchNorm = nn.modules.batchnorm._BatchNorm


def join(device: torch.device) -> None:
    """Meet the other processes: over NCCL where `device` is a GPU, else over gloo."""
    if ranks.size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)


def part(batch: int) -> slice:
    """This process's part of a batch. Raises UserError if the batch cannot be dealt out evenly."""
    if batch % ranks.size():
        raise UserError(
            f"`training.batch` is {batch}, which {ranks.size()} processes cannot share: take a multiple of {ranks.size()}."
        )
    own = batch // ranks.size()
    return slice(ranks.rank() * own, (ranks.rank() + 1) * own)


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as the loss is to call it: gradients are averaged and batch statistics taken over all processes.

    The normalisation layers of `model` are replaced in place; names and tensors stay. Raises UserError for a layer that takes
    statistics in a way of its own.
    """
    if ranks.size() == 1:
        return model
    if device.type == "cuda":
        import timm.layers  # knows its own fused layers too

        timm.layers.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index], broadcast_buffers=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNorm):
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                raise UserError(f"the layer {name} ({type(module).__name__}) cannot be shared by several CPU processes: use one.")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _synchronised(module))
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, without gradient."""
    value = value.detach()
    if ranks.size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.size()


def agreed(value: int, device: torch.device) -> bool:
    """Whether all processes have the same number."""
    if ranks.size() == 1:
        return True
    ends = torch.tensor([value, -value], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def _synchronised(layer: BatchNorm) -> nn.Module:
    new = SyncedBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var, new.num_batches_tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    return new.train(layer.training)


class SyncedBatchNorm(BatchNorm):
    """Batch normalisation over the batches of all processes, on CPUs: torch's SyncBatchNorm runs on accelerators only."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...), each process with its own images."""
        if not self.training:
            out: Tensor = super().forward(x)
            return out
        over = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        wide = x.float()
        average = _Sum.apply(wide.mean(over)) / ranks.size()  # C
        centred = wide - average.view(shape)
        variance = _Sum.apply((centred**2).mean(over)) / ranks.size()  # C
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
            count = x.numel() // x.shape[1] * ranks.size()
            self.running_mean.lerp_(average.detach(), share)
            self.running_var.lerp_(variance.detach() * count / (count - 1), share)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over processes of a tensor that each of them goes on to use: the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
