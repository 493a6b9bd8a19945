"""What a lab needs of the machine, and how it runs the system's own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from hexgen.errors import DeploymentError

_PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "util-linux",
}
_TIMEOUT_S = 60.0
# iproute2 is often in a folder that only root's own shell looks into.
_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"


def check_machine() -> None:
    """``DeploymentError``, one clear line, where this machine or this user cannot have a lab."""
    if not sys.platform.startswith("linux"):
        raise DeploymentError("a lab needs Linux: it is made of network namespaces and control groups")
    if os.geteuid() != 0:
        raise DeploymentError("a lab makes network namespaces, which only root may", remedy="run it with sudo")
    for tool, package in _PACKAGES.items():
        if find(tool) is None:
            raise DeploymentError(f"{package} is missing: there is no `{tool}`", remedy=f"install {package}")


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=_FOLDERS)


def run(*command: str, script: str | None = None) -> str:
    """What the tool prints; ``script`` is its standard input. ``DeploymentError`` in its own words."""
    tool = find(command[0])
    if tool is None:
        raise DeploymentError(f"there is no `{command[0]}`", remedy=f"install {_PACKAGES.get(command[0], 'it')}")
    try:
        done = subprocess.run(
            [tool, *command[1:]],
            input=script or "",
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeploymentError(f"{error}", where=" ".join(command)) from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise DeploymentError(reason, where=" ".join(command), remedy=_remedy(reason))
    return done.stdout


def _remedy(reason: str) -> str | None:
    if "not permitted" in reason:
        return "in a container, a lab needs the capabilities NET_ADMIN and SYS_ADMIN"
    if "kind is unknown" in reason or "not found" in reason:
        return "this kernel lacks it: a lab needs veth, bridge, sch_htb and cls_u32"
    return None
