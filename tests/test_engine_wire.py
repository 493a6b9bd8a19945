"""What travels between stages: everything round trips, and nonsense is refused before it is believed."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.batching.segments import Admission, SampledToken, Segment, SegmentKind, Step
from hexgen.errors import EngineError
from hexgen.request import SamplingParams, TokenLogprobs
from hexgen.worker.framing import INLINE_BYTES, FrameKind, FrameReader, Place, write_frame
from hexgen.worker.wire import decode_step, decode_tokens, encode_step, encode_tokens

_naturals = st.integers(0, 2**31 - 1)
_sequences = st.integers(0, 2**62)


def _tuples(of: st.SearchStrategy[int], least: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(of, min_size=least, max_size=12).map(tuple)


_sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.none() | st.integers(1, 1000),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=4),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop_token_ids=_tuples(st.integers(0, 1000)),
    logprobs=st.none() | st.integers(0, 20),
)
_admissions = st.builds(
    Admission,
    sequence=_sequences,
    sampling=_sampling,
    prompt_tokens=_naturals,
    pages=_tuples(_naturals),
    history=_tuples(_naturals),
    stop_token_ids=_tuples(_naturals),
)
_segments = st.builds(
    Segment,
    sequence=_sequences,
    kind=st.sampled_from(SegmentKind),
    start=st.integers(0, 2**31 - 1),
    tokens=_tuples(_naturals, 1),
    new_pages=_tuples(_naturals),
    sample=st.booleans(),
)
_steps = st.builds(
    Step,
    route=st.integers(0, 1000),
    number=st.integers(0, 2**62),
    released=_tuples(_sequences),
    admitted=st.lists(_admissions, max_size=3).map(tuple),
    segments=st.lists(_segments, max_size=5).map(tuple),
)
_logprobs = st.builds(
    TokenLogprobs,
    chosen=st.floats(-100, 0),
    top=st.lists(st.tuples(_naturals, st.floats(-100, 0)), max_size=20).map(tuple),
)
_sampled = st.builds(SampledToken, sequence=_sequences, token=_naturals, logprobs=st.none() | _logprobs)


@given(_steps)
@settings(deadline=None, max_examples=50)
def test_a_step_round_trips(step: Step) -> None:
    assert decode_step(encode_step(step)) == step


@given(st.lists(_sampled, max_size=8).map(tuple))
@settings(deadline=None, max_examples=50)
def test_tokens_round_trip(tokens: tuple[SampledToken, ...]) -> None:
    assert decode_tokens(encode_tokens(3, 2**40, tokens)) == (3, 2**40, tokens)


@given(_steps, st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_step_is_refused_or_is_another_step(step: Step, data: st.DataObject) -> None:
    header = bytearray(encode_step(step))
    at = data.draw(st.integers(0, len(header) - 1))
    header[at] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(header)))
    for damaged in (bytes(header), bytes(header[:end])):
        with suppress(EngineError):
            assert isinstance(decode_step(damaged), Step)


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=100)
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (decode_step, decode_tokens):
        with suppress(EngineError):
            decode(noise)


def test_sampling_parameters_out_of_range_are_refused() -> None:
    step = Step(0, 0, admitted=(Admission(0, SamplingParams(temperature=-1.0), 1),))
    with pytest.raises(EngineError, match="temperature"):
        decode_step(encode_step(step))


@pytest.fixture
def pair() -> tuple[socket.socket, FrameReader, socket.socket]:
    a, b = socket.socketpair()
    return a, FrameReader(b, "edge", columns=48, max_rows=4096, dtype=torch.bfloat16), b


Pair = tuple[socket.socket, FrameReader, socket.socket]


def test_frames_of_every_size_in_a_row(pair: Pair) -> None:
    writer, reader, _ = pair
    most = INLINE_BYTES // 96
    sent = [
        (bytes(n), torch.randn(rows, 48).to(torch.bfloat16) if rows else None)
        for n, rows in ((0, 0), (1, 1), (200, 16), (70_000, 3), (5, most), (300_000, most), (64 * 1024, 0), (7, 2))
    ]

    def write() -> None:
        for header, tensor in sent:
            write_frame(writer, FrameKind.STEP, header, tensor, Place.NONE if tensor is None else Place.INLINE)
        write_frame(writer, FrameKind.STOP)

    thread = threading.Thread(target=write)
    thread.start()
    for header, tensor in sent:
        frame = reader.read()
        assert frame.header == header
        assert (frame.tensor is None) == (tensor is None)
        if tensor is not None and frame.tensor is not None:
            assert torch.equal(frame.tensor, tensor)
    assert reader.read().kind is FrameKind.STOP
    thread.join()


@pytest.mark.parametrize(
    "preamble",
    [
        (0, 1, 1, 0, 0, 0, 0, 0),  # another protocol
        (0x47584548, 9, 1, 0, 0, 0, 0, 0),  # a later version
        (0x47584548, 1, 77, 0, 0, 0, 0, 0),  # an unknown kind
        (0x47584548, 1, 1, 9, 1, 0, 1, 48),  # an unknown dtype
        (0x47584548, 1, 1, 0, 1, 0, 1, 48),  # not the dtype agreed on
        (0x47584548, 1, 1, 1, 1, 0, 1, 49),  # not the hidden size
        (0x47584548, 1, 1, 1, 1, 0, 2**32 - 1, 48),  # terabytes
        (0x47584548, 1, 1, 1, 0, 2**32 - 1, 0, 0),  # a header of 4 GB
    ],
)
def test_impossible_preambles_are_refused_before_anything_is_allocated(
    pair: Pair, preamble: tuple[int, ...]
) -> None:
    writer, reader, _ = pair
    writer.sendall(struct.pack("<IBBBBIII", *preamble))
    with pytest.raises(EngineError):
        reader.read()


def test_a_peer_that_ends_in_the_middle_of_a_frame(pair: Pair) -> None:
    writer, reader, _ = pair
    writer.sendall(struct.pack("<IBBBBIII", 0x47584548, 1, 1, 0, 0, 100, 0, 0) + b"half")
    writer.close()
    with pytest.raises(EngineError, match="closed"):
        reader.read()
