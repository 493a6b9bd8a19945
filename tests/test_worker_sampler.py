"""The sampler against an independent numpy reference, and against itself on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_driver import on_ranks, rank_config

from hexgen.batching.segments import Admission, SampledToken, Segment, SegmentKind, Step
from hexgen.errors import EngineError
from hexgen.model import ModelSpec
from hexgen.request import SamplingParams
from hexgen.split import RankSlice, deal
from hexgen.worker.communicator import Communicator, SoloCommunicator
from hexgen.worker.sampler import Sampler
from hexgen.worker.sampling_state import SequenceState

VOCAB = 2000


def make_sampler(
    communicator: Communicator | None = None, vocab: int = VOCAB, shares: Sequence[float] = (1,)
) -> Sampler:
    model = ModelSpec("test", "llama", 1, 8, 64, 1, 8, 8, vocab, 64)
    slices = tuple(RankSlice((0, 1), (0, 1), (0, 1), part) for part in deal(vocab, shares))
    communicator = communicator or SoloCommunicator()
    return Sampler(rank_config(model, Path(), slices, communicator.rank), communicator)


def admission(
    i: int,
    params: SamplingParams,
    prompt: Sequence[int] = (1,),
    outputs: Sequence[int] = (),
    stops: Sequence[int] = (),
) -> Admission:
    history = (*prompt, *outputs) if params.needs_history else ()
    return Admission(i, params, len(prompt), (), history, tuple(stops))


def sample(
    sampler: Sampler,
    logits: torch.Tensor,
    admissions: Sequence[Admission],
    ends: Sequence[int] | None = None,
) -> list[SampledToken] | None:
    """One step: admit, and sample row i for sequence i, at position ``ends[i]`` (default: after the prompt)."""
    at = ends or [a.prompt_tokens for a in admissions]
    segments = tuple(
        Segment(a.sequence, SegmentKind.DECODE, end - 1, (5,), (), True)
        for a, end in zip(admissions, at, strict=True)
    )
    with_history = tuple(s for s, a in zip(segments, admissions, strict=True) if not a.history)
    sampler.apply(Step(0, 0, (), tuple(admissions), with_history))
    a, b = sampler._shard
    return sampler.sample(logits[:, a:b].contiguous(), segments)


def token_of(result: list[SampledToken] | None) -> int:
    assert result is not None
    return result[0].token


def reference(raw: np.ndarray, a: Admission, end: int, u: float) -> int:
    """Straight from the definitions, over the whole vocabulary, in float64."""
    p, x = a.sampling, raw.astype(np.float64).copy()
    for token, bias in p.logit_bias.items():
        x[token] += bias
    prompt, outputs = a.history[: a.prompt_tokens], a.history[a.prompt_tokens :]
    for token in set(a.history):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in outputs:
        x[token] -= p.frequency_penalty
    for token in set(outputs):
        x[token] -= p.presence_penalty
    if end - len(prompt or range(a.prompt_tokens)) < p.min_tokens:
        x[list(a.stop_token_ids)] = -np.inf
    if p.greedy:
        return int(x.argmax())
    order = np.lexsort((np.arange(x.size), -x))
    x = x[order] / p.temperature
    if p.top_k is not None:
        x[p.top_k :] = -np.inf
    w = np.exp(x - x[0])
    w /= w.sum()
    before = np.concatenate(([0.0], w.cumsum()[:-1]))
    w[before >= p.top_p] = 0
    w /= w.sum()
    w[w < p.min_p * w[0] * (1 - 1e-12)] = 0
    w /= w.sum()
    return int(order[min(np.searchsorted(w.cumsum(), u, side="right"), np.flatnonzero(w)[-1])])


def params_strategy() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        max_tokens=st.just(8),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
        top_k=st.sampled_from([None, 1, 5, 200, 10_000]),
        min_p=st.sampled_from([0.0, 0.01, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        logit_bias=st.sampled_from([{}, {3: 5.0, 599: -100.0}]),
        min_tokens=st.sampled_from([0, 3]),
        seed=st.integers(0, 2**63 - 1),
        logprobs=st.sampled_from([None, 0, 7]),
    )


rows_strategy = st.lists(st.tuples(params_strategy(), st.sampled_from([0.05, 0.5, 4.0])), min_size=1, max_size=6)


def make_rows(
    rows: list[tuple[SamplingParams, float]], seed: int
) -> tuple[torch.Tensor, list[Admission], list[int]]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(rows), VOCAB)).astype(np.float32)
    admissions, ends = [], []
    for i, (params, scale) in enumerate(rows):
        logits[i] *= scale
        outputs = [int(t) for t in generator.integers(0, VOCAB, size=2)] * 2
        admissions.append(
            admission(
                i,
                params,
                prompt=(7, 8, int(logits[i].argmax())),
                outputs=outputs,
                stops=(int(logits[i].argmax()), 3),
            )
        )
        ends.append(3 + (len(outputs) if params.needs_history else 1))
    return torch.from_numpy(logits), admissions, ends


@settings(deadline=None, max_examples=60)
@given(rows=rows_strategy, seed=st.integers(0, 2**32))
def test_equals_the_definitions(rows: list[tuple[SamplingParams, float]], seed: int) -> None:
    logits, admissions, ends = make_rows(rows, seed)
    sampler = make_sampler()
    result = sample(sampler, logits, admissions, ends)
    assert result is not None
    for i, token in enumerate(result):
        u = sampler._sequences[i].uniform(ends[i])
        assert token.token == reference(logits[i].numpy(), admissions[i], ends[i], u)


@pytest.mark.parametrize("shares", [(1, 1), (5, 1, 3), (1, 1, 1, 1, 1, 1, 1), (1000, 1)])
def test_sharded_equals_single(shares: tuple[float, ...]) -> None:
    """Batches of every mixture, on every split of the vocabulary (the last one leaves a rank nothing)."""
    cases: list[tuple[torch.Tensor, list[Admission], list[int]]] = []
    generator = np.random.default_rng(1)
    for case in range(25):
        rows = []
        for _ in range(int(generator.integers(1, 7))):
            rows.append(
                (
                    SamplingParams(
                        max_tokens=8,
                        temperature=float(generator.choice([0.0, 0.4, 1.0, 2.0])),
                        top_p=float(generator.choice([1.0, 0.95, 0.5])),
                        top_k=[None, None, 1, 40, 300][int(generator.integers(5))],
                        min_p=float(generator.choice([0.0, 0.0, 0.05])),
                        repetition_penalty=float(generator.choice([1.0, 1.2])),
                        frequency_penalty=float(generator.choice([0.0, 0.5])),
                        logit_bias={} if generator.random() < 0.5 else {2: 3.0, 500: 3.0},
                        min_tokens=int(generator.choice([0, 4])),
                        seed=int(generator.integers(2**40)),
                        logprobs=[None, 0, 5][int(generator.integers(3))],
                    ),
                    float(generator.choice([0.05, 0.3, 3.0])),
                )
            )
        cases.append(make_rows(rows, case))

    def run(communicator: Communicator) -> tuple[list[list[SampledToken] | None], int]:
        sampler = make_sampler(communicator, shares=shares if communicator.size > 1 else (1,))
        results = []
        for step, (logits, admissions, ends) in enumerate(cases):
            sampler.apply(Step(0, step, released=tuple(range(10))))
            results.append(sample(sampler, logits, admissions, ends))
        return results, sampler.gathered_rows

    single, _ = run(SoloCommunicator())
    sharded = on_ranks(len(shares), run)
    for others, _ in sharded[1:]:
        assert others == [None] * len(cases)
    assert sharded[0][1] > 0, "no row was gathered whole: the fallback went untested"
    for expected, found in zip(single, sharded[0][0], strict=True):
        assert expected is not None
        assert found is not None
        for a, b in zip(expected, found, strict=True):
            assert (a.sequence, a.token) == (b.sequence, b.token)
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs is not None and b.logprobs is not None:
                assert a.logprobs.chosen == pytest.approx(b.logprobs.chosen, abs=1e-5)
                assert [v for _, v in a.logprobs.top] == pytest.approx([v for _, v in b.logprobs.top], abs=1e-5)


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [450, 77, 300]] = 1.0
    plain = admission(0, SamplingParams(temperature=0.0))
    reported = admission(0, SamplingParams(temperature=0.0, logprobs=2))

    def run(communicator: Communicator) -> list[int]:
        results = []
        for case in (plain, reported):
            sampler = make_sampler(communicator, shares=(1,) * communicator.size)
            results += [t.token for t in sample(sampler, logits, [case]) or []]
        return results

    assert run(SoloCommunicator()) == [77, 77]
    assert on_ranks(3, run)[0] == [77, 77]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=0),
        SamplingParams(temperature=0.7, top_k=20, seed=0),
        SamplingParams(temperature=1.3, top_p=0.8, seed=0),
        SamplingParams(temperature=1.0, min_p=0.2, seed=0),
    ],
)
def test_the_distribution_is_the_softmax(params: SamplingParams) -> None:
    """Chi-square of 4000 draws over positions and seeds, against probabilities worked out in float64."""
    vocab, draws = 150, 4000
    raw = np.random.default_rng(3).normal(size=vocab).astype(np.float32) * 2
    order = np.argsort(-raw)
    w = np.exp((raw[order].astype(np.float64) - raw.max()) / params.temperature)
    w[params.top_k or vocab :] = 0
    w /= w.sum()
    w[np.concatenate(([0.0], w.cumsum()[:-1])) >= params.top_p] = 0
    w[w < params.min_p * w[0]] = 0
    w /= w.sum()
    sampler = make_sampler(vocab=vocab)
    counts = np.zeros(vocab)
    batch = 100
    logits = torch.from_numpy(raw).expand(batch, vocab).contiguous()
    for step in range(draws // batch):
        many = [admission(i, SamplingParams(**{**_fields(params), "seed": i})) for i in range(batch)]
        sampler.apply(Step(0, step, released=tuple(range(batch))))
        for token in sample(sampler, logits, many, [1 + step] * batch) or []:
            counts[token.token] += 1
    counts = counts[order]
    assert counts[w == 0].sum() == 0
    expected = w * draws
    big = expected >= 5
    observed = np.append(counts[big], counts[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi2 = ((observed - wanted) ** 2 / wanted).sum()
    freedom = wanted.size - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}


def test_a_seed_fixes_the_text_whatever_the_batch() -> None:
    """The same request alone, in a batch, and admitted again after a preemption."""
    generator = np.random.default_rng(5)
    logits = torch.from_numpy(generator.normal(size=(12, VOCAB)).astype(np.float32))
    params = SamplingParams(temperature=1.0, seed=99, max_tokens=20)

    def one(at: int, rows: int) -> int:
        others = [admission(i, SamplingParams(temperature=0.9, seed=i)) for i in range(1, rows)]
        batch = torch.cat([logits[at : at + 1], torch.randn(rows - 1, VOCAB)])
        result = sample(make_sampler(), batch, [admission(0, params), *others], [1 + at] * rows)
        assert result is not None
        return result[0].token

    alone = [one(at, 1) for at in range(12)]
    assert alone == [one(at, 5) for at in range(12)]
    assert len(set(alone)) > 6
    other = SamplingParams(temperature=1.0, seed=100, max_tokens=20)
    differs = [
        token_of(sample(make_sampler(), logits[at : at + 1], [admission(0, other)], [1 + at])) for at in range(12)
    ]
    assert differs != alone


def test_history_grows_with_the_steps() -> None:
    """A penalized greedy request never repeats; after a preemption it is admitted with its history and goes on."""
    logits = torch.arange(VOCAB, dtype=torch.float32).flip(0)[None] / VOCAB + 1
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, max_tokens=50)
    sampler = make_sampler()
    tokens, prompt = [], (0, 1)
    sampler.apply(Step(0, 0, (), (admission(0, params, prompt),), (Segment(0, SegmentKind.PREFILL, 0, prompt),)))
    for i in range(6):
        if i == 3:
            again = Admission(0, params, 2, (), (*prompt, *tokens))
            sampler.apply(Step(0, i, (0,), (again,), (Segment(0, SegmentKind.PREFILL, 0, (*prompt, *tokens)),)))
        segment = Segment(0, SegmentKind.DECODE, 1 + i, (tokens[-1] if tokens else 1,), (), True)
        if tokens and i != 3:
            sampler.apply(Step(0, i, segments=(segment,)))
        result = sampler.sample(logits, (segment,))
        assert result is not None
        tokens.append(result[0].token)
    assert tokens == [0, 1, 2, 3, 4, 5]
    sampler.apply(Step(0, 9, (0,)))
    assert len(sampler) == 0


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    best = int(logits.argmax())
    params = SamplingParams(temperature=0.0, logit_bias={best: -100.0, 17: 100.0}, logprobs=20)
    result = sample(make_sampler(), logits, [admission(0, params)])
    assert result is not None
    assert result[0].logprobs is not None
    expected = logits[0].log_softmax(-1)
    assert result[0].token == 17
    assert result[0].logprobs.chosen == pytest.approx(float(expected[17]), abs=1e-5)
    values, ids = expected.topk(20)
    assert [i for i, _ in result[0].logprobs.top] == ids.tolist()
    assert [v for _, v in result[0].logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_min_tokens_hold_back_the_stop_ids() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 9] = 5.0, 4.0
    params = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=8)
    tokens = [
        token_of(sample(make_sampler(), logits, [admission(0, params, (1, 1), stops=(2,))], [2 + i]))
        for i in range(5)
    ]
    assert tokens == [9, 9, 9, 2, 2]


@pytest.mark.parametrize("vocab", [5, 128, 129, 20_000])
def test_any_vocabulary(vocab: int) -> None:
    """Smaller than the candidates, and large enough for selection in blocks."""
    generator = np.random.default_rng(vocab)
    raw = generator.normal(size=vocab).astype(np.float32)
    for seed in range(20):
        case = admission(
            0, SamplingParams(temperature=1.0, top_p=0.9 if seed % 2 else 1.0, seed=seed, logprobs=20)
        )
        sampler = make_sampler(vocab=vocab)
        result = sample(sampler, torch.from_numpy(raw)[None], [case])
        assert result is not None
        assert result[0].token == reference(raw, case, 1, sampler._sequences[0].uniform(1))
        logprobs = result[0].logprobs
        assert logprobs is not None
        assert [id_ for id_, _ in logprobs.top] == np.argsort(-raw)[:20].tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5])
def test_a_flat_row_draws_all_over(top_p: float) -> None:
    """All logits equal: only ids order the candidates, and the nucleus is the first part of them."""
    sampler = make_sampler()
    cases = [admission(i, SamplingParams(temperature=1.0, top_p=top_p, seed=i)) for i in range(200)]
    tokens = [t.token for t in sample(sampler, torch.zeros(200, VOCAB), cases) or []]
    uniform = [sampler._sequences[i].uniform(1) for i in range(200)]
    assert tokens == pytest.approx([u * top_p * VOCAB for u in uniform], abs=1.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_overflowed_row_harms_nobody_else(bad: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[1] = bad
    cases = [admission(i, SamplingParams(temperature=1.0, seed=i, logprobs=1)) for i in range(3)]
    clean = sample(make_sampler(), logits[[0, 2]], [cases[0], cases[2]])
    mixed = sample(make_sampler(), logits, cases)
    assert clean is not None
    assert mixed is not None
    assert [clean[0], clean[1]] == [mixed[0], mixed[2]]
    assert 0 <= mixed[1].token < VOCAB


def test_all_banned_is_no_crash() -> None:
    case = admission(0, SamplingParams(temperature=1.0, min_tokens=2, max_tokens=4, seed=0), stops=range(4))
    result = sample(make_sampler(vocab=4), torch.zeros(1, 4), [case])
    assert result is not None
    assert 0 <= result[0].token < 4


def test_what_does_not_fit_is_refused() -> None:
    sampler = make_sampler()
    segment = Segment(4, SegmentKind.DECODE, 0, (1,), (), True)
    with pytest.raises(EngineError, match="does not know sequence 4"):
        sampler.sample(torch.zeros(1, VOCAB), (segment,))
    with pytest.raises(EngineError, match="logits of shape"):
        sampler.sample(torch.zeros(1, VOCAB - 1), (segment,))


def test_the_generator_is_uniform() -> None:
    state = SequenceState.admit(admission(0, SamplingParams(seed=1)), (0, 10))
    values = np.array([state.uniform(1 + i) for i in range(4000)])
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 200.0) ** 2 / 200).sum() < 19 + 4 * np.sqrt(38)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.05
    assert (
        len({SequenceState.admit(admission(0, SamplingParams(seed=s)), (0, 10)).uniform(1) for s in range(500)})
        == 500
    )
