"""Downloads a part of a model of the hub into the cache of huggingface_hub, with its rules.

``python -m pdlaunch.config.model_files.download NAME REVISION PART`` prints a line of JSON for each
step: ``{"done": BYTES, "total": BYTES}``; ``{"error": TEXT, "fix": TEXT, "field": NAME}`` is the
last one when it fails. It is a process of its own: the library's threads end with it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pdlaunch.config.model_files.find import Part
from pdlaunch.config.model_files.weights import INDEX, names_in
from pdlaunch.errors import ConfigError

DESCRIPTION = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", INDEX),
)
"""The files that are read, apart from weights."""
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def download(name: str, revision: str, part: Part) -> None:
    """Download what the cache does not have yet. Raises ConfigError."""
    try:
        from huggingface_hub import snapshot_download

        def fetch(files: list[str]) -> Path:
            bar = _progress_class()
            found = snapshot_download(name, revision=revision, allow_patterns=files, tqdm_class=bar)
            return Path(found)

        folder = fetch([*DESCRIPTION])
        if not (folder / "config.json").is_file():
            raise _wrong_files(name, revision, "config.json")
        if part == "weights":
            index = folder / INDEX
            wanted = names_in(index) if index.is_file() else ["model.safetensors"]
            # They are patterns to the library.
            fetch([file for file in wanted if _PLAIN_NAME.fullmatch(file)])
            if not any((folder / file).is_file() for file in wanted):
                raise _wrong_files(name, revision, wanted[0])
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{error}", fix="pip install huggingface_hub") from error
    except Exception as error:
        raise _explain(error, name, revision) from error


def _wrong_files(name: str, revision: str, missing: str) -> ConfigError:
    """Return the error of a model that is published in another form."""
    from huggingface_hub import HfApi

    files: list[str] = []
    with suppress(Exception):  # Only for a better message.
        files = HfApi().list_repo_files(name, revision=revision)
    others = [file for file in files if file.endswith((".gguf", ".bin", ".pt", ".pth"))]
    has = f"; it has {', '.join(others[:3])}" if others else ""
    fix = "Name a model whose weights are published as safetensors."
    if any(file.endswith(".gguf") for file in others):
        fix = f"`hf download {name} FILE.gguf --local-dir DIR`, and name DIR/FILE.gguf."
    message = f"{name} on the hub has no {missing}{has}"
    return ConfigError(message, field="model", value=name, fix=fix)


def _explain(error: Exception, name: str, revision: str) -> ConfigError:
    """Return what the user can do about an error of the library."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    field, fix = "model", f"Try again, or `hf download {name}` where it works."
    match error:
        case errors.GatedRepoError():
            text = f"{name} is gated"
            fix = f"Accept its terms at {hub}/{name}, then set HF_TOKEN or run `hf auth login`."
        case errors.RepositoryNotFoundError():
            text = f"{hub} has no model {name}, or it is private, and no directory has that name"
            fix = "Check the name; for a private model set HF_TOKEN or run `hf auth login`."
        case errors.RevisionNotFoundError():
            text, field = f"{name} has no revision {revision}", "revision"
            fix = "Name a branch, a tag or a commit that it has."
        case errors.LocalEntryNotFoundError():
            text = f"{name} is not in the cache {cache}, or only in part, and {hub} cannot be "
            text += f"reached ({reason})"
            fix = "Check network and proxy, or set HF_ENDPOINT to a mirror. Or `hf download "
            fix += f"{name} --local-dir DIR` elsewhere, and serve DIR."
        case errors.HfHubHTTPError():
            text = f"{hub} answered {error.response.status_code} for {name}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            text = f"{name} does not fit on the disk of {cache}"
            fix = "Make room, or set HF_HOME to a folder on another disk."
        case PermissionError():
            text = f"{error.filename} cannot be written"
            fix = "Set HF_HOME to a folder that you may write to."
        case _:
            text = f"{name} was not downloaded: {type(error).__name__}: {reason}"
    return ConfigError(text, field=field, value=name, fix=fix)


def _progress_class() -> type[Any]:
    """Return a bar for the library that prints bytes for our parent and draws nothing."""
    from tqdm.auto import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            with Path(os.devnull).open("w") as nowhere:
                super().__init__(*args, **options | {"disable": False, "file": nowhere})

        def display(self, *args: Any, **options: Any) -> bool:
            # Other bars count files.
            if self.unit == "B" and self.total:
                with lock:
                    _print({"done": int(self.n), "total": int(self.total)})
            return True

    return Bar


def _print(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _drop_partial_files(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End at once, without what this process has begun to write: nobody would continue it."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            path = descriptor.readlink()
            if path.suffix == ".incomplete":
                path.unlink()
    os._exit(128 + number)


def main() -> int:
    """Download what the arguments name; exit code 1 after an error."""
    signal.signal(signal.SIGTERM, _drop_partial_files)
    name, revision, part = sys.argv[1:]
    try:
        download(name, revision, "weights" if part == "weights" else "description")
    except ConfigError as error:
        _print({"error": str(error), "fix": error.fix, "field": error.field})
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # Threads of the library may still wait for the network.
    os._exit(code)
