"""A stream is a function of its three keys and of nothing else; what is drawn from it for an update."""

import itertools

import pytest
import torch

from nano_opd import arithmetic
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.system import config, distributed
from nano_opd.system.batches import draw_batch, draw_problems
from nano_opd.tokenizer import decode


def test_equal_keys_give_equal_draws_and_any_other_key_gives_others():
    keys = list(itertools.product([0, 1], ["rollout", "problems"], [0, 1, 2]))
    numpy_draws = {tuple(numpy_stream(*key).integers(2**60, size=4).tolist()) for key in keys}
    torch_draws = {tuple(torch.rand(4, generator=torch_stream(*key)).tolist()) for key in keys}
    assert len(numpy_draws) == len(torch_draws) == len(keys)
    torch.manual_seed(123)  # no global state takes part
    assert {tuple(torch.rand(4, generator=torch_stream(*key)).tolist()) for key in keys} == torch_draws
    assert {tuple(numpy_stream(*key).integers(2**60, size=4).tolist()) for key in keys} == numpy_draws


def test_every_rank_has_a_stream_of_its_own_where_it_asks_for_one_and_rank_0_has_that_of_a_run_alone(monkeypatch):
    def draws(purpose):
        return numpy_stream(0, purpose, 3).integers(2**60), torch.rand(1, generator=torch_stream(0, purpose, 3)).item()

    alone = draws("rollout")
    shared = set()
    own = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        shared.add(draws("rollout"))
        own.append(draws(distributed.own("rollout")))
    assert shared == {alone}
    assert len(set(own)) == 3 and own[0] == alone


def test_every_rank_draws_references_of_its_own(monkeypatch):
    """Else the three shares of a batch would cite in the same places."""
    cfg = config.Config(digits=2, batch_size=96, method="rlsd")
    device = torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    cited = []
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        cited.append(tuple("@" in decode(row) for row in draw_batch(cfg, 5, device).teacher_prompts))
    assert len(cited[0]) == 32 and len(set(cited)) == 3


@pytest.mark.parametrize("method", ["opdplus", "grpo", "rlsd"])
def test_a_batch_is_drawn_anew_for_each_update_and_shared_out_among_the_ranks(method, monkeypatch):
    cfg = config.Config(digits=2, batch_size=24, method=method)
    device = torch.device("cpu")
    copies = 1 if method == "opdplus" else 4
    problems, prompts, teacher_prompts = draw_batch(cfg, 5, device)
    assert problems[::copies] == draw_problems(cfg, "problems", 24 // copies, 5)
    assert problems == [problem for problem in problems[::copies] for _ in range(copies)]
    for problem, prompt, other in zip(problems, prompts, teacher_prompts, strict=True):
        blank = "_" * 8
        references = [arithmetic.reference(problem, style) for style in arithmetic.REFERENCES]
        assert decode(prompt) == arithmetic.prompt(problem, None if method == "opdplus" else blank)
        allowed = [None] if method == "opdplus" else references
        assert decode(other) in [arithmetic.prompt(problem, slot) for slot in allowed]
    assert draw_batch(cfg, 5, device)[0] == problems != draw_batch(cfg, 6, device)[0]
    assert torch.equal(draw_batch(cfg, 5, device)[2], teacher_prompts)
    cited = [tuple("@" in decode(row) for row in draw_batch(cfg, step, device)[2]) for step in range(6)]
    assert len(set(cited)) > (1 if method == "rlsd" else 0)  # references too are drawn anew
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(draw_batch(cfg, 5, device))
    assert sum((share[0] for share in shares), []) == problems
    assert torch.equal(torch.cat([share[1] for share in shares]), prompts)
