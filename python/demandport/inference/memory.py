"""What models hold of the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# psutil is imported where it is used: a service without models does not need it.

#: What models may hold together where nothing else is said, as a share of the machine's memory.
DEFAULT_SHARE = 0.8


def default_limit_bytes() -> int:
    """The limit where none is configured."""
    import psutil

    return int(psutil.virtual_memory().total * DEFAULT_SHARE)


def held_bytes(pids: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes that processes hold, by the name of their group; of what they share, their share, so that mapped weights
    count once. A process that is gone holds none. Blocks for milliseconds per process."""
    return {name: sum(map(_proportional_bytes, each)) for name, each in pids.items()}


def _proportional_bytes(pid: int) -> int:
    import psutil

    try:
        found = psutil.Process(pid).memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(found, "pss", 0) or found.uss)
