"""Convert a GGUF file into a directory in Hugging Face layout, in the cache.

``python -m pdlaunch.engine.models.convert MODEL`` prints a line for each stage: ``[ 40%] reading
weights``. Several launches may convert the same model at the same time: one of them converts under
a file lock, and renames the complete result into place.
"""

import argparse
import fcntl
import functools
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdlaunch.config.model_files.find import ResolvedModel, resolve_model
from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.config.model_files.weights import DOWNLOAD_AGAIN, check_gguf, damaged
from pdlaunch.engine.models.attention import ReportProgress
from pdlaunch.errors import ConfigError

Converter = Callable[[Path, Path, ReportProgress], None]  # source file, target directory

MAX_REASON = 300  # longer messages of libraries are cut to this number of characters
LARGE_FILE_BYTES = 1024**3  # from this size on, write bfloat16; for smaller files float32


def ensure_converted(
    model: str, progress: ReportProgress, *, convert: Converter | None = None
) -> Path:
    """Return the directory of ``model``, converted first if it is not in the cache. Raises
    ConfigError.
    """
    resolved = resolve_model(model)
    if resolved.ready:
        return resolved.cache_dir
    with _locked(resolved.cache_dir.with_name(resolved.cache_dir.name + ".lock")):
        if not resolve_model(model).ready:
            _convert_into_place(resolved, progress, convert or convert_gguf)
    return resolved.cache_dir


def _convert_into_place(
    resolved: ResolvedModel, progress: ReportProgress, convert: Converter
) -> None:
    folder, prefix = resolved.cache_dir.parent, f".{resolved.cache_dir.name}-"
    for left_behind in folder.glob(f"{prefix}*"):  # from a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        convert(resolved.source, temporary, progress)
        temporary.chmod(0o755)
        temporary.rename(resolved.cache_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_gguf(source: Path, target: Path, progress: ReportProgress) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files of
    ``source`` into ``target``. Raises ConfigError.
    """
    check_gguf(source)
    progress("loading libraries", 0.0)
    try:
        import torch
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        with _reading_once():
            progress("reading the configuration", 0.1)
            config = AutoConfig.from_pretrained(**where)
            config.save_pretrained(target)
            read_model_shape(target)
            progress("reading the tokenizer", 0.2)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            progress("reading weights", 0.4)
            # Before 5.17, transformers always dequantizes, and has no argument for it.
            gguf_config = getattr(transformers, "GgufConfig", None)
            plain = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **where,
                config=config,
                dtype=torch.float32 if source.stat().st_size < LARGE_FILE_BYTES else torch.bfloat16,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **plain,
            )
        _check_weights(source, model, loaded)
    except ConfigError:
        raise
    except ImportError as error:
        raise _not_converted(source, error, "pip install 'pdlaunch[gguf]'") from error
    except Exception as error:
        # The libraries raise anything: struct.error, bare Exception, IndexError.
        raise _not_converted(
            source, error, f"Name another model if others read this file well. {DOWNLOAD_AGAIN}"
        ) from error
    if isinstance(config.eos_token_id, int):
        # The configuration has the right token. The tokenizers of transformers before 5.18 use the
        # token that begins a text instead.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    progress("writing", 0.9)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    progress("converted", 1.0)


@contextmanager
def _reading_once() -> Iterator[None]:
    """Cache the file's header and the table of names in the module ``gguf``. Otherwise transformers
    would parse the header three times, and make the table of names for each module of the model: 20
    of 31 s of CPU time for the demo model.
    """
    import gguf
    import numpy

    reader: Any = gguf.GGUFReader
    name_map = gguf.get_tensor_name_map

    class PlainReader(reader):  # type: ignore[misc]
        # The reader takes hundreds of thousands of slices, and a slice of a ``numpy.memmap`` takes
        # 2.5 times as long as a slice of a plain array.
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

    gguf.GGUFReader = functools.cache(PlainReader)
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _not_converted(source: Path, error: Exception, fix: str) -> ConfigError:
    reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
    return ConfigError(
        f"{source} cannot be converted: {reason}", field="model", value=str(source), fix=fix
    )


def _check_weights(source: Path, model: Any, loaded: dict[str, Any]) -> None:
    """Refuse weights that are missing, have another shape, or are not finite."""
    # transformers only warns of missing weights and uses random numbers for them.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # Mismatched names come with their shapes.
        names = sorted(
            item if isinstance(item, str) else str(item[0]) for item in loaded.get(kind, ())
        )
        if names:
            what = f"{len(names)} {kind.removesuffix('_keys')}, {names[0]} among them"
            raise damaged(source, f"its weights do not fit its configuration: {what}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise damaged(source, f"weight {name} holds numbers that are not finite")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if the directory is there. Otherwise print the reason to stderr and return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pdlaunch.engine.models.convert", description=__doc__
    )
    parser.add_argument("model", help="alias or .gguf file")
    parser.add_argument("--if-needed", action="store_true", help="be quiet if it is in the cache")
    parser.add_argument("--traceback", action="store_true", help="of an error, before the error")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")

    def show(text: str, fraction: float | None) -> None:
        sys.stdout.write(f"[{round((fraction or 0) * 100):3d}%] {text}\n")
        sys.stdout.flush()

    try:
        was_ready = resolve_model(options.model).ready
        directory = ensure_converted(options.model, show)
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        fix = error.fix if isinstance(error, ConfigError) else None
        sys.stderr.write(
            f"error: {str(error) or type(error).__name__}\n" + (f"fix: {fix}\n" if fix else "")
        )
        return 1
    if not (was_ready and options.if_needed):
        sys.stdout.write(f"{directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
