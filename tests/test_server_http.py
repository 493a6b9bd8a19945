"""The HTTP interface on the real engine, with OpenAI's own client and with plain requests."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from oracle import greedy
from served import BUNDLED, Served, engine, served, until

from hexgen.coordinator.admission import AdmissionLimits
from hexgen.coordinator.tokenizer import load_tokenizer
from hexgen.deploy.in_process import InProcessDeployment

PROMPT = "import os\nimport sys\n\ndef main(argv):\n"
LONG = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def deployment() -> Iterator[InProcessDeployment]:
    with engine() as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0)


def post(server: Served, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(server.http + path, json=fields, timeout=60)


def events(server: Served, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", server.http + path, json={**fields, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---- completions ----------------------------------------------------------------------------------


def test_greedy_tokens_are_transformers(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tested", prompt=PROMPT, max_tokens=24, temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    expected = greedy(BUNDLED, prompt, 24)
    assert choice.token_ids == expected  # type: ignore[attr-defined]
    assert choice.prompt_token_ids == list(prompt)  # type: ignore[attr-defined]
    assert choice.text == tokenizer.decode([*prompt, *expected])[len(PROMPT) :]
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tested", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert len(chunks) > 10  # as they are made, not at the end
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_the_first_token_leaves_before_the_last_is_made(server: Served) -> None:
    with httpx.stream(
        "POST", f"{server.http}/v1/completions", json={**LONG, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()  # kept: dropping the iterator closes the response
        first = next(lines)
        assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        assert server.coordinator.running == 1
    server.wait_idle()


def test_prompts_of_every_shape(server: Served) -> None:
    ids = [[5, 6, 7], [8]]
    fields = {"max_tokens": 4, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    both = post(server, prompt=ids, **fields).json()["choices"]
    assert [c["index"] for c in both] == [0, 1]
    assert [c["prompt_token_ids"] for c in both] == ids
    for one, choice in zip(ids, both, strict=True):
        assert post(server, prompt=one, **fields).json()["choices"][0]["token_ids"] == choice["token_ids"]
    texts = post(server, prompt=["def f", "class A"], n=2, **fields).json()
    assert [c["index"] for c in texts["choices"]] == [0, 1, 2, 3]
    assert texts["choices"][0]["token_ids"] == texts["choices"][1]["token_ids"]
    assert texts["usage"]["completion_tokens"] == 16
    streamed: dict[int, list[int]] = {}
    for event in events(server, prompt=ids, **fields):
        for choice in event["choices"]:
            streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert streamed == {i: c["token_ids"] for i, c in enumerate(both)}


def test_echo(server: Served) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    plain = post(server, **fields).json()["choices"][0]["text"]
    assert post(server, **fields, echo=True).json()["choices"][0]["text"] == PROMPT + plain
    assert "".join(e["choices"][0]["text"] for e in events(server, **fields, echo=True)) == PROMPT + plain


def test_stop_strings_over_token_boundaries(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tested", "prompt": PROMPT, "max_tokens": 40, "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    text = client.completions.create(**fields).choices[0].text
    for start in range(3, len(text) - 6, 5):
        stop = text[start : start + 4]
        cut = text[: text.index(stop)]
        whole = client.completions.create(**fields, stop=[stop, "never there"]).choices[0]
        assert (whole.text, whole.finish_reason) == (cut, "stop")
        assert whole.stop_reason == stop  # type: ignore[attr-defined]
    chunks = list(client.completions.create(**fields, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_token_ids(server: Served) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    tokens = post(server, **fields).json()["choices"][0]["token_ids"]
    stop = tokens[7]
    choice = post(server, **fields, stop_token_ids=[stop]).json()["choices"][0]
    assert choice["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_same_seed_same_text_whatever_else_runs(server: Served) -> None:
    fields = {
        "prompt": PROMPT,
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
        "seed": 7,
        "n": 3,
    }
    alone = [c["text"] for c in post(server, **fields).json()["choices"]]
    assert len(set(alone)) > 1
    with httpx.stream("POST", f"{server.http}/v1/completions", json={**LONG, "stream": True}, timeout=60) as other:
        lines = other.iter_lines()
        next(lines)
        assert [c["text"] for c in post(server, **fields).json()["choices"]] == alone
    streamed = dict.fromkeys(range(3), "")
    for event in events(server, **fields):
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(streamed.values()) == alone
    assert [c["text"] for c in post(server, **{**fields, "seed": 8}).json()["choices"]] != alone


def test_logprobs_of_completions(client: openai.OpenAI, server: Served) -> None:
    choice = client.completions.create(
        model="tested", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    ).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(8)]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values()) <= 0  # greedy: the chosen one is the likeliest
    streamed = [
        e["choices"][0]["logprobs"]
        for e in events(server, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, ignore_eos=True)
    ]
    assert [t for entry in streamed if entry for t in entry["tokens"]] == found.tokens
    assert [o for entry in streamed if entry for o in entry["text_offset"]] == found.text_offset


# ---- chat -----------------------------------------------------------------------------------------


def test_chat_goes_through_the_template(client: openai.OpenAI, server: Served) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there."}]},
    ]
    fields: dict[str, Any] = {"model": "tested", "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**fields, extra_body={"return_token_ids": True})
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    text = "<|system|>Be short.<|end|><|user|>Hello there.<|end|><|assistant|>"
    assert answer.choices[0].prompt_token_ids == list(tokenizer.encode(text))  # type: ignore[attr-defined]
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    raw = post(server, prompt=answer.choices[0].prompt_token_ids, max_tokens=12, temperature=0)  # type: ignore[attr-defined]
    assert raw.json()["choices"][0]["text"] == answer.choices[0].message.content


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tested", messages=[{"role": "user", "content": "x"}], max_completion_tokens=5, temperature=0,
        logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for entry in found.content:
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_a_chat_may_use_the_whole_context(server: Served) -> None:
    fields = {"messages": [{"role": "user", "content": "x " * 1000}], "temperature": 0, "ignore_eos": True}
    answer = post(server, "/v1/chat/completions", **fields).json()
    assert answer["usage"]["total_tokens"] == 1024
    assert answer["choices"][0]["finish_reason"] == "length"


# ---- going away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_aborts(server: Served, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: server.coordinator.running == 1)
    server.wait_idle()
    assert b'outcome="aborted"' in server.coordinator.metrics.exposition()


def test_many_disconnects_leave_nothing(server: Served) -> None:
    for i in range(24):
        fields = {**LONG, "prompt": [1 + i, 2, 3] * (1 + i), "n": 1 + i % 3, "stream": True}
        with httpx.stream("POST", f"{server.http}/v1/completions", json=fields, timeout=60) as response:
            if i % 3:
                next(response.iter_lines())
    server.wait_idle()
    assert post(server, prompt="x", max_tokens=1).status_code == 200


@pytest.mark.slow
def test_a_thousand_requests_a_third_of_them_left(server: Served) -> None:
    async def all_of_them() -> None:
        gate = asyncio.Semaphore(32)
        async with httpx.AsyncClient(base_url=server.http, timeout=120) as http:

            async def one(i: int) -> None:
                fields = {"prompt": [i % 50 + 5, i % 7 + 5] * (1 + i % 20), "ignore_eos": True, "stream": True}
                leave = i % 3 == 0
                async with (
                    gate,
                    http.stream(
                        "POST", "/v1/completions", json={**fields, "max_tokens": 200 if leave else 1 + i % 8}
                    ) as response,
                ):
                    assert response.status_code == 200
                    lines = []
                    async for line in response.aiter_lines():
                        lines.append(line)
                        if leave and line:
                            return
                    assert lines[-2:] == ["data: [DONE]", ""]

            await asyncio.gather(*(one(i) for i in range(1000)))

    asyncio.run(all_of_them())
    server.wait_idle(60)


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, 4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": "x " * 3000}, "prompt"),
        ({"prompt": "x" * 1_000_000}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": [1]}, "temperature"),
        ({"prompt": "x", "temperature": 10**400}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "min_p": 2}, "min_p"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 10**9}, "n"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**70}, "seed"),
        ({"prompt": "x", "stop": 5}, "stop"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": ["x"] * 65}, "stop"),
        ({"prompt": "x", "stop_token_ids": "x"}, "stop_token_ids"),
        ({"prompt": "x", "stop_token_ids": [4096]}, "stop_token_ids"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": "x"}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "x", "min_tokens": 99}, "min_tokens"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stream_options": 5}, "stream_options"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 4}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "x", "model": 5}, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_named(server: Served, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = json.dumps({**({"stream": True} if stream else {}), **fields})
    response = httpx.post(f"{server.http}/v1/completions", content=body, timeout=60)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "prompt"),
    ],
)  # fmt: skip
def test_bad_chats_are_named(server: Served, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{server.http}/v1/chat/completions", content=json.dumps(fields), timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"prompt": ' + b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"],
)
def test_bodies_that_are_no_json_object(server: Served, body: bytes) -> None:
    response = httpx.post(f"{server.http}/v1/completions", content=body, timeout=60)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_unknown_fields_are_ignored(server: Served) -> None:
    fields = {"prompt": "x", "max_tokens": 1, "user": "me", "no_such_field": {"deep": [1]}, "temperature": None}
    assert post(server, **fields).status_code == 200


def test_an_unknown_model_is_404(client: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    assert post(server, prompt="x", max_tokens=1, model="tested-too").status_code == 200
    assert post(server, prompt="x", max_tokens=1).status_code == 200


def chunks_of(total: int) -> Iterator[bytes]:
    for _ in range(total // 65536):
        yield b" " * 65536


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_413(server: Served, chunked: bool) -> None:
    size = 100_000_000
    content: Any = chunks_of(size) if chunked else b" " * size
    response = httpx.post(f"{server.http}/v1/completions", content=content, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert post(server, prompt="x", max_tokens=1).status_code == 200


def test_a_declared_100_mb_is_refused_before_it_is_sent(server: Served) -> None:
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            b"expect: 100-continue\r\ncontent-length: 100000000\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_full_queues_are_429(deployment: InProcessDeployment) -> None:
    with served(deployment, waiting=AdmissionLimits(max_waiting_requests=0)) as server:
        with httpx.stream(
            "POST", f"{server.http}/v1/completions", json={**LONG, "n": 64, "stream": True}, timeout=60
        ) as running:
            lines = running.iter_lines()
            next(lines)
            refused = post(server, prompt="x", max_tokens=1)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
        server.wait_idle()
        assert post(server, prompt="x", max_tokens=1).status_code == 200


# ---- the rest -------------------------------------------------------------------------------------


def test_models_health_metrics(client: openai.OpenAI, server: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tested", 1024)  # type: ignore[attr-defined]
    assert client.models.retrieve("tested").id == "tested"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{server.http}/health").json() == {"status": "ok", "routes": 1, "routes_up": 1}
    text = httpx.get(f"{server.http}/metrics").text
    for name in ("hexgen_ttft_seconds_bucket", 'hexgen_kv_free_pages{route="0"}', "hexgen_output_tokens_total"):
        assert name in text


def test_unknown_places_answer_with_an_error_object(server: Served) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)):
        response = httpx.request(method, server.http + path)
        assert (response.status_code, "message" in response.json()["error"]) == (status, True)


def test_the_api_key(deployment: InProcessDeployment) -> None:
    with served(deployment, api_key="s3cret") as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics", "/nope"):
                refused = httpx.get(server.http + path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.http}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="s3cret")
        assert client.completions.create(model="tested", prompt="x", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.http}/v1", api_key="other").models.list()
