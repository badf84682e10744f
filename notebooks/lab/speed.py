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

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import figures
import numpy as np
import torch
from lab import RESULTS, ROOT, bench
from lab.bench import VOCAB_SIZE, B, P, R, new_model, new_pair, observe, paired_ratio, phases, take_turns
from matplotlib.figure import Figure

from nano_opd.gpt import GPTConfig
from nano_opd.policy_gradient import logprobs_of
from nano_opd.rollout import response_logits, response_logprobs
from nano_opd.system import threads
from nano_opd.system.config import Config
from nano_opd.system.console import Parser
from nano_opd.system.device import has_compiler, keep_freed_memory
from nano_opd.system.fast_rollout import sampler

Device, Dtype, Rows = torch.device, torch.dtype, list[dict]
Product = tuple[int, int, int, int]  # (batch, m, k, n): so many products (m, k) @ (k, n)
KINDS = {"mm": "products", "layer_norm": "norms", "softmax": "softmax", "gelu": "GELU", "adamw": "AdamW"}
KINDS |= dict.fromkeys(("copy", "cat", "embedding", "index", "gather", "scatter"), "copies")  # part of a name → kind
TRAIN = [str(ROOT / "train.py"), "--method", "opdplus"]  # what `busy_run` times
STEPS_IN_A_TURN, TURNS = 4, 5  # of `busy`
COLUMNS = "size;B;phase;compile;tokens/s;ms;floor, ms;time / floor;calls;calls per token;peak, MB".split(";")


def forward_products(c: GPTConfig, B: int, T: int, S: int, logits: int) -> list[Product]:
    """Every product of one forward: T tokens per row that attend to S positions, logits of the last `logits`."""
    C, H, D = c.n_embd, c.n_head, c.n_embd // c.n_head
    attention = [(1, B * T, C, 3 * C), (B * H, T, D, S), (B * H, T, S, D), (1, B * T, C, C)]
    mlp = [(1, B * T, C, 4 * C), (1, B * T, 4 * C, C)]
    return c.n_layer * (attention + mlp) + [(1, B * logits, C, c.vocab_size)]


def phase_products(student: GPTConfig, teacher: GPTConfig, B: int, P: int, R: int) -> dict[str, list[list[Product]]]:
    """The products that each phase needs, forward by forward; a backward belongs to its forward."""
    T = P + R - 1
    score = forward_products(student, B, T, T, R)
    backward = [grad for b, m, k, n in score for grad in ((b, m, n, k), (b, k, m, n))]  # dY Wᵀ and Xᵀ dY
    decode = [forward_products(student, B, 1, S, 1) for S in range(P, P + R)]
    rollout = [forward_products(student, B, P - 1, P - 1, 0)[:-1], *decode]
    step = [*rollout, forward_products(teacher, B, T, T, R), score + backward]
    return {"rollout": rollout, "score": [score], "update": [score + backward], "step": step}


def floor(passes: list[list[Product]], device: Device, dtype: Dtype) -> Callable[[], None]:
    """A function that runs the products and nothing else; a forward has its weights, keys and values side by side."""
    new = lambda size: torch.randn(size, device=device, dtype=dtype)
    products = [product for forward in passes for product in forward]
    x, y = (new(max(b * m * size for b, m, *sizes in products for size in sizes)) for _ in range(2))
    largest = max(b * k * n for b, m, k, n in products)
    pool = new(max(largest, min(2**28, sum(b * k * n for b, m, k, n in max(passes, key=len)))))  # 1 GiB is no cache
    calls = []
    for forward in passes:
        start = 0
        for b, m, k, n in forward:
            start = start if start + b * k * n <= len(pool) else 0
            w = pool[start : start + b * k * n].view(b, n, k).mT
            start += b * k * n
            operands = x[: b * m * k].view(b, m, k), w, y[: b * m * n].view(b, m, n)
            calls.append((torch.bmm, *operands) if b > 1 else (torch.mm, *(operand[0] for operand in operands)))

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
    return lambda kept=calls: graph.replay()  # a graph holds addresses, not tensors


