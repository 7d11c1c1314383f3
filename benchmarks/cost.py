"""What a network costs on this machine: images a second and core that it answers about, and that it learns from.

    python -m benchmarks.cost mobilenetv3_small_100 resnet18d convnext_tiny --size 224

One thread; CPU time, not time on the clock, so that other work on the machine matters less. Reading and decoding are not in it.
"""

import argparse
import time
from collections.abc import Callable

import torch

from pipeline.harness.machine import Machine
from pipeline.models import architectures, device

BATCH, ROUNDS = 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="+")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=20)
    args = parser.parse_args()
    on = device.pick(Machine(device="cpu", threads=1))
    print(f"{on.precision}\n\n| network | GMACs | parameters, million | answers, images/s | learns from, images/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for arch in args.arch:
        model = on.place(architectures.create(arch, args.classes))
        images = torch.randn(BATCH, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)

        def step(model: torch.nn.Module = model, images: torch.Tensor = images) -> None:
            with on.autocast():
                loss = model(images).float().logsumexp(1).mean()
            loss.backward()

        def answer(model: torch.nn.Module = model, images: torch.Tensor = images) -> None:
            with torch.inference_mode(), on.autocast():
                model(images)

        model.train()
        learns = rate(step)
        model.eval()
        answers = rate(answer)
        macs, parameters = architectures.macs(model, args.size) / 1e9, architectures.parameters_of(model) / 1e6
        print(f"| {arch} | {macs:.2f} | {parameters:.1f} | {answers:.0f} | {learns:.0f} |", flush=True)


def rate(work: Callable[[], None]) -> float:
    """Images a second of CPU time, of the fastest round after the first."""
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return BATCH / min(seconds[1:])


if __name__ == "__main__":
    main()
