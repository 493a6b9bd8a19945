"""The planner: predicts cost, searches, emits a plan and explains it. Needs neither torch nor Ray."""

from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.planner import plan

__all__ = ["evaluate", "plan"]
