"""The planner's benchmark: its reading of figures against closed forms, and a run of it on small clusters."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import planner  # noqa: E402
from planning import flow, headline, served  # noqa: E402
from planning.cases import Case, all_published, published  # noqa: E402
from planning.deadlines import LENGTHS, Curve, curve, requests  # noqa: E402
from planning.ours import plan_case, usd_per_million  # noqa: E402
from planning.report import Grid, Report, rewrite  # noqa: E402
from planning.robust import losses, with_wrong_figures  # noqa: E402
from planning.settings import Settings  # noqa: E402
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model  # noqa: E402

from hexgen.errors import SpecError  # noqa: E402
from hexgen.scheduler.simulation import simulate  # noqa: E402
from hexgen.scheduler.tables import load_table  # noqa: E402
from hexgen.scheduler.task import make_task  # noqa: E402

SETTINGS = dataclasses.replace(Settings.of_quick(), seconds=0.5, baseline_seconds=0.2)


def small_case() -> Case:
    fast, slow = device_type("cuda", 4.5, 1.0), device_type("cuda", 4.5, 0.3)
    cluster = cluster_of((fast, 1), (slow, 2), prices=(3.6, 1.8))
    return Case("small/tiny", cluster, tiny_model(6), WORKLOAD)


def test_everybody_is_judged_alike_and_goals_follow_from_the_figures() -> None:
    asked = small_case()
    result = served.judge(asked, SETTINGS)
    assert result.ours is not None
    assert result.best is not None
    names = {way.name for way in result.others}
    assert {"Petals", "Swarm", "HexGen", "Helix", "best single node", "symmetric TP x PP"} <= names
    assert result.ours.predicted_tokens_s >= result.best.predicted_tokens_s * 0.98
    assert result.ours.simulated_tokens_s == pytest.approx(result.ours.predicted_tokens_s, rel=0.5)
    assert result.bound_tokens_s is not None
    assert result.ours.predicted_tokens_s <= result.bound_tokens_s
    # A worse plan of ours turns the same figures into missed goals.
    worse = dataclasses.replace(result.ours, predicted_tokens_s=result.best.predicted_tokens_s / 2)
    missed = served.report([dataclasses.replace(result, ours=worse)], [], SETTINGS).findings[0]
    assert missed.endswith(f"met on 0 of 1; missed on small/tiny (0.50 of {result.best.name}).")
    # Nobody is asked for more than is proven to be there without the line saying so.
    near = dataclasses.replace(result.ours, name="HexGen", predicted_tokens_s=result.bound_tokens_s / 1.25)
    near_result = dataclasses.replace(result, others=(near,))
    assert "and no plan exceeds 1.25)" in served.report([near_result], [], SETTINGS).findings[2]
    met = served.report([result], ["other"], SETTINGS).findings
    assert met[-1] == "No built-in model is given for other: left out."


def test_a_model_that_does_not_fit_is_said_and_does_not_stop_the_rest() -> None:
    tiny = device_type("cuda", 0.5, 1.0)
    result = served.judge(dataclasses.replace(small_case(), cluster=cluster_of((tiny, 1))), SETTINGS)
    assert result.ours is None
    assert any("does not fit" in line for line in served.report([result], [], SETTINGS).findings)


def test_prices_are_of_the_hour() -> None:
    assert usd_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert usd_per_million(None, 1000.0) is None
    assert usd_per_million(3.6, math.nan) is None


def test_curves_answer_for_scales_and_rates() -> None:
    # Of 100 requests the i-th takes i / 100 times its reference at rate 1, and four times that at rate 4.
    slow = tuple((i + 1) / 100 for i in range(100))
    found = Curve((1.0, 4.0), (slow, tuple(4 * value for value in slow)))
    assert found.attainment(0, 0.5) == 0.5
    assert found.scale_at(0) == 0.99
    assert found.scale_at(1, 0.5) == 2.0
    assert found.peak_rate(0.98) == 0.0
    assert found.peak_rate(0.99) == 1.0
    # Where the scale is linear in the rate, a line in logarithms is exact.
    assert found.peak_rate(2 * 0.99) == pytest.approx(2.0)
    assert found.peak_rate(100.0) == 4.0


def test_a_curve_counts_what_the_simulation_finds() -> None:
    asked = small_case()
    made = plan_case(asked).plan
    alone = {(prompt, output): 0.5 for prompt in LENGTHS for output in LENGTHS}
    rate = 2.0
    found = curve(made, asked, alone, [rate], 60, 60, 1.0)
    pattern = requests(60)
    again = simulate(
        made,
        asked.cluster,
        asked.model,
        dataclasses.replace(pattern, arrival_s=pattern.arrival_s / rate),
    )
    ratios = again.latency_s[6:] / 0.5
    assert len(found.scales[0]) == 54
    scale = float(sorted(ratios)[27])
    assert found.attainment(0, scale) == pytest.approx((ratios <= scale).mean())


def test_a_pool_takes_whichever_of_its_plans_suits() -> None:
    quick = Curve((1.0, 2.0), ((1.0,), (9.0,)))
    broad = Curve((1.0, 2.0), ((3.0,), (4.0,)))
    pool = headline.Pool("both", (quick, broad))
    assert [pool.scale_at(rate) for rate in (1.0, 2.0, 4.0)] == [1.0, 4.0, math.inf]
    assert pool.peak_rate(4.0) == 2.0
    assert pool.attainment(1.0, 2.0) == 1.0


def test_wrong_figures_keep_equal_devices_equal_and_memory_true() -> None:
    asked = small_case()
    wrong = with_wrong_figures(asked.cluster, random.Random(1))
    assert wrong == with_wrong_figures(asked.cluster, random.Random(1))
    for true, off in zip(asked.cluster.nodes, wrong.nodes, strict=True):
        assert off.device.memory_bytes == true.device.memory_bytes
        for field in ("bandwidth_bytes_s", "fp16_flops"):
            factor = getattr(off.device, field) / getattr(true.device, field)
            assert 0.7 <= factor <= 1.3
            assert factor != 1
    assert wrong.nodes[0].link == wrong.nodes[1].link != asked.cluster.nodes[0].link
    found = losses(asked, 3, None)
    assert len(found.losses) == 3
    assert max(found.losses) < 1


def test_published_clusters_come_with_their_models() -> None:
    cases, without = all_published()
    names = {case.name for case in cases}
    assert {"helix-single24/llama-2-70b", "helix-single24/llama-1-30b", "hexgen-full58/llama-2-70b"} <= names
    assert not any(case.cluster.model is None for case in cases)
    assert without


def test_the_published_placements_carry_what_their_artifact_says() -> None:
    asked = published("helix-single24")
    table = load_table(flow.TABLE)
    task = make_task(asked.cluster, asked.model, asked.workload, "throughput", None, 0, "auto", None, table)
    for method, tokens_s in flow.PUBLISHED_FLOW.items():
        carried, made = flow.placed(task, method)
        assert carried == pytest.approx(tokens_s, rel=1e-3)
        assert made is not None


def test_docs_are_rewritten_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold \\1\n<!-- /a -->\nafter\n<!-- b -->\n<!-- /b -->\n")
    report = Report("a", (Grid("t", ("x", "y"), (("1|2", "3"),)),), ("found \\g",), {})
    rewrite(page, "a", report.markdown(page, "stamp"))
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- a -->\nstamp\n")
    assert "| 1\\|2 | 3 |" in text
    assert "- found \\g\n<!-- /a -->\nafter" in text
    with pytest.raises(SpecError, match="no place for the section c"):
        rewrite(page, "c", "text")


def test_the_documentation_has_a_place_for_every_section() -> None:
    text = planner.DOCS.read_text(encoding="utf-8")
    for name in planner.SECTIONS:
        assert f"<!-- {name} -->" in text
        assert f"<!-- /{name} -->" in text


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert planner.main(["--quick", "--only", "exact", "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    instances = told["sections"]["exact"]["instances"]
    assert instances
    assert all(entry["ratios"]["exact"] == pytest.approx(1, rel=1e-4) for entry in instances)
    assert "equals brute force: met" in capsys.readouterr().out


def test_the_command_refuses_sections_that_it_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        planner.main(["--only", "served,nothing"])
    assert stopped.value.code == 2
    assert "no section nothing" in capsys.readouterr().err
