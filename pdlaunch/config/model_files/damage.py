"""Reports damaged model files, whatever their format."""

from __future__ import annotations

from pathlib import Path

from pdlaunch.errors import ConfigError

DOWNLOAD_AGAIN = (
    "Download the file again, and compare its size and SHA-256 with those at its source."
)

_OTHER_CONTENT = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer: the file itself was never fetched (`git lfs pull`)",
    ),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are"),
    (b"\x80", "a pickle"),
    (b"<", "an HTML or XML page, as servers send instead of a file"),
    (b"GGUF", "a .gguf file"),
)
"""The first bytes of other content that is found in place of model files."""


def damaged(path: Path, what: str, *, fix: str = DOWNLOAD_AGAIN) -> ConfigError:
    """Make the error for a file of the model that cannot be used as it is."""
    return ConfigError(f"{path} is damaged: {what}", field="model", value=str(path), fix=fix)


def describe_content(head: bytes) -> str:
    """Describe a file that begins with ``head`` and is not what its name says."""
    known = (name for start, name in _OTHER_CONTENT if head.startswith(start))
    return next(known, f"unknown content (it begins with {head[:8].hex(' ')})") if head else "empty"
