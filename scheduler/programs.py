"""Linear and integer programs by PuLP with HiGHS: an installation without them plans on, and says so once."""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger("hexgen.scheduler")


def pulp_or_none() -> Any:
    """The module PuLP; None, with a warning, where it is not installed."""
    try:
        import pulp
    except ImportError:
        _warn_once("PuLP is not installed")
        return None
    return pulp


def solved(problem: Any, **options: Any) -> bool:
    """Solve in place; whether there is an answer. A solver that fails or is not installed is a warning."""
    import pulp

    try:
        problem.solve(pulp.HiGHS(msg=False, **options))
    except pulp.PulpError as error:
        _warn_once(f"HiGHS failed: {error}")
        return False
    return problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)


@functools.lru_cache(maxsize=16)
def _warn_once(reason: str) -> None:
    log.warning("planned without linear programs, so plans may be worse: %s", reason)
