"""What perfect credit would bring in training: the update of train.py with the advantage of an oracle.

Every arm gets a batch of GRPO's and says how much of its credit or blame each token gets. It may know what no method
knows: the worked solution, or the value of every prefix. `reproduce.py credit` puts its update in the place of
train.update, with GRPO's rollouts, learning rate and warm start.

The value is exact where an answer is right only in the way that was taught. Until its first mistake

    V(s)  =  p_θ(the rest of the worked solution | s)

and 0 from there on: one pass over the worked solution. An answer that is right in another way has V = 0 up to its last
token, which gets all of its reward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import credit
import torch
from torch import Tensor

from nano_opd import arithmetic, grpo, opsd, policy_gradient, rlsd, sft
from nano_opd.evaluate import response_texts, rewards
from nano_opd.gpt import GPT
from nano_opd.rollout import Rollout, response_logprobs, score
from nano_opd.system.config import Config
from nano_opd.system.streams import draw_batch, torch_stream


@dataclass(frozen=True)
class Judged:
    """B responses, the G to one problem standing together, and what is known of them."""

    student: GPT
    problems: list[arithmetic.Problem]
    rollout: Rollout
    R: Tensor  # (B,) of the verifier
    rate: Tensor  # (B,) how much of the problem's group is right, kept half a response away from 0 and 1
    A: Tensor  # (B,) GRPO's advantage
    student_logp: Tensor  # (B, R) log P_S of each token
    teacher_logp: Tensor  # (B, R) log P_T of each token, of the self-teacher that reads a reference
    generator: torch.Generator

    @property
    def evidence(self) -> tuple[Tensor, ...]:
        """What rlsd.advantage reads first."""
        return self.A, self.teacher_logp, self.student_logp, self.rollout.mask


@torch.no_grad()
def values(student: GPT, problems: list[arithmetic.Problem], rollout: Rollout) -> Tensor:
    """V(s_1) … V(s_R), R(y) along every response, (B, R+1), as defined above; R(y) after the EOS."""
    P, size = rollout.prompt_length, rollout.mask.shape[1]
    tokens = sft.solution_tokens(problems, styles=["blank"] * len(problems))
    rest = response_logprobs(student, tokens, P).flip(1).cumsum(1).flip(1).exp()  # (B, S) p_θ(what is still to come)
    S = rest.shape[1]
    follows = (rollout.responses[:, :S] == tokens[:, P:]).cumprod(1)  # (B, S) up to and with token n
    V = torch.zeros(len(rest), size + 1)
    V[:, 0] = rest[:, 0]
    V[:, 1:S] = follows[:, :-1] * rest[:, 1:]
    ended = torch.cat([torch.zeros_like(rollout.mask[:, :1]), ~rollout.mask[:, 1:], torch.ones(len(V), 1).bool()], 1)
    return torch.where(ended, rewards(problems, rollout)[:, None], V)


def exact(b: Judged) -> Tensor:
    """A_n = V(s_{n+1}) − V(s_n), the most that is to be known. Like GRPO's A, in standard deviations of the reward."""
    return _scaled(values(b.student, b.problems, b.rollout), b.rate)


def running(b: Judged) -> Tensor:
    """The same with OPPO's running V, of the self-teacher's evidence."""
    log_w = torch.where(b.rollout.mask, b.teacher_logp - b.student_logp, 0.0)
    return credit.running_advantage(log_w, b.rate) / (b.rate * (1 - b.rate)).sqrt()[:, None]


def _scaled(V: Tensor, rate: Tensor) -> Tensor:
    return V.diff() / (rate * (1 - rate)).sqrt()[:, None]


def ideal(b: Judged, lam: float, eps_w: float) -> Tensor:
    """RLSD with the weights of an ideal teacher, the student given right: w_n = V(s_{n+1})/V(s_n), 1 where V is 0."""
    V = values(b.student, b.problems, b.rollout)
    w = torch.where(V[:, :-1] > 0, V[:, 1:] / V[:, :-1].clamp(min=1e-30), 1.0)
    log_w = w.clamp(1e-20, 1e20).log()
    return rlsd.advantage(b.A, log_w, torch.zeros_like(log_w), b.rollout.mask, lam, eps_w)


def less_its_one(b: Judged) -> Tensor:
    """RLSD with λ = ε_w = 1 and the real self-teacher, without the 1 of w = 1 + A/V."""
    return rlsd.advantage(*b.evidence, 1.0, 1.0) - b.A[:, None]


def first_mistake(b: Judged) -> Tensor:
    """All of a wrong response's blame on its first wrong token; a right response is credited as in GRPO."""
    A = b.A[:, None].repeat(1, b.rollout.mask.shape[1])
    for row, (problem, text) in enumerate(zip(b.problems, response_texts(b.rollout))):
        n = credit.first_wrong_token(problem, text)
        if A[row, 0] < 0 and n is not None:
            A[row] = A[row].where(torch.arange(A.shape[1]) == n, 0.0)
    return A


def dealt_anew(b: Judged) -> Tensor:
    """The floor: RLSD at the paper's setting, its weights dealt out at random among the tokens of the response."""
    order = torch.rand(b.rollout.mask.shape, generator=b.generator).masked_fill(~b.rollout.mask, 2.0).argsort(1)
    gain = (b.teacher_logp - b.student_logp).gather(1, order)
    return rlsd.advantage(b.A, gain, torch.zeros_like(gain), b.rollout.mask, 0.5, 0.2)


ARMS: dict[str, Callable[[Judged], Tensor]] = {
    "exact A": exact,
    "blame on the first mistake": first_mistake,
    "ideal teacher, λ=½, ε_w=0.2": partial(ideal, lam=0.5, eps_w=0.2),
    "ideal teacher, λ=1, ε_w=1": partial(ideal, lam=1.0, eps_w=1.0),
    "λ=1, ε_w=1, less its one": less_its_one,
    "running value": running,
    "weights dealt anew": dealt_anew,
}


def update(arm: str, cfg: Config, step: int, student: GPT, teacher: GPT, optimizer: torch.optim.Optimizer, sample):
    """train.update for an arm: the same problems, references, draws and optimizer, and the oracle's advantage."""
    problems, prompts, teacher_prompts = draw_batch(cfg, step, student.device)
    rollout = sample(student, prompts, cfg.response_cap, torch_stream(cfg.seed, "rollout", step))
    R = rewards(problems, rollout)
    with torch.no_grad():
        view = opsd.privileged_view(rollout.tokens, rollout.prompt_length, teacher_prompts)
        teacher_logp, _ = score(teacher, *view)
    student_logp, _ = score(student, rollout.tokens, rollout.prompt_length)

    G = cfg.group_size
    rate = R.view(-1, G).mean(1).clamp(0.5 / G, 1 - 0.5 / G).repeat_interleave(G)
    generator = torch_stream(cfg.seed, "credit", step)
    known = problems, rollout, R, rate, grpo.advantage(R, G), student_logp.detach(), teacher_logp, generator
    loss = policy_gradient.loss(student_logp, ARMS[arm](Judged(student, *known)), rollout.mask)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), float("inf"))
    optimizer.step()
    return {"loss": loss, "grad_norm": grad_norm, "reward": R.mean(), "zero_groups": grpo.zero_fraction(R, G)}
