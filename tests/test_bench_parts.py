"""The parts of ``hexgen bench`` by themselves: definitions, requests, HTTP, bad servers, causes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_http import HEAD, ScriptedServer, Send, answer, chunk, event, scripted, token, whole_answer

from hexgen.bench.against import Comparison, StageTimes
from hexgen.bench.asks import Ask, read_prompts, synthetic
from hexgen.bench.causes import findings
from hexgen.bench.client import AnswerError, ServerFacts, ServerState
from hexgen.bench.drive import drive
from hexgen.bench.http import Connection, event_lines, target_of
from hexgen.bench.measures import detail, measures_of
from hexgen.bench.openai import AskOptions, OpenAIClient, state_of
from hexgen.bench.plot import write_plot
from hexgen.bench.record import Outcome, Record
from hexgen.bench.run import Bench, BenchOptions, run_bench
from hexgen.cli import main
from hexgen.cli.bench_request import shortened
from hexgen.errors import SpecError, UnavailableError
from hexgen.scheduler.simulation import Requests, requests_of
from hexgen.workload import Lengths, Slo, Workload


def asks(count: int, output: int = 4, every_s: float = 0.0) -> list[Ask]:
    return [Ask(i, i * every_s, np.arange(3, dtype=np.int32), 3, output) for i in range(count)]


def record(number: int, sent_s: float, times: list[float], output: int, **fields: Any) -> Record:
    ask = Ask(number, 0.0, np.arange(10, dtype=np.int32), 10, output)
    return Record(ask, sent_s, sent_s, array("d", times), 10, output, completed=True, **fields)


# ---- definitions --------------------------------------------------------------------------------------------


def recorded() -> Outcome:
    """Three answers and a failure, with times that can be reckoned by hand."""
    a = record(0, 100.0, [100.5, 100.6, 100.8, 101.1], 4)
    b = record(1, 100.25, [101.25], 1)
    c = record(2, 102.0, [102.1, 102.3], 3)  # the second piece had two tokens
    failed = Record(a.ask, 102.0, 102.5, error="HTTP 500: no")
    return Outcome((a, b, c, failed), started_s=100.0, ended_s=104.0, stopped=False)


def test_definitions_are_those_of_vllm() -> None:
    found = measures_of(recorded(), Slo(ttft_s=0.6, tpot_s=0.15))
    summary = found.summary()
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (3, 1, 0)
    assert summary["request_throughput"] == 3 / 4
    assert summary["output_throughput"] == 8 / 4
    assert summary["total_token_throughput"] == (30 + 8) / 4
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (30, 8)
    # TTFT 500, 1000, 100 ms
    assert summary["mean_ttft_ms"] == pytest.approx(1600 / 3)
    assert summary["median_ttft_ms"] == pytest.approx(500)
    assert summary["p90_ttft_ms"] == pytest.approx(900)  # linear: 500 + 0.8 * 500
    assert summary["p99_ttft_ms"] == pytest.approx(990)
    assert summary["std_ttft_ms"] == pytest.approx(np.std([500, 1000, 100]))
    # TPOT (1.1 - 0.5) / 3 = 200 ms, none, (0.3 - 0.1) / 2 = 100 ms
    assert summary["mean_tpot_ms"] == pytest.approx(150)
    assert summary["p99_tpot_ms"] == pytest.approx(199)
    # ITL 100, 200, 300 and 200 ms: gaps between pieces
    assert summary["mean_itl_ms"] == pytest.approx(200)
    assert summary["median_itl_ms"] == pytest.approx(200)
    # E2EL 1.1, 1.0, 0.3 s
    assert summary["mean_e2el_ms"] == pytest.approx(800)
    assert summary["p90_e2el_ms"] == pytest.approx(1080)
    # a: TPOT too long; b: TTFT too long; c keeps both
    assert summary["request_goodput"] == 1 / 4
    assert measures_of(recorded(), Slo(ttft_s=1.0)).goodput == 3 / 4
    assert measures_of(recorded()).summary()["request_goodput"] is None
    assert summary["failures"] == {"HTTP 500: no": 1}
    # busiest second from the first sending: [100, 101) has a's first three pieces; a and b touch both seconds
    assert (found.peak_output_tokens_s, found.peak_concurrency) == (3.0, 2)


def test_a_run_of_nothing_has_no_figures() -> None:
    summary = measures_of(Outcome((), 0.0, 1.0, False)).summary()
    assert summary["mean_ttft_ms"] is summary["p99_itl_ms"] is None
    assert summary["output_throughput"] == 0.0
    json.dumps(summary, allow_nan=False)


def test_details_tell_each_request() -> None:
    found = detail(recorded())
    assert found["ttfts"][:3] == pytest.approx([0.5, 1.0, 0.1])
    assert found["ttfts"][3] is None
    assert found["itls"][0] == pytest.approx([0.1, 0.2, 0.3])
    assert found["errors"] == ["", "", "", "HTTP 500: no"]
    assert found["start_times"] == pytest.approx([0.0, 0.25, 2.0, 2.5])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"run{suffix}"
    write_plot(path, recorded(), measures_of(recorded()), "three requests")
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start


# ---- what is asked ------------------------------------------------------------------------------------------


def test_the_same_seed_asks_what_simulate_asks() -> None:
    workload = Workload(Lengths(20, p99=60), Lengths(10, p99=30), rate=4.0)
    requests = requests_of(workload, 50, seed=7, burstiness=0.5)
    found = synthetic(requests, 100, seed=7)
    assert [a.due_s for a in found] == requests.arrival_s.tolist()
    assert [a.prompt_tokens for a in found] == [len(a.prompt) for a in found] == requests.prompt_tokens.tolist()
    assert [a.output_tokens for a in found] == requests.output_tokens.tolist()
    ids = np.concatenate([a.prompt for a in found])  # type: ignore[arg-type]
    assert (ids.min(), ids.max()) == (0, 99)
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(found, synthetic(requests, 100, 7), strict=True))
    assert not np.array_equal(found[0].prompt, synthetic(requests, 100, 8)[0].prompt)


def test_a_load_too_large_to_hold_is_refused() -> None:
    requests = Requests(np.zeros(20), np.full(20, 10_000_000), np.ones(20, dtype=np.int64))
    with pytest.raises(SpecError, match="200000000 tokens in all are more"):
        synthetic(requests, 100, 0)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1), st.integers(2, 3000))
def test_shortened_requests_fit(lengths: list[tuple[int, int]], context: int) -> None:
    prompts, outputs = np.array(lengths, dtype=np.int64).T
    found = shortened(Requests(np.zeros(len(lengths)), prompts, outputs), context)
    assert (found.prompt_tokens + found.output_tokens <= context).all()
    fits = prompts + outputs <= context
    assert (found.prompt_tokens[fits] == prompts[fits]).all()
    assert (found.output_tokens[fits] == outputs[fits]).all()


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo words\n")
    assert [p.prompt for p in read_prompts(tmp_path / "p.txt")] == ["one", "two words"]
    path = tmp_path / "p.jsonl"
    path.write_text('"text"\n[1, 2]\n{"prompt": "x", "output_tokens": 9}\n')
    found = read_prompts(path)
    assert (found[0].prompt, list(found[1].prompt), found[2].output_tokens) == ("text", [1, 2], 9)
    for line, complaint in (
        ('{"prompt": "x"', "is not JSON"),
        ('{"prompt": ""}', "neither a text nor"),
        ("[1, -2]", "neither a text nor"),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens must be"),
    ):
        path.write_text('"fine"\n\n' + line + "\n")
        with pytest.raises(SpecError, match=rf"p\.jsonl, line 3: .*{complaint}"):
            read_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(SpecError, match="has no prompts"):
        read_prompts(path)


# ---- HTTP ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_events_survive_any_cut(data: st.DataObject) -> None:
    """Chunks and reads may cut the stream anywhere."""
    lines = data.draw(
        st.lists(st.binary(min_size=1, max_size=30).filter(lambda b: b.strip() == b and b"\n" not in b))
    )
    stream = b": a comment\n\n" + b"".join(b"data: " + line + b"\r\n\n" for line in lines)
    wire = bytearray(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        wire += chunk(stream[:cut])
        stream = stream[cut:]
    wire += b"0\r\nTrailer: yes\r\n\r\n"

    async def run() -> tuple[list[bytes], bool]:
        reader = asyncio.StreamReader()
        here, there = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=here)
        connection = Connection(reader, writer)
        while wire:
            cut = min(len(wire), data.draw(st.integers(1, 200)))
            reader.feed_data(bytes(wire[:cut]))
            del wire[:cut]
        status, pieces = await connection.send(target_of("http://x"), "GET", "/", {})
        found = [line async for line in event_lines(pieces)]
        connection.close()
        there.close()
        assert status == 200
        return found, connection.reusable

    assert asyncio.run(run()) == ([line.strip() for line in lines], True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80, "")),
        ("http://h/v1/", ("h", 80, "")),
        ("http://h:1/base/v1", ("h", 1, "/base")),
        ("http://[::1]:7", ("::1", 7, "")),
        ("https://h", ("h", 443, "")),
    ],
)
def test_addresses(url: str, expected: tuple[str, int, str]) -> None:
    found = target_of(url)
    assert (found.host, found.port, found.path) == expected


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:70000", "http://h/a b", "http://h/\r\nx: y"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(SpecError, match="--url"):
        target_of(url)


# ---- bad servers --------------------------------------------------------------------------------------------


async def breaks_off(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(token()) + chunk(token()) + b"40\r\ndata: {")
    raise ConnectionError


async def closes_without_end(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(token()) + b"0\r\n\r\n")


async def fails_in_the_stream(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(token()) + chunk(event(error={"message": "route 0 went down"})) + b"0\r\n\r\n")


async def says_nothing(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def is_full(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(answer("429 Too Many Requests", b'{"error": {"message": "too many wait"}}'))


async def talks_nonsense(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(b"220 mail.example ESMTP\r\n")
    raise ConnectionError


async def sends_no_json(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(b"data: {oops\n\n"))


async def hangs(number: int, fields: dict[str, Any], send: Send) -> None:
    await send(HEAD + chunk(token()))
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (breaks_off, "the stream broke off: the server closed the connection"),
        (closes_without_end, "the stream broke off: it has no end"),
        (fails_in_the_stream, "error in the stream: route 0 went down"),
        (says_nothing, "the answer has no token"),
        (is_full, "HTTP 429: too many wait"),
        (talks_nonsense, "no answer: this is no HTTP server"),
        (sends_no_json, "an event of the stream is not JSON"),
        (hangs, "no end within 0.2 s"),
    ],
)
def test_failures_are_counted_with_their_reasons(script: Any, reason: str) -> None:
    """Every second request meets the trouble; the others are measured all the same."""

    async def mixed(number: int, fields: dict[str, Any], send: Send) -> None:
        await (script if number % 2 else whole_answer)(number, fields, send)

    async def run() -> Outcome:
        server = ScriptedServer(mixed)
        await server.start()
        client = OpenAIClient(target_of(server.url), AskOptions())
        try:
            await client.look()
            return await drive(client, asks(6), concurrency=1, timeout_s=0.2 if script is hangs else 20)
        finally:
            await client.close()
            await server.stop()

    found = measures_of(asyncio.run(run()))
    assert (found.completed, found.failed, found.reasons) == (3, 3, {reason: 3})
    assert found.output_tokens == 12


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    """As servers of HTTP/1.0 do, and some proxies."""

    async def old(number: int, fields: dict[str, Any], send: Send) -> None:
        await send(b"HTTP/1.0 200 OK\r\n\r\n" + token() + token(finish_reason="stop"))
        raise ConnectionError

    with scripted(old) as server:
        bench = measured(server, asks(3))
    assert bench.measures.completed == 3
    assert [r.output_tokens for r in bench.outcome.records] == [2, 2, 2]  # no usage: pieces are counted
    assert any("before their length limit" in remark for remark in bench.remarks)


def measured(server: ScriptedServer, load: list[Ask], **options: Any) -> Bench:
    async def run() -> Bench:
        client = OpenAIClient(target_of(server.url), AskOptions())
        try:
            return await run_bench(client, lambda _: load, BenchOptions(**options))
        finally:
            await client.close()

    return asyncio.run(run())


def test_nothing_answered_is_an_error() -> None:
    with scripted(breaks_off) as server:
        with pytest.raises(
            UnavailableError, match="none of 3 requests was answered; 3 of them: the stream broke off"
        ):
            measured(server, asks(3), warm_ups=0)
        with pytest.raises(UnavailableError, match="request 1 of the warm-up failed: the stream broke off"):
            measured(server, asks(3))


def test_a_closed_loop_keeps_its_number_and_its_connections() -> None:
    with scripted() as server:
        bench = measured(server, asks(40), concurrency=3)
        assert bench.measures.completed == 40
        assert (server.most_open, server.connections) == (3, 3)
        assert server.asked[-1]["max_tokens"] == 4
        assert server.asked[-1]["stream"] is server.asked[-1]["ignore_eos"] is True


def test_an_open_loop_sends_when_due_and_bounds_what_is_open() -> None:
    release = asyncio.Event()

    async def waits(number: int, fields: dict[str, Any], send: Send) -> None:
        if number >= 4:
            release.set()
        await asyncio.wait_for(release.wait(), 10) if number < 4 else None
        await whole_answer(number, fields, send)

    with scripted(waits) as server:
        bench = measured(server, asks(10, every_s=0.02), warm_ups=0)
        assert bench.measures.completed == 10
        assert server.most_open >= 5  # the first four wait for the fifth: sending does not wait for answers
        sent = np.array([r.sent_s for r in bench.outcome.records]) - bench.outcome.started_s
        assert (sent >= np.arange(10) * 0.02 - 1e-4).all()
    with scripted() as server:
        bench = measured(server, asks(50), most_open=4)
        assert bench.measures.completed == 50
        assert server.most_open <= 4


def test_a_server_that_refuses_or_is_none() -> None:
    with scripted(models=b'{"data": []}') as server, pytest.raises(SpecError, match="does not name its models"):
        measured(server, asks(1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = OpenAIClient(target_of(f"127.0.0.1:{port}"), AskOptions())
    with pytest.raises(UnavailableError, match="no server answers: connection refused"):
        asyncio.run(client.look())


# ---- the command --------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--url", "127.0.0.1:1", "--grpc", "127.0.0.1:1"), "one server at a time"),
        (("--requests", "0"), "--requests: must lie between 1"),
        (("--requests", "1000000"), "--requests: must lie between 1"),
        (("--concurrency", "0"), "--concurrency"),
        (("--concurrency", "2", "--rate", "1"), "no rate of its own"),
        (("--rate", "-1"), "--rate: must be a positive"),
        (("--rate", "nan"), "--rate: must be a positive"),
        (("--burstiness", "0"), "--burstiness"),
        (("--goodput", "ttft"), "is no limit"),
        (("--goodput", "speed:3"), "is no limit"),
        (("--chat",), "give --prompts FILE"),
        (("--cost", "x.json"), "name the plan with --against"),
        (("--against", "no-such-plan.yaml"), "no-such-plan.yaml"),
        (("--trace", "no-such-trace.csv"), "no-such-trace.csv"),
        (("--plot", "plot.pdf"), "plot.pdf"),
        (("--detailed",), "add --json"),
        (("--url", ""), "--url: is empty"),
    ],
)
def test_wrong_options_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    assert command("bench", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("door", ["--url", "--grpc"])
def test_a_dead_server_is_an_error_and_not_zeros(capsys: pytest.CaptureFixture[str], door: str) -> None:
    assert command("bench", door, "127.0.0.1:1", "--json") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no server answers: connection refused" in err
    assert "hexgen serve" in err


def test_a_malformed_trace_names_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("0.0,10,5\n0.5,10,5\n1.0,ten,5\n")
    assert command("bench", "--trace", path) == 2
    assert "t.csv: line 3: prompttokens is 'ten'" in capsys.readouterr().err


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("timestamp,prompt_tokens,output_tokens\n10,5,2\n10.05,6,3\n10.1,7,4\n")
    with scripted() as server:
        code = command("bench", "--url", server.url, "--trace", path, "--json", "--detailed", "--num-warmups", 0)
        assert [(len(a["prompt"]), a["max_tokens"]) for a in server.asked] == [(5, 2), (6, 3), (7, 4)]
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output_lens"] == [2, 3, 4]
    assert found["request_rate"] == pytest.approx(20)
    assert all(s >= d - 1e-4 for s, d in zip(found["start_times"], (0, 0.05, 0.1), strict=True))


def test_the_usual_load_fits_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody named lengths: they are those that this server's context takes, and ids those of its vocabulary."""
    with scripted(models=b'{"data": [{"id": "small", "max_model_len": 64, "vocab_size": 9}]}') as server:
        assert command("bench", "--url", server.url, "--requests", 20, "--json") == 0
        lengths = [(len(a["prompt"]), a["max_tokens"]) for a in server.asked]
        assert all(1 < prompt + output <= 64 for prompt, output in lengths)
        assert {i for a in server.asked for i in a["prompt"]} == set(range(9))
    assert json.loads(capsys.readouterr().out)["model_id"] == "small"


