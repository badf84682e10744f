"""Every option of train.py, once: its default, its help with the paper's symbol, its range, the methods that read it.

The command line is made from this dataclass, and the dataclass that ran is the config.json beside the results.
"""

import argparse
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nano_opd import arithmetic, divergences
from nano_opd.checks import did_you_mean
from nano_opd.gpt import GPTConfig
from nano_opd.methods import METHODS, Method
from nano_opd.system import device, distributed, memory
from nano_opd.system.console import Parser, typed_path
from nano_opd.tokenizer import VOCAB_SIZE


def option(default, help, *, choices=None, low=None, high=None, needs: Callable[[Method], bool] | None = None):
    """A dataclass field with what the command line and the checks need; a bound is inclusive.

    needs  which methods read it; None: those whose loss takes it or, if no loss does, all
    """
    meta = {"help": help, "choices": choices, "low": low, "high": high, "needs": needs}
    return dataclasses.field(default=default, metadata=meta)


# The defaults that a method or a task may replace. A teacher is trained until it is right. A student is trained until
# it sometimes is: for 3 digits of add in the recipe's updates, else in those times EFFORT times digits/3.
RECIPE = {"steps": 400, "batch_size": 128, "lr": 5e-3, "student_steps": 110, "teacher_steps": 400}
OF_TASK = {"mul": {"teacher_steps": 800, "steps": 1600}, "mix": {"teacher_steps": 1600, "steps": 1600}}
EFFORT = {"sub": 1.25, "mul": 1.5, "mix": 2.5}
SELF_TAUGHT = {"needs": lambda method: method.teacher == "self"}
_flag = lambda name: "--" + name.replace("_", "-")
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
GENERATORS = ", ".join(divergences.DIVERGENCES) + ", alpha=<float>; <name>,c=<float> is f + c(u−1)"


