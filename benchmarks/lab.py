"""How exactly a lab is what its file says: bandwidth of a link, time of one message on it, share of the processor.

    sudo .venv/bin/python benchmarks/lab.py

Builds a lab without Ray and measures from inside it, five times each: median (smallest to largest). Processor
shares are only what they should be while nothing else wants the processor.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from hexgen.cluster import parse_cluster
from hexgen.lab.groups import find_groups
from hexgen.lab.laboratory import Laboratory
from hexgen.lab.teardown import clean_dead
from hexgen.lab.tools import check_machine

RUNS = 5
SECONDS = 2.0
MESSAGE_BYTES = 100_000  # hidden states of some hundred tokens of a small model
RATES = {"b": "20Mbps", "c": "100Mbps", "d": "1Gbps"}
BITS_S = {"20Mbps": 20e6, "100Mbps": 100e6, "1Gbps": 1e9}
SPEEDS = (0.1, 0.25, 0.5, 0.8)
_FRAME, _SEGMENT = 1514, 1448  # bytes of a full Ethernet frame, and of what TCP carries in one

_RECEIVE = """
import json, socket, struct, sys, time
server = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
size, messages, times = int(sys.argv[2]), int(sys.argv[3]), []
for _ in range(messages):
    connection.sendall(b"x")
    sent, = struct.unpack("d", connection.recv(8, socket.MSG_WAITALL))  # one machine, one clock
    left = size - 8
    while left: left -= len(connection.recv(min(left, 65536)))
    times.append(time.monotonic() - sent)
connection.sendall(b"x")
connection.recv(1); began = time.monotonic(); total = 0
while data := connection.recv(65536): total += len(data)
print(json.dumps([total / (time.monotonic() - began), times]))
"""
_SEND = """
import socket, struct, sys, time
connection = socket.create_connection((sys.argv[1], 7000))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(int(sys.argv[3])):
    connection.recv(1); time.sleep(0.05)
    connection.sendall(struct.pack("d", time.monotonic()) + bytes(int(sys.argv[2]) - 8))
connection.recv(1)
until = time.monotonic() + float(sys.argv[4])
while time.monotonic() < until: connection.sendall(bytes(65536))
"""
_SPIN = """
import time
began = time.monotonic()
while time.monotonic() < began + 3: pass
print(time.process_time() / (time.monotonic() - began))
"""


def main() -> None:
    check_machine()
    groups = find_groups()
    clean_dead(groups)
    nodes = [{"name": "a", "device": "cpu"}, *({"name": name, "device": "cpu"} for name in RATES)]
    nodes += [{"name": f"s{speed:g}", "device": "cpu", "speed": speed} for speed in SPEEDS]
    pairs = [{"between": ["a", name], "bandwidth": rate, "latency": "0us"} for name, rate in RATES.items()]
    links = {"default": {"bandwidth": "1Gbps", "latency": "0us"}, "nodes": pairs}
    with Laboratory(parse_cluster({"nodes": nodes, "links": links}), groups, with_ray=False) as lab:
        for name, rate in RATES.items():
            _link(lab, "a", name, BITS_S[rate])
            _link(lab, name, "a", BITS_S[rate])
        for speed in SPEEDS:
            shares = [_share(lab, f"s{speed:g}") for _ in range(RUNS)]
            print(f"speed {speed:g}: {_spread(shares)} of a core", flush=True)


def _link(lab: Laboratory, sender: str, receiver: str, bits_s: float) -> None:
    rates, times = [], []
    for _ in range(RUNS):
        address = lab.name.addresses(lab.cluster)[receiver]
        numbers = [str(MESSAGE_BYTES), str(RUNS)]
        receiving = lab.start(receiver, [sys.executable, "-S", "-c", _RECEIVE, address, *numbers], stdout=-1)
        assert receiving.stdout is not None  # noqa: S101 - a pipe was asked for
        receiving.stdout.readline()
        sending = lab.start(sender, [sys.executable, "-S", "-c", _SEND, address, *numbers, str(SECONDS)])
        output, _ = receiving.communicate()
        sending.wait()
        rate, seconds = json.loads(output)
        rates.append(8 * rate / bits_s)
        times += seconds
    expected_s = 8 * MESSAGE_BYTES * _FRAME / _SEGMENT / bits_s
    print(
        f"{sender} to {receiver}, {bits_s / 1e6:g} Mbit/s: {_spread(rates)} of it seen by TCP; "
        f"{MESSAGE_BYTES} bytes in {_spread([t / expected_s for t in times])} of {1e3 * expected_s:.2f} ms",
        flush=True,
    )


def _share(lab: Laboratory, node: str) -> float:
    process = lab.start(node, [sys.executable, "-S", "-c", _SPIN], stdout=subprocess.PIPE)
    return float(process.communicate()[0])


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
