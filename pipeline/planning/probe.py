"""What a unit of each kind of work takes on this machine: measured for a second or two each, with the code that the stages run.

Images are those of this folder where there are some, else drawn. A rate has wall seconds, with all threads and workers that the
stage would have, and CPU seconds of all of them. Other work on the machine makes both longer, the first more.
"""

import contextlib
import io
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.leaks import features, search
from pipeline.leaks.index import VotingIndex
from pipeline.learning import contrastive, losses, views
from pipeline.learning.loop import fit
from pipeline.learning.loop.optimisers import Training
from pipeline.models import architectures, device, inputs, network, prediction
from pipeline.planning.work import ENTRIES, Kind, Recipe, votes
from pipeline.report import corruptions
from pipeline.scenes import dataset
from pipeline.sources.listing import request_of
from pipeline.sources.source import Request
from pipeline.sources.tars import Tars
from pipeline.stages.pack import QUALITY
from pipeline.stages.prepare import Prepare
from pipeline.stages.self_distil import objective
from pipeline.store import decode, manifest

SECONDS = 0.7
"""How long a kind is measured."""
SAMPLE = 48  # images
FEATURES, JITTER = 30_000, 14  # of made-up images in an index, and how far their descriptors are from real ones
STEPS = 4  # at least, of a training; the first is not counted
AFFORDED = 3e10
"""Multiply-accumulates of a measured batch on a CPU, forward passes: of a larger network fewer images are measured at a time."""
PYTHON = (sys.executable, "-c")


class Rate(NamedTuple):
    """Seconds a unit."""

    wall: float
    cpu: float


class Timer:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def rate(self, units: float) -> Rate:
        return Rate((time.perf_counter() - self.wall) / units, (time.process_time() - self.cpu) / units)


