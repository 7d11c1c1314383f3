"""How good are features without a classifier? The k nearest neighbours and a linear probe."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.learning.contrastive import Contrastive
from pipeline.models import device, inputs, prediction

PROBE_DECAY = 1e-3


def monitor(
    known: inputs.Pixels,
    known_labels: np.ndarray,
    asked: inputs.Pixels,
    asked_labels: np.ndarray,
    neighbours: int,
    input_spec: inputs.Input,
    on: device.Device,
) -> Callable[[nn.Module], Mapping[str, float]]:
    """A function that says how well an encoder's features tell the classes of `asked` apart, as top-1 in 0..1.

    `knn`: by their nearest neighbours among the features of `known`. `probe`: by a linear classifier on them.
    """
    y, wanted = torch.from_numpy(known_labels), torch.from_numpy(asked_labels)

    def check(model: nn.Module) -> Mapping[str, float]:
        assert isinstance(model, Contrastive)
        encoder = model.projected.encoder
        bank, queries = (torch.cat([f for _, f in prediction.logits(encoder, p, input_spec, on)]) for p in (known, asked))
        predicted = {"knn": nearest(bank, y, queries, neighbours), "probe": probed(bank, y, queries)}
        return {name: float((guess == wanted).double().mean()) for name, guess in predicted.items()}

    return check


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07) -> Tensor:
    """(N, F), (N,), (M, F) -> (M,): the class with most votes of the k most similar, weighted by exp(cosine / temperature).

    Wu et al. 2018, section 3.4.
    """
    bank, k = F.normalize(bank, dim=1), min(k, len(bank))
    predicted = []
    for part in F.normalize(queries, dim=1).split(1024):
        similarity, rows = (part @ bank.T).topk(k)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        predicted.append(votes.scatter_add_(1, labels[rows], (similarity / temperature).exp()).argmax(1))
    return torch.cat(predicted)


def probed(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """(N, F), (N,), (M, F) -> (M,): the classes that a logistic regression on the standardised features predicts."""
    mean, deviation = bank.mean(0), bank.std(0).clamp(min=1e-6)
    x, asked = (bank - mean) / deviation, (queries - mean) / deviation
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
        bias = torch.zeros(weight.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * PROBE_DECAY * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return (asked @ weight.detach() + bias.detach()).argmax(1)
