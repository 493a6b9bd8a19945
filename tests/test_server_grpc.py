"""The gRPC interface on the real engine; and serving: ports, keys, TLS, health, the end."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oracle import greedy
from served import BUNDLED, Served, engine, served, until

from hexgen.coordinator.admission import AdmissionLimits
from hexgen.coordinator.tokenizer import load_tokenizer
from hexgen.deploy.in_process import InProcessDeployment
from hexgen.errors import DeploymentError, SpecError
from hexgen.proto import inference_pb2 as pb
from hexgen.proto import inference_pb2_grpc

PROMPT = "import os\nimport sys\n\ndef main(argv):\n"
NO_TEXT = pb.TokenIds(ids=[5, 6, 7])


@pytest.fixture(scope="module")
def deployment() -> Iterator[InProcessDeployment]:
    with engine(stages=(((0, 5), 2), ((5, 8), 1))) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


def sampling(tokens: int, **rest: object) -> pb.Sampling:
    return pb.Sampling(max_tokens=tokens, **{"temperature": 0, "ignore_eos": True, **rest})


def answer(responses: Iterator[pb.GenerateResponse]) -> tuple[list[pb.GenerateResponse], dict[int, list[int]]]:
    found = list(responses)
    tokens: dict[int, list[int]] = {}
    for response in found:
        for delta in response.deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
    return found, tokens


def test_greedy_tokens_are_transformers_and_come_one_by_one(stub: inference_pb2_grpc.InferenceStub) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    responses, tokens = answer(
        stub.Generate(pb.GenerateRequest(model="tested", text=PROMPT, sampling=sampling(20)))
    )
    expected = greedy(BUNDLED, prompt, 20)
    assert tokens[0] == expected
    assert len(responses) > 10
    assert list(responses[0].prompt_token_ids) == list(prompt)
    assert [r.finished for r in responses] == [False] * (len(responses) - 1) + [True]
    text = "".join(d.text for r in responses for d in r.deltas)
    assert text == tokenizer.decode([*prompt, *expected])[len(PROMPT) :]
    last = responses[-1]
    assert last.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.output_tokens) == (len(prompt), 20)
    assert 0 <= last.timing.queue_s <= last.timing.ttft_s <= last.timing.total_s


def test_token_ids_n_seed_and_logprobs(stub: inference_pb2_grpc.InferenceStub) -> None:
    request = pb.GenerateRequest(
        token_ids=NO_TEXT, sampling=sampling(6, n=3, seed=5, temperature=1.0), return_logprobs=2
    )
    responses, tokens = answer(stub.Generate(request))
    assert [len(tokens[i]) for i in range(3)] == [6, 6, 6]
    assert len({tuple(t) for t in tokens.values()}) > 1
    assert answer(stub.Generate(request))[1] == tokens
    for response in responses:
        for delta in response.deltas:
            assert len(delta.logprobs) == len(delta.token_ids)
            assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in delta.logprobs)
            assert all(alternative.text for entry in delta.logprobs for alternative in entry.top)


def test_stop_string_and_stop_id(stub: inference_pb2_grpc.InferenceStub) -> None:
    responses, tokens = answer(stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling(30))))
    text = "".join(d.text for r in responses for d in r.deltas)
    stop = text[8:12]
    cut, _ = answer(stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling(30, stop=[stop]))))
    assert "".join(d.text for r in cut for d in r.deltas) == text[: text.index(stop)]
    last = cut[-1].deltas[-1]
    assert (last.finish_reason, last.stop_string) == (pb.FINISH_REASON_STOP, stop)
    by_id = sampling(30, stop_token_ids=[tokens[0][4]])
    ended, _ = answer(stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=by_id)))
    assert ended[-1].deltas[-1].stop_token_id == tokens[0][4]


def test_cancelling_the_call_aborts(stub: inference_pb2_grpc.InferenceStub, server: Served) -> None:
    for _ in range(5):
        call = stub.Generate(pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(900, n=2)))
        next(call)
        call.cancel()
        server.wait_idle()


def test_abort_by_id_from_elsewhere(stub: inference_pb2_grpc.InferenceStub, server: Served) -> None:
    request = pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(900), request_id="mine")
    call = stub.Generate(request)
    assert next(call).request_id == "mine"
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert stub.Abort(pb.AbortRequest(request_id="mine")).found
    rest = list(call)
    assert rest[-1].finished
    assert rest[-1].deltas[-1].finish_reason == pb.FINISH_REASON_ABORT
    assert not stub.Abort(pb.AbortRequest(request_id="mine")).found
    server.wait_idle()


def test_calls_side_by_side_do_not_mix(stub: inference_pb2_grpc.InferenceStub) -> None:
    prompts = [[i + 5, i + 6, i + 7] for i in range(8)]
    alone = [
        answer(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=p), sampling=sampling(8))))[1][0]
        for p in prompts
    ]
    together: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompts[i]), sampling=sampling(8))
        together[i] = answer(stub.Generate(request))[1][0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone


@pytest.mark.parametrize(
    ("request_", "code", "word"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4096])), grpc.StatusCode.INVALID_ARGUMENT, "4096"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 1024)), grpc.StatusCode.INVALID_ARGUMENT, "1024"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=2)), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(n=0)), grpc.StatusCode.INVALID_ARGUMENT, "n:"),
        (pb.GenerateRequest(text="x", return_logprobs=99), grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
        (pb.GenerateRequest(text="x", request_id="x" * 200), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        (pb.GenerateRequest(text="x", model="other"), grpc.StatusCode.NOT_FOUND, "other"),
        (pb.GenerateRequest(text="x" * 17_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger"),
    ],
)
def test_what_is_refused(
    stub: inference_pb2_grpc.InferenceStub, request_: pb.GenerateRequest, code: grpc.StatusCode, word: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_))
    assert caught.value.code() == code
    assert word in caught.value.details()


def test_full_queues(deployment: InProcessDeployment) -> None:
    with (
        served(deployment, waiting=AdmissionLimits(max_waiting_requests=0)) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        running = stub.Generate(pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(900, n=64)))
        next(running)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(1))))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1
        running.cancel()
        server.wait_idle()


def test_model_and_cluster_info(stub: inference_pb2_grpc.InferenceStub) -> None:
    model = stub.ModelInfo(pb.ModelInfoRequest())
    assert (model.name, model.vocab_size, model.max_context) == ("tested", 4096, 1024)
    assert model.has_tokenizer
    assert model.has_chat_template
    assert list(model.eos_token_ids) == [0, 4]
    cluster = stub.ClusterInfo(pb.ClusterInfoRequest())
    assert [(s.name, s.first_layer, s.end_layer, list(s.devices)) for s in cluster.stages] == [
        ("s0", 0, 5, ["n/0", "n/1"]),
        ("s1", 5, 8, ["n/2"]),
    ]
    (route,) = cluster.routes
    assert route.up
    assert [(h.stage, h.first_layer, h.end_layer) for h in route.path] == [("s0", 0, 5), ("s1", 5, 8)]
    assert route.total_pages > 0


def test_the_generated_code_is_of_this_protocol(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    root = Path(__file__).parent.parent
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{root}", *out, str(root / "hexgen/proto/inference.proto")]) == 0
    for made in (tmp_path / "hexgen/proto").iterdir():
        assert made.read_text() == (root / "hexgen/proto" / made.name).read_text(), "run `make proto`"


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "hexgen.v1.Inference"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (listing,) = reflection.ServerReflectionInfo(iter([ask]))
    names = {service.name for service in listing.list_services_response.service}
    assert {"hexgen.v1.Inference", "grpc.health.v1.Health"} <= names


def test_the_api_key(deployment: InProcessDeployment) -> None:
    with served(deployment, api_key="s3cret") as server, grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(2))
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            for call in (
                lambda m: list(stub.Generate(request, metadata=m)),
                lambda m: stub.ModelInfo(pb.ModelInfoRequest(), metadata=m),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        key = (("authorization", "Bearer s3cret"),)
        assert answer(stub.Generate(request, metadata=key))[1][0]
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # open, for probes


# ---- serving ------------------------------------------------------------------------------------------


def test_busy_ports_are_one_clear_error(deployment: InProcessDeployment, server: Served) -> None:
    http_port = int(server.http.rsplit(":", 1)[1])
    grpc_port = int(server.grpc.rsplit(":", 1)[1])
    for options in ({"port": http_port}, {"grpc_port": grpc_port}):
        with pytest.raises(DeploymentError, match="cannot listen"), served(deployment, **options):
            pass


def test_half_of_tls_is_an_error(deployment: InProcessDeployment, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="both"), served(deployment, tls_cert=tmp_path / "cert.pem"):
        pass
    both = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    with pytest.raises(SpecError, match="cannot be read"), served(deployment, **both):
        pass
    for path in both.values():
        path.write_text("no certificate")
    with pytest.raises(SpecError, match="TLS"), served(deployment, **both):
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(deployment: InProcessDeployment, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    with served(deployment, tls_cert=cert, tls_key=key) as server:
        reply = httpx.post(
            f"{server.http}/v1/completions", json={"prompt": "x", "max_tokens": 1}, verify=str(cert), timeout=60
        )
        assert reply.status_code == 200
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(server.grpc, credentials) as channel:
            assert inference_pb2_grpc.InferenceStub(channel).ModelInfo(pb.ModelInfoRequest()).name == "tested"


def test_the_end_lets_short_requests_finish_and_aborts_long_ones(deployment: InProcessDeployment) -> None:
    with served(deployment, drain_s=1.0) as server, grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        short = stub.Generate(pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(3)))
        long = stub.Generate(pb.GenerateRequest(token_ids=NO_TEXT, sampling=sampling(1000)))
        until(lambda: server.coordinator.running == 2)
        server.loop.loop.call_soon_threadsafe(server.stop.set)
        assert len(answer(short)[1][0]) == 3
        assert answer(long)[0][-1].deltas[-1].finish_reason == pb.FINISH_REASON_ABORT
        server.done.result(30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.http}/health")


def test_a_stopped_engine_is_seen(server: Served) -> None:
    with engine() as own, served(own) as other, grpc.insecure_channel(other.grpc) as channel:
        assert httpx.get(f"{other.http}/health").status_code == 200
        own.stop()
        until(lambda: not other.coordinator.healthy)
        assert httpx.get(f"{other.http}/health").status_code == 503
        refused = httpx.post(f"{other.http}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        with pytest.raises(grpc.RpcError) as caught:
            list(inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x")))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest()
        until(lambda: check(request).status == health_pb2.HealthCheckResponse.NOT_SERVING)
