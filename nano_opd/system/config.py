"""Every option of train.py, once: its default, its help with the paper's symbol, its range, the methods that read it.

The command line is made from the dataclass `Config`, and the Config that ran is the config.json beside the results.
A new option is one field of it. From top to bottom: how an option is written, the recipes, all options, what follows
from them, what is refused, and the command line.
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
from nano_opd.methods import LOSS_TYPES, METHODS, VARIANCES, Method
from nano_opd.system import device, distributed, memory
from nano_opd.system.console import Parser, typed_path
from nano_opd.tokenizer import VOCAB_SIZE

# ----------------------------------------------------------------------------------------------- how one is written

# The groups of options in --help.
METHOD = "the method"
DISTILLATION = "distillation: how the teacher's log-probs become A_n"
REWARD = "reward: how the verifier's judgement becomes A_n"
SELF_TEACHER = "self-teacher: the student itself, which reads a reference besides"
TASK = "the task"
TRAINING = "training"
MODELS = "models and their warm starts"
MACHINE = "the machine"
GROUPS = (METHOD, DISTILLATION, REWARD, SELF_TEACHER, TASK, TRAINING, MODELS, MACHINE)  # in this order


def option(
    group: str,
    default,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    needs: Callable[[Method], bool] | None = None,
):
    """Return a dataclass field that also has what the command line and the checks need.

    group      where it stands in --help
    help       the paper's symbol if it has one, and what it is
    choices    the values that are allowed; None: all of its type
    low, high  the smallest and the largest value that is allowed
    needs      a function of a Method: does it read this option? None: if some loss takes it, those whose loss does; if
               none takes it, all
    """
    meta = {"group": group, "help": help, "choices": choices, "low": low, "high": high, "needs": needs}
    return dataclasses.field(default=default, metadata=meta)


def has_reference_slot(method: Method) -> bool:
    """Whether the prompts of a method have a slot for a reference."""
    return method.reference_slot


def has_rewards(method: Method) -> bool:
    """Whether a verifier judges the responses of a method."""
    return method.rewards


def has_self_teacher(method: Method) -> bool:
    """Whether the student is its own teacher."""
    return method.teacher == "self"


# ----------------------------------------------------------------------------------------------------- the recipes

# The defaults that a method or a task may replace. A teacher is trained until it is right. A student is trained until
# it sometimes is: for 3 digits of add in the recipe's updates, else in those times EFFORT times digits/3.
RECIPE = {"steps": 400, "batch_size": 128, "lr": 5e-3, "student_steps": 110, "teacher_steps": 400}
OF_TASK = {"mul": {"teacher_steps": 800, "steps": 1600}, "mix": {"teacher_steps": 1600, "steps": 1600}}
EFFORT = {"sub": 1.25, "mul": 1.5, "mix": 2.5}


def recipe(method: str, task: str, digits: int) -> dict:
    """Return every option's default for this method, task and size."""
    made = {field.name: field.default for field in dataclasses.fields(Config)}
    made |= RECIPE
    made |= OF_TASK.get(task, {})
    made |= METHODS[method].recipe
    made["student_steps"] = round(made["student_steps"] * EFFORT.get(task, 1) * digits / 3)
    return made


# ----------------------------------------------------------------------------------------------------- all options


