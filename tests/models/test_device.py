"""Where and in which precision networks run."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.harness.machine import Machine
from pipeline.models import device


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.set_num_threads(before[2])


@pytest.mark.parametrize(("precision", "matmul", "tf32"), [("float32", "highest", False), ("bfloat16", "highest", False)])
def test_float32_is_float32(precision: str, matmul: str, tf32: bool) -> None:
    """TF32 has ten bits of mantissa: on NVIDIA GPUs it stands in for float32 where torch is told that it may."""
    for first in ("high", "highest"):
        torch.set_float32_matmul_precision(first)
        torch.backends.cudnn.allow_tf32 = first == "high"
        picked = device.pick(Machine.model_validate({"device": "cpu", "precision": precision, "threads": 1}))
        assert picked.dtype == getattr(torch, precision)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, tf32)


def test_auto_is_float32_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: False)
    assert device.pick(Machine(device="cpu", threads=1)).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"
