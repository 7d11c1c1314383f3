"""One training in a process of its own: for groups of processes, and to be killed.

python -m benchmarks.gpu.worker FILE        # what to do, as JSON: the fields of `Order`
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import learning, setting
from pipeline.harness import ranks
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning.loop import optimisers
from pipeline.models import device
from pipeline.store import artifact

WEIGHTS, HISTORY = "weights.safetensors", "history.json"


@dataclass(frozen=True)
class Order:
    """A training on drawn images."""

    out: str  # the folder that the first process writes
    workdir: str  # of the checkpoints
    device: str
    precision: str
    network: int  # number in the list of networks
    tiny: bool
    steps: int
    batch: int
    images: int
    checkpoint_minutes: float
    group: str = ""  # `nccl` or `gloo`: joined before the training; empty: as the training does it

    def write(self, file: Path) -> Path:
        with artifact.writing_file(file) as tmp:
            tmp.write_text(json.dumps(asdict(self)))
        return file


def main() -> None:
    order = Order(**json.loads(Path(sys.argv[1]).read_text()))
    machine = Machine(device=order.device, precision=order.precision, threads=1, checkpoint_minutes=order.checkpoint_minutes)  # type: ignore[arg-type]
    on = device.pick(machine)
    if order.group:
        if on.device.type == "cuda":
            torch.cuda.set_device(on.device)
        dist.init_process_group(order.group)
    given = setting.Setting(Path(order.out), on, order.tiny, None, 0.0, 1.0, order.device, "")
    small = (learning.TINY if order.tiny else learning.NETWORKS)[order.network]
    plan = optimisers.Training(steps=order.steps, batch=order.batch, **small.training)
    job = Job(0, Path(order.workdir), Journal(), machine)
    alone = bool(order.group) and ranks.size() == 1  # `fit` leaves the network of a single process as it is

    def wrap(model: nn.Module) -> nn.Module:
        return wrapped(model, on) if alone else model

    try:
        trained = learning.taught(small, plan, given, images=order.images, job=job, on=on, wrap=wrap)
        model = trained.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if ranks.is_first():
            with artifact.writing(Path(order.out)) as tmp:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                safetensors.torch.save_file(state, tmp / WEIGHTS)
                (tmp / HISTORY).write_text(json.dumps(trained.history))
    finally:
        if order.group:
            dist.destroy_process_group()


def wrapped(model: nn.Module, on: device.Device) -> nn.parallel.DistributedDataParallel:
    """The network of a group of one, as `group.wrapped` gives it to several."""
    model = on.place(model)
    if on.device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    import timm.layers

    model = timm.layers.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, device_ids=[on.device.index or 0], broadcast_buffers=False)


if __name__ == "__main__":
    main()
