import pytest

from pdlaunch.checks.run import all_rules
from tests.command_line import invoke


def explain(*arguments):
    arguments = ["explain", *arguments]
    return invoke(arguments, env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.mark.parametrize("code", ["PD204", "pd204"])
def test_one_rule(code):
    result = explain(code)
    text = " ".join(result.stdout.split())
    rule = all_rules()["PD204"]
    assert result.exit_code == 0
    for part in (rule.title, rule.why, rule.fix, rule.source):
        assert part in text


def test_all_rules():
    result = explain()
    assert result.exit_code == 0
    assert all(code in result.stdout for code in all_rules())


def test_an_unknown_rule():
    result = explain("PD2O4")
    assert result.exit_code == 2
    assert "did you mean PD204?" in result.stderr
    assert result.stdout == ""