def test_ctrl_c_before_anything_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def stuck(number: int, fields: dict[str, Any], send: Send) -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        await asyncio.sleep(60)

    with scripted(stuck) as server:
        assert command("bench", "--url", server.url, "--json") == 130
    assert capsys.readouterr().out == ""


def test_chats_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def chat(number: int, fields: dict[str, Any], send: Send) -> None:
        assert fields["messages"] == [{"role": "user", "content": ["hello", "bye"][number % 2]}]
        role = event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        await send(HEAD + chunk(role) + chunk(event(choices=[{"delta": {"content": "a"}, "finish_reason": None}])))
        await send(chunk(event(choices=[{"delta": {"content": "b"}, "finish_reason": "stop"}])) + b"0\r\n\r\n")

    path = tmp_path / "p.txt"
    path.write_text("hello\nbye\n")
    with scripted(chat) as server:
        options = ("--prompts", path, "--chat", "--requests", 4, "--num-warmups", 0, "--json")
        assert command("bench", "--url", server.url, "--concurrency", 1, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["total_output_tokens"]) == (4, 8)  # the role is no token
    assert found["backend"] == "openai-chat"


def test_token_ids_are_no_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"hello"\n{"prompt": [1, 2, 3]}\n')
    assert command("bench", "--url", "http://127.0.0.1:9", "--prompts", path, "--chat") == 2
    assert "prompt 2 is token ids, and chats are texts" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--fail-on-errors",), 1)])
