"""The memory that a command needs, checked before libraries abort the process."""

import os

_JAX = {"protect", "calibrate", "levels", "audit", "demo"}
_MIB = 1 << 20


def check_memory(command: str) -> None:
    """Refuses a limit on address space (``ulimit -v``) under which libraries abort.

    Raises:
        MemoryError: the limit is too low for this command to start.
    """
    try:
        import resource
    except ModuleNotFoundError:  # a system without such limits
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    # Measured. Each core adds threads, each with its own stack and arena.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    least = (1400 + 80 * cores if command in _JAX else 160 + 32 * cores) * _MIB
    if limit != resource.RLIM_INFINITY and limit < least:
        raise MemoryError(
            f"memory: expected at least {least // _MIB} MiB of address space for selcrypt "
            f"{command}, got a limit of {limit // _MIB}. Raise it (ulimit -v)."
        )
