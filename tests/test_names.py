"""Names say what is what: ``_s`` a duration, ``_at`` an instant, a class one thing."""

import re
from collections import defaultdict

from tests.test_layers import sources

# What a clock says: an instant. Alone, or with seconds added, it is no duration.
CLOCK = r"[\w.]*\b_?(?:clock|monotonic|now|perf_counter|process_time|time)\(\)"
WRONG = re.compile(
    rf"(\w+_s)(?:: \w+)? = {CLOCK}(?: \+ [^-]+)?$|(\w+_at)(?:: \w+)? = {CLOCK} - [\w.]+_at$",
    re.MULTILINE,
)


def wrong_names(text: str) -> list[str]:
    return ["".join(found) for found in WRONG.findall(text)]


def test_durations_and_instants_are_told_apart_and_no_two_classes_share_a_name() -> None:
    wrong: list[str] = []
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources():
        text = path.read_text()
        wrong += [f"{path}, {name}" for name in wrong_names(text)]
        for name in re.findall(r"^class ([^_]\w*)", text, re.MULTILINE):
            places[name].append(str(path))
    assert wrong == []
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_wrong_names_are_found() -> None:
    text = """
began_s = time.perf_counter()
self.end_s: float = self._clock() + timeout_s
took_at = clock() - begin_at
left_s = end_at - clock()
end_at = clock() + left_s
oldest_at = clock() - WINDOW_S
took_s = clock() - begin_at
"""
    assert wrong_names(text) == ["began_s", "end_s", "took_at"]
