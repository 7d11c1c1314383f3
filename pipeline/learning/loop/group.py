"""Several training processes that work as one: each takes its share of every batch, and the result is that of one process.

torchrun starts them, on one machine by `machine.processes`, on several by hand. The first one writes; the others only compute.
What a batch and its pieces are follows from params alone, so a training can go on with another number of processes.
"""

import atexit
import contextlib
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness import ranks

BatchNorm = nn.modules.batchnorm._BatchNorm
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Share(NamedTuple):
    """Images `first` to `last` - 1 of a piece of a batch, which has `of` images and begins at image `start` of the batch."""

    start: int
    first: int
    last: int
    of: int

    @property
    def weight(self) -> float:
        """How much the mean over this share counts where the processes' means are averaged: 1 if all have as many images."""
        return (self.last - self.first) * ranks.size() / self.of


def shares(batch: int, pieces: int) -> list[Share]:
    """This process's share of each of the equal pieces of a batch; shares differ by two images at most.

    They are cut at even places of the batch where that leaves nobody without an image: `views.mixed` pairs neighbours. Raises
    UserError if a piece has fewer images than there are processes.
    """
    of, processes = batch // pieces, ranks.size()
    if of < processes:
        raise UserError(
            f"`training.batch` is {batch}, and {processes} processes cannot share pieces (`accumulate`) of {of} images. "
            f"Set `machine.processes` to {of} or less: a training that was begun goes on."
        )

    def cut(start: int, process: int) -> int:
        at = of * process // processes
        return at - 1 if 0 < process < processes <= of // 2 and (start + at) % 2 else at

    return [Share(start, cut(start, ranks.rank()), cut(start, ranks.rank() + 1), of) for start in range(0, batch, of)]


_at_work: tuple[Share, int] | None = None


@contextlib.contextmanager
def at_work(share: Share, views: int) -> Iterator[None]:
    """While all processes do their shares of one piece, of each image so many views: `gathered` and the layers that look at the
    whole piece then do so."""
    global _at_work
    _at_work = (share, views)
    try:
        yield
    finally:
        _at_work = None


def is_shared() -> bool:
    """Whether this is one of several processes that are `at_work` on a piece."""
    return _at_work is not None and ranks.size() > 1


def places(rows: int) -> Tensor:
    """(rows,) int64: where the rows of this process stand among those of all, in the order of one process that has the whole
    piece: one view of all images after the other, and the rows of an image in a view (its windows, say) side by side."""
    if _at_work is None:
        return torch.arange(rows)
    share, views = _at_work
    own = torch.arange(share.first, share.last)
    views = min(views, rows // len(own))  # some layers see the first view alone
    each = rows // (views * len(own))
    of_views = torch.arange(views)[:, None, None] * share.of * each
    return (of_views + own[:, None] * each + torch.arange(each)).flatten()


def gathered(own: Tensor) -> Tensor:
    """The (R, ...) rows of all processes, in their `places`, from this one's (r, ...); `own` itself where nothing is shared.

    Gradients flow back to the process whose rows they are, from all of them.
    """
    if not is_shared():
        return own
    whole = own.new_zeros(_rows_of_all(len(own)), *own.shape[1:])
    everything: Tensor = _Sum.apply(whole.index_copy(0, places(len(own)).to(own.device), own))
    return everything


def _rows_of_all(rows: int) -> int:
    assert _at_work is not None
    share, _ = _at_work
    return rows // (share.last - share.first) * share.of


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Raise BrokenExecutor, which a stage answers with "try again", where another process of the group has ended."""
    try:
        yield
    except RuntimeError as error:
        if ranks.size() > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise BrokenExecutor("another process that trains with this one has ended") from error
        raise


def join(device: torch.device) -> None:
    """Meet the other processes: over NCCL where `device` is a GPU, else over gloo."""
    if ranks.size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as the loss is to call it: gradients are averaged, batch statistics and dropout are those of the whole piece.

    The layers of `model` that do so are replaced in place; names and tensors stay. Raises UserError for a layer that takes
    statistics in a way of its own.
    """
    if ranks.size() == 1:
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, DROPOUT) or type(module).__name__ == "DropPath":  # timm's, and others of that name
            _replace(model, name, SharedDropout(module))
    if device.type == "cuda":
        import timm.layers  # knows its own fused layers too

        timm.layers.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index], broadcast_buffers=False)
    synchronise(model)
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def synchronise(model: nn.Module) -> None:
    """Replace the batch normalisation of `model` by one over all processes. Raises UserError as `wrapped` does."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNorm):
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) and type(module).__name__ != "BatchNormAct2d":
                raise UserError(f"the layer {name} ({type(module).__name__}) has no form for several processes here: use one.")
            _replace(model, name, _synchronised(module))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


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


class SharedDropout(nn.Module):
    """A layer that multiplies by noise: it draws that of the whole piece, as one process would, and takes its own rows of it.

    All processes draw from generators of one state.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not (self.training and is_shared()):
            out: Tensor = self.layer(x)
            return out
        shape = x.shape[1:] if isinstance(self.layer, DROPOUT) else [1] * (x.ndim - 1)  # DropPath: a number for each image
        ones = x.new_ones(_rows_of_all(len(x)), *shape)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            ones = ones.contiguous(memory_format=torch.channels_last)  # noise is drawn in the order of memory
        noise: Tensor = self.layer(ones)
        return x * noise[places(len(x)).to(x.device)]


def _synchronised(layer: BatchNorm) -> nn.Module:
    new = SyncedBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var, new.num_batches_tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    for name, then in layer.named_children():
        setattr(new, name, then)
    return new.train(layer.training)


class SyncedBatchNorm(BatchNorm):
    """Batch normalisation over the shares of all processes, on CPUs: torch's SyncBatchNorm runs on accelerators only.

    As torch's own layer it takes the batch's statistics in training, and in evaluation if it keeps none. Its children, which
    timm's BatchNormAct2d has, come after it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...), each process with its own images."""
        of_the_batch = is_shared() and (self.training or self.running_mean is None)
        out: Tensor = self._normalised(x) if of_the_batch else super().forward(x)
        for then in self.children():
            out = then(out)
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        rows = _rows_of_all(len(x))
        part = len(x) / rows
        wide = x.float()
        average = _Sum.apply(wide.mean(over) * part)  # C
        centred = wide - average.view(shape)
        variance = _Sum.apply((centred**2).mean(over) * part)  # C
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
            count = x[0, 0].numel() * rows
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
