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

from nano_opd import sft
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.methods import METHODS, Scored
from nano_opd.rollout import Rollout, score
from nano_opd.system.config import Config
from nano_opd.system.console import Parser, accept_any_text, typed_path
from nano_opd.system.device import compiled, has_compiler, keep_freed_memory, resolve
from nano_opd.system.fast_rollout import sampler
from nano_opd.tokenizer import EOS

SIZES = [(2, 64), (4, 128), (6, 384), (12, 768)]  # layers × width
B, P, R = 128, 8, 24  # responses; tokens of a prompt and of a response
VOCAB_SIZE = EOS  # the toy's alphabet without EOS and PAD: no response ends early, so 24 tokens are 24 tokens


def new_model(layers: int, width: int, length: int, device: torch.device, vocab_size: int = VOCAB_SIZE) -> GPT:
    """Four heads, or more of 64 channels each. Random weights, none of them zero as some are before training."""
    model = GPT(GPTConfig(vocab_size, length, layers, max(4, width // 64), width)).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    return model


def new_pair(layers: int, width: int, length: int, device: torch.device) -> tuple[GPT, GPT]:
    """A student and its teacher: 3×96 for the default student of 2×64, else of the same size."""
    of_teacher = (3, 96) if (layers, width) == (2, 64) else (layers, width)
    return new_model(layers, width, length, device), new_model(*of_teacher, length, device).requires_grad_(False)


def phases(student: GPT, teacher: GPT, B: int, P: int, R: int, dtype=torch.float32, compile="auto") -> dict:
    """The student's rollout, score and update, and the step, which is train.py's `update` with the default options."""
    student.precision = teacher.precision = dtype
    cfg, optimizer = Config(), sft.adamw(student, 0.0)  # lr 0: no update changes the next
    sample = sampler(student.device, compile)
    scored_student, scored_teacher = compiled(compile, student), compiled(compile, teacher)
    prompts = torch.randint(VOCAB_SIZE, (B, P), device=student.device)
    rollout = lambda: sample(student, prompts, R)
    logp_of = lambda model, y: score(model, y.tokens, P)[0]
    given, constant = rollout(), torch.no_grad()(logp_of)

    def update(y: Rollout, teacher_logp: torch.Tensor) -> None:
        logp = logp_of(scored_student, y)
        scored = Scored(y.responses, y.mask, logp, logp.detach(), teacher_logp)
        optimizer.zero_grad()
        METHODS[cfg.method].loss(scored, **cfg.options_of_method)[0].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), float("inf"))  # train.py logs the norm
        optimizer.step()

    step = lambda: update(y := rollout(), constant(scored_teacher, y))
    of_given = {"score": lambda: constant(scored_student, given), "update": lambda: update(given, given.logp)}
    return {"rollout": rollout, **of_given, "step": step}


def take_turns(runs: dict, device: torch.device, seconds: float, turns: int = 5) -> dict:
    """Seconds of each run in each turn, arrays: as many turns as fit into `seconds`, but at least `turns`."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for run in runs.values():
        run()
    times, order, end = {name: [] for name in runs}, list(runs), time.monotonic() + seconds
    while len(times[order[0]]) < turns or time.monotonic() < end:
        for name in order:
            wait()
            start = time.perf_counter()
            runs[name]()
            wait()
            times[name].append(time.perf_counter() - start)
        order.reverse()  # so that none always comes after the same neighbour
    return {name: np.array(values) for name, values in times.items()}


def paired_ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
    """[median, lower quartile, upper quartile] of a/b, turn by turn."""
    return [float(q) for q in np.percentile(np.asarray(a) / np.asarray(b), (50, 25, 75))]


def observe(run: Callable, device: torch.device) -> tuple[int, float]:
    """Operator calls (on a GPU: kernels) of one run, and its peak MB of tensors on top of what there was before."""
    if gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.profiler.profile(profile_memory=not gpu) as profile:
        run()  # the profiler waits for the device at its end
    if gpu:
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        return kernels, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    is_operator = lambda event: event is not None and event.name.startswith("aten::")
    calls = sum(is_operator(e) and not is_operator(e.cpu_parent) for e in profile.events())  # not those within others
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # +allocated, −freed
    live = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return calls, float(live.max()) / 1e6


def measure(student: GPT, teacher: GPT, B: int, dtype: torch.dtype, seconds: float = 8, others=()) -> tuple:
    """One row for each phase and --compile, and all times; `others` are timed in the same turns, by name."""
    torch.compiler.reset()  # or sizes that are seen to change would become variables of slower kernels
    runs, rows, size = {}, [], f"{student.config.n_layer}×{student.config.n_embd}"
    for way in ("off", "on") if has_compiler(student.device) else ("off",):
        runs |= {(name, way): run for name, run in phases(student, teacher, B, P, R, dtype, way).items()}
    times = take_turns(runs | dict(others), student.device, seconds)
    for (name, way), run in runs.items():
        s, ratio = np.median(times[name, way]), paired_ratio(times[name, way], times[name, "off"])
        calls, peak = observe(run, student.device)
        row = {"size": size, "B": B, "phase": name, "compile": way, "tokens/s": round(B * R / s), "ms": 1e3 * s}
        rows.append(row | {"on / off": ratio if way == "on" else None, "calls": calls, "peak, MB": peak})
    return rows, times


def processor() -> str:
    """The CPU's name as Linux gives it; elsewhere, as Python does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8") if info.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Where the numbers come from."""
    cpu = f"{processor()}, threads: {torch.get_num_threads()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"


def markdown(rows: list[dict]) -> str:
    """A table of Markdown: three digits, quartiles in brackets."""

    def cell(value) -> str:
        if isinstance(value, list):
            return "{} [{}, {}]".format(*map(cell, value))
        if not isinstance(value, (int, float)):
            return value or ""
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"

    lines = [rows[0], ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    try:
        args.device, args.tables = resolve(args.device), {}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.tables = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
            if not isinstance(args.tables, dict):
                raise ValueError("the file holds something else than tables")
    except (OSError, ValueError) as error:
        parser.error(f"--device {args.device}, --json {args.json}: {error}")
    args.dtype, args.sizes = getattr(torch, args.dtype), SIZES[: 4 if args.large or args.device.type == "cuda" else 2]
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
    pairs = (new_pair(*size, P + R, args.device) for size in args.sizes)
    publish("phases", [row for pair in pairs for row in measure(*pair, B, args.dtype)[0]], args)


if __name__ == "__main__":
    main()
