"""How fast the phases of an update are, with torch.compile and without: `python -m lab.bench`.

What is compared takes turns (A, B, B, A, …): a moment in which the machine is busy falls on all. A ratio is the median
over the turns of the ratio within a turn, with its quartiles. Tokens are response tokens; memory is beyond weights and
optimizer. lab/speed.py measures more by the same means.
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nano_opd.gpt import GPT, GPTConfig, adamw
from nano_opd.methods import METHODS, Scored
from nano_opd.rollout import Rollout, score
from nano_opd.system.config import Config
from nano_opd.system.console import Parser, accept_any_text, typed_path
from nano_opd.system.device import compiled, has_compiler, keep_freed_memory, resolve
from nano_opd.system.fast_rollout import sampler
from nano_opd.tokenizer import EOS

SIZES = [(2, 64), (4, 128), (6, 384), (12, 768)]  # layers × width
B = 128  # responses
P = 8  # tokens of a prompt
R = 24  # tokens of a response
VOCAB_SIZE = EOS  # the toy's alphabet without EOS and PAD: no response ends early, so 24 tokens are 24 tokens


def new_model(layers: int, width: int, length: int, device: torch.device, vocab_size: int = VOCAB_SIZE) -> GPT:
    """Four heads, or more of 64 channels each. Random weights, none of them zero as some are before training."""
    model = GPT(GPTConfig(vocab_size, length, layers, max(4, width // 64), width)).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    return model


def new_pair(layers: int, width: int, length: int, device: torch.device) -> tuple[GPT, GPT]:
    """A student and its teacher: 3×96 for the default student of 2×64, else of the same size."""
    student = new_model(layers, width, length, device)
    if (layers, width) == (2, 64):
        teacher = new_model(3, 96, length, device)
    else:
        teacher = new_model(layers, width, length, device)
    return student, teacher.requires_grad_(False)


def phases(student: GPT, teacher: GPT, B: int, P: int, R: int, dtype=torch.float32, compile="auto") -> dict:
    """The student's rollout, score and update, and the step, which is train.py's `update` with the default options."""
    student.precision = dtype
    teacher.precision = dtype
    cfg = Config()
    optimizer = adamw(student, lr=0.0)  # no update changes the next
    sample = sampler(student.device, compile)
    scored_student = compiled(compile, student)
    scored_teacher = compiled(compile, teacher)
    prompts = torch.randint(VOCAB_SIZE, (B, P), device=student.device)

    def rollout() -> Rollout:
        return sample(student, prompts, R)

    def score_with(model: nn.Module, y: Rollout) -> Tensor:
        logp, _ = score(model, y.tokens, P)
        return logp

    def update_on(y: Rollout, teacher_logp: Tensor) -> None:
        logp = score_with(scored_student, y)
        scored = Scored(y.responses, y.mask, logp, logp.detach(), teacher_logp)  # drops nothing: p_old
        loss, _ = METHODS[cfg.method].loss(scored, **cfg.options_of_method)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), float("inf"))  # train.py logs the norm
        optimizer.step()

    given = rollout()

    @torch.no_grad()
    def score_given() -> Tensor:
        return score_with(scored_student, given)

    def update() -> None:
        update_on(given, given.logp)

    def step() -> None:
        y = rollout()
        with torch.no_grad():
            teacher_logp = score_with(scored_teacher, y)
        update_on(y, teacher_logp)

    return {"rollout": rollout, "score": score_given, "update": update, "step": step}


def take_turns(runs: dict, device: torch.device, seconds: float, turns: int = 5) -> dict:
    """Seconds of each run in each turn, arrays: as many turns as fit into `seconds`, but at least `turns`."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    order = list(runs)
    end = time.monotonic() + seconds
    while len(times[order[0]]) < turns or time.monotonic() < end:
        for name in order:
            wait_for(device)
            start = time.perf_counter()
            runs[name]()
            wait_for(device)
            times[name].append(time.perf_counter() - start)
        order.reverse()  # so that none always comes after the same neighbour
    return {name: np.array(values) for name, values in times.items()}


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def paired_ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
    """[median, lower quartile, upper quartile] of a/b, turn by turn."""
    return [float(q) for q in np.percentile(np.asarray(a) / np.asarray(b), (50, 25, 75))]


