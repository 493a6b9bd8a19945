"""Tokens and logits of the worker's model against transformers, for every family and every way of splitting."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from worker_driver import LocalRank, greedy_batch, on_ranks

from hexgen.worker.communicator import Communicator, SoloCommunicator

# From one token to several chunks; longer than mistral's window and than the original context of dynamic and yarn.
PROMPT_LENGTHS = (1, 6, 23, 41)
MAX_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def _make(directory: Path, variant: str) -> Path:
    return oracle.make_checkpoint(directory / variant, variant)


def prompts() -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(3, 101) for _ in range(n)] for n in PROMPT_LENGTHS]


@cache
def expected(path: Path) -> list[list[int]]:
    return [oracle.greedy(path, prompt, MAX_TOKENS) for prompt in prompts()]


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_every_family_alone(checkpoints: Path, variant: str) -> None:
    path = _make(checkpoints, variant)
    rank = LocalRank(path, SoloCommunicator())
    assert greedy_batch(rank, prompts(), MAX_TOKENS) == expected(path)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_logits_of_every_family(checkpoints: Path, variant: str) -> None:
    """In one piece, in chunks, and token by token (a whole prompt decides dynamic rope: not token by token)."""
    path, prompt = _make(checkpoints, variant), prompts()[-1]
    wanted = oracle.logits(path, prompt)
    for chunk in (len(prompt), 9, 1):
        rank = LocalRank(path, SoloCommunicator(), seed=chunk)
        rank.admit(0, len(prompt))
        for start in range(0, len(prompt), chunk):
            end = min(start + chunk, len(prompt))
            found = rank.run([rank.segment(0, start, prompt[start:end])])
            error = (found[0] - wanted[end - 1]).abs().max() / wanted[end - 1].abs().max()
            assert error < 1e-4


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_every_family_on_five_ranks(checkpoints: Path, variant: str) -> None:
    path = _make(checkpoints, variant)
    results = on_ranks(5, lambda c: greedy_batch(LocalRank(path, c), prompts(), MAX_TOKENS))
    assert all(result == expected(path) for result in results)


@pytest.mark.parametrize(
    ("width", "shares"),
    [(2, None), (3, None), (6, None), (7, None), (12, None), (2, (5, 3)), (3, (9, 2, 1)), (4, (1, 1, 1, 40))],
)
def test_any_width_and_shares(checkpoints: Path, width: int, shares: tuple[float, ...] | None) -> None:
    """12 heads in 4 KV groups; the last shares leave ranks with hardly a column."""
    path = _make(checkpoints, "llama-wide")
    results = on_ranks(width, lambda c: greedy_batch(LocalRank(path, c, shares), prompts()[1:3], 6))
    assert all(result == [tokens[:6] for tokens in expected(path)[1:3]] for result in results)


def test_a_batch_does_not_change_the_tokens(checkpoints: Path) -> None:
    """20 sequences that start at different steps and lengths against each alone: groups, padding, page order."""
    path = _make(checkpoints, "mistral-full")
    generator = random.Random(3)
    many = [[generator.randrange(3, 101) for _ in range(generator.randrange(1, 60))] for _ in range(20)]
    together = greedy_batch(LocalRank(path, SoloCommunicator()), many, 5, chunk=11)
    alone = [greedy_batch(LocalRank(path, SoloCommunicator(), seed=i), [p], 5)[0] for i, p in enumerate(many)]
    assert together == alone


def test_old_and_new_spellings_of_the_config(tmp_path: Path) -> None:
    for variant in ("llama-linear", "llama-llama3"):
        old = oracle.make_checkpoint(tmp_path / variant, variant, old_spelling=True)
        new = oracle.make_checkpoint(tmp_path / f"{variant}-new", variant)
        one, two = (greedy_batch(LocalRank(p, SoloCommunicator()), prompts()[:2], 8) for p in (old, new))
        assert one == two == [oracle.greedy(old, prompt, 8) for prompt in prompts()[:2]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    """Stored and run in 16 bits, on one rank and on three: as near to float32 as transformers comes."""
    kind = getattr(torch, dtype)
    path = oracle.make_checkpoint(tmp_path, "qwen3", dtype=kind)
    prompt = prompts()[2]
    exact, reference = oracle.logits(path, prompt)[-1], oracle.logits(path, prompt, kind)[-1]
    allowed = 2 * float((reference - exact).abs().max()) + 0.05 * float(exact.abs().max())

    def run(communicator: Communicator) -> torch.Tensor:
        rank = LocalRank(path, communicator, dtype=dtype)  # type: ignore[arg-type]
        rank.admit(0, len(prompt))
        rank.run([rank.segment(0, 0, prompt[:10], sample=False)])
        return rank.run([rank.segment(0, 10, prompt[10:])])[0]

    assert float((run(SoloCommunicator()) - exact).abs().max()) < allowed
    for found in on_ranks(3, run):
        assert float((found - exact).abs().max()) < allowed
