"""Each peer in a virtual environment of its own, outside the repository, made only when it is asked for.

Below ``$HEXGEN_PEERS``, or ``hexgen/peers`` in the user's cache directory. An environment is made again where what
it should hold has changed; an unfinished one is removed first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hexgen.compiled import user_cache
from hexgen.errors import HexgenError

INSTALL_LIMIT_S = 3600.0  # llama-cpp-python compiles for a quarter of an hour on one slow core
_MARK = "installed.txt"


class PeerError(HexgenError):
    """A peer cannot be installed, started or asked."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    script: str  # beside this file; speaks lines.py's JSON
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # what pip brings along and must go again


PEERS = {
    peer.name: peer
    for peer in (
        Peer("llama.cpp", "run_llama_cpp.py", ("llama-cpp-python", "gguf", "numpy")),
        Peer(
            "OpenVINO",
            "run_openvino.py",
            # The exporter traces the model with torch: of the version that is here, which is likely at hand.
            ("openvino", "optimum-intel[openvino]", f"torch=={torch.__version__.split('+')[0]}"),
            # Not needed here, and of another build than a torch without CUDA: transformers then fails to import.
            unwanted=("torchvision",),
        ),
    )
}


def default_folder() -> Path:
    named = os.environ.get("HEXGEN_PEERS")
    return Path(named) if named else user_cache() / "peers"


def python_of(peer: Peer, folder: Path) -> Path:
    """The interpreter of ``peer``'s environment, made where it is missing. ``PeerError``: why it cannot be had."""
    home = folder / peer.name
    python, mark = home / "bin" / "python", home / _MARK
    wanted = "\n".join(peer.requirements) + "\n"
    if mark.is_file() and mark.read_text() == wanted and python.is_file():
        return python
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    print(f"installing {peer.name} into {home} (minutes; once)", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(home)], peer)
    _run([str(python), "-m", "pip", "install", "--quiet", *peer.requirements], peer)
    if peer.unwanted:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.unwanted], peer)
    mark.write_text(wanted)
    return python


def _run(command: list[str], peer: Peer) -> None:
    remedy = "see the message above; leave the peer out with --peers"
    try:
        done = subprocess.run(command, stdout=sys.stderr, timeout=INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"cannot be installed: {error}", where=peer.name, remedy=remedy) from error
    if done.returncode != 0:
        raise PeerError(f"cannot be installed: pip ended with {done.returncode}", where=peer.name, remedy=remedy)