class Prober:
    """Measures kinds of work for a recipe. `size`: the side of the images in pixels, where there are none to look at."""

    def __init__(self, recipe: Recipe, size: int | None = None) -> None:
        self.recipe, self.machine, self.size = recipe, recipe.machine, size
        self.workers = self.machine.cores(self.machine.workers)

    def rate(self, kind: Kind) -> Rate:
        """Measure a kind. Raises UserError where what it needs is not there."""
        with contextlib.redirect_stderr(io.StringIO()):  # progress of what is called
            measured: Rate = getattr(self, f"_{kind.name}")(**kind.details)
        return measured

    # Images ------------------------------------------------------------------------------------------------------------

    @cached_property
    def images(self) -> list[bytes]:
        """Image files: of the pool if there are some already, of the sources, or drawn."""
        if self.size is not None:
            return photographs(self.size)
        with contextlib.suppress(UserError, OSError):
            table = manifest.read(Path("data", "prepare", "pool"))
            rows = np.linspace(0, len(table) - 1, min(SAMPLE, len(table))).astype(int)
            if found := list(manifest.image_bytes(table, rows)):
                return found
        with contextlib.suppress(UserError, OSError):
            if found := self._of_sources():
                return found
        return photographs(96)

    def _of_sources(self) -> list[bytes]:
        params = self.recipe.section("prepare", None)
        assert isinstance(params, Prepare)
        request = Request("pool", Path(params.root), Tars(Path(), Path()), set())
        sources = [s for s in (*params.pool, *params.labelled) if s.kind in ("tar", "folder")]
        files = itertools.chain.from_iterable(source.files(request_of(source, request)) for source in sources)
        with manifest.Opened() as opened:
            listed = itertools.islice((file for file in files if file.reason is None), SAMPLE)
            found = [opened.read(file.path, file.offset, file.size) for file in listed]
        return [data for data in found if _is_image(data)]

    @cached_property
    def pixels(self) -> list[np.ndarray]:
        return [decode.decode(data) for data in self.images]

    def _with_workers(self, work: Callable[[Any], object], items: Sequence[Any]) -> Rate:
        """Threads that each do their part of `items`, again and again: the decoders and OpenCV release the GIL."""
        work(items[0])
        timer, done = Timer(), 0
        with ThreadPoolExecutor(self.workers) as threads:
            while not done or time.perf_counter() - timer.wall < SECONDS / 2:
                parts = [items[i :: self.workers] for i in range(self.workers)]
                list(threads.map(lambda part: [work(item) for item in part], parts))
                done += len(items)
        return timer.rate(done)

    def _alone(self, work: Callable[[Any], object], items: Sequence[Any], units: int = 1) -> Rate:
        """One thread, whose work processes share in the stage, as well as SIFT's can be shared."""
        work(items[0])  # what a process does once is no part of an item
        timer, done = Timer(), 0
        for item in itertools.cycle(items):
            work(item)
            done += units
            if time.perf_counter() - timer.wall > SECONDS:
                break
        rate = timer.rate(done)
        return Rate(rate.wall / self.gain, rate.cpu)

    @cached_property
    def gain(self) -> float:
        """How many times as fast all workers together are as one: less than their number where cores share hardware or others use
        them."""
        if self.workers == 1:
            return 1.0
        greys = self.pixels
        timer = Timer()
        for image in greys:
            features.extract(image)
        one = timer.rate(len(greys)).wall
        return float(np.clip(one / self._with_workers(features.extract, greys).wall, 1.0, self.workers))

    def _draw(self) -> Rate:
        params = dataset.Draw(seed=0)
        files = [dataset.File("", str(i), content) for i, content in enumerate(dataset.pool_contents(params))]

        def one(file: dataset.File) -> None:
            list(dataset.draw_all([file], params, 1))

        return self._alone(one, files)

    def _header(self) -> Rate:
        return self._with_workers(decode.size_of, self.images)

    def _decode(self, side: int, whole: bool = False, packed: int | None = None) -> Rate:
        canvas = inputs.squeezed if whole else inputs.canvas

        def one(data: bytes) -> None:
            image = decode.decode(data)
            if side:
                canvas(image, side)

        return self._with_workers(one, [_packed(image, packed) for image in self.pixels] if packed else self.images)

    def _pack(self, side: int) -> Rate:
        return self._with_workers(lambda data: _packed(decode.decode(data), side), self.images)

    def _corrupt(self, side: int) -> Rate:
        images = [inputs.canvas(image, side) for image in self.pixels]
        ways = list(itertools.product(corruptions.CORRUPTIONS.values(), corruptions.SEVERITIES))
        random = np.random.default_rng(0)

        def all_ways(image: np.ndarray) -> None:
            for corrupt, severity in ways:
                corrupt(image, severity, random)

        rate = self._alone(all_ways, images, len(ways))
        return Rate(rate.wall * self.gain, rate.cpu)  # in one thread, while the network waits

    # The leak check ----------------------------------------------------------------------------------------------------

    def _sift(self) -> Rate:
        return self._with_workers(features.extract, self.pixels)

    @cached_property
    def described(self) -> list[features.Picture]:
        return [features.extract(image) for image in self.pixels]

    @cached_property
    def large(self) -> np.ndarray:
        """(images,) bool"""
        return np.array([picture.is_large for picture in self.described])

    @cached_property
    def searched(self) -> tuple[VotingIndex, Rate, int]:
        """An index of made-up images, large enough to be compressed, what an entry of it took, and how many it has.

        They have the features of real ones, jittered and thrown together: in an index of a few images any two look alike.
        """
        real, random = features.bag([picture.features for picture in self.described]), np.random.default_rng(0)
        count = FEATURES if len(real.owner) else 0
        rows = random.integers(max(1, len(real.owner)), size=count)
        jittered = real.descriptors[rows] + random.normal(0, JITTER, (count, 128)).astype(np.float32)
        descriptors = np.clip(jittered, 0, 255).astype(np.uint8)
        owner = (np.arange(count) // (ENTRIES // 2)).astype(np.int32)
        bag = features.Bag(owner, real.points[random.permutation(rows)], descriptors)
        timer = Timer()
        large = np.full(count, self.large.all())
        index = VotingIndex.build(count, [bag], np.concatenate([descriptors, np.zeros((1, 128), np.uint8)]), large)
        return index, timer.rate(max(1, 2 * count)), 2 * count

    def _index(self) -> Rate:
        return self.searched[1]

    def _vote(self) -> Rate:
        index, _, entries = self.searched
        queries = features.bag([picture.features for picture in self.described])
        rate = self._alone(lambda bag: index.shortlist(bag, None, self.large), [queries], len(self.described))
        unit = votes(max(entries, ENTRIES))
        return Rate(rate.wall / unit, rate.cpu / unit)

    def _alike(self) -> Rate:
        known = 2000
        random = np.random.default_rng(0).standard_normal((2, features.THUMBNAIL**2, known)).astype(np.float32)
        look = search.LookAlikes(*random)
        batch = (self.described * search.BATCH)[: search.BATCH]
        return self._alone(look.among, [batch], search.BATCH * known)

    # Networks ----------------------------------------------------------------------------------------------------------

    @cached_property
    def on(self) -> device.Device:
        return device.pick(self.machine)

    def _affordable(self, model: nn.Module, size: int, batch: int) -> int:
        if self.on.device.type != "cpu":
            return batch
        return int(min(batch, max(4, AFFORDED // max(1, architectures.macs(model, size)))))

    def _forward(
        self, classes: int, precision: str, net: Mapping[str, Any] | None = None, parts: Sequence[Mapping[str, Any]] = ()
    ) -> Rate:
        if parts:
            rates = [self._forward(classes, precision, part) for part in parts]
            return Rate(sum(r.wall for r in rates), sum(r.cpu for r in rates))
        assert net is not None
        on = self.on if precision == "own" else device.pick(self.machine.model_copy(update={"precision": precision}))
        model, given = made(net, classes)
        model.eval()
        if precision == "own":
            model = prediction.folded(model)
        n = self._affordable(model, given.size, prediction.BATCH)
        model = on.place(model)
        pixels = _noise(n, given.size)

        def one(_: object) -> None:
            with torch.inference_mode():
                prediction.forward(model, inputs.centre(on.batch(pixels), given.size), given, on).cpu()

        one(None)
        return self._batches(one, n)

    def _batches(self, one: Callable[[object], None], n: int) -> Rate:
        rounds = list[Rate]()
        began = time.perf_counter()
        while not rounds or time.perf_counter() - began < SECONDS:
            timer = Timer()
            one(None)
            rounds.append(timer.rate(n))
        return _middle(rounds)

    def _view(self, view: Mapping[str, Any], size: int, canvas: int) -> Rate:
        n = prediction.BATCH
        pixels = _noise(n, canvas)
        cut = views.viewer(size, views.View.model_validate(view), 0, np.ones(n))

        def one(_: object) -> None:
            cut(self.on.batch(pixels), np.arange(n), np.zeros(n, int))

        return self._batches(one, n)

    def _step(
        self,
        net: Mapping[str, Any],
        loss: str,
        canvas: int,
        whole: bool,
        batch: int,
        how: Mapping[str, Any],
        classes: int,
        **spec: Any,
    ) -> Rate:
        """A step of `fit` itself, without its teacher: on random pixels, targets too where they are soft."""
        model, given = made(net, 0 if loss == "contrast" else classes)
        n = self._affordable(model, given.size, batch)
        n = max(how["accumulate"], n - n % how["accumulate"])
        pixels = inputs.InMemory(_noise(n, canvas).permute(0, 2, 3, 1).contiguous().numpy())
        network.whiten(model, pixels, given, 0)
        cut = views.viewer(given.size, views.View.model_validate(spec.get("view") or {}), 0, np.ones(n))
        if loss == "contrast":
            model = contrastive.Contrastive(
                architectures.Projected(model, *spec["head"]), contrastive.Memory(size=1024) if spec["memory"] else None
            )
            cut = contrastive.two_views(given.size, contrastive.TwoViews.model_validate(spec["views"]), 0, np.ones(n))
        elif loss == "exits":
            model = _with_exits(model, classes)
        elif loss == "soft":
            cut = views.viewer(
                given.size, views.View.model_validate(spec["view"]), 0, np.ones(n), views.Mix.model_validate(spec["mix"])
            )
        told = Stepwise(_loss(loss, given, classes, self.on, str(spec.get("divergence", "kl"))), how["accumulate"], self.on)
        training = Training(
            steps=10_000, batch=n, lr=1e-6, optimizer=how["optimizer"], accumulate=how["accumulate"],
            ema=0.99 if how["ema"] else 0.0, clip=1.0 if how["clip"] else 0.0, frozen=tuple(how["frozen"]),
        )  # fmt: skip
        with TemporaryDirectory() as folder:
            job = Job(0, Path(folder), Journal(), self.machine)
            with contextlib.suppress(Enough):
                fit.fit(model, told, pixels, cut, training, lambda _: {"top1": 0.0}, job=job, device=self.on, label="")
        rate = _middle(told.steps)
        return Rate(rate.wall * batch / n, rate.cpu * batch / n)

    # Processes ---------------------------------------------------------------------------------------------------------

    def _start(self, torch: bool, trains: bool) -> Rate:
        return self._starts[int(trains)] if torch else _started("pipeline.stages.search")[0]

    @cached_property
    def _starts(self) -> list[Rate]:
        """With torch, and with what optimisers import beside it when they are made; of one process, as this takes seconds."""
        return _started("pipeline.stages.teach", "torch._dynamo")


def _started(*modules: str) -> list[Rate]:
    """What it takes to start Python and to have imported each of the modules, one after the other."""
    told = "u = resource.getrusage(resource.RUSAGE_SELF); print(time.time(), u.ru_utime + u.ru_stime)"
    code = "; ".join(["import resource, time", *(f"import {module}; {told}" for module in modules)])
    began = time.time()
    said = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=True).stdout
    return [Rate(float(now) - began, float(cpu)) for now, cpu in map(str.split, said.splitlines())]


class Enough(Exception):
    """A training has been looked at for long enough."""


class Stepwise:
    """A loss that notes when it is called, and ends the training by Enough when that says how long a step takes."""

    def __init__(self, loss: fit.Loss, pieces: int, on: device.Device) -> None:
        self.loss, self.pieces, self.on = loss, pieces, on
        self.calls, self.steps = 0, list[Rate]()
        self.timer: Timer | None = None
        self.began = time.perf_counter()

    def __call__(self, model: nn.Module, batch: views.Batch) -> Tensor:
        if self.calls % self.pieces == 0:
            if self.on.device.type == "cuda":
                torch.cuda.synchronize()
            if self.timer is not None and self.calls > self.pieces:
                self.steps.append(self.timer.rate(1))
            if len(self.steps) >= STEPS - 1 and time.perf_counter() - self.began > SECONDS:
                raise Enough
            self.timer = Timer()
        self.calls += 1
        return self.loss(model, batch)


def _loss(name: str, given: inputs.Input, classes: int, on: device.Device, divergence: str) -> fit.Loss:
    """The losses of the stages, with targets that are the same for every batch."""
    soft = losses.SoftLoss.model_validate({"name": divergence})

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        if name == "contrast":
            both = batch.views.transpose(0, 1).flatten(0, 1)
            return contrastive.nt_xent(*_projected(model(inputs.normalise(both, given))))
        answered = model(inputs.normalise(batch.views, given))
        labels = torch.arange(len(batch.views), device=on.device) % classes
        if name == "labels":
            return nn.functional.cross_entropy(answered.float(), labels)
        if name == "exits":
            return objective(answered, lambda s: nn.functional.cross_entropy(s.float(), labels), 0.1, 1e-4, 3.0)
        return soft(answered, nn.functional.one_hot(labels, classes).float())

    return loss


def _projected(answered: tuple[Tensor, Tensor | None]) -> tuple[Tensor, float, Tensor | None]:
    return answered[0], 0.1, answered[1]


def _with_exits(model: nn.Module, classes: int) -> nn.Module:
    from pipeline.models.exits import Exits

    return Exits(model, classes)


def made(net: Mapping[str, Any], classes: int) -> tuple[nn.Module, inputs.Input]:
    """A network with random weights, and its input. Raises ModelError."""
    torch.manual_seed(0)
    return architectures.create(net["arch"], classes, net["options"]), inputs.Input(size=net["size"])


def photographs(size: int) -> list[bytes]:
    """JPEGs of `size` x `size` pixels with detail at all scales, as photographs have it."""
    return [
        cv2.imencode(".jpg", _detailed(number, size), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        for number in range(SAMPLE)
    ]


def _detailed(number: int, size: int) -> np.ndarray:
    random = np.random.default_rng(number)
    whole = np.zeros((size, size, 3), np.float32)
    for side in _octaves(size):
        noise = random.standard_normal((side, side, 3)).astype(np.float32)
        whole += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) * (40.0 / side**0.5 * 2)
    return np.clip(128 + whole, 0, 255).astype(np.uint8)


def _octaves(size: int) -> Iterator[int]:
    side = 4
    while side < size:
        yield side
        side *= 2


def _packed(image: np.ndarray, side: int) -> bytes:
    scale = min(1.0, side / min(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _is_image(data: bytes) -> bool:
    try:
        decode.decode(data)
    except decode.ImageRefused:
        return False
    return True


def _noise(n: int, side: int) -> Tensor:
    """(n, 3, side, side) uint8, in channels_last memory as decoded images are."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _middle(rates: Sequence[Rate]) -> Rate:
    """The median: other work on the machine comes in bursts."""
    return Rate(*(float(np.median(column)) for column in zip(*rates, strict=True)))
