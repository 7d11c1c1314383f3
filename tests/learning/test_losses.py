"""Each divergence against a naive float64 loop of its formula."""

import math

import pytest
import torch

from pipeline.learning.labels import Best
from pipeline.learning.losses import SoftLoss


def probabilities(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(x / temperature) for x in logits]
    return [e / sum(exponentials) for e in exponentials]


def naive(name: str, student: list[float], teacher: list[float], temperature: float) -> float:
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if name == "kl":
        return kl(p, q)
    if name == "sym_kl":
        return 0.5 * (kl(p, q) + kl(q, p))
    if name == "js":
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return 0.5 * kl(p, m) + 0.5 * kl(q, m)
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sym_kl", "js", "kl", "soft_ce"])
def test_equals_the_formula(name: str, temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 11, generator=random, dtype=torch.float64)
    expected = [naive(name, s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    loss = SoftLoss(name=name, temperature=temperature)(student.float(), teacher.float())  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(temperature**2 * sum(expected) / 7, rel=1e-5)


def test_soft_ce_with_the_weight_of_one_over_t_squared_is_simclrv2s_equation() -> None:
    """SimCLRv2, equation 2 has no T^2: the mean of -sum p log q at T = 0.1, T^2 = 0.01."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, generator=random, dtype=torch.float64)
    expected = [naive("soft_ce", s, t, 0.1) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    loss = SoftLoss(name="soft_ce", temperature=0.1, weight=100)(student.float(), teacher.float())
    assert loss.item() == pytest.approx(sum(expected) / 7, rel=1e-5)


def test_symmetric_kl_is_not_jensen_shannon() -> None:
    """At 1000 random classes the one is about 3.9, the other cannot pass log 2. SSLD's code calls the first one JS."""
    random = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 256, 1000, generator=random)
    assert 3.7 < SoftLoss(name="sym_kl")(student, teacher).item() < 4.1
    assert SoftLoss(name="js")(student, teacher).item() < math.log(2)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """Without the factor T^2 the gradient at T = 8 would be 64 times smaller."""
    random = torch.Generator().manual_seed(0)
    student, teacher = 0.1 * torch.randn(2, 64, 10, generator=random)
    sizes = []
    for temperature in (1.0, 8.0):
        s = student.clone().requires_grad_()
        SoftLoss(name="kl", temperature=temperature)(s, teacher).backward()
        assert s.grad is not None
        sizes.append(s.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_is_computed_in_float32_under_autocast() -> None:
    student, teacher = torch.randn(2, 4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SoftLoss()(student.bfloat16(), teacher)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["sym_kl", "js", "kl"])
def test_is_zero_with_zero_gradient_where_both_agree_even_when_certain(name: str) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0], [1.0, 2.0, 3.0]])
    student = logits.clone().requires_grad_()
    loss = SoftLoss(name=name)(student, logits)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def correlation(x: list[float], y: list[float]) -> float:
    dx, dy = ([value - sum(z) / len(z) for value in z] for z in (x, y))
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_the_correlation_within_images_and_within_classes(temperature: float) -> None:
    """Huang et al. 2022, section 3, in a loop. There is no T^2: a correlation has no scale."""
    random = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 11, generator=random, dtype=torch.float64)
    q, p = ([probabilities(row, temperature) for row in logits.tolist()] for logits in (student, teacher))
    images = sum(1 - correlation(a, b) for a, b in zip(p, q, strict=True)) / 7
    columns = ([row[c] for row in p] + [row[c] for row in q] for c in range(11))
    classes = sum(1 - correlation(column[:7], column[7:]) for column in columns) / 11
    loss = SoftLoss(name="dist", temperature=temperature)(student.float(), teacher.float())
    assert loss.item() == pytest.approx(images + classes, rel=1e-5)


def test_dist_counts_a_rare_class_as_much_as_any_other() -> None:
    """The probabilities of a class that a batch hardly holds are tiny, and correlate all the same."""
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 10, generator=random)
    teacher[:, 0] -= 30
    assert SoftLoss(name="dist")(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert SoftLoss(name="dist")(torch.zeros(64, 10), teacher).item() == pytest.approx(2)  # a student without an opinion


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sym_kl", "js", "kl", "soft_ce"])
def test_classes_that_are_not_kept_count_as_one(name: str, temperature: float) -> None:
    """The formula over m + 1 probabilities at the temperature, the last one the sum of the others', of both."""
    random = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 11, generator=random, dtype=torch.float64)
    log_p, best = teacher.log_softmax(1).topk(4)
    rest = (teacher.log_softmax(1) / temperature).scatter(1, best, -torch.inf).logsumexp(1)
    expected = 0.0
    for s, t, kept in zip(student.tolist(), teacher.tolist(), best.tolist(), strict=True):
        q, p = probabilities(s, temperature), probabilities(t, temperature)
        q, p = ([x[i] for i in kept] + [sum(v for i, v in enumerate(x) if i not in kept)] for x in (q, p))
        expected += naive(name, [math.log(x) for x in q], [math.log(x) for x in p], 1.0)
    loss = SoftLoss(name=name, temperature=temperature)  # type: ignore[arg-type]
    value = loss(student.float(), Best(best, log_p.float(), rest.float(), temperature))
    assert value.item() == pytest.approx(temperature**2 * expected / 7, rel=1e-5)


def test_a_student_that_agrees_with_the_whole_distribution_is_left_alone() -> None:
    """What is left was divided evenly once: that pulled a student away from its teacher, by more the higher T."""
    teacher = 4 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    log_p, best = teacher.log_softmax(1).topk(10)
    rest = (teacher.log_softmax(1) / 4).scatter(1, best, -torch.inf).logsumexp(1)
    student = teacher.clone().requires_grad_()
    SoftLoss(name="kl", temperature=4.0)(student, Best(best, log_p, rest, 4.0)).backward()
    assert student.grad is not None
    assert student.grad.norm().item() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_standardised_logits_have_no_size(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 11, generator=random, dtype=torch.float64)

    def z(logits: list[float]) -> list[float]:
        mean = sum(logits) / len(logits)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in logits) / len(logits))
        return [(x - mean) / deviation for x in logits]

    expected = [naive("kl", z(s), z(t), temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    loss = SoftLoss(name="kl", temperature=temperature, standardise=True)
    assert loss(student.float(), teacher.float()).item() == pytest.approx(temperature**2 * sum(expected) / 7, rel=1e-4)
    moved = loss(5 * student.float() + 2, teacher.float().log_softmax(1))  # cached labels have log-probabilities
    assert moved.item() == pytest.approx(loss(student.float(), teacher.float()).item(), rel=1e-4)
    assert loss(torch.zeros(2, 3), torch.randn(2, 3)).isfinite()
    assert (SoftLoss(temperature=0.1).read_at, SoftLoss(temperature=0.1, standardise=True).read_at) == (0.1, 1.0)