def test_failures_end_in_an_exit_status_where_asked(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], status: int
) -> None:
    async def every_other(number: int, fields: dict[str, Any], send: Send) -> None:
        if number % 2:
            await send(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
        else:
            await whole_answer(number, fields, send)

    with scripted(every_other) as server:
        load = ("--workload", "prompt=4,output=4", "--requests", 4, "--num-warmups", 0, "--json")
        assert command("bench", "--url", server.url, "--concurrency", 1, *load, *options) == status
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["failed"]) == (2, 2)


def test_ctrl_c_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def stuck(number: int, fields: dict[str, Any], send: Send) -> None:
        if number == 3:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        if number >= 3:
            await asyncio.sleep(60)
        await whole_answer(number, fields, send)

    with scripted(stuck) as server:
        options = ("--requests", 10, "--concurrency", 1, "--num-warmups", 0, "--json")
        workload = "prompt=4,output=4"
        assert command("bench", "--url", server.url, "--workload", workload, *options) == 130
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["failed"], found["unfinished"]) == (3, 0, 7)
    assert "ended early" in found["remarks"][0]


# ---- causes -------------------------------------------------------------------------------------------------


class Simulated:
    """What `findings` reads of a simulation."""

    steps = 100
    preemptions = 0

    def mean(self, name: str) -> float:
        return 0.1


