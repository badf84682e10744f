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
from functools import partial
from unittest import mock

import credit
import torch
from torch import Tensor

from nano_opd import arithmetic, grpo, policy_gradient, rlsd, sft
from nano_opd.gpt import GPT
from nano_opd.methods import METHODS, Loss, Scored
from nano_opd.rollout import response_logprobs
from nano_opd.streams import torch_stream
from nano_opd.system.batches import draw_batch
from nano_opd.system.config import Config
from nano_opd.tokenizer import decode


@dataclass(frozen=True)
class Judged:
    """B responses, scored by student and self-teacher, and what only an oracle knows of them."""

    s: Scored
    student: GPT
    problems: list[arithmetic.Problem]
    group_size: int
    generator: torch.Generator

    @property
    def rate(self) -> Tensor:
        """(B,) how much of the problem's group is right."""
        return credit.success_rate(self.s.rewards, self.group_size)

    @property
    def A(self) -> Tensor:
        """(B,) GRPO's advantage."""
        return grpo.advantage(self.s.rewards, self.group_size)

    @property
    def gain(self) -> Tensor:
        """(B, R) log P_T − log P_S of each token; a constant."""
        return torch.where(self.s.mask, self.s.teacher_logp - self.s.old_logp, 0.0)

    def values(self) -> Tensor:
        """V along every response."""
        return values(self.student, self.problems, self.s.tokens, self.s.mask, self.s.rewards)

    def weighted(self, gain: Tensor, lam: float, eps_w: float) -> Tensor:
        """RLSD's advantage with the weight w = e^gain of a right response, e^−gain of a wrong one."""
        return rlsd.advantage(self.A, gain, torch.zeros_like(gain), self.s.mask, lam, eps_w)

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
    ended = torch.cat([torch.zeros_like(mask[:, :1]), ~mask[:, 1:], torch.ones(len(V), 1).bool()], 1)
    return torch.where(ended, rewards[:, None], V)


def exact(b: Judged) -> Tensor:
    """A_n = V(s_{n+1}) − V(s_n), the most that is to be known."""
    return b.scaled(b.values().diff())


def running(b: Judged) -> Tensor:
    """The same with OPPO's running V, of the self-teacher's evidence."""
    return b.scaled(credit.running_advantage(b.gain, b.rate))


def ideal(b: Judged, lam: float, eps_w: float) -> Tensor:
    """RLSD with the weights of an ideal teacher, the student given right: w_n = V(s_{n+1})/V(s_n), 1 where V is 0."""
    V = b.values()
    w = torch.where(V[:, :-1] > 0, V[:, 1:] / V[:, :-1].clamp(min=1e-30), 1.0)
    return b.weighted(w.clamp(1e-20, 1e20).log(), lam, eps_w)


def less_its_one(b: Judged) -> Tensor:
    """RLSD with λ = ε_w = 1 and the real self-teacher, without the 1 of w = 1 + A/V."""
    return b.weighted(b.gain, 1.0, 1.0) - b.A[:, None]


def first_mistake(b: Judged) -> Tensor:
    """All of a wrong response's blame on its first wrong token; a right response is credited as in GRPO."""
    A = b.A[:, None].repeat(1, b.s.mask.shape[1])
    for row, (problem, tokens) in enumerate(zip(b.problems, b.s.tokens.tolist())):
        n = credit.first_wrong_token(problem, decode(tokens))
        if A[row, 0] < 0 and n is not None:
            A[row] = A[row].where(torch.arange(A.shape[1]) == n, 0.0)
    return A


def dealt_anew(b: Judged) -> Tensor:
    """The floor: RLSD at the paper's setting, its weights dealt out at random among the tokens of the response."""
    order = torch.rand(b.s.mask.shape, generator=b.generator).masked_fill(~b.s.mask, 2.0).argsort(1)
    return b.weighted(b.gain.gather(1, order), 0.5, 0.2)


ARMS: dict[str, Callable[[Judged], Tensor]] = {
    "exact A": exact,
    "blame on the first mistake": first_mistake,
    "ideal teacher, λ=½, ε_w=0.2": partial(ideal, lam=0.5, eps_w=0.2),
    "ideal teacher, λ=1, ε_w=1": partial(ideal, lam=1.0, eps_w=1.0),
    "λ=1, ε_w=1, less its one": less_its_one,
    "running value": running,
    "weights dealt anew": dealt_anew,
}


def update(of_method: Callable[..., dict], arm: str, cfg: Config, step: int, student: GPT, *rest) -> dict:
    """train.update, which is `of_method`, with the oracle's advantage in the place of its method's; all else stays."""

    def loss(s: Scored) -> Loss:
        problems, generator = draw_batch(cfg, s.step, student.device)[0], torch_stream(cfg.seed, "credit", s.step)
        A = ARMS[arm](Judged(s, student, problems, cfg.group_size, generator))
        measured = {"reward": s.rewards.mean(), "zero_groups": grpo.zero_fraction(s.rewards, cfg.group_size)}
        return policy_gradient.loss(s.student_logp, A, s.mask), measured

    with mock.patch.dict(METHODS, {cfg.method: replace(METHODS[cfg.method], loss=loss, options=())}):
        return of_method(cfg, step, student, *rest)
