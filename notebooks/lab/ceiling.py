"""What perfect credit would bring in training: the update of train.py with the advantage of an oracle.

Every arm gets a batch of GRPO's and says how much of its credit or blame each token gets. It may know what no method
knows: the worked solution, or the value of every prefix. `reproduce.py credit` trains with it in the place of RLSD's
advantage: the same problems, draws, scores and steps.

The value is exact where an answer is right only in the way that was taught. Until its first mistake

    V(s)  =  p_θ(the rest of the worked solution | s)

and 0 from there on: one pass over the worked solution. An answer that is right in another way has V = 0 up to its last
token, which gets all of its reward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import credit
import torch
from torch import Tensor
from torch.optim import Optimizer

from nano_opd import arithmetic, grpo, policy_gradient, rlsd, sft
from nano_opd.gpt import GPT
from nano_opd.methods import METHODS, Loss, Scored
from nano_opd.rollout import Rollout, response_logprobs
from nano_opd.streams import torch_stream
from nano_opd.system.batches import draw_batch
from nano_opd.system.config import Config
from nano_opd.tokenizer import decode


@dataclass(frozen=True)
class Judged:
    """B responses, scored by student and self-teacher, and what only an oracle knows of them."""

    scored: Scored
    student: GPT
    problems: list[arithmetic.Problem]
    group_size: int
    generator: torch.Generator

    @property
    def rate(self) -> Tensor:
        """(B,) how much of the problem's group is right."""
        return credit.success_rate(self.scored.rewards, self.group_size)

    @property
    def A(self) -> Tensor:
        """(B,) GRPO's advantage."""
        return grpo.advantage(self.scored.rewards, self.group_size)

    @property
    def gain(self) -> Tensor:
        """(B, R) log P_T − log P_S of each token; a constant."""
        return torch.where(self.scored.mask, self.scored.teacher_logp - self.scored.old_logp, 0.0)

    def values(self) -> Tensor:
        """V along every response."""
        return values(self.student, self.problems, self.scored.tokens, self.scored.mask, self.scored.rewards)

    def weighted(self, gain: Tensor, lam: float, eps_w: float) -> Tensor:
        """RLSD's advantage with the weight w = e^gain of a right response, e^−gain of a wrong one."""
        return rlsd.advantage(self.A, gain, torch.zeros_like(gain), self.scored.mask, lam, eps_w)

    def scaled(self, A: Tensor) -> Tensor:
        """A token's change of the value in standard deviations of the reward, as GRPO's A is."""
        return A / (self.rate * (1 - self.rate)).sqrt()[:, None]


@torch.no_grad()
def values(
    student: GPT, problems: list[arithmetic.Problem], responses: Tensor, mask: Tensor, rewards: Tensor
) -> Tensor:
    """V(s_1) … V(s_R), R(y) along the responses (B, R), (B, R+1), as defined above; R(y) after the EOS."""
    tokens = sft.solution_tokens(problems, styles=["blank"] * len(problems))
    P = arithmetic.prompt_length(problems[0].digits, slot=True)
    rest = response_logprobs(student, tokens, P).flip(1).cumsum(1).flip(1).exp()  # (B, S) p_θ(what is still to come)
    S = rest.shape[1]
    follows = (responses[:, :S] == tokens[:, P:]).cumprod(1)  # (B, S) up to and with token n
    V = torch.zeros(len(rest), mask.shape[1] + 1)
    V[:, 0] = rest[:, 0]
    V[:, 1:S] = follows[:, :-1] * rest[:, 1:]
    start = torch.zeros_like(mask[:, :1])
    last = torch.ones_like(mask[:, :1])
    ended = torch.cat([start, ~mask[:, 1:], last], 1)  # (B, R+1)
    return torch.where(ended, rewards[:, None], V)


def exact(judged: Judged) -> Tensor:
    """A_n = V(s_{n+1}) − V(s_n), the most that is to be known."""
    return judged.scaled(judged.values().diff())


def running(judged: Judged) -> Tensor:
    """The same with OPPO's running V, of the self-teacher's evidence."""
    return judged.scaled(credit.running_advantage(judged.gain, judged.rate))


def ideal_teacher(judged: Judged, lam: float, eps_w: float) -> Tensor:
    """RLSD with the weights of an ideal teacher, the student given right: w_n = V(s_{n+1})/V(s_n), 1 where V is 0."""
    V = judged.values()
    w = torch.where(V[:, :-1] > 0, V[:, 1:] / V[:, :-1].clamp(min=1e-30), 1.0)
    return judged.weighted(w.clamp(1e-20, 1e20).log(), lam, eps_w)


def ideal_narrow(judged: Judged) -> Tensor:
    """The same at the paper's setting."""
    return ideal_teacher(judged, lam=0.5, eps_w=0.2)


def ideal_wide(judged: Judged) -> Tensor:
    """The same with λ = ε_w = 1."""
    return ideal_teacher(judged, lam=1.0, eps_w=1.0)


def less_its_one(judged: Judged) -> Tensor:
    """RLSD with λ = ε_w = 1 and the real self-teacher, without the 1 of w = 1 + A/V."""
    return judged.weighted(judged.gain, 1.0, 1.0) - judged.A[:, None]


def first_mistake(judged: Judged) -> Tensor:
    """All of a wrong response's blame on its first wrong token; a right response is credited as in GRPO."""
    A = judged.A[:, None].repeat(1, judged.scored.mask.shape[1])
    position = torch.arange(A.shape[1])
    for row, problem in enumerate(judged.problems):
        n = credit.first_wrong_token(problem, decode(judged.scored.tokens[row].tolist()))
        if A[row, 0] < 0 and n is not None:
            A[row] = A[row].where(position == n, 0.0)
    return A


def dealt_anew(judged: Judged) -> Tensor:
    """The floor: RLSD at the paper's setting, its weights dealt out at random among the tokens of the response."""
    mask = judged.scored.mask
    draws = torch.rand(mask.shape, generator=judged.generator)
    order = draws.masked_fill(~mask, 2.0).argsort(1)  # what lies outside the response stays behind it
    return judged.weighted(judged.gain.gather(1, order), lam=0.5, eps_w=0.2)


ARMS: dict[str, Callable[[Judged], Tensor]] = {
    "exact A": exact,
    "blame on the first mistake": first_mistake,
    "ideal teacher, λ=½, ε_w=0.2": ideal_narrow,
    "ideal teacher, λ=1, ε_w=1": ideal_wide,
    "λ=1, ε_w=1, less its one": less_its_one,
    "running value": running,
    "weights dealt anew": dealt_anew,
}


def update(
    of_method: Callable[..., dict],
    arm: str,
    cfg: Config,
    step: int,
    student: GPT,
    teacher: GPT,
    optimizer: Optimizer,
    sample: Callable[..., Rollout],
) -> dict:
    """train.update, which is `of_method`, with the oracle's advantage in the place of its method's; all else stays."""

    def loss(scored: Scored) -> Loss:
        problems = draw_batch(cfg, scored.step, student.device).problems
        generator = torch_stream(cfg.seed, "credit", scored.step)
        A = ARMS[arm](Judged(scored, student, problems, cfg.group_size, generator))
        zero_groups = grpo.zero_fraction(scored.rewards, cfg.group_size)
        measured = {"reward": scored.rewards.mean(), "zero_groups": zero_groups}
        return policy_gradient.loss(scored.student_logp, A, scored.mask), measured

    oracle = replace(METHODS[cfg.method], loss=loss, options=())
    with mock.patch.dict(METHODS, {cfg.method: oracle}):
        return of_method(cfg, step, student, teacher, optimizer, sample)
