"""Damaged model files: each is told in words with the right fix within seconds, by check-config and
by the conversion.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.attacks.verdict import Verdict
from tests.config.model_files.files import tiny_gguf
from tests.config.model_files.test_weights import GOOD as GOOD_SAFETENSORS
from tests.e2e.conftest import clean_environ

LIMIT_S = 10.0


def model_files(folder: Path, seed: int, verdict: Verdict) -> None:
    """Every damaged file through both commands."""
    for what, model in (*damaged_gguf(folder, random.Random(seed)), *damaged_safetensors(folder)):
        commands = [[sys.executable, "-m", "pdlaunch", "check-config", "--model", str(model)]]
        if model.suffix == ".gguf":
            commands.append([sys.executable, "-m", "pdlaunch.engine.models.convert", str(model)])
        for command in commands:
            judge(verdict, what, command, folder)


def judge(verdict: Verdict, what: str, command: list[str], folder: Path) -> None:
    environ = clean_environ() | {"PDLAUNCH_CACHE": str(folder / "cache"), "COLUMNS": "1000"}
    name = " ".join(command[2:4])
    start_s = time.monotonic()
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=6 * LIMIT_S, env=environ, check=False
        )
    except subprocess.TimeoutExpired:
        verdict.broke("a damaged file ends in time", f"{what}: {name} does not end")
        return
    seconds, said = time.monotonic() - start_s, result.stdout + result.stderr
    if result.returncode not in (1, 2):
        verdict.broke(
            "a damaged file is refused",
            f"{what}: {name} ended with {result.returncode}: {said[-300:]}",
        )
    if "Traceback" in said:
        verdict.broke("a damaged file is told in words", f"{what}: {name}: {said[-300:]}")
    if "damaged" not in said and "pickles" not in said and "has no" not in said:
        verdict.broke("a damaged file is named as such", f"{what}: {name}: {said[-300:]}")
    if seconds > LIMIT_S:
        verdict.broke(
            f"a damaged file ends within {LIMIT_S:g} s", f"{what}: {name} took {seconds:.1f} s"
        )
    reason = next(
        (line.strip() for line in said.splitlines() if "damaged" in line or "has " in line), ""
    )
    which = "check-config" if "check-config" in name else "convert"
    ended = f"{result.returncode} in {seconds:.1f} s"
    verdict.row(f"{what}, {which}", ended, reason.rpartition("damaged: ")[2][:90])


def damaged_gguf(folder: Path, source: random.Random) -> Iterator[tuple[str, Path]]:
    good = tiny_gguf().encode()
    contents = {
        "empty": b"",
        "magic only": good[:4],
        "cut in the header": good[:1000],
        "half": good[: len(good) // 2],
        "one byte short": good[:-1],
        "2^63 tensors": good[:8] + (2**63 - 1).to_bytes(8, "little") + good[16:],
        "2^40 values": good[:16] + (2**40).to_bytes(8, "little") + good[24:],
        "key of 2^60 bytes": good[:24] + (2**60).to_bytes(8, "little") + good[32:],
        "version 99": good[:4] + (99).to_bytes(4, "little") + good[8:],
        "a zip archive": b"PK\x03\x04" + source.randbytes(5000),
        "2^30 layers": good.replace(
            b"llama.block_count\x04\0\0\0\x02\0\0\0", b"llama.block_count\x04\0\0\0\0\0\0\x40"
        ),
    }
    for number in range(3):
        flipped = bytearray(good)
        # Places of numbers, where every flip is damage; a flipped letter is another letter.
        for place in source.sample([*range(8, 24), *range(24, 32)], 5):
            flipped[place] ^= 1 << source.randrange(8)
        contents[f"flipped bits {number}"] = bytes(flipped)
    for what, content in contents.items():
        file = folder / f"{what.replace(' ', '-')}.gguf"
        file.write_bytes(content)
        yield what, file


def damaged_safetensors(folder: Path) -> Iterator[tuple[str, Path]]:
    contents = {
        "empty weights": b"",
        "half of the weights": GOOD_SAFETENSORS[:-8],
        "header of weights": GOOD_SAFETENSORS[:20],
    }
    for what, content in contents.items():
        model = _directory(folder / what.replace(" ", "-"))
        (model / "model.safetensors").write_bytes(content)
        yield what, model
    model = _directory(folder / "pickles")
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + os.urandom(100))
    yield "pickles", model
    yield "no weights", _directory(folder / "nothing")


def _directory(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128,'
        ' "num_hidden_layers": 2,'
        ' "num_attention_heads": 4,'
        ' "vocab_size": 256, "max_position_embeddings": 512}'
    )
    return path
