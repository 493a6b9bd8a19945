"""What steps and sampled tokens look like between stages: integers, a little JSON, nothing pickled.

A header is a count, that many little-endian 64-bit integers, and what cannot be said in integers behind them
(JSON of sampling parameters; log-probabilities as doubles). Everything is bounded and checked before it is
believed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

from hexgen.batching.segments import Admission, SampledToken, Segment, SegmentKind, Step
from hexgen.errors import EngineError, RequestError
from hexgen.protocol import sampling_from_plain, sampling_to_plain
from hexgen.request import MAX_LOGPROBS, TokenLogprobs

_COUNT = struct.Struct("<I")
_MAX_POSITION = 2**31
_MAX_SAMPLING_BYTES = 1 << 20


class _Reader:
    """Takes integers off a header from the left; ``EngineError`` where it ends too early."""

    def __init__(self, header: bytes, what: str) -> None:
        self._what = what
        if len(header) < _COUNT.size:
            raise self.wrong("shorter than its own count")
        (count,) = _COUNT.unpack_from(header)
        end = _COUNT.size + 8 * count
        if end > len(header):
            raise self.wrong("shorter than its count says")
        self._values: tuple[int, ...] = struct.unpack_from(f"<{count}q", header, _COUNT.size)
        self._at = 0
        self._rest = header[end:]

    def take(self, count: int) -> tuple[int, ...]:
        at = self._at
        if not 0 <= count <= len(self._values) - at:
            raise self.wrong("an impossible count in it")
        self._at = at + count
        return self._values[at : at + count]

    def naturals(self, count: int) -> tuple[int, ...]:
        """Positions, token ids, page numbers: at least 0, below 2**31."""
        values = self.take(count)
        if values and (min(values) < 0 or max(values) >= _MAX_POSITION):
            raise self.wrong("a number out of range in it")
        return values

    def raw(self, count: int) -> bytes:
        if not 0 <= count <= len(self._rest):
            raise self.wrong("an impossible length in it")
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def done(self) -> None:
        if self._at != len(self._values) or self._rest:
            raise self.wrong("bytes left over behind it")

    def wrong(self, why: str) -> EngineError:
        return EngineError(f"not a {self._what} of ours: {why}", where="edge")


def _pack(values: list[int], rest: bytes) -> bytes:
    return struct.pack(f"<I{len(values)}q", len(values), *values) + rest


def encode_step(step: Step) -> bytes:
    values = [step.route, step.number, len(step.released), len(step.admitted), len(step.segments), *step.released]
    blobs: list[bytes] = []
    for a in step.admitted:
        blob = json.dumps(sampling_to_plain(a.sampling), separators=(",", ":")).encode()
        blobs.append(blob)
        values += (
            a.sequence, a.prompt_tokens, len(a.pages), len(a.history), len(a.stop_token_ids), len(blob),
            *a.pages, *a.history, *a.stop_token_ids,
        )  # fmt: skip
    for s in step.segments:
        values += (s.sequence, s.kind, s.start, len(s.tokens), len(s.new_pages), s.sample, *s.tokens, *s.new_pages)
    return _pack(values, b"".join(blobs))


def decode_step(header: bytes) -> Step:
    """The step in ``header``; ``EngineError`` where it is none."""
    r = _Reader(header, "step")
    route, number, n_released, n_admitted, n_segments = r.take(5)
    released = r.take(n_released)
    admitted = tuple(_admission(r) for _ in _checked_range(r, n_admitted))
    segments = tuple(_segment(r) for _ in _checked_range(r, n_segments))
    r.done()
    return Step(route, number, released, admitted, segments)


def _checked_range(r: _Reader, count: int) -> range:
    if count < 0:
        raise r.wrong("a negative count in it")
    return range(count)  # each item takes integers, so the count is bounded by the header's length


def _admission(r: _Reader) -> Admission:
    sequence, prompt_tokens, n_pages, n_history, n_stops, n_blob = r.take(6)
    pages, history, stops = r.naturals(n_pages), r.naturals(n_history), r.naturals(n_stops)
    if n_blob > _MAX_SAMPLING_BYTES:
        raise r.wrong("sampling parameters too long")
    try:
        sampling = sampling_from_plain(json.loads(r.raw(n_blob)))
        sampling.validate()
    except (ValueError, KeyError, TypeError, AttributeError, RequestError) as error:
        raise r.wrong(f"sampling parameters: {error}") from error
    return Admission(sequence, sampling, prompt_tokens, pages, history, stops)


def _segment(r: _Reader) -> Segment:
    sequence, kind, start, n_tokens, n_pages, sample = r.take(6)
    tokens, pages = r.naturals(n_tokens), r.naturals(n_pages)
    if not tokens or not 0 <= start < _MAX_POSITION or sample not in (0, 1):
        raise r.wrong("an impossible segment in it")
    try:
        return Segment(sequence, SegmentKind(kind), start, tokens, pages, bool(sample))
    except ValueError as error:
        raise r.wrong(f"segments of a kind {kind} are unknown here") from error


def encode_tokens(route: int, number: int, tokens: Sequence[SampledToken]) -> bytes:
    """What step ``number`` of ``route`` sampled (maybe nothing)."""
    values = [route, number, len(tokens)]
    figures: list[float] = []
    for t in tokens:
        if t.logprobs is None:
            values += (t.sequence, t.token, -1)
        else:
            values += (t.sequence, t.token, len(t.logprobs.top), *(i for i, _ in t.logprobs.top))
            figures += (t.logprobs.chosen, *(p for _, p in t.logprobs.top))
    return _pack(values, struct.pack(f"<{len(figures)}d", *figures))


def decode_tokens(header: bytes) -> tuple[int, int, tuple[SampledToken, ...]]:
    """Route, step number and tokens; ``EngineError`` where it is none of these."""
    r = _Reader(header, "list of tokens")
    route, number, count = r.take(3)
    tokens: list[SampledToken] = []
    for _ in _checked_range(r, count):
        sequence, token, n_top = r.take(3)
        logprobs = None
        if n_top > MAX_LOGPROBS:
            raise r.wrong("too many log-probabilities")
        if n_top >= 0:
            ids = r.naturals(n_top)
            figures = struct.unpack(f"<{n_top + 1}d", r.raw(8 * (n_top + 1)))
            logprobs = TokenLogprobs(figures[0], tuple(zip(ids, figures[1:], strict=True)))
        tokens.append(SampledToken(sequence, token, logprobs))
    r.done()
    return route, number, tuple(tokens)
