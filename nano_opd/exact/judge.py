"""The judge of any advantage: `print(judge(A))` says what its expected update descends, and where it leads.

An A of u alone descends E_p[h(u)] with the h of law.py. Any other descends something if and only if its expected update
does no work around closed loops of students. Where it is smooth, and only there, a symmetric Jacobian says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, exp

from nano_opd.checks import require_finite
from nano_opd.divergences import Divergence, get
from nano_opd.exact.law import NAMED, STUDENTS, TEACHER, generator, of_u, paths, update

Advantage = Callable[[Tensor, Tensor], Tensor]  # log p, log q, (…, V) each → (…, V)
OfLogU = Callable[[Tensor], Tensor]  # log u → the same shape

FARTHEST = 30.0  # the largest |log u| to which A is followed: there p is 2e-14
NEAR = 0.02  # a student has reached the teacher if its probabilities are no farther away, in Euclidean length
EXACT = 1e-8  # the resolution of an A in float64, as `resolution_of` measures it


@dataclass(frozen=True, eq=False)
class Verdict:
    """What `judge` found in numbers; str() is it in sentences."""

    size: float  # the largest |A|, at random prefixes
    length: float  # of the longest expected update, at random prefixes
    resolution: float  # the least change of the student's logits that A notices; EXACT, or more in low precision
    asymmetry: float  # of its Jacobian J in the logits, ‖J − Jᵀ‖ / 2‖J‖, at the worst prefix
    measurable: float  # the asymmetry that rounding alone may cause
    work: float  # |∮ update · dz| / ∮ |update · dz| around the worst triangle of students
    generator: Divergence | None  # h; None if A depends on more than u and a term that all tokens of a prefix share
    name: str  # h as one or two of NAMED, but for a multiple of u − 1; "" if it is neither
    clip: tuple[float, float] | None  # the u between which A is not constant, if it stops there abruptly
    clipped_name: str  # as name, of A between these u
    falls: list[tuple[float, float]]  # ranges of u where A falls and h bends down; 0 and inf: as far as A is followed
    flat: tuple[float, float] | None  # the u around 1 between which A does not change: students rest there
    unbounded: bool  # whether E_p[h(u)] has no lower bound, because −A grows at least like u
    at_teacher: float  # longest expected update of a student that is the teacher
    ends: Tensor  # where the 55 STUDENTS end, (55, 3), when the teacher is TEACHER
    slow: int  # how many of them reach the teacher only when their small updates are lengthened
    cornered: int  # how many of three students with 0.9998 on one token put still more on it
    against: str  # the divergence of the next three
    bias: float  # ‖update − g‖ / ‖g‖, g the OPD+ update
    cosine: float  # of update and g
    noise: tuple[float, float]  # variance of one sampled token over ‖update‖²; the same of OPD+ over ‖g‖²

    @property
    def zero(self) -> bool:
        """Return whether the expected update is 0 but for rounding."""
        return self.length <= 1e-12 * self.size

    @property
    def gradient(self) -> bool:
        """Return whether the expected update is the gradient of a function: always for an A of u alone."""
        if self.generator is not None:
            return True
        return self.asymmetry < self.measurable and self.work < 0.01

    @property
    def rests(self) -> bool:
        """Return whether a student that is the teacher stays there."""
        return self.at_teacher <= 1e-6 * self.length

    @property
    def arrive(self) -> int:
        """Return how many of the 55 students reach the teacher; none if the teacher itself does not rest."""
        if not self.rests:
            return 0
        return int(is_near_teacher(self.ends).sum())

    @property
    def wrong(self) -> str:
        """Return the first sentence with bad news, or ""."""
        for good, sentence in self._findings():
            if not good:
                return sentence
        return ""

    def __str__(self) -> str:
        return "\n".join(sentence for _, sentence in self._findings())

    def _findings(self) -> list[tuple[bool, str]]:
        """Return (good news?, sentence), what matters most first."""
        if self.zero:
            return [(False, f"It teaches nothing: its expected update is 0 (at most {self.length:.0e}).")]
        findings = [(self.gradient, self._what_it_is())]
        if self.resolution > EXACT:
            precise = self.resolution < 1e-4
            steps = f"A does not notice changes of the logits below about {self.resolution:.0e}"
            findings.append((precise, f"It is computed in low precision: {steps}."))
        findings.append((not self.falls, self._shape()))
        if self.name:
            findings.append((True, f"It descends {self.name}."))
        if self.clip is not None:
            findings.append((True, self._clipping()))
        if self.flat is not None:
            low, high = self.flat
            between = range_in_words(low, high)
            findings.append((False, f"A does not change for u {between}: students rest there, short of the teacher."))
        findings.append((self.rests, f"A student that is the teacher moves by {self.at_teacher:.2g}."))
        findings.append((self.arrive == len(STUDENTS), self._where_it_leads()))
        if self.cornered:
            findings.append((False, f"Of 3 students with 0.9998 on one token {self.cornered} put still more on it."))
        findings.append((True, self._comparison()))
        return findings

    def _what_it_is(self) -> str:
        measured = f"asymmetry of the Jacobian {self.asymmetry:.2g}, work around a loop {self.work:.2g}"
        smooth = self.asymmetry < self.measurable and self.work < 0.01
        if self.gradient and smooth:
            return f"The expected update is the gradient of a function ({measured})."
        if self.gradient:
            return "The expected update is the gradient of a function: A jumps, but it depends on u alone."
        return f"The expected update is the gradient of nothing ({measured})."

    def _shape(self) -> str:
        if self.generator is None and self.cosine > 1 - 1e-12:
            gate = f"at ordinary prefixes it acts as {self.against}, at others a gate is closed"
            return f"A depends on more than u, and there is no one h: {gate}."
        if self.generator is None:
            return "A depends on more than u: there is no one h."
        if not self.falls:
            return "A(u) never falls: h is convex."
        falls = f"A falls, and h bends down, for u {ranges_in_words(self.falls)}"
        if self.unbounded:
            return f"{falls}, and E_p[h] has no lower bound."
        return f"{falls}."

    def _clipping(self) -> str:
        low, high = self.clip
        between = range_in_words(low, high)
        if self.falls or not self.clipped_name:
            return f"A is clipped: it changes only for u {between}."
        return f"It is a clipped divergence: A is that of {self.clipped_name} for u {between}, and constant beyond."

    def _where_it_leads(self) -> str:
        center = self.ends.mean(0)
        if (self.ends - center).norm(dim=1).max() < NEAR:
            ends = f"all meet at {center.numpy().round(3)}"
        else:
            ends = f"{int((self.ends.amax(1) > 0.99).sum())} end in a corner"
        slowly = ""
        if self.slow:
            slowly = f", {self.slow} of them slowly (after 330 steps they are still approaching)"
        return f"Of {len(STUDENTS)} students {self.arrive} reach the teacher{slowly}; {ends}."

    def _comparison(self) -> str:
        values = f"bias {self.bias:.2g}, cosine {self.cosine:.2f}, variance over squared length {self.noise[0]:.3g}"
        return f"Against {self.against}: {values}; OPD+ has {self.noise[1]:.3g}."


def range_in_words(low: float, high: float) -> str:
    """Return a range of u in words. A range of one step of the grid is a jump."""
    if low == 0 and high == math.inf:
        return "of any size"
    if high == math.inf:
        return f"above {short(low)}"
    if low == 0:
        return f"below {short(high)}"
    if high < 1.011 * low:
        return f"at {short(low)}"
    return f"from {short(low)} to {short(high)}"


def short(u: float) -> str:
    """Return a number in two digits, or in three from 100 to 999."""
    if 100 <= u < 999:
        return f"{u:.0f}"
    return f"{u:.2g}"


def ranges_in_words(ranges: list[tuple[float, float]]) -> str:
    """Return ranges of u in words; of more than three, those nearest to u = 1."""
    nearest = sorted(ranges, key=distance_from_one)[:3]
    words = [range_in_words(low, high) for low, high in sorted(nearest)]
    if len(ranges) > 3:
        words.append(f"in {len(ranges) - 3} ranges farther from 1")
    return " and ".join(words)


def distance_from_one(bounds: tuple[float, float]) -> float:
    """Return how far from log u = 0 a range of u begins."""
    low, high = bounds
    if low >= 1:
        return math.log(low)
    if high <= 1:
        return -math.log(high)
    return 0.0


def judge(advantage: Advantage, against: str = "reverse_kl") -> Verdict:
    """Return the Verdict on an advantage, from 32 random prefixes of 4 tokens and the flow of 55 students over 3.

    advantage   as for `update`, for any V; a number for all tokens will do. It may detach: J is taken by differences
    against     divergence that bias, cosine and variance refer to; ValueError as divergences.get

    Raises ValueError for an advantage that no single prefix determines, because it depends on the other prefixes of a
    batch, or that fails at a vocabulary of 3 or 4 tokens, as a top k with k = 5. Raises NumericalFault, a ValueError,
    for one that is not finite at ordinary prefixes or where the student is the teacher.
    """
    divergence = get(against)
    given = accepting_any_shape(advantage)
    rng = torch.Generator().manual_seed(0)
    logits, teacher_logits = 1.5 * torch.randn(2, 32, 4, dtype=torch.float64, generator=rng)
    log_p = logits.log_softmax(-1)
    log_q = teacher_logits.log_softmax(-1)
    corners = 1.5 * torch.randn(32, 3, 1, 4, dtype=torch.float64, generator=rng)
    require_one_prefix_to_be_enough(given, log_p, log_q)

    size = given(log_p, log_q).abs().max().item()
    length = update(given, log_p, log_q).norm(dim=-1).max().item()
    unit = length
    if length <= 1e-12 * size:  # the expected update is 0
        unit = 1.0

    def A(log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the advantage in a unit in which the longest expected update is 1: a factor changes no verdict."""
        return given(log_p, log_q) / unit

    resolution = resolution_of(A, logits, log_q)
    rounding = 0.0
    if resolution > EXACT:
        rounding = resolution
    step = max(1e-4, rounding ** (1 / 3))  # of the differences: the error of rounding / step + step² is least
    asymmetry = jacobian_asymmetry(jacobian(A, logits, log_q, step))
    measurable = max(1e-5, min(0.3, 30 * rounding / step))
    work = loop_work(A, corners, log_q)

    h = None
    of_log_u = advantage_of_log_u(given)
    shape = Shape(name="", clip=None, clipped_name="", falls=[], flat=None, unbounded=False)
    if depends_on_u_alone(A, rounding):
        h = generator(of_log_u)
        shape = shape_of(of_log_u, rounding)
    elif asymmetry < measurable and work < 0.01:
        work = loop_work(A, 3 * corners, log_q)  # students so sure of a token that a gate on p may close

    ends, slow = endpoints(A)
    bias, cosine, noise = compare(given, divergence, log_p, log_q)
    return Verdict(
        size=size,
        length=length,
        resolution=resolution,
        asymmetry=asymmetry,
        measurable=measurable,
        work=work,
        generator=h,
        name=shape.name,
        clip=shape.clip,
        clipped_name=shape.clipped_name,
        falls=shape.falls,
        flat=shape.flat,
        unbounded=shape.unbounded,
        at_teacher=update(given, log_q, log_q).norm(dim=-1).max().item(),
        ends=ends,
        slow=slow,
        cornered=driven_into_a_corner(A),
        against=against,
        bias=bias,
        cosine=cosine,
        noise=noise,
    )


