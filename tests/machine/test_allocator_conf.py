"""Reading torch's allocator configuration, with the installed torch as the judge."""

import json
import os
import random
import subprocess
import sys
from importlib.metadata import version

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.machine.allocator_conf import VARIABLES, read_allocator_conf
from tests.machine.allocator_texts import (
    ACCEPTED,
    ACCEPTED_SINCE_2_13,
    REFUSED,
    REFUSED_WITH_CUDA,
)

CUDA, HIP, ANY = VARIABLES
ON, OFF = "expandable_segments:True", "expandable_segments:False"

JUDGE = """
import json, os, sys, torch
texts = json.load(sys.stdin)
print(torch.version.cuda is not None)
for text in texts:
    sys.stdout.flush()
    child = os.fork()  # What one text sets must not be there for the next one.
    if child == 0:
        try:
            torch._C._accelerator_setAllocatorSettings(text)
        except (RuntimeError, ValueError, IndexError):
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Says for each text whether torch accepts it (0) or raises an exception (1)."""


def refused(text):
    refusal = read_allocator_conf({ANY: text}).refusal
    return None if refusal is None else refusal.reason


@pytest.mark.parametrize(
    ("conf", "enabled"),
    [
        (ON, True),
        (OFF, False),
        (f"{ON},{OFF}", False),
        (f"{OFF},{ON}", True),
        (" expandable_segments : T r u e ", True),
        (f"max_split_size_mb:100,{ON},garbage_collection_threshold:0.5", True),
        (f"roundup_power2_divisions:[256:1,>:4],{ON}", True),
        (f"{ON},", True),
        ("max_split_size_mb:100", False),
        ("", False),
        # Refused, and meant as True.
        ("expandable_segments:1", True),
        ("expandable_segments:true", True),
        ("expandable_segments:no", False),
        ("EXPANDABLE_SEGMENTS:True", False),
        ("garbage", False),
    ],
)
def test_expandable_segments_as_torch_takes_them(conf, enabled):
    assert read_allocator_conf({ANY: conf}).expandable_segments is enabled


@pytest.mark.parametrize("text", [*ACCEPTED, *ACCEPTED_SINCE_2_13])
def test_what_torch_accepts_is_accepted(text):
    assert refused(text) is None


@pytest.mark.parametrize("text", [*REFUSED, *REFUSED_WITH_CUDA])
def test_what_torch_refuses_is_refused_with_a_reason(text):
    assert refused(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_split_size:128", "'max_split_size' is no key that torch knows; did you mean max_spl"),
        ("Expandable_Segments:True", "did you mean expandable_segments:...?"),
        ("'expandable_segments:True'", "did you mean expandable_segments:...?"),
        ("foo:bar", "'foo' is no key that torch knows"),
        (",a:1", "',' stands where a key is expected"),
        ("expandable_segments", "the text ends where a value of expandable_segments is expected"),
        ("expandable_segments:true", "expandable_segments:'true' is neither True nor False"),
        ("max_split_size_mb:1", "max_split_size_mb:'1' is less than 20"),
        ("garbage_collection_threshold:2", "garbage_collection_threshold:'2' is not between 0"),
    ],
)
def test_the_reason_names_key_and_value(text, reason):
    assert reason in refused(text)


@pytest.mark.parametrize(
    ("environ", "variable", "enabled"),
    [
        ({ANY: OFF, CUDA: ON}, CUDA, True),
        ({ANY: ON, CUDA: OFF}, CUDA, False),
        ({ANY: OFF, HIP: ON}, HIP, True),
        ({CUDA: OFF, HIP: ON}, CUDA, False),
        ({ANY: ON, CUDA: ""}, CUDA, False),
        ({ANY: ON, CUDA: "max_split_size_mb:100"}, CUDA, False),
        ({}, None, False),
    ],
)
def test_one_variable_is_read_alone(environ, variable, enabled):
    conf = read_allocator_conf(environ)
    assert (conf.variable, conf.expandable_segments) == (variable, enabled)
    assert set(conf.ignored) == set(environ) - {variable}


