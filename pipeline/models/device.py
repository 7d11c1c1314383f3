"""Where and in which precision the networks run, from the `machine` section."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness import allocator, ranks
from pipeline.harness.machine import Machine


@dataclass(frozen=True)
class Device:
    """A torch device and the type that matrix products are computed in."""

    device: torch.device
    dtype: torch.dtype
    compile: bool = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model there, in channels_last, in which bfloat16 convolutions are fastest."""
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, pixels: Tensor) -> Tensor:
        """Move a batch there without waiting for it."""
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)

    @property
    def precision(self) -> str:
        """`float32` or `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def pick(machine: Machine) -> Device:
    """The device that `machine` asks for; sets torch's thread count, that nothing stands in for float32, and how memory is kept.

    Raises UserError for a device that is not there.
    """
    allocator.keep_freed()
    torch.set_num_threads(machine.cores(machine.threads))
    torch.set_float32_matmul_precision("highest")  # TF32 would cut a float32 classifier's inputs to three digits
    torch.backends.cudnn.allow_tf32 = False
    name = machine.device if machine.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.launched():
        name = f"cuda:{ranks.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"`machine.device` (params.yaml) or --device is {name!r}, which torch cannot use here ({error})."
        ) from None
    fast = device.type == "cuda" or multiplies_bfloat16()
    precision = machine.precision if machine.precision != "auto" else "bfloat16" if fast else "float32"
    return Device(device, getattr(torch, precision), machine.compile)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products in hardware (AVX512-BF16 or AMX); emulated ones are slower than float32."""
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123 - a kernel interface, and there on Linux only
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