def bandwidth(device: Device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    a, b = torch.empty(2, 2**28, device=device)
    return 2 * a.nbytes / np.median(take_turns({"copy": lambda: a.copy_(b)}, device, 1)["copy"])


def speed(layers: int, width: int, B: int, device: Device, dtype: Dtype, copy_rate=np.inf, seconds=8.0) -> Rows:
    """One row for each phase and --compile, beside its floor."""
    pair = new_pair(layers, width, P + R, device)
    passes = phase_products(*(model.config for model in pair), B, P, R)
    floors = {(name, "floor"): floor(products, device, dtype) for name, products in passes.items()}
    rows, times = bench.measure(*pair, B, dtype, seconds, floors)
    for row in rows:
        name, taken = row["phase"], times[row["phase"], row["compile"]]
        to_read = sum(b * k * n for products in passes[name] for b, m, k, n in products) * dtype.itemsize
        lowest = np.maximum(times[name, "floor"], to_read / copy_rate)
        row |= {"floor, ms": 1e3 * np.median(lowest), "time / floor": paired_ratio(taken, lowest)}
        row["calls per token"] = row["calls"] / R if name == "rollout" else None
    return [{column: row[column] for column in COLUMNS} for row in rows]


def vocabulary(device: Device, dtype: Dtype, B: int = 8, T: int = 256, V: int = 50257) -> Rows:
    """Log-probs of sampled tokens at GPT-2's vocabulary: `response_logprobs`, and with all of (B, T, V) in float32."""
    model, tokens, whole, rows = new_model(2, 256, T, device, V), torch.randint(V, (B, T)), "the whole (B, T, V)", []
    model.precision, tokens = dtype, tokens.to(device)
    ways = {
        "response_logprobs": lambda: response_logprobs(model, tokens, P),
        whole: lambda: logprobs_of(tokens[:, P:], response_logits(model, tokens, P).float()),
    }
    backward = lambda way: lambda: way().sum().backward()
    for phase, run_of in {"forward": torch.no_grad(), "forward + backward": backward}.items():
        runs = {name: run_of(way) for name, way in ways.items()}
        times = take_turns(runs, device, 0, turns=4)
        for name, run in runs.items():
            model.zero_grad()
            ratio = paired_ratio(times[name], times[whole]) if name != whole else None
            row = {"log-probs": name, "phase": phase, "ms": 1e3 * np.median(times[name]), "time / whole": ratio}
            rows.append(row | {"peak, MB": observe(run, device)[1]})
    return rows


def peers(layers: int, width: int, B: int, device: Device, dtype: Dtype, seconds: float = 8) -> Rows:
    """Ours, ours without its cache, `generate` for a GPT-2 of the same size; ratios of tokens/s, ours over theirs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.compiler.reset()
    model, prompts = new_model(layers, width, P + R, device), torch.randint(VOCAB_SIZE, (B, P), device=device)
    model.precision = dtype
    heads, shape = model.config.n_head, {"vocab_size": VOCAB_SIZE, "n_positions": P + R, "n_layer": layers}
    config = GPT2Config(**shape, n_embd=width, n_head=heads, bos_token_id=None, eos_token_id=None)
    gpt2 = GPT2LMHeadModel(config).to(device, dtype).eval()
    knobs = {"do_sample": True, "top_k": 0, "min_new_tokens": R, "max_new_tokens": R, "pad_token_id": 0}

    @torch.no_grad()
    def without_cache() -> torch.Tensor:
        tokens = prompts
        for _ in range(R):
            probs = model(tokens, logits_from=tokens.shape[1] - 1)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
        return tokens

    ways = {"sample": "off" if device.type == "cpu" else "auto"}
    if device.type == "cpu" and has_compiler(device):
        ways["sample, compiled"] = "on"
    ours = {name: lambda way=way: sampler(device, way)(model, prompts, R).tokens for name, way in ways.items()}
    generate = lambda: gpt2.generate(prompts, attention_mask=torch.ones_like(prompts), **knobs)
    others = {"the same without a cache": without_cache, "Hugging Face generate": generate}
    times, rows = take_turns(ours | others, device, seconds), []
    for name, taken in times.items():
        ratios = {f"{mine} / this": paired_ratio(taken, times[mine]) if name not in ours else None for mine in ours}
        row = {"size": f"{layers}×{width}", "B": B, "generation": name, "tokens/s": round(B * R / np.median(taken))}
        rows.append(row | ratios)
    return rows


def precision(width: int, B: int, device: Device, seconds: float = 3) -> Rows:
    """bfloat16 weights and autocast against float32: one product (B·31, C) @ (C, 4C), and an update of two layers."""
    x, w = torch.randn(B * (P + R - 1), width, device=device), torch.randn(width, 4 * width, device=device)
    x_half, w_half, half = x.bfloat16(), w.bfloat16(), torch.bfloat16
    models = [new_model(2, width, P + R, device) for _ in range(3)]
    models[1].bfloat16()
    update = lambda model, dtype: phases(model, model, B, P, R, dtype)["update"]
    ways = {
        "product": [lambda: x @ w, lambda: x_half @ w_half, torch.autocast(device.type, half)(lambda: x @ w)],
        "update": list(map(update, models, (torch.float32, torch.float32, half))),
    }
    rows = []
    for what, runs in ways.items():
        times = take_turns(dict(zip(("float32", "weights", "autocast"), runs)), device, seconds)
        row = {"width": width, "what": what, "float32, ms": 1e3 * np.median(times["float32"])}
        row |= {f"{kind} / float32": paired_ratio(times[kind], times["float32"]) for kind in ("weights", "autocast")}
        with torch.profiler.profile() as profile:
            runs[2]()
        operators = profile.key_averages()
        casts = sum(e.cpu_time_total for e in operators if e.key == "aten::_to_copy")
        rows.append(row | {"of autocast: casts": casts / sum(e.self_cpu_time_total for e in operators)})
    return rows


def operators(B: int, seconds: float = 8) -> Rows:
    """Where each millisecond of the default models' phases goes on a CPU, without --compile, by kind of operator.

    The profiler gives the shares, but slows what it counts; the milliseconds are those without it. "between" is Python.
    """
    runs, rows = phases(*new_pair(2, 64, P + R, torch.device("cpu")), B, P, R, compile="off"), []
    times = take_turns(runs, torch.device("cpu"), seconds)
    for phase, run in runs.items():
        taken = dict.fromkeys([*KINDS.values(), "others", "between"], 0.0)
        with torch.profiler.profile() as profile, torch.profiler.record_function("between"):
            for _ in range(5):
                run()
        for event in profile.key_averages():
            names = (kind for part, kind in KINDS.items() if part in event.key)
            taken[event.key if event.key == "between" else next(names, "others")] += event.self_cpu_time_total
        ms, whole = 1e3 * np.median(times[phase]), sum(taken.values())
        rows.append({"phase": phase, "B": B, "ms": ms} | {kind: ms * t / whole for kind, t in taken.items()})
    return rows


def scaling(axis: str, values: list[int], device: Device, dtype: Dtype, turns: int = 5) -> Rows:
    """Seconds of a step of the default models, of its rollout and of the rollout's products, by "length" or "batch"."""
    runs, rows = {}, []
    for value in values:
        rows_of, response = (32, value) if axis == "length" else (value, R)
        pair = new_pair(2, 64, P + response, device)
        products = phase_products(*(model.config for model in pair), rows_of, P, response)["rollout"]
        work = phases(*pair, rows_of, P, response, dtype)
        runs |= {("step", value): work["step"], ("rollout", value): work["rollout"]}
        runs["products of the rollout", value] = floor(products, device, dtype)
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
        step = bench.phases(*new_pair(2, 64, P + R, cpu), B, P, R, compile="off")["step"]
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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=environment(**settings), **pipes) as process:
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