# ------------------------------------------------------------------------------------- what can be judged, and what not


def accepting_any_shape(advantage: Advantage) -> Advantage:
    """Return the advantage as float64 of the shape of log_p, also where it returns one number for all tokens.

    The function returned raises ValueError where the advantage cannot be computed.
    """

    def A(log_p: Tensor, log_q: Tensor) -> Tensor:
        try:
            return advantage(log_p, log_q.expand_as(log_p)) + 0 * log_p
        except (RuntimeError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"A cannot be judged: it must take (…, V) for a vocabulary of any size and return as many numbers, and "
                f"at {log_p.shape[-1]} tokens it fails with “{reason}”; a top k needs a k of 1 or 2 here"
            ) from error

    return A


def require_one_prefix_to_be_enough(A: Advantage, log_p: Tensor, log_q: Tensor) -> None:
    """Raise ValueError for an A that is not finite, or that a single prefix does not determine."""
    together = A(log_p, log_q)
    likely = "A is not finite for some token of 32 ordinary prefixes"
    require_finite("expected update", update(A, log_p, log_q), likely)
    for row in range(4):
        alone = A(log_p[row : row + 1], log_q[row : row + 1])
        difference = (alone[0] - together[row]).abs().max()
        if not difference <= 1e-3 * together[row].abs().max():
            raise ValueError(
                "A cannot be judged: at one prefix it depends on the other prefixes of the batch (as whitening over a "
                "batch does) or on chance, so that one prefix has no expected update of its own"
            )
    likely = "0/0 in A at u = 1: put in its limit there, as log_u.sign() for log_u / log_u.abs()"
    require_finite("expected update of a student that is the teacher", update(A, log_q, log_q), likely)