def observe(run: Callable, device: torch.device) -> tuple[int, float]:
    """Operator calls (on a GPU: kernels) of one run, and its peak MB of tensors on top of what there was before."""
    if device.type == "cuda":
        return observe_on_gpu(run, device)
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    calls = 0
    for event in profile.events():
        if is_operator(event) and not is_operator(event.cpu_parent):  # not those within others
            calls += 1
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # +allocated, −freed
    changes.sort(key=lambda event: event.start_ns())
    live = np.cumsum([event.nbytes() for event in changes])
    return calls, float(live.max()) / 1e6


def is_operator(event) -> bool:
    return event is not None and event.name.startswith("aten::")


def observe_on_gpu(run: Callable, device: torch.device) -> tuple[int, float]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.profiler.profile() as profile:
        run()  # the profiler waits for the device at its end
    kernels = 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += 1
    return kernels, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def measure(student: GPT, teacher: GPT, B: int, dtype: torch.dtype, seconds: float = 8, others=()) -> tuple:
    """One row for each phase and --compile, and all times; `others` are timed in the same turns, by name."""
    torch.compiler.reset()  # or sizes that are seen to change would become variables of slower kernels
    size = f"{student.config.n_layer}×{student.config.n_embd}"
    runs = {}
    for way in ["off", "on"] if has_compiler(student.device) else ["off"]:
        for name, run in phases(student, teacher, B, P, R, dtype, way).items():
            runs[name, way] = run
    times = take_turns(runs | dict(others), student.device, seconds)
    rows = []
    for (name, way), run in runs.items():
        median = np.median(times[name, way])
        calls, peak = observe(run, student.device)
        rows.append(
            {
                "size": size,
                "B": B,
                "phase": name,
                "compile": way,
                "tokens/s": round(B * R / median),
                "ms": 1e3 * median,
                "on / off": paired_ratio(times[name, way], times[name, "off"]) if way == "on" else None,
                "calls": calls,
                "peak, MB": peak,
            }
        )
    return rows, times


def processor() -> str:
    """The CPU's name as Linux gives it; elsewhere, as Python does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Where the numbers come from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, threads: {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"


def markdown(rows: list[dict]) -> str:
    """A table of Markdown: three digits, quartiles in brackets."""

    lines = [markdown_row(list(rows[0])), markdown_row(["---"] * len(rows[0]))]
    for row in rows:
        lines.append(markdown_row([cell(value) for value in row.values()]))
    return "\n".join(lines)


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: list[float] | float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        median, low, high = value
        return f"{cell(median)} [{cell(low)}, {cell(high)}]"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def parse(parser: Parser, arguments: list[str] | None, path: Path | None = None) -> argparse.Namespace:
    """What to measure, where, and the tables in --json. Bad input ends the program: one sentence, exit code 2."""
    accept_any_text()
    parser.add_argument("--large", action="store_true", help="6×384 and 12×768 on a CPU too")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 by autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=typed_path, default=path, help="file of tables; those not measured now are kept")
    args = parser.parse_args(arguments)
    most = os.cpu_count() or 1
    if not 1 <= args.threads <= most:
        parser.error(f"--threads {args.threads}: must be from 1 to {most}")
    args.tables = {}
    try:
        args.device = resolve(args.device)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            if args.json.exists():
                args.tables = json.loads(args.json.read_text(encoding="utf-8"))
            if not isinstance(args.tables, dict):
                raise ValueError("the file holds something else than tables")
    except (OSError, ValueError) as error:
        parser.error(f"--device {args.device}, --json {args.json}: {error}")
    args.dtype = getattr(torch, args.dtype)
    args.sizes = SIZES if args.large or args.device.type == "cuda" else SIZES[:2]
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    return args


def publish(name: str, rows: list[dict], args: argparse.Namespace) -> None:
    """Print a table and, with --json, keep it."""
    args.tables[name] = {"machine": machine(args.device, args.dtype), "rows": rows}
    print(f"\n{name}: {args.tables[name]['machine']}\n\n{markdown(rows)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(args.tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """One table of all sizes."""
    args = parse(Parser("bench", description=__doc__, allow_abbrev=False), arguments)
    rows = []
    for layers, width in args.sizes:
        student, teacher = new_pair(layers, width, P + R, args.device)
        rows_of_size, _ = measure(student, teacher, B, args.dtype)
        rows += rows_of_size
    publish("phases", rows, args)


if __name__ == "__main__":
    main()
