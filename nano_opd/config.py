"""Every knob of train.py, once: its default, its help with the paper's symbol, its range, the methods that read it.

The command line is made from this dataclass, and the dataclass that ran is the config.json beside the results.
"""

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nano_opd import arithmetic, device, distributed, divergences
from nano_opd.checks import did_you_mean
from nano_opd.gpt import GPTConfig
from nano_opd.tokenizer import VOCAB_SIZE

METHODS = ("sft", "gkd", "opd", "opdplus", "grpo", "opsd", "grpo+opsd", "rlsd")
ESTIMATORS = ("opd", "opdplus")
PRIVILEGED = ("grpo", "opsd", "grpo+opsd", "rlsd")  # a prompt with a reference slot; no teacher but itself
REWARDED = ("grpo", "grpo+opsd", "rlsd")
SELF_TAUGHT = ("opsd", "grpo+opsd", "rlsd")
WITH_DIVERGENCE = ("gkd", *ESTIMATORS, "opsd", "grpo+opsd")  # those that minimise an f-divergence


def knob(default, help, *, choices=None, low=None, high=None, methods=METHODS):
    """A dataclass field with what the command line and the checks need; a bound is inclusive."""
    meta = {"help": help, "choices": choices, "low": low, "high": high, "methods": methods}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """One run."""

    method: str = knob("opdplus", "what is A_t?", choices=METHODS)
    divergence: str = knob(
        "jsd",
        "generator f of D_f(q‖p): " + ", ".join(divergences.DIVERGENCES) + ", alpha=<float>",
        methods=WITH_DIVERGENCE,
    )
    gamma: float = knob(0.0, "γ, discount of the rewards still to come", low=0.0, high=1.0, methods=ESTIMATORS)
    variance: str = knob(
        "baseline",
        "sampled token; minus its exact mean over the vocabulary; or the full vocabulary",
        choices=("sampled", "baseline", "full"),
        methods=ESTIMATORS,
    )
    normalize: str = knob(
        "batch",
        "divisor of the loss; token_mean and sequence_mean are biased",
        choices=("batch", "token_mean", "sequence_mean"),
        methods=(*ESTIMATORS, *REWARDED),
    )
    log_u_clip: float = knob(0.0, "clip log u to ± this many nats (biased); 0 is off", low=0.0, methods=ESTIMATORS)

    group_size: int = knob(4, "G, responses to each prompt; divides B", low=2, methods=PRIVILEGED)
    loss_type: str = knob(
        "grpo",
        "A = (R − mean)/(std + ε) over the group; dr_grpo: A = R − mean",
        choices=("grpo", "dr_grpo"),
        methods=REWARDED,
    )
    epochs: int = knob(
        1, "updates per batch of rollouts, with ratios ρ to the policy that sampled it", low=1, methods=REWARDED
    )
    clip_low: float = knob(0.2, "ε_low: ρ is clipped below at 1 − ε_low", low=0.0, high=1.0, methods=REWARDED)
    clip_high: float = knob(0.28, "ε_high: ρ is clipped above at 1 + ε_high", low=0.0, methods=REWARDED)
    opsd_coef: float = knob(1.0, "weight of the OPSD loss beside GRPO's", low=0.0, methods=("grpo+opsd",))
    lam: float = knob(0.5, "λ, share of the evidence weight in Â_t; 0 is GRPO", low=0.0, high=1.0, methods=("rlsd",))
    eps_w: float = knob(0.2, "ε_w, clip of the evidence weight w_t to 1 ± ε_w; 0 is GRPO", low=0.0, methods=("rlsd",))
    lam_warmup: int = knob(0, "updates over which λ rises from 0", low=0, methods=("rlsd",))
    lam_decay: int = knob(
        0, "updates, after the warm-up, over which λ falls to 0; 0 is never", low=0, methods=("rlsd",)
    )
    negative_only: bool = knob(False, "reweight only responses with A < 0", methods=("rlsd",))
    reasoning_only: bool = knob(False, "reweight only the tokens before the answer", methods=("rlsd",))
    student_logp: str = knob(
        "live",
        "P_S in Δ_t: the policy being trained or the one that sampled; they differ from the second epoch on",
        choices=("live", "sampling"),
        methods=("rlsd",),
    )
    reference: str = knob(
        "true",
        "r that the self-teacher reads: this problem's, drawn among the valid ones; always the worked one, so that "
        "I(Y; R | X) = 0; another problem's (a control); or none",
        choices=("true", "work", "shuffled", "none"),
        methods=SELF_TAUGHT,
    )
    teacher_sync: int = knob(
        0, "updates between copies of θ into the self-teacher P_T: 0 is frozen, 1 live", low=0, methods=SELF_TAUGHT
    )

    task: str = knob("add", "arithmetic task", choices=tuple(arithmetic.TASK_NAMES))
    digits: int = knob(3, "digits of each operand", low=1, high=arithmetic.MAX_DIGITS)
    seed: int = knob(0, "seed of every random stream", low=0)

    steps: int = knob(400, "updates of the student", low=1)
    batch_size: int = knob(128, "B, rollouts per update", low=1)
    lr: float = knob(5e-3, "AdamW learning rate, after a tenth of the updates; decays linearly to 0", low=0.0)
    grad_clip: float = knob(0.0, "largest gradient norm; 0 is off", low=0.0)
    eval_every: int = knob(50, "updates between evaluations and checkpoints", low=1)
    eval_size: int = knob(
        500, "held-out problems per evaluation; four times as many at the start and at the end", low=1
    )

    teacher_layers: int = knob(3, "teacher: transformer blocks", low=1)
    teacher_width: int = knob(96, "teacher: channels", low=8)
    teacher_steps: int = knob(400, "teacher: supervised updates", low=0)
    student_layers: int = knob(2, "student: transformer blocks", low=1)
    student_width: int = knob(64, "student: channels", low=8)
    student_steps: int = knob(110, "student: supervised updates of its warm start", low=0)
    heads: int = knob(4, "attention heads of both", low=1)
    sft_batch_size: int = knob(64, "worked solutions per supervised update of the warm starts", low=1)
    sft_lr: float = knob(1e-2, "learning rate of the warm starts, decayed linearly to 0", low=0.0)

    device: str = knob("auto", "auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:<n> or mps")
    dtype: str = knob(
        "auto",
        "of matrix products; weights and log-probs are float32 (auto: bfloat16 on a GPU)",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = knob(
        "auto",
        "through torch.compile (auto: score and update, on a GPU; on: on a CPU sampling too)",
        choices=("auto", "on", "off"),
    )
    out_dir: str = knob("out", "folder of all runs and of the cached warm starts")
    resume: bool = knob(False, "continue this run from its last checkpoint")

    def __post_init__(self):
        """Raises ValueError, one sentence naming the flag, the value and what is allowed."""
        for field in dataclasses.fields(self):
            value, choices, low, high = (
                getattr(self, field.name),
                *(field.metadata[k] for k in ("choices", "low", "high")),
            )
            if choices and value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ValueError(f"{_flag(field.name)} {value}: choose from {', '.join(choices)}{hint}")
            if low is not None and not (low <= value <= high if high is not None else low <= value < float("inf")):
                allowed = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise ValueError(f"{_flag(field.name)} {value}: must be {allowed}")
        divergences.get(self.divergence)
        if self.variance == "full" and self.method in ESTIMATORS:
            if self.gamma > 0:
                raise ValueError(
                    f"--gamma {self.gamma} sums a sampled return, so --variance must be sampled or baseline"
                )
            if self.normalize != "batch" or self.log_u_clip > 0:
                raise ValueError("--normalize and --log-u-clip have no meaning with --variance full: leave them out")
        N, G = distributed.world_size(), self.group_size if self.privileged else 1
        if self.batch_size % (N * G):
            factors = [f"the {N} processes"] * (N > 1) + [f"--group-size {G}"] * (G > 1)
            raise ValueError(f"--batch-size {self.batch_size}: must be a multiple of {' times '.join(factors)}")
        if N > 1 and self.normalize == "token_mean":
            raise ValueError("--normalize token_mean: no process knows the tokens of all: use batch or sequence_mean")
        if self.reference == "shuffled" and self.batch_size < 2 * N * self.group_size:
            each = " for each process" if N > 1 else ""
            raise ValueError(f"--reference shuffled: needs two groups or more in --batch-size{each}")
        for who in ("teacher", "student"):
            try:
                self.gpt(who)
            except ValueError as error:
                raise ValueError(f"--{who}-width {getattr(self, f'{who}_width')}: {error}") from None

    @property
    def privileged(self) -> bool:
        """Whether the prompt has a reference slot and the model is its own teacher."""
        return self.method in PRIVILEGED

    @property
    def prompt_length(self) -> int:
        """P."""
        return arithmetic.prompt_length(self.digits, self.privileged)

    @property
    def response_cap(self) -> int:
        """R: a worked solution and a little room, so that a lost EOS shows as length and truncation."""
        return arithmetic.solution_length(self.digits) + 5

    def gpt(self, who: str) -> GPTConfig:
        """Sizes of the "teacher" or the "student"."""
        layers, width = getattr(self, f"{who}_layers"), getattr(self, f"{who}_width")
        block_size = self.prompt_length + self.response_cap
        return GPTConfig(VOCAB_SIZE, block_size, layers, self.heads, width)

    def warm_start_key(self, who: str) -> dict:
        """Everything that determines the weights of a warm start: two equal keys are one cached file."""
        shared = ("task", "digits", "seed", "sft_batch_size", "sft_lr")
        return {"who": who, "gpt": dataclasses.asdict(self.gpt(who)), "steps": getattr(self, f"{who}_steps")} | {
            name: getattr(self, name) for name in (*shared, "privileged")
        }

    def run_key(self) -> dict:
        """Everything that determines a run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("out_dir", "resume")}

    @property
    def run_dir(self) -> Path:
        """The run's own folder: its method and what is read by it, task, seed and, since they sample, other ranks."""
        parts = [self.method]
        if self.method in WITH_DIVERGENCE:
            parts.append(self.divergence)
        if self.method in ESTIMATORS:
            parts.append(self.variance + (f"-gamma{self.gamma:g}" if self.gamma else ""))
        ranks = [f"ranks{distributed.world_size()}"] if distributed.world_size() > 1 else []
        return Path(self.out_dir) / "-".join([*parts, f"{self.task}{self.digits}", f"seed{self.seed}", *ranks])

    def warm_start_path(self, who: str) -> Path:
        """Where the warm start with exactly this key is cached."""
        digest = hashlib.sha256(json.dumps(self.warm_start_key(who), sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.out_dir) / "warm_starts" / f"{who}-{self.task}{self.digits}-seed{self.seed}-{digest}.pt"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        # the one sentence, from one process, without the page of usage
        self.exit(2, f"train.py: {message}\n" if distributed.rank() == 0 else None)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration of a command line. Bad input ends the program: one sentence on stderr, exit code 2."""
    parser = _Parser(
        prog="train.py",
        description="On-policy distillation of a small GPT on arithmetic.",
        argument_default=argparse.SUPPRESS,  # so that what was typed can be told from what was not
        allow_abbrev=False,
    )
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for name, field in fields.items():
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": field.type.__name__}
        if field.metadata["choices"]:
            kind = {"type": str, "metavar": "{" + ",".join(field.metadata["choices"]) + "}"}
        only = "" if field.metadata["methods"] == METHODS else f" [{', '.join(field.metadata['methods'])}]"
        default = "" if field.type is bool else f" (default: {field.default})"
        parser.add_argument(_flag(name), help=field.metadata["help"].replace("%", "%%") + only + default, **kind)
    typed = vars(parser.parse_args(arguments))
    try:
        config = Config(**typed)
    except ValueError as error:
        parser.error(str(error))
    for name in typed:
        if config.method not in fields[name].metadata["methods"]:
            readers = ", ".join(fields[name].metadata["methods"])
            parser.error(
                f"{_flag(name)} {typed[name]} means nothing with --method {config.method}: it is read by {readers}"
            )
    try:
        device.require_compiler(config.compile, distributed.place(device.resolve(config.device)))
    except ValueError as error:
        parser.error(f"--device {error}")
    return config
