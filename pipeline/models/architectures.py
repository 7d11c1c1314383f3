"""Classifiers under one `create`: small-image networks of the literature, and every model of timm."""

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.errors import UserError
from pipeline.models import exits, precise
from pipeline.models.airbench import Airbench
from pipeline.models.inputs import Input
from pipeline.models.wide import WideResNet

SMALL = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
AIRBENCH, ENSEMBLE = "airbench", "ensemble"
WIDE = re.compile(r"wrn(\d+)_([1-9]\d*)")
STEM_3X3 = re.compile(r"((?:sk)?resnet(?:18|34|50|101|152))_3x3")


class ModelError(UserError):
    """No such architecture, or options that it does not take."""


def create(arch: str, classes: int, options: Mapping[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """A classifier (B, 3, S, S) float -> (B, classes) logits; with 0 classes an encoder -> (B, F) pooled features.

    `arch`: resnet8/14/20/32/44/56/110 (He et al. 2016, section 4.2, for 32 px images; options `shortcut`, `width`,
    `stem_stride`); airbench (Jordan 2024, for 32 px images; option `widths`); wrn28_2 and other wide ResNets of
    6n+4 layers, that many times as wide (for 32 px images); resnet18_3x3, skresnet18_3x3, ... (timm's, with a
    3x3 stem of stride 1 and no max-pooling); any name of timm.
    Twice as wide is `width: 32` for the small ones, `channels: [128, 256, 512, 1024]` for timm's resnet* and skresnet*
    (selective kernels). The option `exits` gives a ResNet exits after its stages: `all` makes an `exits.Exits`, which returns
    more than logits; the number of an exit makes the classifier that ends there. With the option `head_layers` so many layers of
    a projection head stand before the classifier (SimCLRv2's fine-tuning). `ensemble` is what the stage of that name writes.
    `pretrained` brings timm's published weights (and needs a network or a filled cache). The classifier layers run in float32
    (`precise.Float32Linear`). Raises ModelError or ExitError.
    """
    try:
        return _create(arch, classes, dict(options or {}), pretrained)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        told = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"`{arch}` does not take these options: {options} ({told}).") from error


def _create(arch: str, classes: int, options: dict[str, Any], pretrained: bool) -> nn.Module:
    if arch == ENSEMBLE:
        return EnsembleNetwork(classes, **options)
    if exits.OPTION in options:
        trunk = create(arch, classes, exits.plain(options), pretrained)
        return exits.with_exits(trunk, classes, options[exits.OPTION])
    if head_layers := options.pop("head_layers", 0):
        return HeadedClassifier(create(arch, 0, options, pretrained), head_layers, classes)
    wide = WIDE.fullmatch(arch)
    if pretrained and (arch in SMALL or arch == AIRBENCH or wide):
        raise ModelError(f"`{arch}` has no published weights by name: give the file as `checkpoint`.")
    if arch in SMALL:
        return SmallResNet(SMALL[arch], classes, **options)
    if arch == AIRBENCH:
        return Airbench(classes, **options)
    if wide:
        return _wide(int(wide[1]), int(wide[2]), classes, **options)
    return _timm(arch, classes, options, pretrained)


def _wide(layers: int, width: int, classes: int) -> nn.Module:
    if layers < 10 or layers % 6 != 4:
        raise ModelError(f"there is no wide ResNet of {layers} layers: they have 10, 16, 22, 28, ... (`wrn28_2`).")
    return WideResNet(layers // 6, width, classes)


def _timm(arch: str, classes: int, options: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm  # a second of import time that the small networks need not pay

    small_stem = STEM_3X3.fullmatch(arch)
    name = small_stem[1] if small_stem else arch
    if not timm.is_model(name):
        known = [*SMALL, AIRBENCH, "wrn28_2", *timm.list_models()]
        close = difflib.get_close_matches(arch, known, n=3)
        raise ModelError(f"there is no architecture `{arch}`" + (f"; close: {', '.join(close)}." if close else "."))
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)
    except (RuntimeError, OSError) as error:
        raise ModelError(f"timm cannot make `{name}` (pretrained: {pretrained}): {error}") from error
    if small_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    for head in heads(model):
        precise.make(model, head.removesuffix("."))
    return model


def heads(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier layers, which a model started from other classes does not take over."""
    if isinstance(model, EnsembleNetwork):
        return tuple(f"members.{i}.{name}" for i, member in enumerate(model.members) for name in heads(member))
    if isinstance(model, exits.Exits | exits.Cut):
        own = (f"trunk.{name}" for name in heads(model.trunk)) if isinstance(model, exits.Exits) else ()
        return (*own, *(f"branches.{number}.linear." for number in model.branches))
    if isinstance(model, SmallResNet | Airbench | WideResNet | HeadedClassifier):
        return ("linear.",)
    named = getattr(model, "default_cfg", {}).get("classifier", "fc")
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named or ()))  # two of a distilled DeiT


class SmallResNet(nn.Module):
    """ResNet of 6n+2 layers for small images: three stages of n basic blocks, widths w, 2w, 4w (He et al. 2016, section 4.2).

    `shortcut`: A, which keeps the identity by striding and zero channels and has no parameters, or B, a 1x1 convolution where
    shapes change. `stem_stride` 2 quarters the compute for larger images. Parameter names follow the common option-A
    checkpoints (conv1, bn1, layer1.0.conv1, ..., linear).
    """

    def __init__(
        self, blocks: int, classes: int, *, width: int = 16, shortcut: Literal["A", "B"] = "A", stem_stride: int = 1
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError(f"`shortcut` is {shortcut!r}: it must be A or B.")
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        widths, channels = (width, 2 * width, 4 * width), width
        for i, out in enumerate(widths):
            first = BasicBlock(channels, out, 2 if i else 1, shortcut)
            rest = [BasicBlock(out, out, 1, shortcut) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            channels = out
        self.linear = precise.Float32Linear(channels, classes) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 4w, S', S')."""
        x = self.act1(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, 4w, S', S') -> (B, classes)."""
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = (
                PaddedIdentity(stride, out - channels)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class PaddedIdentity(nn.Module):
    """Option A: every `stride`-th pixel, with `extra` zero channels, half before and half after."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


def features_of(encoder: nn.Module) -> int:
    """F, the width of the (B, F) features that an encoder (`create` with 0 classes) returns."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


def projection_layers(features: int, layers: int, out: int) -> nn.Sequential:
    """SimCLRv2's projection head (B, F) -> (B, out): each layer is linear without bias, then batch normalisation.

    All layers but the last are as wide as the features and end with a ReLU; the last normalisation has a scale, but a shift that
    stays at zero.
    """
    inner = [
        nn.Sequential(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()) for _ in range(layers - 1)
    ]
    last = nn.BatchNorm1d(out)
    last.bias.requires_grad_(False)
    return nn.Sequential(*inner, nn.Sequential(nn.Linear(features, out, bias=False), last))


class Projected(nn.Module):
    """An encoder and its projection head: (B, 3, S, S) -> (B, out), what contrastive pre-training trains."""

    def __init__(self, encoder: nn.Module, layers: int, out: int) -> None:
        super().__init__()
        self.encoder, self.out = encoder, out
        self.head = projection_layers(features_of(encoder), layers, out)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.head(self.encoder(x))
        return projected


class HeadedClassifier(nn.Module):
    """A classifier on the output of layer `layers` of a projection head, after its ReLU (SimCLRv2, section 2).

    Parameter names are those of `Projected`, plus `linear`.
    """

    def __init__(self, encoder: nn.Module, layers: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = features_of(encoder)
        self.head = projection_layers(self.num_features, layers + 1, 1)[:layers]
        self.linear = precise.Float32Linear(self.num_features, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.head(self.encoder(x)))
        return logits


def zero_classifier(model: nn.Module) -> None:
    """Set the classifier's weights to zero: fine-tuning then starts from the features alone, all classes equally likely."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(heads(model)):
                parameter.zero_()


class EnsembleNetwork(nn.Module):
    """The mean of the probabilities of `members`, as log-probabilities: (B, 3, size, size) of 0..1 -> (B, classes).

    A member is described by its `arch` and `options`, and by the `size`, `mean` and `std` of the input that it was trained on.
    """

    def __init__(self, classes: int, *, members: Sequence[Mapping[str, Any]], size: int) -> None:
        super().__init__()
        self.described, self.size = [dict(member) for member in members], size
        self.members = nn.ModuleList(create(m["arch"], classes, m["options"]) for m in members)
        for i, member in enumerate(members):
            for name in ("mean", "std"):
                self.register_buffer(f"{name}{i}", torch.tensor(member[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        log_p = []
        for i, (model, described) in enumerate(zip(self.members, self.described, strict=True)):
            side = described["size"]
            view = x if side == self.size else F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            log_p.append(model((view - getattr(self, f"mean{i}")) / getattr(self, f"std{i}")).float().log_softmax(1))
        return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def parameters_of(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class _Flops(TorchDispatchMode):
    """Counts by the library's formulas. Its own mode imports torch's compiler: two seconds of each process."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, which is torch's default, is what imports the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:  # which has no parts, and fails when it is asked
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=out) if formula else 0
        return out


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image of `size` pixels, counted over matrix products and convolutions."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), _Flops() as counter:
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    model.train(was_training)
    return counter.flops // 2


def macs_of_training(trained: nn.Module, size: int, *frozen: tuple[nn.Module, int]) -> int:
    """Multiply-accumulates that one image costs in training: three forward passes' worth for the trained network, as the backward
    pass takes about two, and one for each frozen network, given with its input size."""
    return 3 * macs(trained, size) + sum(macs(model, side) for model, side in frozen)


def timm_input(model: nn.Module) -> Input | None:
    """What timm's published weights of a network take, by its config; None if no part of the network is timm's.

    Says so on stderr where they were measured on something else than the central square.
    """
    import timm

    for part in model.modules():
        if hasattr(part, "pretrained_cfg"):
            config = timm.data.resolve_model_data_config(part)
            size = config["input_size"][-1]
            if config["crop_mode"] != "center":
                sys.stderr.write(
                    f"{getattr(part, 'default_cfg', {}).get('architecture')}: the published weights were measured with timm's "
                    f"crop mode `{config['crop_mode']}`; winnow cuts the central square, at what cost is not known.\n"
                )
            return Input(size=size, crop=size / int(size / config["crop_pct"]), mean=config["mean"], std=config["std"])
    return None


def torchvision_input(arch: str) -> Input:
    """What torchvision's published weights of a model take, by their transforms."""
    import torchvision

    given = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
    return Input(
        size=given.crop_size[0], crop=given.crop_size[0] / given.resize_size[0], mean=tuple(given.mean), std=tuple(given.std)
    )


def torchvision_weights(arch: str) -> dict[str, Tensor]:
    """torchvision's published weights of a model, whose parameter names timm shares for ResNets, VGGs and DenseNets.

    Raises ModelError for a name that torchvision lacks, or when the weights are neither cached nor can be downloaded.
    """
    import torchvision

    if arch not in torchvision.models.list_models():
        close = difflib.get_close_matches(arch, torchvision.models.list_models(), n=3)
        raise ModelError(f"torchvision has no model `{arch}`" + (f"; close: {', '.join(close)}." if close else "."))
    try:
        state: dict[str, Tensor] = torchvision.models.get_model(arch, weights="DEFAULT").state_dict()
    except OSError as error:
        raise ModelError(
            f"torchvision's weights of `{arch}` cannot be fetched ({error}). Give a local file as `checkpoint`."
        ) from error
    return state
