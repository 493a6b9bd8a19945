"""``python -m hexgen.lab.ray_node ...``: one Ray node of a lab, run inside the node's namespace.

Says ``ready`` on standard output once the node has joined, stays for as long as its processes run, and ends them
with itself. What ``ray start`` does, without the dashboard's server and the log monitor, whose work would be the
node's.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from importlib import import_module
from typing import Any

from hexgen.deploy.ray_local import LOCAL_SETTINGS, OBJECT_STORE_BYTES, quiet_node_class
from hexgen.deploy.ray_placement import NODE_LABEL

GCS_PORT = 6379  # every lab's head has an address of its own
_WATCH_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--address", required=True, help="the node's own")
    parser.add_argument("--head", help="the head's address; without it this is the head")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    labels = dict(label.split("=", 1) for label in given.label) | {NODE_LABEL: given.name}
    common = {
        "node_ip_address": given.address,
        "num_cpus": given.cpus,
        "num_gpus": 0,  # a lab's nodes are CPUs, whatever the machine has
        "labels": labels,
        "include_log_monitor": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "temp_dir": given.folder,
        "min_worker_port": 0,
        "max_worker_port": 0,
    }
    if given.head is None:
        special: dict[str, Any] = {
            "gcs_server_port": GCS_PORT,
            "include_dashboard": False,
            "no_monitor": True,
            "_system_config": LOCAL_SETTINGS,
        }
    else:
        special = {"gcs_address": f"{given.head}:{GCS_PORT}"}
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    parameters = import_module("ray._private.parameter").RayParams(**common, **special)
    node = quiet_node_class()(parameters, head=given.head is None, shutdown_at_exit=False, spawn_reaper=False)
    print("ready", flush=True)
    while not stop.wait(_WATCH_S):
        dead = node.dead_processes()
        if dead:
            print(f"ended: {', '.join(str(kind) for kind, _ in dead)}", file=sys.stderr, flush=True)
            break
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    return 0 if stop.is_set() else 1


if __name__ == "__main__":
    sys.exit(main())