@dataclass(frozen=True)
class Config:
    """One run. The default None stands for the recipe's."""

    method: str = option(
        METHOD, "opdplus", "A_n: the training method decides this advantage of each token", choices=tuple(METHODS)
    )

    divergence: str = option(
        DISTILLATION,
        "jsd",
        f"f: the generator of D_f(q‖p): {', '.join(divergences.DIVERGENCES)}, alpha=<float>; "
        "<name>,c=<float> is f + c(u−1)",
    )
    gamma: float = option(DISTILLATION, 0.0, "γ: discount of the rewards still to come", low=0.0, high=1.0)
    variance: str = option(
        DISTILLATION,
        "sampled",
        "A_n: of the sampled token (sampled); the same minus its exact mean over the vocabulary (baseline); the mean "
        "over the teacher's top k, and the sampled token if it is none of them (topk); the mean over the whole "
        "vocabulary (full)",
        choices=VARIANCES,
    )
    top_k: int = option(
        DISTILLATION, 4, "k: how many of the teacher's likeliest tokens --variance topk sums over", low=1
    )
    normalize: str = option(
        TRAINING,
        "batch",
        "B: the divisor of the loss (batch); a mean over all tokens, or over those of each response, is biased",
        choices=("batch", "token_mean", "sequence_mean"),
    )
    log_u_clip: float = option(
        DISTILLATION, 0.0, "log u: clipped to ± this many nats, which is biased; 0 is off", low=0.0
    )

    group_size: int = option(REWARD, 4, "G: responses to each prompt; divides B", low=2, needs=has_reference_slot)
    loss_type: str = option(
        REWARD,
        "grpo",
        "A: (R − mean)/(std + ε) of the group (grpo), or R − mean (dr_grpo)",
        choices=LOSS_TYPES,
    )
    epochs: int = option(
        REWARD, 1, "ρ: updates on each batch, with ratios ρ to the policy that sampled it", low=1, needs=has_rewards
    )
    clip_low: float = option(REWARD, 0.2, "ε_low: ρ is clipped below at 1 − ε_low", low=0.0, high=1.0)
    clip_high: float = option(REWARD, 0.28, "ε_high: ρ is clipped above at 1 + ε_high", low=0.0)

    lam: float = option(SELF_TEACHER, 0.5, "λ: share of the evidence weight in Â_n; 0 is GRPO", low=0.0, high=1.0)
    lam_decay: int = option(SELF_TEACHER, 0, "λ: updates over which it falls to 0; 0 is never", low=0)
    eps_w: float = option(SELF_TEACHER, 0.2, "ε_w: clip of the evidence weight w_n to 1 ± ε_w; 0 is GRPO", low=0.0)
    negative_only: bool = option(SELF_TEACHER, False, "w_n: reweight only responses with A < 0")
    reasoning_only: bool = option(SELF_TEACHER, False, "w_n: reweight only the tokens before the answer")
    reference: str = option(
        SELF_TEACHER,
        "true",
        "r: what the self-teacher P_T reads and the student P_S does not: this problem's, drawn among the valid ones "
        "(true); always the worked solution, or always the answer alone, so that I(Y; R | X) = 0 (work, cite); another "
        "problem's (shuffled); or nothing (none)",
        choices=("true", "work", "cite", "shuffled", "none"),
        needs=has_self_teacher,
    )
    teacher_sync: int = option(
        SELF_TEACHER, 0, "P_T: updates between copies of θ into it; 0 is frozen, 1 live", low=0, needs=has_self_teacher
    )

    task: str = option(TASK, "add", "arithmetic task", choices=(*arithmetic.TASKS, "mix"))
    digits: int = option(TASK, 3, "digits of each operand", low=1, high=arithmetic.MAX_DIGITS)
    seed: int = option(TRAINING, 0, "seed of every random stream", low=0)

    steps: int = option(TRAINING, None, "updates of the student", low=1)
    batch_size: int = option(TRAINING, None, "B: responses per update", low=1)
    lr: float = option(
        TRAINING,
        None,
        "learning rate of AdamW; it rises for a tenth of the updates, then falls to 0",
        low=0.0,
    )
    grad_clip: float = option(TRAINING, 0.0, "largest gradient norm; 0 is off", low=0.0)
    eval_every: int = option(TRAINING, 50, "updates between evaluations and checkpoints", low=1)
    eval_size: int = option(
        TRAINING, 500, "held-out problems per evaluation; four times as many at the start and the end", low=1
    )

    teacher_layers: int = option(MODELS, 3, "q: transformer blocks of the teacher", low=1)
    teacher_width: int = option(MODELS, 96, "q: channels of the teacher", low=8)
    teacher_steps: int = option(MODELS, None, "q: supervised updates of the teacher", low=0)
    student_layers: int = option(MODELS, 2, "p_θ: transformer blocks of the student", low=1)
    student_width: int = option(MODELS, 64, "p_θ: channels of the student", low=8)
    student_steps: int = option(
        MODELS,
        None,
        "p_θ: supervised updates of the student before the run; the default is that of add, × digits/3; "
        + ", ".join(f"{task} × {effort}" for task, effort in EFFORT.items()),
        low=0,
    )
    sft_batch_size: int = option(MODELS, 64, "worked solutions per supervised update", low=1)
    sft_lr: float = option(MODELS, 1e-2, "learning rate of the supervised updates, falling to 0", low=0.0)

    device: str = option(MACHINE, "auto", "auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:<n> or mps")
    dtype: str = option(
        MACHINE,
        "auto",
        "auto: bfloat16 for products on a GPU, from width 256 on",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: str = option(
        MACHINE,
        "auto",
        "threads of the CPU, a number; auto: as many as are fastest at the start, and at --resume as before",
    )
    compile: str = option(
        MACHINE,
        "auto",
        "on: torch.compile; auto: on a GPU CUDA graphs to sample; off: neither",
        choices=("auto", "on", "off"),
    )
    out_dir: str = option(MACHINE, "out", "folder of all runs and of the cached warm starts")
    resume: bool = option(MACHINE, False, "continue this run from its last checkpoint, to more --steps if you like")

    def __post_init__(self):
        """Check what was given, and take what was not from the recipe of the method and the task.

        Raises ValueError: the flag, the value and what is allowed.
        """
        if isinstance(self.out_dir, (str, Path)):
            self._set("out_dir", str(typed_path(self.out_dir)))
        if type(self.threads) is int:  # as config.json has it
            self._set("threads", str(self.threads))
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

        defaults = recipe(self.method, self.task, self.digits)
        for name, default in defaults.items():
            if getattr(self, name) is None:
                self._set(name, default)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != defaults[field.name]:
                check_is_read(self, field)
        for field in dataclasses.fields(self):
            if field.type is float:  # so that 1 and 1.0 are one run, with one name
                self._set(field.name, float(getattr(self, field.name)))

        divergences.get(self.divergence)  # raises ValueError for an unknown one
        check_threads(self)
        check_digits(self)
        check_top_k(self)
        check_variance(self)
        check_batch_size(self)
        check_normalize(self)
        check_reference(self)
        check_widths(self)

    def _set(self, name: str, value) -> None:
        """Set a field while the Config is made. A frozen dataclass has no other way to fill in a default."""
        object.__setattr__(self, name, value)

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
        """Return the sizes of the "teacher" or the "student"."""
        layers = {"teacher": self.teacher_layers, "student": self.student_layers}
        widths = {"teacher": self.teacher_width, "student": self.student_width}
        return GPTConfig(
            vocab_size=VOCAB_SIZE,
            block_size=self.prompt_length + self.response_cap,
            n_layer=layers[who],
            n_embd=widths[who],
            reference_slot=self.reference_slot,
        )

    def run_key(self, resumed: bool = False) -> dict:
        """Return everything that determines a run, or what a run has to keep when it is resumed.

        The number of threads is not in it: it decides the last bits only, and folder.recorded_threads keeps it.
        """
        left_out = ["out_dir", "resume", "threads"]
        if resumed:
            left_out += ["steps", "eval_every", "device", "compile"]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @property
    def not_default(self) -> dict:
        """What a run has to keep when it is resumed, and is not the default of its method, task and size."""
        defaults = recipe(self.method, self.task, self.digits)
        return {name: value for name, value in self.run_key(resumed=True).items() if value != defaults[name]}

    @property
    def run_dir(self) -> Path:
        """The run's own folder, named after it and every option not at its default, but those free at --resume."""
        parts = [self.method]
        for name in ("divergence", "variance"):
            if name in METHODS[self.method].options:
                parts.append(getattr(self, name))
        parts.append(f"{self.task}{self.digits}")
        parts.append(f"seed{self.seed}")
        for name, value in self.not_default.items():
            if name in ("method", "divergence", "variance", "task", "digits", "seed"):
                continue
            if value is True:
                parts.append(name)
            else:
                parts.append(f"{name}{value}")
        if distributed.world_size() > 1:
            parts.append(f"ranks{distributed.world_size()}")
        return Path(self.out_dir) / file_name("-".join(parts))


def file_name(text: str) -> str:
    """Return a text as the name of a folder: no more than 120 characters, all of which every file system takes."""
    name = re.sub(r"[^\w.+=-]", "_", text, flags=re.ASCII)
    if len(name) > 120:  # some file systems allow 143
        name = f"{name[:107]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


# ------------------------------------------------------------------------------------------------- what is refused

# Each function raises ValueError: the flag, the value, and what is allowed. The command line prints that sentence.

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
LARGEST = {int: 2**64, float: 3e38}  # float32 ends at 3.4e38


def flag_of(name: str) -> str:
    """Return an option as it is typed."""
    return "--" + name.replace("_", "-")


def check_value(field: dataclasses.Field, value) -> None:
    """Refuse a value of another type, one that is no choice of the option, and one outside its range."""
    if value is None and field.default is None:  # the recipe has it
        return
    check_type(field, value)
    check_choice(field, value)
    check_range(field, value)


def check_type(field: dataclasses.Field, value) -> None:
    """Refuse a value of another type than the option has."""
    if not has_type(value, field.type):
        raise ValueError(f"{flag_of(field.name)} {str(value)[:20]}: must be {WORDS[field.type]}")


def has_type(value, kind: type) -> bool:
    """Return whether a value is what an option of this type takes: an int is a number too, and a bool is none."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def check_choice(field: dataclasses.Field, value) -> None:
    """Refuse a value that is no choice of the option."""
    choices = field.metadata["choices"]
    if choices and value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{flag_of(field.name)} {value}: choose from {', '.join(choices)}{hint}")


def check_range(field: dataclasses.Field, value) -> None:
    """Refuse a number outside the option's range."""
    low = field.metadata["low"]
    high = field.metadata["high"]
    if low is None:
        return
    largest = LARGEST[field.type] if high is None else high
    if low <= value <= largest:
        return
    if high is not None:
        allowed = f"from {low} to {high}"
    elif value > 0:
        allowed = f"{low} or more and at most {largest:.0e}"
    else:  # negative, or not a number
        allowed = f"{low} or more"
    raise ValueError(f"{flag_of(field.name)} {str(value)[:20]}: must be {allowed}")


def readers(field: dataclasses.Field) -> list[str]:
    """Return the names of the methods that read an option."""
    those = [name for name, method in METHODS.items() if reads(method, field)]
    if not those:  # no loss takes it: it is read on the way to the loss, whatever the method
        return list(METHODS)
    return those


def reads(method: Method, field: dataclasses.Field) -> bool:
    """Return whether the option names this method as a reader or, if it names none, the method names the option."""
    needs = field.metadata["needs"]
    if needs is not None:
        return needs(method)
    return field.name in method.options


def check_is_read(cfg: Config, field: dataclasses.Field) -> None:
    """Refuse an option that the method does not read."""
    those = readers(field)
    if cfg.method not in those:
        given = f"{flag_of(field.name)} {getattr(cfg, field.name)}"
        raise ValueError(f"{given} means nothing with --method {cfg.method}: it is read by {', '.join(those)}")


def check_threads(cfg: Config) -> None:
    """Refuse a number of threads that is neither auto nor a whole number from 1 on."""
    if cfg.threads == "auto":
        return
    if not cfg.threads.isdecimal() or int(cfg.threads) < 1:
        raise ValueError(f"--threads {cfg.threads[:20]}: must be auto, or a whole number from 1 on")


def check_digits(cfg: Config) -> None:
    """Refuse problems of a single column: then no held-out problem is ever taught."""
    if cfg.digits == 1:
        raise ValueError("--digits 1: a problem is one column, so no held-out one is ever taught; give 2 or more")


def check_top_k(cfg: Config) -> None:
    """Refuse a k that no variance reads."""
    if cfg.top_k != Config.top_k and cfg.variance != "topk":
        raise ValueError(f"--top-k {cfg.top_k}: only --variance topk reads it")


def check_variance(cfg: Config) -> None:
    """Refuse what has no meaning where the mean over several tokens is taken."""
    if "variance" not in METHODS[cfg.method].options:
        return
    if cfg.variance in ("topk", "full") and cfg.gamma > 0:
        raise ValueError(f"--gamma {cfg.gamma} sums what was sampled: leave --variance {cfg.variance} out")
    if cfg.variance == "full" and (cfg.normalize != "batch" or cfg.log_u_clip > 0):
        raise ValueError("--normalize and --log-u-clip have no meaning with --variance full: leave them out")


def check_batch_size(cfg: Config) -> None:
    """Refuse a B that cannot be dealt out to the processes in whole groups."""
    processes = distributed.world_size()
    if cfg.batch_size % (processes * cfg.copies) == 0:
        return
    factors = []
    if processes > 1:
        factors.append(f"the {processes} processes")
    if cfg.copies > 1:
        factors.append(f"--group-size {cfg.copies}")
    raise ValueError(f"--batch-size {cfg.batch_size}: must be a multiple of {' times '.join(factors)}")


def check_normalize(cfg: Config) -> None:
    """Refuse a divisor that no process knows."""
    if distributed.world_size() > 1 and cfg.normalize == "token_mean":
        raise ValueError("--normalize token_mean: no process knows the tokens of all: use batch or sequence_mean")


def check_reference(cfg: Config) -> None:
    """Refuse to shuffle the references of a single group."""
    if cfg.reference == "shuffled" and cfg.batch_size < 2 * distributed.world_size() * cfg.group_size:
        raise ValueError("--reference shuffled: needs two groups or more of --batch-size in each process")


def check_widths(cfg: Config) -> None:
    """Refuse a width that the heads of attention cannot share."""
    for who, width in (("teacher", cfg.teacher_width), ("student", cfg.student_width)):
        try:
            cfg.gpt(who)
        except ValueError as error:
            raise ValueError(f"--{who}-width {width}: {error}") from None


def check_machine(cfg: Config) -> None:
    """Refuse what this machine does not have: a device, cores, a compiler, memory."""
    try:
        where = distributed.own_device(device.resolve(cfg.device))
    except ValueError as error:
        raise ValueError(f"--device {error}") from None
    check_cores(cfg)
    if cfg.compile == "on" and not device.has_compiler(where):
        raise ValueError(
            "--compile on: needs a C++ compiler, or Triton and a C compiler on a GPU, and Python's headers"
        )
    shortage = memory.shortage(cfg, where)
    if shortage:
        raise ValueError(shortage)


def check_cores(cfg: Config) -> None:
    """Refuse more threads than the machine has cores."""
    cores = os.cpu_count()
    if cores is None:  # the system does not say
        cores = 1
    if cfg.threads != "auto" and int(cfg.threads) > cores:
        raise ValueError(f"--threads {cfg.threads[:20]}: this machine has {cores} cores")


# ------------------------------------------------------------------------------------------------ the command line


def parse(arguments: list[str] | None = None) -> Config:
    """Return the Config of a command line. Bad input ends the program: one sentence on stderr, exit code 2."""
    parser = command_line()
    fields = {field.name: field for field in dataclasses.fields(Config)}
    try:
        distributed.require_launcher()
        parser.speaks = distributed.rank() == 0
        typed = vars(parser.parse_args(arguments))
        cfg = Config(**typed)
        for name in typed:  # also what was typed at its default
            check_is_read(cfg, fields[name])
        check_machine(cfg)
    except ValueError as error:
        parser.error(str(error))
    return cfg


def command_line() -> Parser:
    """Return the parser of all options. What was not typed is not in what it returns."""
    parser = Parser(
        "train.py",
        usage="train.py [options]",
        description="On-policy distillation of a small GPT on arithmetic. In brackets stand the methods that read an "
        "option; with another method it is refused. Without brackets all read it.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for field in dataclasses.fields(Config):
        add_option(groups[field.metadata["group"]], field)
    return parser


def add_option(group, field: dataclasses.Field) -> None:
    """Add an option to its group of the command line. A wrong choice is refused by Config, in its own words."""
    flag = flag_of(field.name)
    text = help_of(field).replace("%", "%%")  # argparse fills in what stands after a single %
    if field.type is bool:
        group.add_argument(flag, help=text, action="store_true")
    elif field.metadata["choices"]:
        group.add_argument(flag, help=text, type=str, metavar="{" + ",".join(field.metadata["choices"]) + "}")
    else:
        group.add_argument(flag, help=text, type=field.type, metavar=field.type.__name__)


def help_of(field: dataclasses.Field) -> str:
    """Return an option's line of --help: its symbol, what it is, its default, and the methods that read it."""
    text = f"{field.metadata['help']} (default: {default_of(field)})"
    those = readers(field)
    if those != list(METHODS):
        text += f" [{', '.join(those)}]"
    return text


def default_of(field: dataclasses.Field) -> str:
    """Return an option's default, and which methods and tasks have another one, as in "128; grpo, opsd: 64"."""
    if field.type is bool:
        return "off"
    words = [str(RECIPE.get(field.name, field.default))]
    recipes = {name: method.recipe for name, method in METHODS.items()} | OF_TASK
    who_has = {}
    for who, own in recipes.items():
        if field.name in own:
            who_has.setdefault(own[field.name], []).append(who)
    for value, those in who_has.items():
        words.append(f"{', '.join(those)}: {value}")
    return "; ".join(words)
