"""Losses on soft labels that two or more stages use. Logits in, mean over the batch out, float32 whatever the autocast type."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.learning.labels import Best
from pipeline.learning.loop import group
from pipeline.store.params import Section


class SoftLoss(Section):
    """Which divergence pulls the student's q = softmax(s/T) to the teacher's p = softmax(t/T).

    Summed over classes, averaged over the batch, multiplied by `weight` and by T^2, which keeps the size of the gradient
    roughly independent of T (Hinton et al. 2015, section 2). SimCLRv2's equation has no T^2; LARS, which it uses, takes such a
    factor out of the tensors that it adapts, but for the decay. Nor is `dist` multiplied by it.
    """

    name: Literal["sym_kl", "js", "kl", "soft_ce", "dist"] = "sym_kl"
    """`sym_kl`: 1/2 KL(p||q) + 1/2 KL(q||p), what SSLD's code computes and calls JS. `js`: 1/2 KL(p||m) + 1/2 KL(q||m), m =
    (p+q)/2, the true Jensen-Shannon divergence; near agreement its gradient is a quarter of KL's. `kl`: KL(p||q). `soft_ce`:
    -sum p log q, SimCLRv2's. `dist` (Huang et al. 2022, section 3): 1 - r(p, q) of the probabilities of each image, averaged,
    plus 1 - r of each class over the images of the batch; r is Pearson's correlation, which has no scale."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T. SimCLRv2 has 0.1 to a network of the same kind and 1 to a smaller one. Below 1 the model directory records it, and all
    that read the model divide by it; above 1 the student's logits match the teacher's own, and are read at 1."""
    standardise: bool = False
    """Subtract from the logits of each image their mean and divide them by their standard deviation, the student's and the
    teacher's, before they are divided by T (Sun et al. 2024, "Logit Standardization", section 4): the student then need not copy
    the size of its teacher's logits. Its own have any size, so its probabilities are not calibrated."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """A factor: 4 with `js` compares like with like, 1 / T^2 gives SimCLRv2's equation."""

    @property
    def read_at(self) -> float:
        """The temperature at which a student of this loss answers with probabilities, where it is below 1."""
        return 1.0 if self.standardise else min(1.0, self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor | Best) -> Tensor:
        """(N, C) logits of student and teacher -> scalar. Of a teacher's `Best`, at this temperature, the classes that are not
        kept count as one, by the same formula; `dist` and `standardise` have no such form."""
        if isinstance(teacher, Best):
            log_p, log_q = teacher.cells(student)
        else:
            s, t = student.float(), teacher.float()
            if self.standardise:
                s, t = standardised(s), standardised(t)
            if self.name == "dist":  # which looks at all images of a piece at once
                s, t = group.gathered(s), group.gathered(t)
            log_q = F.log_softmax(s / self.temperature, dim=1)
            log_p = F.log_softmax(t / self.temperature, dim=1)
        scale = 1.0 if self.name == "dist" else self.temperature**2
        return self.weight * scale * DIVERGENCES[self.name](log_p, log_q).mean()


def standardised(logits: Tensor) -> Tensor:
    """(N, C) -> (N, C): each row with mean 0 and standard deviation 1 (over its C values)."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-7)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, C) log-probabilities -> (N,): KL(p||q)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def sym_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, C) log-probabilities -> (N,): 1/2 KL(p||q) + 1/2 KL(q||p) = 1/2 sum (p - q) (log p - log q)."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, C) log-probabilities -> (N,): 1/2 KL(p||m) + 1/2 KL(q||m) with m = (p+q)/2; between 0 and log 2."""
    log_m = ((log_p.exp() + log_q.exp()) / 2).clamp_min(1e-38).log()
    return 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


def soft_ce(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, C) log-probabilities -> (N,): -sum p log q."""
    return -(log_p.exp() * log_q).sum(1)


def dist(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, C) log-probabilities -> scalar: mean over images of 1 - r(p_n, q_n), plus mean over classes of 1 - r(p_c, q_c)."""
    p, q = log_p.exp(), log_q.exp()
    return (1 - _correlation(p, q)).mean() + (1 - _correlation(p.T, q.T)).mean()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """(N, C), (N, C) -> (N,): Pearson's of each pair of rows, -1..1; 0 where a row is constant."""
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    tiny = 1e-20  # a class that no image of the batch has is as small as its probabilities, and counts as much as any other
    return (F.normalize(x, eps=tiny) * F.normalize(y, eps=tiny)).sum(1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sym_kl": sym_kl,
    "js": js,
    "kl": kl,
    "soft_ce": soft_ce,
    "dist": dist,
}
