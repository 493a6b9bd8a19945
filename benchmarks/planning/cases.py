"""The published clusters, each with the models and the workload that it is planned for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hexgen.cluster import Cluster, load_cluster
from hexgen.model import ModelSpec, load_model
from hexgen.workload import Lengths, Workload
from planning.settings import SPECS

# Conversations of the Azure LLM inference trace of 2023, filtered as Helix does (ASPLOS'25, section 6.1): mean and
# largest lengths. Helix's cluster files name it; clusters of others are given it too, so that one table is read.
CONVERSATIONS = Workload(prompt_tokens=Lengths(mean=763.1, max=2047), output_tokens=Lengths(mean=232.4, max=1000))
# The Helix clusters serve two models in its paper, and the sub-clusters of section 6.3 the larger one.
_SECOND_MODEL = ("helix-single24", "helix-distributed24", "helix-hetero42")
_PREFIXES = ("hexgen", "helix", "llmpq")
# Those that papers' claims are about come first: a run that is stopped has them.
_FIRST = (
    "helix-single24",
    "helix-distributed24",
    "helix-hetero42",
    "hexgen-full58",
    "hexgen-half30",
    "hexgen-homogeneous16",
    "hexgen-asym-example8",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One cluster serving one model. ``name`` tells it from others."""

    name: str
    cluster: Cluster
    model: ModelSpec
    workload: Workload


def case(cluster: Cluster, model: ModelSpec, workload: Workload | None = None, name: str | None = None) -> Case:
    asked = workload or cluster.workload or CONVERSATIONS
    return Case(name or f"{cluster.name}/{model.name}", cluster, model, asked)


def published(name: str, model: str | None = None) -> Case:
    """The cluster of that file with its own model, or another. Raises ``SpecError`` where it names none."""
    cluster = load_cluster(SPECS / f"{name}.yaml")
    return case(cluster, load_model(model or cluster.model or ""))


def all_published(quick: bool = False) -> tuple[list[Case], list[str]]:
    """Every published cluster with its model, and the names of those that no built-in model is given for."""
    names = sorted(path.stem for path in SPECS.glob("*.yaml") if path.stem.startswith(_PREFIXES))
    names = [*_FIRST, *(name for name in names if name not in _FIRST)]
    if quick:
        names = ["helix-a100x4", "hexgen-asym-example8", "llmpq-1"]
    found: list[Case] = []
    without: list[str] = []
    for name in names:
        cluster = load_cluster(SPECS / f"{name}.yaml")
        if cluster.model is None:
            without.append(name)
            continue
        found.append(case(cluster, load_model(cluster.model)))
        if name in _SECOND_MODEL:
            found.append(case(cluster, load_model("llama-1-30b")))
    return found, without


def priced(cluster: Cluster) -> float | None:
    """USD an hour of all its nodes; None where one has no price."""
    prices = [node.price_usd_h for node in cluster.nodes]
    known = [price for price in prices if price is not None]
    return sum(known) if len(known) == len(prices) else None


def with_workload(found: Case, workload: Workload) -> Case:
    return dataclasses.replace(found, workload=workload)