@dataclass(frozen=True)
class Config:
    """One run."""

    method: str = option("opdplus", "training method; it decides each token's advantage A_n", choices=tuple(METHODS))
    divergence: str = option("jsd", f"generator f of D_f(q‖p): {GENERATORS}")
    gamma: float = option(0.0, "γ, discount of the rewards still to come", low=0.0, high=1.0)
    variance: str = option(
        "sampled",
        "A_n of the sampled token; A_n minus its exact mean over the vocabulary (baseline); the mean over the "
        "teacher's top k, and the sampled token if it is none of them (topk); or over the whole vocabulary (full)",
        choices=("sampled", "baseline", "topk", "full"),
    )
    top_k: int = option(4, "k of --variance topk", low=1)
    normalize: str = option("batch", "divisor: B, or a biased mean", choices=("batch", "token_mean", "sequence_mean"))
    log_u_clip: float = option(0.0, "clip log u to ± this many nats (biased); 0 is off", low=0.0)

    group_size: int = option(4, "G, responses to each prompt; divides B", low=2, needs=lambda m: m.reference_slot)
    loss_type: str = option("grpo", "A = (R − mean)/(std + ε) of the group, or R − mean", choices=("grpo", "dr_grpo"))
    epochs: int = option(1, "updates per batch, with ratios ρ to the sampling policy", low=1, needs=lambda m: m.rewards)
    clip_low: float = option(0.2, "ε_low: ρ is clipped below at 1 − ε_low", low=0.0, high=1.0)
    clip_high: float = option(0.28, "ε_high: ρ is clipped above at 1 + ε_high", low=0.0)
    lam: float = option(0.5, "λ, share of the evidence weight in Â_n; 0 is GRPO", low=0.0, high=1.0)
    lam_decay: int = option(0, "updates over which λ falls to 0; 0 is never", low=0)
    eps_w: float = option(0.2, "ε_w, clip of the evidence weight w_n to 1 ± ε_w; 0 is GRPO", low=0.0)
    negative_only: bool = option(False, "reweight only responses with A < 0")
    reasoning_only: bool = option(False, "reweight only the tokens before the answer")
    reference: str = option(
        "true",
        "r that the self-teacher P_T reads and the student P_S does not: this problem's, drawn among the valid ones "
        "(true); always the worked solution, or always the answer alone, so that I(Y; R | X) = 0 (work, cite); another "
        "problem's (shuffled); or none",
        choices=("true", "work", "cite", "shuffled", "none"),
        **SELF_TAUGHT,
    )
    teacher_sync: int = option(0, "updates between copies of θ into P_T: 0 is frozen, 1 live", low=0, **SELF_TAUGHT)

    task: str = option("add", "arithmetic task", choices=(*arithmetic.TASKS, "mix"))
    digits: int = option(3, "digits of each operand", low=1, high=arithmetic.MAX_DIGITS)
    seed: int = option(0, "seed of every random stream", low=0)

    steps: int = option(None, "updates of the student", low=1)
    batch_size: int = option(None, "B, responses per update", low=1)
    lr: float = option(None, "AdamW learning rate: rises for a tenth of the updates, then falls to 0", low=0.0)
    grad_clip: float = option(0.0, "largest gradient norm; 0 is off", low=0.0)
    eval_every: int = option(50, "updates between evaluations and checkpoints", low=1)
    eval_size: int = option(500, "held-out problems per evaluation; four times as many at the start and the end", low=1)

    teacher_layers: int = option(3, "teacher: transformer blocks", low=1)
    teacher_width: int = option(96, "teacher: channels", low=8)
    teacher_steps: int = option(None, "teacher: supervised updates", low=0)
    student_layers: int = option(2, "student: transformer blocks", low=1)
    student_width: int = option(64, "student: channels", low=8)
    student_steps: int = option(
        None, f"student: warm-start updates; × digits/3; {', '.join(f'{k} × {x}' for k, x in EFFORT.items())}", low=0
    )
    sft_batch_size: int = option(64, "worked solutions per supervised update of the warm starts", low=1)
    sft_lr: float = option(1e-2, "learning rate of the warm starts, falling to 0", low=0.0)

    device: str = option("auto", "auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:<n> or mps")
    dtype: str = option(
        "auto", "auto: bfloat16 for products on a GPU, from width 256 on", choices=("auto", "float32", "bfloat16")
    )
    threads: str = option(
        "auto", "threads of the CPU, a number; auto: as many as are fastest at the start, and at --resume as before"
    )
    compile: str = option(
        "auto", "on: torch.compile; auto: on a GPU CUDA graphs to sample; off: neither", choices=("auto", "on", "off")
    )
    out_dir: str = option("out", "folder of all runs and of the cached warm starts")
    resume: bool = option(False, "continue this run from its last checkpoint, to more --steps if you like")

    def __post_init__(self):
        """What was not given is the method's recipe. Raises ValueError: the flag, the value and what is allowed."""
        if isinstance(self.out_dir, (str, Path)):
            object.__setattr__(self, "out_dir", str(typed_path(self.out_dir)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:  # the recipe has it
                continue
            if not _has_type(value, field.type):
                raise ValueError(f"{_flag(field.name)} {str(value)[:20]}: must be {WORDS[field.type]}")
            choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
            if choices and value not in choices:
                known = ", ".join(choices) + did_you_mean(str(value), choices)
                raise ValueError(f"{_flag(field.name)} {value}: choose from {known}")
            most = (2**64 if field.type is int else 3e38) if high is None else high  # float32 ends at 3.4e38
            if low is not None and not low <= value <= most:
                above = f"{low} or more" + f" and at most {most:.0e}" * (value > 0)
                allowed = f"from {low} to {high}" if high else above
                raise ValueError(f"{_flag(field.name)} {str(value)[:20]}: must be {allowed}")
        defaults = recipe(self.method, self.task, self.digits)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, defaults[field.name])
            elif getattr(self, field.name) != defaults[field.name]:
                self.require_reader(field)
            if field.type is float:  # so that 1 and 1.0 are one run, with one name
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        divergences.get(self.divergence)
        if self.threads != "auto" and (not str(self.threads).isdecimal() or int(self.threads) < 1):
            raise ValueError(f"--threads {str(self.threads)[:20]}: must be auto, or a whole number from 1 on")
        if self.digits == 1:
            raise ValueError("--digits 1: a problem is one column, so no held-out one is ever taught; give 2 or more")
        if self.top_k != Config.top_k and self.variance != "topk":
            raise ValueError(f"--top-k {self.top_k}: only --variance topk reads it")
        if self.variance in ("topk", "full") and "variance" in METHODS[self.method].options:
            if self.gamma > 0:
                raise ValueError(f"--gamma {self.gamma} sums what was sampled: leave --variance {self.variance} out")
            if self.variance == "full" and (self.normalize != "batch" or self.log_u_clip > 0):
                raise ValueError("--normalize and --log-u-clip have no meaning with --variance full: leave them out")
        N, G = distributed.world_size(), self.copies
        if self.batch_size % (N * G):
            factors = [f"the {N} processes"] * (N > 1) + [f"--group-size {G}"] * (G > 1)
            raise ValueError(f"--batch-size {self.batch_size}: must be a multiple of {' times '.join(factors)}")
        if N > 1 and self.normalize == "token_mean":
            raise ValueError("--normalize token_mean: no process knows the tokens of all: use batch or sequence_mean")
        if self.reference == "shuffled" and self.batch_size < 2 * N * self.group_size:
            raise ValueError("--reference shuffled: needs two groups or more of --batch-size in each process")
        for who in ("teacher", "student"):
            try:
                self.gpt(who)
            except ValueError as error:
                raise ValueError(f"--{who}-width {getattr(self, f'{who}_width')}: {error}") from None

    def require_reader(self, field: dataclasses.Field) -> None:
        """Raise ValueError if the method does not read this option."""
        those = readers(field)
        if self.method not in those:
            given = f"{_flag(field.name)} {getattr(self, field.name)}"
            raise ValueError(f"{given} means nothing with --method {self.method}: it is read by {', '.join(those)}")

    @property
    def reference_slot(self) -> bool:
        """Whether the prompt has a slot for a reference."""
        return METHODS[self.method].reference_slot

    @property
    def options_of_method(self) -> dict:
        """The options that the method's loss takes."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}

    @property
    def copies(self) -> int:
        """Responses to each prompt: G where they are compared with each other or with a reference, else 1."""
        return self.group_size if self.reference_slot else 1

    @property
    def prompt_length(self) -> int:
        """P."""
        return arithmetic.prompt_length(self.digits, self.reference_slot)

    @property
    def response_cap(self) -> int:
        """R: a worked solution and a little room, so that a lost EOS shows as length and truncation."""
        return arithmetic.solution_length(self.digits) + 5

    def gpt(self, who: str) -> GPTConfig:
        """Sizes of the "teacher" or the "student"."""
        layers, width = getattr(self, f"{who}_layers"), getattr(self, f"{who}_width")
        return GPTConfig(VOCAB_SIZE, self.prompt_length + self.response_cap, layers, n_embd=width)

    def run_key(self, resumed: bool = False) -> dict:
        """Everything that determines a run, or what a run has to keep when it is resumed.

        But the number of threads, which decides the last bits only: folder.recorded_threads keeps it.
        """
        left_out = ["out_dir", "resume", "threads", *(["steps", "eval_every", "device", "compile"] if resumed else [])]
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}

    @property
    def not_default(self) -> dict:
        """What a run has to keep when it is resumed, and is not the default of its method, task and size."""
        defaults = recipe(self.method, self.task, self.digits)
        return {k: v for k, v in self.run_key(resumed=True).items() if v != defaults[k]}

    @property
    def run_dir(self) -> Path:
        """The run's own folder, named after it and every option not at its default, but those free at --resume."""
        named = "method divergence variance task digits seed".split()
        parts = [self.method, *(getattr(self, name) for name in named[1:3] if name in METHODS[self.method].options)]
        parts += [f"{self.task}{self.digits}", f"seed{self.seed}"]
        parts += [f"{k}{'' if v is True else v}" for k, v in self.not_default.items() if k not in named]
        parts += [f"ranks{distributed.world_size()}"] if distributed.world_size() > 1 else []
        name = re.sub(r"[^\w.+=-]", "_", "-".join(parts), flags=re.ASCII)
        if len(name) > 120:  # some file systems allow 143
            name = f"{name[:107]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return Path(self.out_dir) / name


def _has_type(value, kind: type) -> bool:
    """Whether a value is what an option of this type takes: an int is a number too, and a bool is none."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def recipe(method: str, task: str, digits: int) -> dict:
    """Every option's default for this method, task and size."""
    made = {f.name: f.default for f in dataclasses.fields(Config)} | RECIPE | OF_TASK.get(task, {})
    made |= METHODS[method].recipe if method in METHODS else {}
    return made | {"student_steps": round(made["student_steps"] * EFFORT.get(task, 1) * digits / 3)}


def readers(field: dataclasses.Field) -> list[str]:
    """The names of the methods that read an option."""
    needs = field.metadata["needs"] or (lambda method: field.name in method.options)
    return [name for name, method in METHODS.items() if needs(method)] or list(METHODS)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration of a command line. Bad input ends the program: one sentence on stderr, exit code 2."""
    parser = Parser("train.py", description="On-policy distillation of a small GPT on arithmetic.", allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS  # so that what was typed can be told from what was not
    try:
        distributed.require_launcher()
    except ValueError as error:
        parser.error(str(error))
    parser.speaks = distributed.rank() == 0
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for name, field in fields.items():
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": field.type.__name__}
        if field.metadata["choices"]:
            kind = {"type": str, "metavar": "{" + ",".join(field.metadata["choices"]) + "}"}
        only = "" if readers(field) == list(METHODS) else f" [{', '.join(readers(field))}]"
        recipes = {m: method.recipe for m, method in METHODS.items()} | OF_TASK
        defaults = [RECIPE.get(name, field.default), *(f"{k} {r[name]}" for k, r in recipes.items() if name in r)]
        default = "" if field.type is bool else f" (default: {'; '.join(map(str, defaults))})"
        parser.add_argument(_flag(name), help=field.metadata["help"].replace("%", "%%") + only + default, **kind)
    typed = vars(parser.parse_args(arguments))
    try:
        config = Config(**typed)
        for name in typed:  # at its default too
            config.require_reader(fields[name])
    except ValueError as error:
        parser.error(str(error))
    try:
        where = distributed.own_device(device.resolve(config.device))
    except ValueError as error:
        parser.error(f"--device {error}")
    there = os.cpu_count() or 1
    if config.threads != "auto" and int(config.threads) > there:
        parser.error(f"--threads {config.threads[:20]}: this machine has {there} cores")
    if config.compile == "on" and not device.has_compiler(where):
        parser.error("--compile on: needs a C++ compiler, or Triton and a C compiler on a GPU, and Python's headers")
    if message := memory.shortage(config, where):
        parser.error(message)
    return config