def compared(
    compute: float,
    *,
    steps: int = 100,
    host: float = 0.0,
    transfer: float = 0.0,
    far: bool = True,
    wait: float = 1.0,
) -> Comparison:
    measured = {"compute": compute, "wait": wait, "transfer": transfer, "host": host}
    predicted = {"busy": 4.0, "wait": 1.0, "transfer": 0.0}
    stage = StageTimes("s0", predicted, measured, steps, far)
    return Comparison((), (stage,), Simulated(), 5.0, 10.0, steps, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("comparison", "tabled", "load", "first", "cause"),
    [
        (
            compared(8.0),
            True,
            3.0,
            "was busy for 8 s",
            "2.00 times as long as predicted: other work had this machine's",
        ),
        (
            compared(8.0),
            False,
            0.0,
            "was busy for 8 s, predicted 4 s (+100%)",
            "2.00 times as long as the catalogue's",
        ),
        (compared(8.0), True, 0.0, "was busy for 8 s", "something else uses that machine"),
        (compared(8.0, steps=200), False, 9.0, "was busy for 8 s", "emptier"),
        (compared(2.0), False, 0.0, "was busy for 2 s", "faster than its figures"),
        (compared(2.0), True, 0.0, "was busy for 2 s", "measured while other work ran"),
        (compared(2.0, wait=3.0), True, 0.0, "was busy for 2 s", "rests between steps"),
        (compared(3.0, host=5.0), False, 0.0, "5 s of it outside the model, 50 ms a step", "most of it outside"),
        (compared(4.0, transfer=3.0), False, 0.0, "passed on for 3 s, predicted none", "link is slower"),
        (compared(4.0, transfer=3.0, far=False), False, 0.0, "passed on for 3 s", "nothing leaves the node"),
    ],
)
def test_the_largest_difference_has_its_cause(
    comparison: Comparison, tabled: bool, load: float, first: str, cause: str
) -> None:
    outcome = recorded()
    facts = ServerFacts("m")
    bench = Bench(facts, outcome, measures_of(outcome), ServerState(), ServerState(), 0.0, load, ())
    found = findings(comparison, bench, tabled=tabled)
    assert first in found[0].what
    assert cause in found[0].cause
    assert [f.share for f in found] == sorted((f.share for f in found), reverse=True)


def test_prometheus_text_is_read() -> None:
    text = (
        '# TYPE hexgen_stage_steps counter\nhexgen_stage_steps_total{device="cpu",rank="1",stage="a"} 7.0\n'
        "# TYPE hexgen_stage_wait_seconds counter\n"
        'hexgen_stage_wait_seconds_total{device="cpu",rank="1",stage="a"} 2.5\n'
        '# TYPE hexgen_steps counter\nhexgen_steps_total{route="0"} 3.0\nhexgen_steps_total{route="1"} 4.0\n'
        '# TYPE other counter\nother_total 9\n'
    )  # fmt: skip
    found = state_of(text)
    assert (found.ranks[0].stage, found.ranks[0].rank, found.ranks[0].steps, found.ranks[0].wait_s) == (
        "a",
        1,
        7,
        2.5,
    )
    assert found.totals == {"steps_total": 7.0}
    assert state_of("<html>") == ServerState()
    assert math.isclose(found.ranks[0].compute_s, 0.0)


def test_reasons_are_short() -> None:
    assert len(str(AnswerError("x " * 1000))) == 200
