"""What no placement's max-flow exceeds: every token passes every layer once, and a device sees each token once."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.cluster import Node
from hexgen.scheduler.cost import CostModel, GroupShape, StageProfile
from hexgen.scheduler.times import ENDS
from hexgen.scheduler.traffic import Mix, Traffic, mix_of

_HALVINGS = 60
_ROUNDING = 1e-9  # relative, of sums of floats: where the two sides are equal over a range, it must not decide
Rates = tuple[float, ...]  # tokens/s by layers, from one


def flow_mix(traffic: Traffic) -> Mix:
    """The steps of a stage that is never short of work: as many sequences as a route may have."""
    return mix_of(traffic, float(traffic.max_sequences), 1)


def rates_of(profile: StageProfile, traffic: Traffic, most: int, kv_tokens: int, end: int = 0) -> Rates:
    """As far as ``kv_tokens`` fit beside the layers. ``end`` 0: in mid-route, where a stage has least to do."""
    embeds, samples = ENDS[end]
    fits = min(most, profile.max_layers(kv_tokens, embeds, samples))
    mix = flow_mix(traffic)
    return tuple(profile.flow_tokens_s(n, mix, end) for n in range(1, fits + 1))


def flow_bound_tokens_s(
    cost: CostModel, nodes: Sequence[Node], traffic: Traffic, *, in_turns: bool = False
) -> float:
    """The largest R with: sum over devices of max_n [n x min(rate(n), R)] >= layers x R.

    A stage of n layers does at most n token-layers for each of the R tokens a second that there are, and at most
    n x rate(n); R tokens/s need layers x R. Divided by R the left side only falls, so bisection finds the largest.
    Groups are within nodes, and each node is cut as suits it best; links are not looked at. ``in_turns``: a stage
    may use more or fewer of its layers in turns, each at the rate of that many, and holds a page of KV at least;
    without, it uses those that it has, and holds one mean request.
    """
    layers = cost.model.layers
    kv_tokens = traffic.page_size if in_turns else traffic.peak_tokens
    kinds: dict[tuple[Rates, ...], int] = {}  # by width, from one; as many as a node has devices
    for node in nodes:
        if node.count:
            widths = tuple(
                rates_of(cost.profile(GroupShape((node.device,) * width, node.link)), traffic, layers, kv_tokens)
                if width <= cost.model.heads
                else ()
                for width in range(1, node.count + 1)
            )
            kinds[widths] = kinds.get(widths, 0) + 1
    fastest = (max((rate for rates in widths for rate in rates), default=0.0) for widths in kinds)
    low, high = 0.0, sum(rate * len(widths) * n for rate, (widths, n) in zip(fastest, kinds.items(), strict=True))

    def holds(tokens_s: float) -> bool:
        done = sum(n * _node_token_layers(widths, tokens_s, in_turns) for widths, n in kinds.items())
        return done >= layers * tokens_s * (1 - _ROUNDING)

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _node_token_layers(widths: Sequence[Rates], tokens_s: float, in_turns: bool) -> float:
    """The best way to cut a node into groups, by token-layers/s."""
    most = _most_in_turns if in_turns else _most_token_layers
    done = [most(rates, tokens_s) for rates in widths]
    best = [0.0]
    for devices in range(1, len(widths) + 1):
        best.append(max(best[devices - w] + done[w - 1] for w in range(1, devices + 1)))
    return best[-1]


def _most_token_layers(rates: Rates, tokens_s: float) -> float:
    return max((n * min(rate, tokens_s) for n, rate in enumerate(rates, start=1)), default=0.0)


def _most_in_turns(rates: Rates, tokens_s: float) -> float:
    """The same for a stage that divides its time: of two constraints, time and tokens, two choices suffice."""
    slow = [(rate, n * rate) for n, rate in enumerate(rates, start=1) if rate <= tokens_s]
    fast = [(rate, n * rate) for n, rate in enumerate(rates, start=1) if rate > tokens_s]
    best = max((done for _, done in slow), default=0.0)
    best = max([best, *(done * tokens_s / rate for rate, done in fast)])
    for rate, done in slow:
        for faster, more in fast:
            share = (tokens_s - rate) / (faster - rate)
            best = max(best, done + share * (more - done))
    return best