@pytest.mark.parametrize(
    ("environ", "backend"),
    [
        ({ANY: "max_split_size_mb:100,backend:cudaMallocAsync"}, "cudaMallocAsync"),
        ({CUDA: ON, ANY: "backend:cudaMallocAsync"}, None),
        ({HIP: "backend:cudaMallocAsync"}, None),
        ({HIP: ON, ANY: "backend:cudaMallocAsync"}, "cudaMallocAsync"),
        ({ANY: "backend:native,backend:cudaMallocAsync"}, "native"),
        ({ANY: ON}, None),
    ],
)
def test_the_backend_is_read_at_import(environ, backend):
    assert read_allocator_conf(environ).backend == backend


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({CUDA: "foo:1", ANY: ON}, CUDA),
        ({CUDA: ON, ANY: "foo:1", HIP: "foo:1"}, None),
        ({CUDA: "", ANY: "foo:1"}, None),
        ({HIP: "foo:1", ANY: ON}, HIP),
        # CUDA's own parser does not read the variable of HIP, but the general one.
        ({HIP: ON, ANY: "foo:1"}, ANY),
        ({HIP: "backend:foo"}, None),
        ({HIP: "backend:native", ANY: "backend:foo"}, ANY),
    ],
)
def test_the_variable_that_is_refused(environ, variable):
    refusal = read_allocator_conf(environ).refusal
    assert (refusal and refusal.variable) == variable


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("expandable_segments", True),
        ("expandable_segments=True", True),
        ("foo:[1", True),
        ("backend:", True),
        ("expandable_segments:true", False),
        ("backend:foo,b", False),
        (",a:1", False),
    ],
)
def test_texts_with_which_torch_cannot_even_be_imported(text, ends):
    """Compared with libc10_cuda of torch 2.13.0+cu130, which parses the text when it is loaded."""
    refusal = read_allocator_conf({ANY: text}).refusal
    assert refusal is not None
    assert refusal.at_import is ends


@given(st.text())
def test_any_text_is_read(conf):
    read_allocator_conf({ANY: conf})


@pytest.mark.processes
def test_the_installed_torch_agrees():
    """A build without CUDA cannot say what it thinks of CUDA's own keys and of unknown ones: there
    it must accept ``REFUSED_WITH_CUDA``, and refuse nothing that is accepted here.
    """
    mixed = random_texts(300)
    since = tuple(map(int, version("torch").split(".")[:2]))
    accepted = [*ACCEPTED, *(ACCEPTED_SINCE_2_13 if since >= (2, 13) else ())]
    judge = subprocess.run(
        [sys.executable, "-c", JUDGE],
        input=json.dumps([*accepted, *REFUSED, *REFUSED_WITH_CUDA, *mixed]),
        env=without_variables(),
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    with_cuda, *codes = judge.stdout.split()
    has_cuda = with_cuda == "True"
    verdicts = iter(codes)
    assert [text for text in accepted if next(verdicts) != "0"] == []
    assert [text for text in REFUSED if next(verdicts) != "1"] == []
    assert [text for text in REFUSED_WITH_CUDA if next(verdicts) != str(int(has_cuda))] == []
    by_torch = {text for text in mixed if next(verdicts) == "1"}
    by_us = {text for text in mixed if refused(text)}
    assert by_torch <= by_us
    assert by_torch
    assert by_us != set(mixed)
    if has_cuda:
        assert by_torch == by_us


@pytest.mark.processes
def test_the_installed_torch_prefers_the_same_variable():
    """One process each, for torch reads them once."""
    program = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    environments = [
        {ANY: "max_split_size_mb:21", HIP: "max_split_size_mb:22", CUDA: "max_split_size_mb:23"},
        {ANY: "max_split_size_mb:21", HIP: "max_split_size_mb:22"},
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=without_variables() | environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environ in environments
    ]
    found = [process.communicate(timeout=500)[0].strip() for process in processes]
    assert found == [
        environ[read_allocator_conf(environ).variable or ""] for environ in environments
    ]


def without_variables():
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}


def random_texts(count):
    """Texts of keys, values and separators that are right more often than wrong."""
    draw = random.Random(13)
    keys = [
        "expandable_segments",
        "max_split_size_mb",
        "large_segment_size_mb",
        "garbage_collection_threshold",
        "roundup_power2_divisions",
        "pinned_max_cached_size_mb",
    ]
    values = ["True", "False", "1", "20", "32", "0.5", "1e-400", "x", "", "[", "[256:1,512:2]"]
    values += ["[256:1,>:4]", "[>:3]", "[]", "[8", "-0", "0x1p-1", "256]", "[1,2]", "[256]4]"]
    return [
        "".join(
            draw.choice(keys)
            + draw.choice([":"] * 9 + ["="])
            + draw.choice(values)
            + draw.choice([","] * 9 + [";"])
            for _ in range(draw.choice((1, 1, 2)))
        )
        for _ in range(count)
    ]
