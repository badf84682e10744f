"""How many threads of the CPU a run computes with: as many as are fastest while it starts.

After each operator the threads wait for each other, and a thread that waits keeps its core busy. If another program has
taken the core of one of them, all wait until the scheduler gives it back, many times in each update. On two cores,
beside one other program, two threads can then be several times slower than one. And on a machine of many cores, the
matrices of a small model are too small for all of them.

Sums over several threads differ in their last bits from sums over one. So a run keeps its number until its end, also
when it is resumed.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from nano_opd.gpt import GPT
from nano_opd.rollout import response_logprobs, sample
from nano_opd.system import distributed
from nano_opd.system.console import say
from nano_opd.tokenizer import VOCAB_SIZE

ROUNDS = 5  # measurements of each number
ENOUGH = 0.6  # seconds; no further round begins after three rounds and this time
GAIN = 0.9  # more threads must take less than this part of the time of fewer
HOPELESS = 3  # times the fastest: not measured again
LARGEST = 1e10  # floating-point operations of what is measured, so that it takes tenths of a second for a large model
MISSING = 0.3  # cores: what the threads of a run may lack before it measures again
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user has already chosen


@contextlib.contextmanager
def chosen(cfg, device: torch.device, recorded: int | None) -> Iterator[None]:
    """Compute with the run's number of threads for the length of a `with`; all ranks take that of rank 0.

    recorded  the number of the run that is resumed; None for a new one
    """
    before = torch.get_num_threads()
    number = None
    if distributed.rank() == 0:
        number = choose(cfg, device, recorded)
    torch.set_num_threads(distributed.first_value(number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose(cfg, device: torch.device, recorded: int | None) -> int:
    """Return the number of threads. Print a line if --resume or the measurement takes another than PyTorch would.

    In this order: what --resume continues, --threads, what the environment says, and what is measured to be fastest.
    Neither several processes, which share the cores, nor a GPU's host are measured.
    """
    usual = torch.get_num_threads()
    if recorded is not None:
        if recorded != usual:
            say(f"threads: {recorded}, as this run began, where PyTorch would take {usual}")
        return recorded
    if cfg.threads != "auto":
        return int(cfg.threads)
    if device.type != "cpu" or any(name in os.environ for name in SETTINGS):
        return usual
    if distributed.world_size() > 1:
        return max(1, min(usual, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    numbers = candidates(min(usual, cores()))
    if len(numbers) == 1:
        return numbers[0]
    seconds = measure(piece_of_work(cfg), numbers)
    number = fastest(seconds)
    if number != usual:
        times = ", ".join(f"{1000 * taken:.0f} ms with {n}" for n, taken in seconds.items())
        say(f"threads: {number}, where PyTorch would take {usual} (a piece of this run takes {times})")
    return number


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not say
        return os.cpu_count() or 1


def candidates(most: int) -> list[int]:
    """Return 1, 2, 4, … below `most`, and `most` itself."""
    numbers = []
    number = 1
    while number < most:
        numbers.append(number)
        number *= 2
    return [*numbers, most]


def piece_of_work(cfg) -> Callable[[], None]:
    """Return a function that does a part of what the run does: it samples tokens, scores a batch and differentiates.

    The model is of the student's size, and the batch is the run's, or smaller if the model is large. For each gradient
    it samples half of a response. An update samples a whole one, but there the teacher scores too, which takes about as
    long as the gradient; so the proportion is that of an update. The function has a model and a generator of its own,
    and leaves the random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = GPT(cfg.gpt("student"))
    size = model.config
    tokens_of_row = cfg.prompt_length + cfg.response_cap
    parameters = 12 * size.n_layer * size.n_embd**2 + size.vocab_size * size.n_embd
    operations_of_row = 6 * parameters * tokens_of_row  # forward and backward
    rows = max(1, min(cfg.batch_size, int(LARGEST / operations_of_row)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (rows, tokens_of_row), generator=generator)
    prompts = tokens[:, : cfg.prompt_length]

    def work() -> None:
        sample(model, prompts, cfg.response_cap // 2, generator)
        model.zero_grad()
        response_logprobs(model, tokens, cfg.prompt_length).sum().backward()

    return work


def measure(work: Callable[[], None], numbers: list[int]) -> dict[int, float]:
    """Return the median of the seconds that `work` takes with each number of threads.

    The numbers take turns, so that a moment in which the machine is busy falls on all. The median is taken, because
    the least would hide that threads wait for each other: now and then none of them loses its core.
    """
    before = torch.get_num_threads()
    taken = {number: [] for number in numbers}
    still_tried = list(numbers)
    work()  # the allocator has the memory from here on
    for done in range(ROUNDS):
        spent = sum(sum(times) for times in taken.values())
        if done >= 3 and spent > ENOUGH:
            break
        for number in list(still_tried):
            taken[number].append(seconds_of(work, number))
        medians = {number: statistics.median(times) for number, times in taken.items()}
        least = min(medians.values())
        still_tried = [number for number in still_tried if medians[number] < HOPELESS * least]
        if len(still_tried) == 1:
            break
        still_tried.reverse()  # so that none always comes after the same neighbour
    torch.set_num_threads(before)
    return {number: statistics.median(times) for number, times in taken.items()}


def seconds_of(work: Callable[[], None], number: int) -> float:
    """Return the seconds that `work` takes with this number of threads, which are there before the clock starts."""
    torch.set_num_threads(number)
    torch.ones(2**20).add_(1)  # large enough for all of them
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fastest(seconds: dict[int, float]) -> int:
    """Return the number of threads to take: a larger one only if it is clearly faster than a smaller one.

    A single thread stays as fast when the machine becomes busy later.
    """
    choice = min(seconds)
    for number in sorted(seconds):
        if seconds[number] < GAIN * seconds[choice]:
            choice = number
    return choice


class Watch:
    """Notices, once, that the threads of a run wait for a core that another program has.

    The threads of an undisturbed run compute, or wait on cores of their own: in each second the CPU time of the process
    grows by as many seconds as it has threads. A thread that has lost its core uses no CPU time, so some is missing.
    Beside one busy program, two threads on two cores had 1.3 seconds of CPU time in a second, and 2.0 without it. Some
    is also missing where a run waits for a disk, say. So the watch then measures whether one thread would be faster.
    """

    def __init__(self, cfg, device: torch.device):
        self.cfg = cfg
        self.number = torch.get_num_threads()
        self.over = self.number == 1 or device.type != "cpu" or distributed.world_size() > 1
        self._begin()

    def _begin(self) -> None:
        self.started = time.monotonic()
        self.cpu_before = time.process_time()

    def look(self) -> str | None:
        """Return a sentence for the user if one thread would now be clearly faster; at most once in a run."""
        elapsed = time.monotonic() - self.started
        if self.over or elapsed < 1:
            return None
        missing = self.number - (time.process_time() - self.cpu_before) / elapsed
        sentence = None
        if missing > MISSING:
            seconds = measure(piece_of_work(self.cfg), [1, self.number])
            if seconds[1] < GAIN * seconds[self.number]:
                sentence = self._sentence(seconds)
                self.over = True
        self._begin()
        return sentence

    def _sentence(self, seconds: dict[int, float]) -> str:
        times = seconds[self.number] / seconds[1]
        return (
            f"this run is slow: its {self.number} threads wait for each other, since other programs use the cores too; "
            f"one thread would now be {times:.1f} times as fast: give the next run --threads 1"
        )
