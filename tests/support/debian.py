"""Programs that a test needs and Debian has."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Unavailable(Exception):
    """Why a program cannot be had here."""


def program(name: str) -> str | None:
    """Where a program is."""
    return shutil.which(name, path=PATH)


def install(packages: Sequence[str], programs: Sequence[str]) -> None:
    """Installs packages where their programs are missing.

    Raises:
        Unavailable: they are missing and this user cannot install them.
    """
    if all(map(program, programs)):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{programs[0]} is not installed and there is no apt-get to install it")
    if os.geteuid() != 0:
        raise Unavailable(f"{programs[0]} is not installed and only root may: apt-get install {' '.join(packages)}")
    # A container has no init; where there is one, the services must not start with a configuration of the host's.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        words = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120", "--no-install-recommends"]
        for attempt in (["install", *packages], ["update"], ["install", *packages]):
            done = subprocess.run(
                [*words, *attempt],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if all(map(program, programs)):
                return
    finally:
        if ours:
            policy.unlink(missing_ok=True)
    raise Unavailable(f"apt-get could not install {programs[0]}: {done.stderr.strip()[-300:]}")