def resolution_of(A: Advantage, logits: Tensor, log_q: Tensor) -> float:
    """Return the least change of the logits, from EXACT up, that half of the values of A notice.

    An A in float64 notices EXACT. One in float32 needs about 1e-7, one in bfloat16 about 1e-2. An A with only a few
    values, as a sign, counts as exact.
    """
    values = A(logits.log_softmax(-1), log_q)
    if values.unique().numel() < values.numel() / 4:
        return EXACT
    directions = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))

    def noticed(change: float) -> int:
        moved = A((logits + change * directions).log_softmax(-1), log_q)
        return int((moved != values).sum())

    at_most = noticed(0.1)
    for change in (EXACT, 3e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        if noticed(change) >= at_most / 2:
            return change
    return 0.1


# ------------------------------------------------------------------------- is the expected update a gradient, and of u?


def jacobian(A: Advantage, logits: Tensor, log_q: Tensor, step: float) -> Tensor:
    """Return the Jacobian of the expected update in the logits by central differences, (S, V, V)."""
    columns = []
    for direction in step * torch.eye(logits.shape[-1], dtype=logits.dtype):
        ahead = update(A, (logits + direction).log_softmax(-1), log_q)
        behind = update(A, (logits - direction).log_softmax(-1), log_q)
        columns.append((ahead - behind) / (2 * step))
    return torch.stack(columns, -1)


def jacobian_asymmetry(J: Tensor) -> float:
    """Return ‖J − Jᵀ‖ / 2‖J‖ at the worst prefix: 0 for the Jacobian of a gradient, at most 1."""
    antisymmetric = (J - J.mT).norm(dim=(1, 2))
    whole = 2 * J.norm(dim=(1, 2))
    return (antisymmetric / whole.clamp(min=1e-6)).max().item()


def loop_work(A: Advantage, corners: Tensor, log_q: Tensor) -> float:
    """Return |∮ update · dz| / ∮ |update · dz| around the worst triangle of students: 0 for a gradient.

    corners  logits of the triangles' corners, (S, 3, 1, V)
    """
    sides = corners.roll(-1, 1) - corners
    along = (torch.arange(1000)[:, None] + 0.5) / 1000  # the midpoints of 1000 pieces of each side
    students = (corners + along * sides).log_softmax(-1)
    work = (update(A, students, log_q[:, None, None]) * sides).sum(-1).flatten(1)
    return (work.sum(1).abs() / work.abs().sum(1).clamp(min=1e-9)).max().item()


# Prefixes in which two tokens with given u stand: the larger of p and q at the first and at the second token, and the
# share of a third token in what is left of p, and of q. A fourth token has the rest.
PREFIXES = [
    (0.25, 0.25, 0.5, 0.5),
    (0.02, 0.03, 0.3, 0.6),
    (0.01, 0.2, 0.8, 0.2),
    (0.3, 0.01, 0.1, 0.4),
    (1e-3, 2e-3, 0.999, 0.5),
    (1e-4, 2e-4, 0.9999, 0.7),
    (0.9, 0.05, 0.5, 0.5),
    (0.98, 1e-3, 0.5, 0.3),
    (0.9995, 1e-4, 0.5, 0.9),
    (0.45, 0.45, 0.2, 0.5),
    (0.1, 0.05, 0.98, 0.5),
    (0.1, 0.05, 0.5, 0.99),
]


def depends_on_u_alone(A: Advantage, rounding: float) -> bool:
    """Return whether A is a function of u and of a term that all tokens of a prefix share.

    Two tokens with given u stand in the PREFIXES, each time with other probabilities and beside other tokens. The
    difference of their A must stay. So a factor, a gate or a term c log p is found, and a baseline is allowed.
    """
    rng = torch.Generator().manual_seed(2)
    log_u = 2 * torch.randn(64, 1, 2, dtype=torch.float64, generator=rng)
    scale, share_of_p, share_of_q = torch.tensor(PREFIXES, dtype=torch.float64).split([2, 1, 1], dim=-1)
    p = scale * exp(-log_u.clamp(min=0))
    q = scale * exp(log_u.clamp(max=0))
    log_p = completed(p, share_of_p[:, 0]).log()
    log_q = completed(q, share_of_q[:, 0]).log()
    values = A(log_p, log_q)
    differences = values[..., 0] - values[..., 1]  # (64 pairs of u, PREFIXES)
    spread = differences.amax(1) - differences.amin(1)
    size = differences.abs().amax(1)
    tolerance = 1e-9 * size + (1e-11 + 16 * rounding) * size.median()
    return bool((spread <= tolerance).all())


def completed(probabilities: Tensor, share: Tensor) -> Tensor:
    """Return two probabilities, (…, 2), and two more that share what is left of 1, (…, 4)."""
    rest = 1 - probabilities.sum(-1)
    return torch.stack([*probabilities.unbind(-1), share * rest, (1 - share) * rest], -1)


def advantage_of_log_u(A: Advantage) -> OfLogU:
    """Return, as a function of log u, A of a token with this u less A of a token with u = 1 at the same prefix."""

    def of_log_u(log_u: Tensor) -> Tensor:
        p = exp(-log_u.clamp(min=0)) / 4
        q = exp(log_u.clamp(max=0)) / 4
        quarter = torch.full_like(p, 0.25)
        log_p = torch.stack([p, quarter, 0.75 - p], -1).log()
        log_q = torch.stack([q, quarter, 0.75 - q], -1).log()
        values = A(log_p, log_q)
        return values[..., 0] - values[..., 1]

    return of_log_u


# ----------------------------------------------------------------------------------------- the shape of an A of u alone


@dataclass(frozen=True)
class Shape:
    """What there is to say of A(u); fields as in Verdict."""

    name: str
    clip: tuple[float, float] | None
    clipped_name: str
    falls: list[tuple[float, float]]
    flat: tuple[float, float] | None
    unbounded: bool


def shape_of(of_log_u: OfLogU, rounding: float) -> Shape:
    """Return the Shape of A(u) − A(1), given as a function of log u."""
    log_u = grid_of_log_u()
    log_u = log_u[torch.isfinite(of_log_u(log_u))]
    coarse = log_u[:: max(1, round(2500 * rounding))]  # points farther apart than rounding moves them
    noise = noise_of(of_log_u, coarse)
    if rounding > 1e-5:
        noise = torch.zeros_like(noise)  # it would be that of rounding, which is counted already
    values = of_log_u(log_u)
    name = name_of_generator(log_u, values, rounding)
    bounds = None
    clipped_name = ""
    if not name and not rounding:
        bounds = clipping_bounds(log_u, values)
    if bounds is not None:
        inside = (log_u > bounds[0]) & (log_u < bounds[1])
        clipped_name = name_of_generator(log_u[inside], values[inside], rounding)
        bounds = (math.exp(bounds[0]), math.exp(bounds[1]))
    return Shape(
        name=name,
        clip=bounds,
        clipped_name=clipped_name,
        falls=falling_ranges(coarse, of_log_u(coarse), noise, rounding),
        flat=flat_range(log_u, values),
        unbounded=has_no_lower_bound(of_log_u),
    )


def grid_of_log_u() -> Tensor:
    """Return log u from −FARTHEST to FARTHEST, closer together for |log u| ≤ 4. It leaves out 0, where A may jump."""
    inner = torch.linspace(-4, 4, 800, dtype=torch.float64)
    outer = torch.linspace(4, FARTHEST, 2601, dtype=torch.float64)[1:]
    return torch.cat([-outer.flip(0), inner, outer])


def noise_of(of_log_u: OfLogU, log_u: Tensor) -> Tensor:
    """Return how much A(u) trembles by rounding: where 1 + 1/u is nearly 1, a formula may lose all its digits.

    It is the second difference over tiny steps, which is almost 0 where A is smooth. The quantile of 41 neighbours is
    blind to a single jump or kink among them.
    """
    noise = torch.zeros_like(log_u)
    for step in (1e-4, 1e-3):
        second_difference = of_log_u(log_u + step) - 2 * of_log_u(log_u) + of_log_u(log_u - step)
        noise = torch.maximum(noise, second_difference.abs())
    padded = torch.cat([noise[:1].expand(20), noise, noise[-1:].expand(20)])
    return padded.unfold(0, 41, 1).quantile(0.9, dim=-1)


def size_near_one(log_u: Tensor, values: Tensor) -> float:
    """Return by how much A varies over |log u| ≤ 4."""
    near = values[log_u.abs() <= 4]
    return (near.max() - near.min()).item()


def falling_ranges(log_u: Tensor, values: Tensor, noise: Tensor, rounding: float) -> list[tuple[float, float]]:
    """Return the ranges of u in which A falls by more than rounding explains.

    A range that reaches the end of log_u ends at u = 0 or inf; so does one that fades out on the way there.
    """
    steps = values.diff()
    local = torch.maximum(values.abs()[:-1], values.abs()[1:])
    tremor = torch.maximum(noise[:-1], noise[1:])
    smallest = 1e-9 * local + 1e-13 * size_near_one(log_u, values)
    by_rounding = 8 * rounding * local + 1e-3 * rounding * size_near_one(log_u, values)
    tolerance = smallest + by_rounding + 10 * tremor
    falls = (steps < -tolerance).tolist()
    flat = (steps.abs() <= tolerance).tolist()
    fades = (steps.abs() <= 10 * smallest).tolist()  # with more digits it would be seen to fall farther out
    fades[0] = True
    fades[-1] = True

    ranges = []
    first = 0
    while first < len(falls):
        if not falls[first]:
            first += 1
            continue
        last = first
        while last + 1 < len(falls) and falls[last + 1]:
            last += 1
        low = math.exp(log_u[first])
        high = math.exp(log_u[last + 1])
        if all(flat[:first]) and fades[first]:
            low = 0.0
        if all(flat[last + 1 :]) and fades[last]:
            high = math.inf
        ranges.append((low, high))
        first = last + 1
    return ranges


def has_no_lower_bound(of_log_u: OfLogU) -> bool:
    """Return whether h(u)/u = ∫ A/u² du falls for ever: −A grows like u or faster. A liked token brings q h(u)/u."""
    log_u = torch.tensor([FARTHEST - 5, FARTHEST], dtype=torch.float64)
    before, after = (of_log_u(log_u) * exp(-log_u)).tolist()
    return after < 0 and after <= 0.5 * before  # both may be −∞


def name_of_generator(log_u: Tensor, values: Tensor, rounding: float) -> str:
    """Return A(u) as a sum of one or two w_f of NAMED and a constant, in words; "" if it is no such sum.

    The sum is fitted where |log u| ≤ 4, and must hold at every log u that is given.
    """
    near = log_u.abs() <= 4
    if size_near_one(log_u, values) == 0:
        return ""
    tolerance = max(1e-8, 4 * rounding) * size_near_one(log_u, values)
    everywhere = max(1e-6, 4 * rounding)
    for count in (1, 2):
        found = ""
        smallest_error = tolerance
        for names in combinations(NAMED, count):
            columns = [NAMED[name](log_u) for name in names]
            basis = torch.stack([*columns, torch.ones_like(log_u)], -1)
            coefficients = torch.linalg.lstsq(basis[near], values[near, None]).solution[:, 0]
            errors = (basis @ coefficients - values).abs()
            allowed = everywhere * (basis.abs() @ coefficients.abs())
            error = errors[near].max().item()
            if error <= smallest_error and (errors <= allowed + tolerance).all():
                smallest_error = error
                found = sum_in_words(coefficients.tolist(), names)
        if found:
            return found
    return ""


def sum_in_words(coefficients: list[float], names: tuple[str, ...]) -> str:
    """Return a sum such as "3 reverse_kl − 0.5 forward_kl"."""
    terms = [f"{coefficient:.3g} {name}" for coefficient, name in zip(coefficients, names)]
    return " + ".join(terms).replace("+ -", "− ")


def clipping_bounds(log_u: Tensor, values: Tensor) -> tuple[float, float] | None:
    """Return the log u between which A changes, if beyond one of them it is constant from a kink on; else None.

    A tanh is constant at its ends too, but its slope fades: that is no clip. Nor is a jump to a constant.
    """
    steps = values.diff().abs()
    slopes = steps / log_u.diff()
    changing = (steps > 1e-13 * size_near_one(log_u, values)).nonzero()[:, 0].tolist()
    if len(changing) < 10:
        return None
    first = changing[0]
    last = changing[-1]
    steepest = slopes[log_u[1:].abs() <= 4].max()
    clipped_below = first > 0 and has_kink(slopes[first], slopes[first + 1], steepest)
    clipped_above = last < len(slopes) - 1 and has_kink(slopes[last], slopes[last - 1], steepest)
    if not clipped_below and not clipped_above:
        return None
    low = -math.inf
    high = math.inf
    if clipped_below:
        low = log_u[first : first + 2].mean().item()
    if clipped_above:
        high = log_u[last : last + 2].mean().item()
    return low, high


def has_kink(outermost: Tensor, within: Tensor, steepest: Tensor) -> bool:
    """Return whether a slope stops abruptly: it is not tiny just within, and the outermost step is no jump."""
    return bool(within > 1e-4 * steepest) and bool(outermost < 3 * within)


def flat_range(log_u: Tensor, values: Tensor) -> tuple[float, float] | None:
    """Return the u between which A is what it is at u = 1, if they lie on both sides of it; else None."""
    other = values != 0
    low = torch.where(other & (log_u < 0), log_u, -math.inf).max().item()
    high = torch.where(other & (log_u > 0), log_u, math.inf).min().item()
    if low > -0.02 or high < 0.02:  # where the points of the grid lie too near to 1 to tell
        return None
    return math.exp(low), math.exp(high)


# ------------------------------------------------------------------------------------------------------- where it leads


def is_near_teacher(students: Tensor) -> Tensor:
    """Return which students have reached TEACHER, (S,) bool."""
    return (students - TEACHER).norm(dim=1) < NEAR


def faster(A: Advantage, factor: float) -> Advantage:
    """Return factor · A, which leads the same way."""

    def multiplied(log_p: Tensor, log_q: Tensor) -> Tensor:
        return factor * A(log_p, log_q)

    return multiplied


def endpoints(A: Advantage) -> tuple[Tensor, int]:
    """Return where the 55 STUDENTS end, (55, 3), and how many reach the teacher only if small updates are lengthened.

    A positive factor at each student changes no path. So a student that has not arrived, and still moves, goes on in
    steps of one length: under (log u)³ the update is tiny long before the teacher is reached.
    """
    log_q = TEACHER.log()
    length = update(A, STUDENTS.log(), log_q).norm(dim=-1).mean().item()
    size = A(STUDENTS.log(), log_q).abs().max().item()
    length = max(length, 1e-9 * size, 1e-300)  # an update of 0, which is all rounding, stays small
    brisk = faster(A, 0.6 / length)
    ends = paths(brisk, STUDENTS.log(), log_q, steps=250, size=0.3)[-1]
    ends = paths(brisk, ends.log(), log_q, steps=80, size=0.02)[-1]  # where A jumps, only small steps arrive

    moving = update(brisk, ends.log(), log_q).norm(dim=-1) > 1e-8
    on_the_way = moving & ~is_near_teacher(ends)
    if not on_the_way.any():
        return ends, 0
    one_length = faster(A, 1e12 / length)  # so that every step is cut to its size
    farther = paths(one_length, ends[on_the_way].log(), log_q, steps=200, size=0.02)[-1]
    farther = paths(one_length, farther.log(), log_q, steps=50, size=0.004)[-1]
    arrived = is_near_teacher(farther)
    ends = ends.clone()
    ends[on_the_way] = torch.where(arrived[:, None], farther, ends[on_the_way])
    return ends, int(arrived.sum())


def driven_into_a_corner(A: Advantage) -> int:
    """Return how many of three students with 0.9998 on one token are updated to put still more on it."""
    students = torch.full((3, 3), 0.0001, dtype=torch.float64).fill_diagonal_(0.9998)
    on_the_likely_token = update(A, students.log(), TEACHER.log()).diagonal()
    return int((on_the_likely_token > 1e-7).sum())


# -------------------------------------------------------------------------------------------------- beside a divergence


def compare(
    A: Advantage, divergence: Divergence, log_p: Tensor, log_q: Tensor
) -> tuple[float, float, tuple[float, float]]:
    """Return bias, cosine and noise, as in Verdict, beside the OPD+ update of a divergence."""
    plus = of_u(divergence.w_f)
    ours = update(A, log_p, log_q)
    right = update(plus, log_p, log_q)
    bias = (ours - right).norm() / right.norm()
    lengths = ours.norm() * right.norm()
    cosine = (ours * right).sum() / lengths.clamp(min=1e-300)
    noise = noise_of_one_token(A, log_p, log_q)
    noise_of_opdplus = noise_of_one_token(plus, log_p, log_q)
    return bias.item(), cosine.item(), (noise, noise_of_opdplus)


def noise_of_one_token(A: Advantage, log_p: Tensor, log_q: Tensor) -> float:
    """Return E‖A ∇log p‖² / ‖E[A ∇log p]‖² − 1 over all prefixes, with ‖∇log p_v‖² = 1 − 2 p_v + Σ p²."""
    p = log_p.exp()
    squared_score = 1 - 2 * p + (p * p).sum(-1, keepdim=True)
    second_moment = (p * A(log_p, log_q) ** 2 * squared_score).sum()
    squared_mean = update(A, log_p, log_q).square().sum()
    return (second_moment / squared_mean - 1).item()
