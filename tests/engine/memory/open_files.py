from pathlib import Path


def num_open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
