"""Lengths of prompts and outputs: the distribution of a given mean, 99th percentile and maximum; its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from hexgen.errors import SpecError
from hexgen.workload import Lengths

_NORMAL = NormalDist()
_Z99 = _NORMAL.inv_cdf(0.99)
_TOLERANCE = 1e-3  # of the 99th percentile, relative


@dataclass(frozen=True, slots=True)
class LogNormal:
    """``exp(N(mu, sigma^2))``, cut off above ``most``. Lengths of real requests are close to it: heavy-tailed,
    positive, and their logarithms are bell-shaped.
    """

    mu: float
    sigma: float
    most: float

    @property
    def mean(self) -> float:
        """Of the truncated distribution (Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 1,
        chapter 14).
        """
        if math.isinf(self.most):
            return math.exp(self.mu + self.sigma**2 / 2)
        z = (math.log(self.most) - self.mu) / self.sigma
        return math.exp(self.mu + self.sigma**2 / 2 + _log_phi(z - self.sigma) - _log_phi(z))

    @property
    def second_moment(self) -> float:
        """The mean of squares, by the same source."""
        if math.isinf(self.most):
            return math.exp(2 * self.mu + 2 * self.sigma**2)
        z = (math.log(self.most) - self.mu) / self.sigma
        return math.exp(2 * self.mu + 2 * self.sigma**2 + _log_phi(z - 2 * self.sigma) - _log_phi(z))

    @property
    def inside(self) -> float:
        """The share of the distribution that is not cut off."""
        return 1.0 if math.isinf(self.most) else math.exp(_log_phi((math.log(self.most) - self.mu) / self.sigma))

    def quantile(self, share: float, inside: float | None = None) -> float:
        """``inside``: as above, where it is known already. ``share`` is kept away from 0 and 1."""
        share = min(max(share * (self.inside if inside is None else inside), 1e-300), 1 - 1e-16)
        return min(self.most, math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(share)))


def fit(lengths: Lengths, where: str = "lengths") -> LogNormal | None:
    """The truncated log-normal with these figures; None where only a mean is given: every length equals it.

    Without a 99th percentile, the maximum is taken for that of the distribution before it is cut off. Raises
    ``SpecError`` where no log-normal has the mean and the percentile.
    """
    most = float(lengths.max) if lengths.max is not None else math.inf
    if lengths.p99 is None and lengths.max is None:
        return None
    if lengths.p99 is not None and not lengths.mean <= lengths.p99 <= most:
        raise SpecError(
            f"the 99th percentile ({lengths.p99:g}) must lie between the mean ({lengths.mean:g}) and the maximum",
            where=where,
        )
    if lengths.mean >= most or (lengths.p99 is not None and lengths.p99 <= lengths.mean):
        return None
    if lengths.p99 is None:
        return _with_mean(lengths.mean, _sigma_of_tail(most / lengths.mean), most)
    if math.isinf(most):
        sigma = _sigma_of_tail(lengths.p99 / lengths.mean)
        found = _with_mean(lengths.mean, sigma, most)
    else:
        found = _with_p99(lengths.mean, lengths.p99, most)
    if abs(found.quantile(0.99) / lengths.p99 - 1) > 0.01:
        raise SpecError(
            f"no log-normal of mean {lengths.mean:g} has a 99th percentile of {lengths.p99:g}"
            + ("" if math.isinf(most) else f" below {most:g}"),
            where=where,
            remedy=f"the nearest is {found.quantile(0.99):.0f}; or simulate a trace of real lengths",
        )
    return found


@lru_cache(maxsize=1 << 10)
def mean_age(lengths: Lengths) -> float:
    """The mean position, from 0, of a token picked at random among those of all requests: E[x^2] / (2 E[x]).

    It is half the mean where all lengths are equal, and more where they differ: long requests have more tokens,
    and whoever looks at a busy server meets them more often (length-biased sampling; Cox, Renewal Theory, 1962).
    Percentiles that no distribution has are the simulator's to refuse; here the mean alone counts then.
    """
    try:
        found = fit(lengths)
    except SpecError:
        found = None
    return lengths.mean / 2 if found is None else found.second_moment / (2 * found.mean)


def _sigma_of_tail(ratio: float) -> float:
    """``sigma`` of the log-normal (not cut off) whose 99th percentile is ``ratio`` times its mean.

    ln ratio = z sigma - sigma^2 / 2, which has its maximum at sigma = z; the smaller root is the lighter tail.
    """
    return _Z99 - math.sqrt(max(0.0, _Z99**2 - 2 * math.log(ratio)))


def _with_p99(mean: float, p99: float, most: float) -> LogNormal:
    """Bisection over sigma: with the mean held, a wider distribution has the larger 99th percentile, until the
    cut-off dominates.
    """
    low, high = 1e-6, 8.0
    # The percentile may fall again for very wide ones: step up to the first sigma that reaches it.
    grid = [high * step / 160 for step in range(1, 161)]
    reached = next((sigma for sigma in grid if _with_mean(mean, sigma, most).quantile(0.99) >= p99), None)
    high = high if reached is None else reached
    for _ in range(60):
        middle = (low + high) / 2
        found = _with_mean(mean, middle, most)
        if found.quantile(0.99) < p99:
            low = middle
        else:
            high = middle
    return _with_mean(mean, high, most)


def _with_mean(mean: float, sigma: float, most: float) -> LogNormal:
    if math.isinf(most):
        return LogNormal(math.log(mean) - sigma**2 / 2, sigma, most)
    low, high = math.log(mean) - sigma**2 / 2 - 1, math.log(most) + 40 * sigma + 40
    for _ in range(80):
        middle = (low + high) / 2
        if LogNormal(middle, sigma, most).mean < mean:
            low = middle
        else:
            high = middle
    return LogNormal((low + high) / 2, sigma, most)


def _log_phi(z: float) -> float:
    """The logarithm of the normal distribution function, also where it underflows (Mills' ratio)."""
    if z > -30:
        return math.log(math.erfc(-z / math.sqrt(2)) / 2)
    return -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi))
