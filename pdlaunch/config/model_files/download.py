"""Downloads a part of a model from the hub into the cache of huggingface_hub.

The library runs in its own process, so that its threads end at once on Ctrl-C:
``python -m pdlaunch.config.model_files.download NAME REVISION PART`` shows the library's progress
bars on standard error, and prints ``{"weight_bytes": NUMBER}``, or ``{"error": TEXT, "fix": TEXT,
"field": NAME}`` if it fails.
"""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from pdlaunch.config.model_files.find import cached_snapshot, is_offline
from pdlaunch.config.model_files.shape import INDEX, WEIGHTS
from pdlaunch.config.model_files.weights import names_in, weight_files
from pdlaunch.errors import ConfigError

# ``description``: the small files that native engines read. ``weights``: the files in safetensors
# that the description names. ``all``: all files that vLLM may read, for models without native
# support.
Part = Literal["description", "weights", "all"]
# Downloads a part of a model (name, revision) into the cache. Returns the size of its weights if
# only the hub knows it. Raises ConfigError.
Fetch = Callable[[str, str | None, Part], int | None]

# Files that native engines read besides the weights
DESCRIPTION = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", INDEX),
)
# Other formats of weights, which many repositories hold besides safetensors
_OTHER_FORMS = (
    *("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"),
    *("consolidated*", "original/*", "onnx/*"),
)
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_STOP_TIMEOUT_S = 10.0


def fetch_part(name: str, revision: str | None, part: Part) -> int | None:
    """Download what the cache lacks of a part: see ``Fetch``. Ends at once on Ctrl-C. Asks the hub
    for a newer description, unless HF_HUB_OFFLINE is set.
    """
    # Offline, the code that reads the files reports missing files.
    if is_offline() or (part == "weights" and _has_weights(name, revision)):
        return None
    revision = revision or "main"
    command = [sys.executable, "-P", "-m", "pdlaunch.protocol.process.bootstrap", __spec__.name]
    # Progress bars are useless for small files and in logs.
    is_shown = part != "description" and sys.__stderr__ is not None and sys.__stderr__.isatty()
    with subprocess.Popen(
        [*command, name, revision, part],
        env={"HF_HUB_DISABLE_PROGRESS_BARS": "0" if is_shown else "1", **os.environ},
        # The child ends when this pipe closes, that is, when this process ends.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        # Keep Ctrl-C away from the child: this process terminates it below.
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
    try:
        found = json.loads(said.rpartition("\n")[2])  # Libraries may print lines before it
    except ValueError:
        text = f"{name} was not downloaded: the process ended with code {process.returncode}"
        found = {"error": text, "fix": "Try again.", "field": "model"}
    if "error" in found:
        value = revision if found["field"] == "revision" else name
        raise ConfigError(found["error"], field=found["field"], value=value, fix=found["fix"])
    weight_bytes: int | None = found["weight_bytes"]
    return weight_bytes


def _has_weights(name: str, revision: str | None) -> bool:
    try:
        weight_files(cached_snapshot(name, revision))
    except ConfigError:
        return False
    return True


def download(name: str, revision: str, part: Part) -> int | None:
    """Do the work of ``fetch_part`` in this process. Raises ConfigError."""
    try:
        from huggingface_hub import snapshot_download

        # Small files first: the index names the files of the weights.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*DESCRIPTION]))
        if not (folder / "config.json").is_file():
            raise _wrong_files(name, "config.json")
        if part == "weights":
            index = folder / INDEX
            wanted = names_in(index) if index.is_file() else ["model.safetensors"]
            # The library treats names as glob patterns, so leave out names with special characters.
            plain = [file for file in wanted if _PLAIN_NAME.fullmatch(file)]
            snapshot_download(name, revision=revision, allow_patterns=plain)
            if not any((folder / file).is_file() for file in wanted):
                raise _wrong_files(name, wanted[0])
        elif part == "all":
            snapshot_download(name, revision=revision, ignore_patterns=[*_OTHER_FORMS])
            if not any(folder.glob("*.safetensors")):
                raise _wrong_files(name, "*.safetensors")
        elif not (folder / INDEX).is_file() and not any(folder.glob(WEIGHTS)):
            return _weight_bytes(name, revision)
        return None
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{error}", field="model", fix="pip install huggingface_hub") from error
    except Exception as error:
        raise _explain(error, name, revision) from error


def _weight_bytes(name: str, revision: str) -> int | None:
    """Return the bytes of a model's weights on the hub; None if the hub does not say."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # Without an answer of the hub, the cached files suffice
        model = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=5.0)
        files = [each for each in model.siblings or () if fnmatchcase(each.rfilename, WEIGHTS)]
        return sum(each.size or 0 for each in files) or None
    return None


def _wrong_files(name: str, missing: str) -> ConfigError:
    """Return the error for a model without safetensors on the hub."""
    fix = "Name a model whose weights are published as safetensors; for one in GGUF, run "
    fix += f"`hf download {name} FILE.gguf --local-dir DIR`, and name DIR/FILE.gguf."
    return ConfigError(f"{name} on the hub has no {missing}", field="model", value=name, fix=fix)


def _explain(error: Exception, name: str, revision: str) -> ConfigError:
    """Return an error with a fix for the user, in place of an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    field, fix = "model", f"Try again, or run `hf download {name}` to see more."
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
            fix = "Check network and proxy, or set HF_ENDPOINT to a mirror. Or run `hf download "
            fix += f"{name} --local-dir DIR` elsewhere, and serve DIR."
        case errors.HfHubHTTPError():  # A subclass of OSError, so matched before it
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
    """Delete the partial files of this process and end at once: no later download resumes them."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = descriptor.readlink()
            if path.suffix == ".incomplete":
                path.unlink()
    os._exit(128 + number)


def main() -> int:
    """Download the part that the arguments name. Return the exit code, 1 after an error."""
    signal.signal(signal.SIGTERM, _drop_partial_files)
    name, revision, text = sys.argv[1:]
    part = next(each for each in get_args(Part) if each == text)
    if part != "description":
        sys.stderr.write(f"downloading {name}\n")
    said: dict[str, object]
    try:
        said = {"weight_bytes": download(name, revision, part)}
    except ConfigError as error:
        said = {"error": str(error), "fix": error.fix, "field": error.field}
    sys.stdout.write(json.dumps(said))
    sys.stdout.flush()
    return int("error" in said)


if __name__ == "__main__":
    code = main()
    # Do not wait for threads of the library, which may still wait for the network.
    os._exit(code)
