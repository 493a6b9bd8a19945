"""Pictures of plans: complete, well-formed, harmless whatever things are called, and of bearable size."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.cluster import Cluster, Link, RegionLink
from hexgen.errors import InfeasibleError, SpecError
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.compare import Baseline
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.explain import Change, WhatIf, explain
from hexgen.scheduler.picture import page, write_page, write_plot
from hexgen.scheduler.picture.layout import layout_of
from hexgen.scheduler.picture.markup import Html, el
from hexgen.scheduler.picture.plot import rows_of
from hexgen.scheduler.picture.view import DRAWN_SINGLY, view_of
from hexgen.scheduler.planner import plan
from hexgen.scheduler.task import make_task

OPTIONS = EngineOptions(dtype="float32", max_sequences=8, token_budget=64)
VOID = {"meta", "br", "hr"}
NASTY = "<script>alert('x')</script>&\"$1$"


class Reader(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def paged(cluster: Cluster, made: Plan, others: tuple[Baseline, ...] | None = None) -> str:
    task = make_task(cluster, tiny_model(), WORKLOAD, "throughput", None, 0, "auto", made.engine)
    return page(made, cluster, explain(made, task, what_if_s=None), others)


def priced(draft: Plan, cluster: Cluster, model: ModelSpec) -> Plan:
    return dataclasses.replace(draft, predicted=evaluate(draft, cluster, model, WORKLOAD))


@settings(max_examples=25, deadline=None)
@given(cluster=clusters(), objective=st.sampled_from(["throughput", "latency", "maxflow"]))
def test_the_page_is_well_formed_and_has_every_stage_and_device(cluster: Cluster, objective: str) -> None:
    try:
        made = plan(cluster, tiny_model(), WORKLOAD, objective, options=OPTIONS)  # type: ignore[arg-type]
    except InfeasibleError:
        return
    text = paged(cluster, made)
    said = " ".join(read(text).text)
    for stage in made.stages:
        assert re.search(rf"\b{stage.name}\b", said)
    for device in cluster.devices():
        assert device.id in said
    for node in cluster.nodes:
        assert node.name in said


def test_the_page_is_self_contained_and_names_cannot_become_markup(tmp_path: Path) -> None:
    device = device_type("cpu", 4, 0.1, NASTY)
    cluster = cluster_of((device, 1), (device, 1), regions=(NASTY, "west"))
    renamed = tuple(dataclasses.replace(n, name=f"{NASTY}{i}") for i, n in enumerate(cluster.nodes))
    cluster = dataclasses.replace(cluster, name=NASTY, nodes=renamed)
    model = tiny_model()
    stages = tuple(Stage(f"s{i}{NASTY}", (2 * i, 2 * i + 2), (f"{NASTY}{i}/0",)) for i in range(2))
    draft = Plan(NASTY, cluster, stages, (Route(tuple(Hop(s.name, s.layers) for s in stages)),), OPTIONS)
    made = priced(draft, cluster, model)
    others = (Baseline(NASTY, None, NASTY), Baseline("itself", made))
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    said = explain(made, task, what_if_s=None)
    change = Change("drop node", f"drop {NASTY}", (NASTY,), None, None)
    said = dataclasses.replace(said, what_if=WhatIf(1.0, (change,), (NASTY,)))
    reader = read(page(made, cluster, said, others))
    assert "script" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert not any(name in ("src", "href", "xlink:href") for name, _ in reader.attributes)
    assert any(NASTY in text for text in reader.text)
    assert "@import" not in page(made, cluster, said)
    assert "url(" not in page(made, cluster, said)
    pytest.importorskip("matplotlib")
    write_plot(tmp_path / "plan.svg", made, cluster)
    ElementTree.parse(tmp_path / "plan.svg")


def test_markup_escapes_everything_but_markup() -> None:
    assert el("p", "<b>", Html("<i></i>"), None, 1.0, ["&"]) == "<p>&lt;b&gt;<i></i>1&amp;</p>"
    assert el("p", class_='"><x', title=None) == '<p class="&quot;&gt;&lt;x"></p>'
    assert el("rect", x=1, stroke_width=2.5) == '<rect x="1" stroke-width="2.5"/>'


def test_what_was_asked_for_is_on_the_page_and_nothing_else() -> None:
    device = device_type("cpu", 8, 0.1)
    cluster, model = cluster_of((device, 2), (device, 1)), tiny_model()
    made = plan(cluster, model, WORKLOAD, options=OPTIONS)
    assert "Compared with" not in paged(cluster, made)
    assert "What would change it" not in paged(cluster, made)
    text = paged(cluster, made, (Baseline("best single node", None, "no node alone holds it"),))
    assert "Compared with" in text
    assert "no node alone holds it" in text


# ---- many devices ---------------------------------------------------------------------------------------------


def many(pipelines: int) -> tuple[Cluster, Plan]:
    """Pipelines of two nodes of eight, in two regions; one more node of each kind is unused."""
    fast, slow = device_type("cpu", 40, 0.2, "fast"), device_type("cpu", 40, 0.1, "slow")
    kinds = [(fast, 8), (slow, 8)] * (pipelines + 1)
    cluster = cluster_of(
        *kinds,
        regions=("east", "west") * (pipelines + 1),
        region_links=(RegionLink(("east", "west"), Link(1e9, 1e-3)),),
    )
    model = tiny_model(heads=8, kv_heads=8)
    stages: list[Stage] = []
    routes: list[Route] = []
    for i in range(pipelines):
        a = Stage(f"a{i}", (0, 3), tuple(f"n{2 * i}/{d}" for d in range(8)))
        b = Stage(f"b{i}", (3, 4), tuple(f"n{2 * i + 1}/{d}" for d in range(8)))
        stages += [a, b]
        routes.append(Route((Hop(a.name, a.layers), Hop(b.name, b.layers)), 1.0))
    draft = Plan(model.name, cluster, tuple(stages), tuple(routes), OPTIONS)
    return cluster, priced(draft, cluster, model)


def test_a_thousand_devices_are_drawn_by_kind_and_listed_one_by_one() -> None:
    cluster, made = many(63)
    assert len(cluster.devices()) == 1024
    view = view_of(made, cluster)
    assert len(view.nodes) == 4  # two kinds, used or not
    assert sorted(len(node.names) for node in view.nodes) == [1, 1, 63, 63]
    assert len(view.routes) == 1
    assert len(view.routes[0].numbers) == 63
    (way,) = view.ways
    assert way.share == pytest.approx(1)
    model = tiny_model(heads=8, kv_heads=8)
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", made.engine)
    text = page(made, cluster, explain(made, task, what_if_s=None))
    assert len(text) < 3_000_000
    said = " ".join(read(text).text)
    assert all(device in said for stage in made.stages for device in stage.devices)


def test_cards_do_not_overlap_and_stay_in_their_region() -> None:
    for pipelines in (1, 4, 20):
        cluster, made = many(pipelines)
        layout = layout_of(view_of(made, cluster))
        assert sum(len(card.view.names) for card in layout.cards) == len(cluster.nodes)
        boxes = [card.box for card in layout.cards]
        for i, a in enumerate(boxes):
            region = layout.regions[layout.cards[i].region].box
            assert region.x < a.x
            assert a.right < region.right
            assert region.y < a.y
            assert a.bottom < region.bottom
            for b in boxes[i + 1 :]:
                assert a.right <= b.x or b.right <= a.x or a.bottom <= b.y or b.bottom <= a.y


def test_few_devices_are_drawn_one_by_one() -> None:
    cluster, made = many(2)
    assert len(cluster.devices()) <= DRAWN_SINGLY
    view = view_of(made, cluster)
    assert [node.names for node in view.nodes] == [(f"n{i}",) for i in range(6)]
    assert {(way.pairs, way.share) for way in view.ways} == {((("n0", "n1"),), 0.5), ((("n2", "n3"),), 0.5)}
    assert view.nodes[-1].unused == tuple(f"n5/{i}" for i in range(8))


# ---- files ----------------------------------------------------------------------------------------------------


def test_the_chart_is_a_png_or_an_svg_of_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cluster, made = many(2)
    write_plot(tmp_path / "plan.png", made, cluster)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    write_plot(tmp_path / "plan.svg", made, cluster)
    ElementTree.parse(tmp_path / "plan.svg")
    rows = rows_of(made, view_of(made, cluster))
    assert [row.layers for row in rows] == [(0, 3), (3, 4), (0, 3), (3, 4), (0, 0), (0, 0)]
    assert all(row.text.startswith("unused") for row in rows[4:])


def test_files_that_cannot_be_written_and_a_missing_library_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, made = many(1)
    task = make_task(cluster, tiny_model(heads=8, kv_heads=8), WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    with pytest.raises(SpecError, match="cannot be written"):
        write_page(tmp_path / "none" / "a.html", made, cluster, explain(made, task, what_if_s=None))
    with pytest.raises(SpecError, match=r"neither a \.png nor a \.svg"):
        write_plot(tmp_path / "plan.jpg", made, cluster)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpecError, match="needs matplotlib") as caught:
        write_plot(tmp_path / "plan.png", made, cluster)
    assert "hexgen-engine[plot]" in str(caught.value)
