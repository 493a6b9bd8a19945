"""Sequences that decode together, as a few numbers for all of them.

Between two changes of membership every member grows by one token a step. What a step costs and needs follows from
how often the cohort has gone round: nothing is done for each member but when it joins, leaves or ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

from hexgen.batching.sequence import SequenceState

Part = tuple["CountedSequence", int, int, bool, bool]  # sequence, first position, end, samples, decodes


class CountedSequence(SequenceState):
    """A sequence of ``known`` tokens (prompt and output so far) that ends with ``end`` of them.

    While it is in a cohort, only the cohort knows its ``computed``, ``known`` and ``last_s``.
    """

    __slots__ = ("base", "cohort", "end", "ends_at", "first", "known", "last_s", "request", "waits")

    def __init__(self, number: int, prompt: int, end: int, request: int) -> None:
        self.number = number
        self.prompt_tokens = prompt
        self.known = prompt
        self.end = end
        self.request = request
        self.computed = 0
        self.running = False
        self.waits = False  # a token of it is in flight, outside a cohort
        self.first = True  # no token has come yet
        self.last_s = 0.0  # when its last token came
        self.cohort: Cohort | None = None
        self.base = self.ends_at = 0  # in the cohort's rounds

    @property
    def arrival(self) -> int:  # type: ignore[override]
        return self.number

    @property
    def tokens(self) -> range:  # type: ignore[override]
        return range(self.known)

    @property
    def remaining(self) -> int:
        return self.known - self.computed

    @property
    def awaiting(self) -> bool:  # type: ignore[override]
        return self.waits if self.cohort is None else self.cohort.sent


class Cohort:
    """Decoding sequences in the order in which they became ready; they make one step, or wait for one.

    ``rounds``: decode steps formed so far. A member's ``base`` is what it had computed when ``rounds`` was 0, or
    would have had. ``sent``: a step with all of them is in flight.
    """

    __slots__ = (
        "_ends", "_members", "last_s", "late", "orphans", "page", "residues", "rounds", "sent", "size", "total",
    )  # fmt: skip

    def __init__(self, page: int, last_s: float) -> None:
        self.page = page
        self.size = 0
        self.rounds = 0
        self.total = 0  # tokens computed, all members together
        self.sent = False
        self.last_s = last_s  # when the members' last tokens came, but for a few
        self.orphans: list[CountedSequence] = []  # preempted while their tokens are in flight
        self._members: deque[CountedSequence] = deque()  # and some that have ended
        self.residues = [0] * page  # members by base modulo page
        self._ends: list[tuple[int, int, CountedSequence]] = []  # a heap; those that have left stay in it
        self.late: dict[CountedSequence, float] = {}  # whose last tokens came at other times

    @classmethod
    def of(cls, states: Iterable[CountedSequence], page: int, sent: bool) -> Cohort:
        """Of single sequences, in this order."""
        made: Cohort | None = None
        for state in states:
            if made is None:
                made = cls(page, state.last_s)
            made.join(state, state.last_s)
        if made is None:
            raise ValueError("a cohort has members")
        made.sent = sent
        return made

    def __iter__(self) -> Iterator[CountedSequence]:
        return (state for state in self._members if state.cohort is self)

    @property
    def left(self) -> int:
        """Rounds until the next member ends, at least."""
        return self._ends[0][0] - self.rounds

    @property
    def pages(self) -> int:
        """New pages that the next round needs."""
        return self.residues[-self.rounds % self.page]

    def advance(self) -> int:
        """One token more of each is computed. Returns the new pages that it takes."""
        pages = self.residues[-self.rounds % self.page]
        self.rounds += 1
        self.total += self.size
        return pages

    # ---- members ---------------------------------------------------------------------------------------------

    def join(self, state: CountedSequence, last_s: float, *, front: bool = False) -> None:
        computed = state.computed
        base = state.base = computed - self.rounds
        state.cohort = self
        ends_at = state.ends_at = state.end - 1 - base
        heappush(self._ends, (ends_at, state.number, state))
        self.residues[base % self.page] += 1
        self.total += computed
        self.size += 1
        if front:
            self._members.appendleft(state)
        else:
            self._members.append(state)
        if last_s != self.last_s:
            self.late[state] = last_s

    def _part(self, state: CountedSequence) -> None:
        """Write into the sequence what only the cohort knew. Whoever calls this takes it out of the order."""
        base = state.base
        computed = state.computed = base + self.rounds
        state.known = computed if self.sent else computed + 1
        state.waits = self.sent
        state.last_s = self.late.pop(state, self.last_s) if self.late else self.last_s
        state.cohort = None
        self.residues[base % self.page] -= 1
        self.total -= computed
        self.size -= 1

    def orphan(self, state: CountedSequence) -> None:
        """The sequence leaves while its token is in flight; `arrive` still tells of it."""
        self._members.remove(state)
        self._part(state)
        self.orphans.append(state)

    def dissolve(self) -> list[CountedSequence]:
        """All members, in order, each on its own."""
        members = list(self)
        for state in members:
            self._part(state)
        self._members.clear()
        self._ends.clear()
        return members

    def _pop(self, front: bool) -> CountedSequence:
        members = self._members
        while True:
            state = members.popleft() if front else members.pop()
            if state.cohort is self:
                self._part(state)
                return state

    def split(self, count: int) -> tuple[Cohort, Cohort]:
        """The first ``count`` members, and the rest. Moves the fewer of them."""
        few_first = count <= self.size - count
        moved = [self._pop(few_first) for _ in range(count if few_first else self.size - count)]
        if not few_first:
            moved.reverse()
        other = Cohort.of(moved, self.page, self.sent)
        return (other, self) if few_first else (self, other)

    def merged(self, other: Cohort) -> Cohort:
        """One of both: own members first. Moves the fewer of them."""
        if self.size >= other.size:
            for state in other.dissolve():
                self.join(state, state.last_s)
            return self
        for state in reversed(self.dissolve()):
            other.join(state, state.last_s, front=True)
        return other

    def ordered(self, order: Iterable[CountedSequence]) -> Cohort:
        """The same members in another order: ``order`` has them all, and others."""
        if not self.size:
            return self
        members = [state for state in order if state.cohort is self]
        self.dissolve()
        return Cohort.of(members, self.page, self.sent)

    # ---- tokens ----------------------------------------------------------------------------------------------

    def arrive(self, now_s: float) -> list[tuple[float, int]]:
        """The step is back. Seconds since the token before, and how many tokens came after such a time."""
        self.sent = False
        late = self.late
        if not late:
            gaps = [(now_s - self.last_s, self.size)]
        else:
            gaps = [(now_s - last_s, 1) for last_s in late.values()]
            gaps.append((now_s - self.last_s, self.size - len(late)))
            late.clear()
        self.last_s = now_s
        return gaps

    def ended(self) -> list[CountedSequence]:
        """Members whose last token has come. They are out."""
        ends, rounds = self._ends, self.rounds
        found: list[CountedSequence] = []
        while ends and ends[0][0] <= rounds:
            ends_at, _, state = heappop(ends)
            if state.cohort is self and state.ends_at == ends_at:
                self._part(state)
                found.append(state)
        if len(self._members) > 2 * self.size + 32:
            self._members = deque(self)
        return found