NEIGHBOURS = "quiet", "beside one busy process", "beside a job of all threads"


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
                for line in processes[name].stdout:  # what --threads auto says comes before
                    if line.startswith("ready"):
                        numbers[name] = line.split()[1]
                        break
            order = list(ways)
            for _ in range(TURNS):
                for name in order:
                    print("go", file=processes[name].stdin, flush=True)
                    taken[name] += map(float, processes[name].stdout.readline().split())
                order.reverse()
            for name, values in taken.items():
                rows[name][f"{neighbour}, s"] = [float(q) for q in np.percentile(values, (50, 25, 75))]
                rows[name].setdefault("threads", []).append(numbers[name])
    for row in rows.values():
        row["threads"] = ", ".join(row.pop("threads"))  # in the last column, neighbour by neighbour
    return list(rows.values())


def busy_run(usual: int, limit: float = 250) -> Rows:
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
    measured, panels = {}, {}
    for row in rows:
        measured.setdefault(row["axis"], {}).setdefault(row["what"], []).append((row["tokens or rows"], row["s"]))
    for axis, series in measured.items():
        series = {name: np.array(points).T for name, points in series.items()}
        panels[f"s by {axis}: a step ∝ x^{exponent(*series['step']):.2f}"] = series
        if axis == "length":  # between two lengths, drawn at their geometric mean
            panels["ms per further token, by position"] = {
                name: (np.sqrt(x[1:] * x[:-1]), 1e3 * np.diff(s) / np.diff(x)) for name, (x, s) in series.items()
            }
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
    where, sizes, batches, copy_rate = (args.device, args.dtype), args.sizes, (B,), np.inf
    if args.device.type == "cuda":
        batches, copy_rate = (128, 512, 1024, 4096), bandwidth(args.device)
    axes = {"length": [2**n for n in range(4, 10)], "batch": [2**n for n in range(4, 11)]}
    tables = {
        "speed": [lambda s=s, b=b: speed(*s, b, *where, copy_rate) for s in sizes for b in batches],
        "vocabulary": [lambda: vocabulary(*where)],
        "peers": [lambda s=s: peers(*s, B, *where) for s in sizes],
        "precision": [lambda w=w: precision(w, B, args.device) for w in (64, 128, 256, 384, 768)],
        "operators": [lambda: operators(B)],
        "scaling": [lambda a=a: scaling(*a, *where) for a in axes.items()],
        "busy": [lambda: busy(args.threads)],
        "busy_run": [lambda: busy_run(args.threads)],
    }
    asked = [name for name in ("peers", "precision", "scaling", "operators", "busy") if getattr(args, name)]
    asked += ["busy_run"] if args.busy else []
    for name in asked or ["speed", "vocabulary"]:
        rows = []
        for measure in tables[name]:
            try:
                rows += measure()
            except torch.OutOfMemoryError as error:
                print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
        bench.publish(name, rows, args)
        if name == "scaling":
            rounded = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
            (args.json.parent / "scaling.csv").write_text(
                "\n".join(map(",".join, [rows[0], *rounded])) + "\n", encoding="utf-8"
            )
            figures.save(scaling_figure(rows), args.json.parent / "scaling.png")


if __name__ == "__main__":
    main()
