"""What a training process asks of JAX and of its host before the first array is made."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import jax

from jaxllm.core.machine import keep_freed_memory
from jaxllm.train.config import Distributed
from jaxllm.train.distributed import join


def start(distributed: Distributed | None = None, *, compile_cache: bool) -> None:
    """Settles compilation cache and memory of this process, and joins it to others if asked; changes no result.

    Raises:
      ConfigError: the processes that `distributed` tells of cannot be joined.
    """
    if compile_cache:
        keep_compiled_programs()
    if only_cpu():
        keep_freed_memory()
    if distributed:
        join(distributed)


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in its configured place or under the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "jaxllm" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def only_cpu() -> bool:
    """Whether JAX will compute on CPU, told without starting its backends (too late for the allocator's settings)."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return (
        not plugins and importlib.util.find_spec("libtpu") is None and importlib.util.find_spec("jax_plugins") is None
    )
