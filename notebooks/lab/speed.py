"""How fast everything is, and how fast it could be: notebooks/results/speed.json.

    python -m lab.speed --large               each phase of an update; log-probs at GPT-2's vocabulary
    python -m lab.speed --large --peers       sampling beside other people's
    python -m lab.speed --precision           from which width on bfloat16 is faster
    python -m lab.speed --scaling             cost against response length and batch, and scaling.png
    python -m lab.speed --operators           where each millisecond of a step on a CPU goes
    python -m lab.speed --busy                one thread, all threads and --threads auto beside other programs

The floor of a phase is its matrix products alone, their outputs preallocated and nothing in between, at the rate that
this machine reaches in the same turns. So time / floor says what everything else costs: launches, normalisation,
softmax, drawing, the optimizer. On a GPU the floor is replayed as one CUDA graph, and is never below the time that
reading weights, keys and values takes.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import figures
import numpy as np
import torch
from lab import RESULTS, ROOT, bench
from lab.bench import VOCAB_SIZE, B, P, R, new_model, new_pair, observe, paired_ratio, phases, take_turns
from matplotlib.figure import Figure
from torch import Tensor

from nano_opd.gpt import GPT, GPTConfig
from nano_opd.policy_gradient import logprobs_of
from nano_opd.rollout import response_logits, response_logprobs
from nano_opd.system import threads
from nano_opd.system.config import Config
from nano_opd.system.console import Parser
from nano_opd.system.device import has_compiler, keep_freed_memory
from nano_opd.system.fast_rollout import sampler

Device = torch.device
Dtype = torch.dtype
Rows = list[dict]
Product = tuple[int, int, int, int]  # (batch, m, k, n): so many products (m, k) @ (k, n)
KINDS = {  # part of an operator's name → kind; the first that fits
    "mm": "products",
    "layer_norm": "norms",
    "softmax": "softmax",
    "gelu": "GELU",
    "adamw": "AdamW",
    "copy": "copies",
    "cat": "copies",
    "embedding": "copies",
    "index": "copies",
    "gather": "copies",
    "scatter": "copies",
}
TRAIN = [str(ROOT / "train.py"), "--method", "opdplus"]  # what `busy_run` times
STEPS_IN_A_TURN = 4  # of `busy`
TURNS = 5
COLUMNS = [
    "size",
    "B",
    "phase",
    "compile",
    "tokens/s",
    "ms",
    "floor, ms",
    "time / floor",
    "calls",
    "calls per token",
    "peak, MB",
]


def forward_products(c: GPTConfig, B: int, T: int, S: int, logits: int) -> list[Product]:
    """Every product of one forward: T tokens per row that attend to S positions, logits of the last `logits`."""
    C = c.n_embd
    H = c.n_head
    D = C // H
    attention = [(1, B * T, C, 3 * C), (B * H, T, D, S), (B * H, T, S, D), (1, B * T, C, C)]
    mlp = [(1, B * T, C, 4 * C), (1, B * T, 4 * C, C)]
    return c.n_layer * (attention + mlp) + [(1, B * logits, C, c.vocab_size)]


def phase_products(student: GPTConfig, teacher: GPTConfig, B: int, P: int, R: int) -> dict[str, list[list[Product]]]:
    """The products that each phase needs, forward by forward; a backward belongs to its forward."""
    T = P + R - 1
    score = forward_products(student, B, T, T, R)
    backward = []
    for b, m, k, n in score:
        backward.append((b, m, n, k))  # dY Wᵀ
        backward.append((b, k, m, n))  # Xᵀ dY
    prompt = forward_products(student, B, P - 1, P - 1, 0)[:-1]  # without its logits
    decode = [forward_products(student, B, 1, S, 1) for S in range(P, P + R)]
    teacher_score = forward_products(teacher, B, T, T, R)
    return {
        "rollout": [prompt, *decode],
        "score": [score],
        "update": [score + backward],
        "step": [prompt, *decode, teacher_score, score + backward],
    }


def floor(passes: list[list[Product]], device: Device, dtype: Dtype) -> Callable[[], None]:
    """A function that runs the products and nothing else; a forward has its weights, keys and values side by side."""

    def new(size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    products = [product for forward in passes for product in forward]
    largest_input = max(b * m * k for b, m, k, n in products)
    largest_weight = max(b * k * n for b, m, k, n in products)
    largest_output = max(b * m * n for b, m, k, n in products)
    x = new(max(largest_input, largest_output))
    y = new(max(largest_input, largest_output))
    longest = max(passes, key=len)
    weights_of_longest = sum(b * k * n for b, m, k, n in longest)
    pool = new(max(largest_weight, min(2**28, weights_of_longest)))  # 1 GiB is no cache
    calls = []
    for forward in passes:
        start = 0
        for b, m, k, n in forward:
            if start + b * k * n > len(pool):
                start = 0
            w = pool[start : start + b * k * n].view(b, n, k).mT
            start += b * k * n
            inputs = x[: b * m * k].view(b, m, k)
            outputs = y[: b * m * n].view(b, m, n)
            if b > 1:
                calls.append((torch.bmm, inputs, w, outputs))
            else:
                calls.append((torch.mm, inputs[0], w[0], outputs[0]))

    @torch.no_grad()
    def run() -> None:
        for product, a, b, out in calls:
            product(a, b, out=out)

    if device.type != "cuda":
        return run
    run()
    graph = torch.cuda.CUDAGraph()  # one launch for all, or the floor of a small model would be that of its launches
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()

    replay.kept = calls  # a graph holds addresses, not tensors
    return replay


def bandwidth(device: Device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source, target = torch.empty(2, 2**28, device=device)
    times = take_turns({"copy": lambda: target.copy_(source)}, device, seconds=1)
    return 2 * source.nbytes / np.median(times["copy"])


def speed(layers: int, width: int, B: int, device: Device, dtype: Dtype, copy_rate=np.inf, seconds=8.0) -> Rows:
    """One row for each phase and --compile, beside its floor."""
    student, teacher = new_pair(layers, width, P + R, device)
    passes = phase_products(student.config, teacher.config, B, P, R)
    floors = {}
    for name, products in passes.items():
        floors[name, "floor"] = floor(products, device, dtype)
    rows, times = bench.measure(student, teacher, B, dtype, seconds, floors)
    for row in rows:
        name = row["phase"]
        taken = times[name, row["compile"]]
        to_read = dtype.itemsize * sum(b * k * n for products in passes[name] for b, m, k, n in products)
        lowest = np.maximum(times[name, "floor"], to_read / copy_rate)
        row["floor, ms"] = 1e3 * np.median(lowest)
        row["time / floor"] = paired_ratio(taken, lowest)
        row["calls per token"] = row["calls"] / R if name == "rollout" else None
    return [{column: row[column] for column in COLUMNS} for row in rows]


def vocabulary(device: Device, dtype: Dtype, B: int = 8, T: int = 256, V: int = 50257) -> Rows:
    """Log-probs of sampled tokens at GPT-2's vocabulary: `response_logprobs`, and with all of (B, T, V) in float32."""
    model = new_model(2, 256, T, device, V)
    model.precision = dtype
    tokens = torch.randint(V, (B, T)).to(device)
    whole = "the whole (B, T, V)"

    def without_logits() -> Tensor:
        return response_logprobs(model, tokens, P)

    def with_logits() -> Tensor:
        return logprobs_of(tokens[:, P:], response_logits(model, tokens, P).float())

    def backward(way: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: way().sum().backward()

    ways = {"response_logprobs": without_logits, whole: with_logits}
    rows = []
    for phase, run_of in {"forward": torch.no_grad(), "forward + backward": backward}.items():
        runs = {name: run_of(way) for name, way in ways.items()}
        times = take_turns(runs, device, 0, turns=4)
        for name, run in runs.items():
            model.zero_grad()
            _, peak = observe(run, device)
            rows.append(
                {
                    "log-probs": name,
                    "phase": phase,
                    "ms": 1e3 * np.median(times[name]),
                    "time / whole": None if name == whole else paired_ratio(times[name], times[whole]),
                    "peak, MB": peak,
                }
            )
    return rows


def peers(layers: int, width: int, B: int, device: Device, dtype: Dtype, seconds: float = 8) -> Rows:
    """Ours, ours without its cache, `generate` for a GPT-2 of the same size; ratios of tokens/s, ours over theirs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.compiler.reset()
    model = new_model(layers, width, P + R, device)
    prompts = torch.randint(VOCAB_SIZE, (B, P), device=device)
    model.precision = dtype
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=P + R,
        n_layer=layers,
        n_embd=width,
        n_head=model.config.n_head,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = GPT2LMHeadModel(config).to(device, dtype).eval()

    @torch.no_grad()
    def without_cache() -> Tensor:
        tokens = prompts
        for _ in range(R):
            probs = model(tokens, logits_from=tokens.shape[1] - 1)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
        return tokens

    def with_huggingface() -> Tensor:
        return gpt2.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=R,
            max_new_tokens=R,
            pad_token_id=0,
        )

    def ours(compile: str) -> Callable[[], Tensor]:
        sample = sampler(device, compile)
        return lambda: sample(model, prompts, R).tokens

    if device.type != "cpu":
        mine = {"sample": ours("auto")}
    elif has_compiler(device):
        mine = {"sample": ours("off"), "sample, compiled": ours("on")}
    else:
        mine = {"sample": ours("off")}
    others = {"the same without a cache": without_cache, "Hugging Face generate": with_huggingface}
    times = take_turns(mine | others, device, seconds)
    rows = []
    for name, taken in times.items():
        row = {"size": f"{layers}×{width}", "B": B, "generation": name, "tokens/s": round(B * R / np.median(taken))}
        for way in mine:
            row[f"{way} / this"] = None if name in mine else paired_ratio(taken, times[way])
        rows.append(row)
    return rows


def precision(width: int, B: int, device: Device, seconds: float = 3) -> Rows:
    """bfloat16 weights and autocast against float32: one product (B·31, C) @ (C, 4C), and an update of two layers."""
    x = torch.randn(B * (P + R - 1), width, device=device)
    w = torch.randn(width, 4 * width, device=device)
    x_half = x.bfloat16()
    w_half = w.bfloat16()
    model = new_model(2, width, P + R, device)
    half_model = new_model(2, width, P + R, device).bfloat16()
    autocast_model = new_model(2, width, P + R, device)

    def product() -> Tensor:
        return x @ w

    def half_product() -> Tensor:
        return x_half @ w_half

    def update_of(model: GPT, dtype: Dtype) -> Callable[[], None]:
        return phases(model, model, B, P, R, dtype)["update"]

    ways = {
        "product": {
            "float32": product,
            "weights": half_product,
            "autocast": torch.autocast(device.type, torch.bfloat16)(product),
        },
        "update": {
            "float32": update_of(model, torch.float32),
            "weights": update_of(half_model, torch.float32),
            "autocast": update_of(autocast_model, torch.bfloat16),
        },
    }
    rows = []
    for what, runs in ways.items():
        times = take_turns(runs, device, seconds)
        rows.append(
            {
                "width": width,
                "what": what,
                "float32, ms": 1e3 * np.median(times["float32"]),
                "weights / float32": paired_ratio(times["weights"], times["float32"]),
                "autocast / float32": paired_ratio(times["autocast"], times["float32"]),
                "of autocast: casts": share_of_casts(runs["autocast"]),
            }
        )
    return rows


def share_of_casts(run: Callable) -> float:
    """The share of a run's time in which the CPU casts to another dtype."""
    with torch.profiler.profile() as profile:
        run()
    casts = 0.0
    whole = 0.0
    for event in profile.key_averages():
        whole += event.self_cpu_time_total
        if event.key == "aten::_to_copy":
            casts += event.cpu_time_total
    return casts / whole


def operators(B: int, seconds: float = 8) -> Rows:
    """Where each millisecond of the default models' phases goes on a CPU, without --compile, by kind of operator.

    The profiler gives the shares, but slows what it counts; the milliseconds are those without it. "between" is Python.
    """
    cpu = torch.device("cpu")
    student, teacher = new_pair(2, 64, P + R, cpu)
    runs = phases(student, teacher, B, P, R, compile="off")
    times = take_turns(runs, cpu, seconds)
    rows = []
    for phase, run in runs.items():
        taken = dict.fromkeys([*KINDS.values(), "others", "between"], 0.0)
        with torch.profiler.profile() as profile, torch.profiler.record_function("between"):
            for _ in range(5):
                run()
        for event in profile.key_averages():
            taken[kind_of_operator(event.key)] += event.self_cpu_time_total
        ms = 1e3 * np.median(times[phase])
        whole = sum(taken.values())
        row = {"phase": phase, "B": B, "ms": ms}
        for kind, part in taken.items():
            row[kind] = ms * part / whole
        rows.append(row)
    return rows


def kind_of_operator(name: str) -> str:
    if name == "between":
        return name
    for part, kind in KINDS.items():
        if part in name:
            return kind
    return "others"


def scaling(axis: str, values: list[int], device: Device, dtype: Dtype, turns: int = 5) -> Rows:
    """Seconds of a step of the default models, of its rollout and of the rollout's products, by "length" or "batch"."""
    runs = {}
    for value in values:
        if axis == "length":
            batch, length = 32, value
        else:
            batch, length = value, R
        student, teacher = new_pair(2, 64, P + length, device)
        work = phases(student, teacher, batch, P, length, dtype)
        products = phase_products(student.config, teacher.config, batch, P, length)
        runs["step", value] = work["step"]
        runs["rollout", value] = work["rollout"]
        runs["products of the rollout", value] = floor(products["rollout"], device, dtype)
    rows = []
    for (name, value), times in take_turns(runs, device, 0, turns).items():
        low, median, high = np.percentile(times, (25, 50, 75))
        rows.append({"axis": axis, "tokens or rows": value, "what": name, "s": median, "s low": low, "s high": high})
    return rows


def make_steps(asked: str) -> None:
    """Make steps of the default method, with the threads that --threads would take; the body of a process of its own.

    It prints "ready" and its number of threads. Then it makes STEPS_IN_A_TURN steps for each line that it reads, and
    prints their seconds.
    """
    cpu = torch.device("cpu")
    keep_freed_memory()
    with threads.chosen(Config(threads=asked), cpu, None):
        student, teacher = new_pair(2, 64, P + R, cpu)
        step = bench.phases(student, teacher, B, P, R, compile="off")["step"]
        step()
        print("ready", torch.get_num_threads(), flush=True)
        for _ in sys.stdin:
            taken = []
            for _ in range(STEPS_IN_A_TURN):
                started = time.perf_counter()
                step()
                taken.append(time.perf_counter() - started)
            print(*taken, flush=True)


def environment(**settings: str) -> dict[str, str]:
    """The environment of a process that finds this package, with no number of threads in it, and these settings."""
    kept = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    folders = [str(ROOT / "notebooks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(folders)} | settings


@contextlib.contextmanager
def running(*arguments: str, **settings: str) -> Iterator[subprocess.Popen]:
    """A Python process for the length of a `with`."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(**settings),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def beside(neighbour: str, usual: int) -> Iterator[None]:
    """One of NEIGHBOURS at work for the length of a `with`."""
    if neighbour == "quiet":
        yield
    elif neighbour == "beside one busy process":
        with running("-c", "while True: pass"):
            yield
    else:
        endless = f"import torch; torch.set_num_threads({usual}); x = torch.randn(512, 512)\nwhile True: x @ x"
        with running("-c", endless):
            time.sleep(3)  # until it has imported torch
            yield


NEIGHBOURS = ("quiet", "beside one busy process", "beside a job of all threads")


def ways_of_waiting(usual: int) -> dict[str, tuple[str, dict[str, str]]]:
    """What is compared: its name, its --threads, and the settings of its environment."""
    return {
        f"{usual} threads": (str(usual), {}),
        f"{usual} threads, OMP_WAIT_POLICY=PASSIVE": (str(usual), {"OMP_WAIT_POLICY": "PASSIVE"}),
        f"{usual} threads, GOMP_SPINCOUNT=5000": (str(usual), {"GOMP_SPINCOUNT": "5000"}),
        f"{usual} threads, GOMP_SPINCOUNT=20000": (str(usual), {"GOMP_SPINCOUNT": "20000"}),
        "1 thread": ("1", {}),
        "--threads auto": ("auto", {}),
    }


def busy(usual: int) -> Rows:
    """Seconds of a step of the default method, eager: median and quartiles, by neighbour.

    A neighbour is started, then a process for each way, one after the other, so that --threads auto chooses beside that
    neighbour alone. Then the ways take turns. What waits for its turn uses no core.
    """
    ways = ways_of_waiting(usual)
    rows = {name: {"a step with": name} for name in ways}
    for neighbour in NEIGHBOURS:
        with contextlib.ExitStack() as stack:
            stack.enter_context(beside(neighbour, usual))
            processes = {}
            numbers = {}
            taken = {name: [] for name in ways}
            for name, (asked, settings) in ways.items():
                code = f"from lab import speed; speed.make_steps({asked!r})"
                processes[name] = stack.enter_context(running("-c", code, **settings))
                numbers[name] = threads_when_ready(processes[name])
            order = list(ways)
            for _ in range(TURNS):
                for name in order:
                    print("go", file=processes[name].stdin, flush=True)
                    seconds = processes[name].stdout.readline().split()
                    taken[name] += [float(text) for text in seconds]
                order.reverse()
            for name, values in taken.items():
                rows[name][f"{neighbour}, s"] = [float(q) for q in np.percentile(values, (50, 25, 75))]
                rows[name].setdefault("threads", []).append(numbers[name])
    for row in rows.values():
        row["threads"] = ", ".join(row.pop("threads"))  # in the last column, neighbour by neighbour
    return list(rows.values())


def threads_when_ready(process: subprocess.Popen) -> str:
    """Wait until `make_steps` is ready in that process; return its number of threads."""
    for line in process.stdout:  # what --threads auto says comes before
        if line.startswith("ready"):
            return line.split()[1]
    raise RuntimeError("a process that was to be timed ended before it was ready")


def busy_run(usual: int, limit: float = 200) -> Rows:
    """Seconds of the main command from nothing, beside one busy process, with no end later than `limit`."""
    rows = []
    for asked in dict.fromkeys(("1", "auto", str(usual))):
        with beside("beside one busy process", usual), tempfile.TemporaryDirectory() as out:
            command = [sys.executable, *TRAIN, "--threads", asked, "--out-dir", out]
            started = time.monotonic()
            try:
                subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True, timeout=limit)
                seconds = time.monotonic() - started
            except subprocess.TimeoutExpired:
                seconds = f"no end within {limit:.0f}"
            warm_starts = len([*Path(out).glob("warm_starts/*.pt")])
            rows.append({"train.py --threads": asked, "s": seconds, "warm starts finished": warm_starts})
    return rows


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """The a of y ∝ x^a, by least squares on logarithms over the upper half of x."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def scaling_figure(rows: Rows) -> Figure:
    """Seconds against length and batch with the exponent of a step; ms that each further token takes."""
    measured = {}
    for row in rows:
        points = measured.setdefault(row["axis"], {}).setdefault(row["what"], [])
        points.append((row["tokens or rows"], row["s"]))
    panels = {}
    for axis, points_of in measured.items():
        series = {name: np.array(points).T for name, points in points_of.items()}
        x, s = series["step"]
        panels[f"s by {axis}: a step ∝ x^{exponent(x, s):.2f}"] = series
        if axis == "length":  # between two lengths, drawn at their geometric mean
            per_token = {}
            for name, (x, s) in series.items():
                per_token[name] = (np.sqrt(x[1:] * x[:-1]), 1e3 * np.diff(s) / np.diff(x))
            panels["ms per further token, by position"] = per_token
    figure = figures.curves(panels, "", "", xscale="log", yscale="log")
    for ax in figure.axes:
        ax.set_xscale("log", base=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for; unasked, speed and the large vocabulary."""
    parser = Parser("speed", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--peers", action="store_true", help="sampling beside other people's")
    parser.add_argument("--precision", action="store_true", help="from which width on bfloat16 is faster")
    parser.add_argument("--scaling", action="store_true", help="cost against response length and batch; a figure")
    parser.add_argument("--operators", action="store_true", help="where each millisecond of a step on a CPU goes")
    parser.add_argument("--busy", action="store_true", help="beside other programs: the number of threads (a CPU)")
    args = bench.parse(parser, arguments, RESULTS / "speed.json")
    if args.peers and importlib.util.find_spec("transformers") is None:
        parser.error("--peers: Hugging Face's transformers is not installed here")
    if args.operators and args.device.type != "cpu":
        parser.error("--operators: counts on a CPU; add --device cpu")
    if args.busy and args.threads < 2:
        parser.error("--busy: compares one thread with several; add --threads 2 or more")
    asked = [name for name in ("peers", "precision", "scaling", "operators", "busy") if getattr(args, name)]
    if args.busy:
        asked.append("busy_run")
    if not asked:
        asked = ["speed", "vocabulary"]
    for name in asked:
        rows = []
        for measure in measurements(name, args):
            try:
                rows += measure()
            except torch.OutOfMemoryError as error:
                print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
        bench.publish(name, rows, args)
        if name == "scaling":
            write_scaling(rows, args.json.parent)


def measurements(name: str, args: argparse.Namespace) -> list[Callable[[], Rows]]:
    """What makes the rows of a table, to be called one after the other."""
    device = args.device
    dtype = args.dtype
    if name == "speed":
        batches = [B]
        copy_rate = np.inf
        if device.type == "cuda":
            batches = [128, 512, 1024, 4096]
            copy_rate = bandwidth(device)
        made = []
        for layers, width in args.sizes:
            for batch in batches:
                made.append(partial(speed, layers, width, batch, device, dtype, copy_rate))
        return made
    if name == "vocabulary":
        return [partial(vocabulary, device, dtype)]
    if name == "peers":
        return [partial(peers, layers, width, B, device, dtype) for layers, width in args.sizes]
    if name == "precision":
        return [partial(precision, width, B, device) for width in (64, 128, 256, 384, 768)]
    if name == "operators":
        return [partial(operators, B)]
    if name == "scaling":
        lengths = [2**n for n in range(4, 10)]
        batches = [2**n for n in range(4, 11)]
        return [
            partial(scaling, "length", lengths, device, dtype),
            partial(scaling, "batch", batches, device, dtype),
        ]
    if name == "busy":
        return [partial(busy, args.threads)]
    return [partial(busy_run, args.threads)]


def write_scaling(rows: Rows, folder: Path) -> None:
    """Write scaling.csv, numbers to four digits, and scaling.png."""
    lines = [",".join(rows[0])]
    for row in rows:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(",".join(values))
    (folder / "scaling.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figures.save(scaling_figure(rows), folder / "scaling.png")


if __name__ == "__main__":
    main()
