"""Downloads a part of a model of the hub into the cache of huggingface_hub, with its rules.

The library runs in a process of its own, so that its threads end at once on Ctrl-C:
``python -m pdlaunch.config.model_files.download NAME REVISION PART`` draws the library's bars on
standard error, and prints ``{"error": TEXT, "fix": TEXT, "field": NAME}`` when it fails.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from pdlaunch.config.model_files.find import cached_snapshot, is_offline
from pdlaunch.config.model_files.shape import INDEX
from pdlaunch.config.model_files.weights import names_in, weight_files
from pdlaunch.errors import ConfigError

# The parts of a download: the small files that native engines read, the weights that these
# describe, or, for a model that native engines do not know, all files that vLLM may read
Part = Literal["description", "weights", "all"]
# Brings a part of a model (name, revision) into the cache. Raises ConfigError.
Fetch = Callable[[str, str | None, Part], None]

# The files that are read, apart from weights
DESCRIPTION = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", INDEX),
)
# Other formats of weights, in which many models are published too
_OTHER_FORMS = (
    *("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"),
    *("consolidated*", "original/*", "onnx/*"),
)
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_STOP_TIMEOUT_S = 10.0


def fetch_part(name: str, revision: str | None, part: Part) -> None:
    """Download what the cache lacks of a part of a model; ends at once on Ctrl-C.

    The hub is asked for a newer version of the description, unless HF_HUB_OFFLINE forbids it.
    Weights that are complete are not asked for. Raises ConfigError.
    """
    # Offline, what is missing is found where it is read.
    if is_offline() or (part == "weights" and _has_weights(name, revision)):
        return
    revision = revision or "main"
    command = [sys.executable, "-P", "-m", "pdlaunch.protocol.process.guarded", __spec__.name]
    # Bars of small files, or in a log, only disturb.
    is_shown = part != "description" and sys.__stderr__ is not None and sys.__stderr__.isatty()
    with subprocess.Popen(
        [*command, name, revision, part],
        env={"HF_HUB_DISABLE_PROGRESS_BARS": "0" if is_shown else "1", **os.environ},
        # Its end tells the process that we are gone.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        # Ctrl-C is for us, who stop it.
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.read()
            process.wait()
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        try:
            found = json.loads(said.rpartition("\n")[2])  # behind what a library may print
        except ValueError:
            text = f"{name} was not downloaded: the process ended with code {process.returncode}"
            found = {"error": text, "fix": "Try again.", "field": "model"}
        value = revision if found["field"] == "revision" else name
        raise ConfigError(found["error"], field=found["field"], value=value, fix=found["fix"])


def _has_weights(name: str, revision: str | None) -> bool:
    try:
        weight_files(cached_snapshot(name, revision))
    except ConfigError:
        return False
    return True


def download(name: str, revision: str, part: Part) -> None:
    """Download what the cache does not have yet. Raises ConfigError."""
    try:
        from huggingface_hub import snapshot_download

        # Small files first: they say which weights to ask for.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*DESCRIPTION]))
        if not (folder / "config.json").is_file():
            raise _wrong_files(name, "config.json")
        if part == "weights":
            index = folder / INDEX
            wanted = names_in(index) if index.is_file() else ["model.safetensors"]
            # They are patterns to the library.
            plain = [file for file in wanted if _PLAIN_NAME.fullmatch(file)]
            snapshot_download(name, revision=revision, allow_patterns=plain)
            if not any((folder / file).is_file() for file in wanted):
                raise _wrong_files(name, wanted[0])
        elif part == "all":
            snapshot_download(name, revision=revision, ignore_patterns=[*_OTHER_FORMS])
            if not any(folder.glob("*.safetensors")):
                raise _wrong_files(name, "*.safetensors")
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{error}", field="model", fix="pip install huggingface_hub") from error
    except Exception as error:
        raise _explain(error, name, revision) from error


def _wrong_files(name: str, missing: str) -> ConfigError:
    """Return the error of a model that is published in another form."""
    fix = "Name a model whose weights are published as safetensors; of one in GGUF, "
    fix += f"`hf download {name} FILE.gguf --local-dir DIR`, and name DIR/FILE.gguf."
    return ConfigError(f"{name} on the hub has no {missing}", field="model", value=name, fix=fix)


def _explain(error: Exception, name: str, revision: str) -> ConfigError:
    """Return what the user can do about an error of the library."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
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
            text = f"{name} is not in the cache {constants.HF_HUB_CACHE}, or only in part, and "
            text += f"{hub} cannot be reached ({reason})"
            fix = "Check network and proxy, or set HF_ENDPOINT to a mirror. Or `hf download "
            fix += f"{name} --local-dir DIR` elsewhere, and serve DIR."
        case errors.HfHubHTTPError():  # it is an OSError, too
            text = f"{hub} answered {error.response.status_code} for {name}"
        case OSError():
            text = f"{name} was not downloaded: {error}"
            folder = "HF_HOME to a folder that you may write to."
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = f"Make room, or set {folder}"
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                fix = f"Set {folder}"
        case _:
            text = f"{name} was not downloaded: {type(error).__name__}: {reason}"
    return ConfigError(text, field=field, value=name, fix=fix)


def _drop_partial_files(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End at once, without what this process has begun to write: nobody would continue it."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = descriptor.readlink()
            if path.suffix == ".incomplete":
                path.unlink()
    os._exit(128 + number)


def main() -> int:
    """Download what the arguments name; exit code 1 after an error."""
    signal.signal(signal.SIGTERM, _drop_partial_files)
    name, revision, text = sys.argv[1:]
    part = next(each for each in get_args(Part) if each == text)
    if part != "description":
        sys.stderr.write(f"downloading {name}\n")
    try:
        download(name, revision, part)
    except ConfigError as error:
        sys.stdout.write(json.dumps({"error": str(error), "fix": error.fix, "field": error.field}))
        sys.stdout.flush()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # Threads of the library may still wait for the network.
    os._exit(code)
