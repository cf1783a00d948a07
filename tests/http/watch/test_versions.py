from __future__ import annotations

import pytest

from pdlaunch.http.watch.engine_api import with_version
from pdlaunch.launch.engines.plan import capabilities_over_http


@pytest.mark.parametrize(
    ("version", "continues"),
    [
        ("0.10.2", False),
        ("0.11.0", True),
        ("0.11.0rc1+cpu", True),
        ("0.32.0+cpu", True),
        ("1.0", True),
        ("dev", False),
        ("", False),
    ],
)
def test_streams_of_vllm_go_on_where_token_ids_are_told(version: str, continues: bool) -> None:
    known = with_version(capabilities_over_http("vllm"), version)
    assert (known.version, known.continues, known.goes_on) == (version, continues, continues)


def test_native_engines_resume_in_every_version() -> None:
    known = with_version(capabilities_over_http("native"), "0.10.2")
    assert (known.continues, known.goes_on) == (False, True)
