"""Classifier layers that run in float32 whatever the autocast type: bfloat16 has three digits, and logits tie."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """A linear layer (..., F) of any type -> (..., C) float32."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):  # an exporter would write the context into its graph
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class Float32Conv2d(nn.Conv2d):
    """A convolution (B, F, H, W) of any type -> (B, C, H, W) float32, as some networks of timm classify."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Tracer(torch.fx.Tracer):
    """Traces a network down to torch's layers and these."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a layer stays one node of the graph."""
        return isinstance(m, Float32Linear | Float32Conv2d) or super().is_leaf_module(m, module_qualified_name)


def make(model: nn.Module, name: str) -> None:
    """Let the layer `name` of `model`, if it has it, run in float32; its parameters stay as they are."""
    layer = dict(model.named_modules()).get(name)
    if isinstance(layer, nn.Linear):
        layer.__class__ = Float32Linear
    elif isinstance(layer, nn.Conv2d):
        layer.__class__ = Float32Conv2d
