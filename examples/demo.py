"""The demonstration that `make demo` runs: plan an unlike cluster, serve it on Ray, ask it over gRPC and HTTP.

Every step is the command that a person would type; this script only types it, and reads what comes back.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from hexgen import Plan, load_plan
from hexgen.plan import resolve_cluster
from hexgen.proto import inference_pb2 as pb
from hexgen.proto import inference_pb2_grpc

CLUSTER = Path(__file__).parent.parent / "cluster_specs" / "demo.yaml"
HEXGEN = [sys.executable, "-m", "hexgen"]
START_LIMIT_S = 240
STOP_LIMIT_S = 60
console = Console(width=116, highlight=False)


@dataclass(frozen=True, slots=True)
class Server:
    http: str
    grpc: str


@contextmanager
def serving(plan: Path) -> Iterator[Server]:
    """`hexgen serve PLAN` in a process of its own, stopped as Ctrl-C stops it; it must exit with status 0."""
    command = [*HEXGEN, "serve", str(plan), "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _ready(process)
        process.send_signal(signal.SIGINT)
        if process.wait(STOP_LIMIT_S) != 0:
            raise SystemExit(f"hexgen serve ended with status {process.returncode}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_LIMIT_S)


def _ready(process: subprocess.Popen[str]) -> Server:
    watchdog = threading.Timer(START_LIMIT_S, process.terminate)
    watchdog.start()
    line = process.stdout.readline() if process.stdout else ""  # empty where it ended instead
    watchdog.cancel()
    match = re.fullmatch(r"ready http=(\S+) grpc=(\S+)\n", line)
    if match is None:
        raise SystemExit(f"hexgen serve did not start (see above); it said {line!r}")
    return Server(match[1], match[2])


def ask_grpc(address: str, prompt: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text=prompt, sampling=pb.Sampling(max_tokens=40, temperature=0))
        text = "".join(delta.text for response in stub.Generate(request) for delta in response.deltas)
    show("gRPC", prompt, text)


def ask_http(address: str, prompt: str) -> None:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    answer = httpx.post(f"http://{address}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    show("HTTP", prompt, answer.json()["choices"][0]["text"])


def show(way: str, prompt: str, text: str) -> None:
    console.print(Rule(f"{way}: {prompt!r}", align="left", style="dim"))
    console.print(f"[dim]{_plain(prompt)}[/dim][bold]{_plain(text)}[/bold]")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def tokens_s(server: Server, requests: int, prompt_tokens: int, output_tokens: int) -> float:
    """Output tokens/s of ``requests`` greedy requests at once, each with a prompt of its own."""

    def one(number: int) -> int:
        prompt = [(number * 977 + i * 13) % 4000 + 8 for i in range(prompt_tokens)]
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = client.post(f"http://{server.http}/v1/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    with httpx.Client(timeout=300) as client, ThreadPoolExecutor(requests) as pool:
        began = time.perf_counter()
        produced = sum(pool.map(one, range(requests)))
        return produced / (time.perf_counter() - began)


def compare(server: Server, plan: Plan) -> None:
    """Measured beside predicted, for the cluster file's own workload."""
    predicted, workload = plan.predicted, resolve_cluster(plan, CLUSTER.parent).workload
    if predicted is None or workload is None:
        raise SystemExit("the demo's plan carries no prediction")
    lengths = int(workload.prompt_tokens.mean), int(workload.output_tokens.mean)
    tokens_s(server, 4, *lengths)  # warm up
    table = Table("output tokens/s", "predicted", "measured", title="Predicted and measured")
    table.add_row("one request alone", f"{predicted.single_tokens_s:.0f}", f"{tokens_s(server, 1, *lengths):.0f}")
    table.add_row("32 requests at once", f"{predicted.tokens_s:.0f}", f"{tokens_s(server, 32, *lengths):.0f}")
    console.print(table)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.yaml"
        console.print(Rule(f"hexgen plan {CLUSTER.name}", align="left"))
        subprocess.run([*HEXGEN, "plan", str(CLUSTER)], check=True)
        subprocess.run([*HEXGEN, "plan", str(CLUSTER), "-o", plan_file.name], check=True, cwd=folder)
        console.print(Rule("hexgen serve plan.yaml", align="left"))
        with serving(plan_file) as server:
            console.print(f"ready: HTTP at {server.http}, gRPC at {server.grpc}")
            ask_grpc(server.grpc, "import os\nimport sys\n\ndef main(")
            ask_http(server.http, "class Stack:\n    def __init__(self")
            compare(server, load_plan(plan_file))
    console.print("stopped; nothing is left running")


if __name__ == "__main__":
    main()
