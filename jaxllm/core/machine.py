"""What a run ran on: versions, source revision, hardware. Nothing here imports JAX."""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Version of Python and of each installed package that a run's numbers depend on, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: str | Path) -> str | None:
    """Commit that `folder` is checked out from, with `+dirty` if tracked files in it differ; None if git tracks it not.

    A folder that git ignores (an environment inside a checkout) is not tracked: its commit would be another project's.
    """
    if not _git(folder, "ls-files", "--error-unmatch", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None  # a repository before its first commit
    return commit + ("+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")


def _git(folder: str | Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *command], check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_machine() -> dict:
    """Platform, CPU model, usable cores, memory in bytes; and the devices, if JAX has been imported already."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        described["devices"] = {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)}
    return described


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation; False where there is no glibc to tell.

    XLA's CPU client allocates the temporary buffers of a program at each call. glibc would map them anew and the kernel
    would clear every page of them: a fifth of a small training step. To be called before threads allocate; no use on
    accelerators, where those buffers are not in host memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # malloc.h: never trim, grow by 64 MiB at a time, no mapping of its own for a large block, one arena for all threads
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    asked = {trim_threshold: -1, top_pad: 64 << 20, mmap_max: 0, arena_max: 1}
    return all([mallopt(name, value) for name, value in asked.items()])
