"""Settings from files, variables and flags: what wins, and what is said of a wrong one."""

from pathlib import Path

import pytest

from pdlaunch.config.engine_settings import KVOffloadSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.config.sources import LoadedConfig, load_config


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "deploy.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def load(path: Path | None = None, environ: dict | None = None, **flags) -> LoadedConfig:
    return load_config(
        path, environ or {}, {name.replace("__", "."): value for name, value in flags.items()}
    )


def problems(path: Path | None = None, environ: dict | None = None, **flags) -> tuple[Problem, ...]:
    with pytest.raises(InvalidConfigError) as caught:
        load(path, environ, **flags)
    return caught.value.problems


def only(found: tuple[Problem, ...]) -> Problem:
    (problem,) = found
    return problem


def test_a_connector_is_installed_and_has_what_it_needs():
    problem = only(problems(kv_transfer__connector="file"))
    assert problem.field == "kv_transfer.connector"
    assert "needs kv_transfer.file.directory" in problem.message
    loaded = load(kv_transfer__connector="file", kv_transfer__file__directory="/kv")
    assert loaded.config.kv_transfer.file.directory == "/kv"
    assert only(problems(kv_transfer__connector="nixel")).fix == "did you mean nixl?"


class TestPrecedence:
    def test_nothing_given_is_the_defaults(self):
        loaded = load()
        assert loaded.config == LaunchConfig()
        assert loaded.origins == {}

    def test_flag_beats_environment_beats_file_beats_default(self, file):
        path = file("block_size: 32\nport: 1111\nhost: filehost\n")
        environ = {"PDLAUNCH_BLOCK_SIZE": "64", "PDLAUNCH_PORT": "2222"}
        loaded = load(path, environ, block_size=128)
        config = loaded.config
        assert (config.block_size, config.port, config.host) == (128, 2222, "filehost")
        assert loaded.origins["block_size"] == "--block-size"
        assert loaded.origins["port"] == "PDLAUNCH_PORT"
        assert loaded.origins["host"] == f"{path}:3:7"

    def test_sections_and_mappings_merge_entry_by_entry(self, file):
        path = file("prefill: {replicas: 2, dtype: float32}\nenv: {A: file, B: file}\n")
        environ = {
            "PDLAUNCH_PREFILL_TP": "4",
            "PDLAUNCH_ENV__B": "variable",
            "PDLAUNCH_DECODE__ENV__C.d": "x",
        }
        loaded = load(path, environ, prefill__replicas=3)
        prefill = loaded.config.prefill
        assert (prefill.replicas, prefill.tensor_parallel_size, prefill.dtype) == (3, 4, "float32")
        assert loaded.config.env == {"A": "file", "B": "variable"}
        assert loaded.config.decode.env == {"C.d": "x"}
        assert loaded.origins["env.B"] == "PDLAUNCH_ENV__B"

    def test_a_null_in_the_file_is_the_default_of_optional_fields(self, file):
        assert load(file("max_model_len: null\n")).config.max_model_len is None
        assert only(problems(file("block_size: null\n"))).field == "block_size"

    def test_a_role_overrides_single_settings_of_a_section(self, file):
        path = file("kv_offload: {host_memory: 8GiB}\nprefill: {kv_offload: {host_memory: 0}}\n")
        config = load(path).config
        assert config.engine_settings("prefill").kv_offload.host_memory == 0
        expected = KVOffloadSettings(host_memory=8 * 1024**3)
        assert config.engine_settings("decode").kv_offload == expected


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("PDLAUNCH_MODEL", "m", "model"),
        ("PDLAUNCH_PREFILL", "2", "prefill.replicas"),
        ("PDLAUNCH_PREFILL__REPLICAS", "2", "prefill.replicas"),
        ("PDLAUNCH_DECODE_TP", "2", "decode.tensor_parallel_size"),
        ("PDLAUNCH_KV_TRANSFER__VERIFY", "off", "kv_transfer.verify"),
        ("PDLAUNCH_STARTUP_TIMEOUT", "5", "startup_timeout_s"),
        ("PDLAUNCH_ENGINE_ARGS__A", "1", "engine_args.A"),
    ],
)
def test_a_variable_reaches_its_field(name, value, path):
    assert load(environ={name: value}).origins[path] == name


@pytest.mark.parametrize(
    ("environ", "where", "said"),
    [
        ({"PDLAUNCH_DECODE__ENV": "{}"}, "PDLAUNCH_DECODE__ENV", "PDLAUNCH_DECODE__ENV__NAME=VAL"),
        ({"PDLAUNCH_PORRT": "1"}, "PDLAUNCH_PORRT", "did you mean PDLAUNCH_PORT?"),
        ({"PDLAUNCH_API_KEY": ""}, "PDLAUNCH_API_KEY", "is empty"),
        (
            {"PDLAUNCH_PREFILL": "1", "PDLAUNCH_PREFILL__REPLICAS": "1"},
            "PDLAUNCH_PREFILL__REPLICAS",
            "so does PDLAUNCH_PREFILL",
        ),
    ],
)
def test_wrong_variables_are_refused_and_others_left_alone(environ, where, said):
    problem = only(problems(environ={"PDLAUNCH_CACHE": "/x", "pdlaunch_model": "z", **environ}))
    assert problem.where == where
    assert said in f"{problem.message} {problem.fix}"


class TestFileProblems:
    @pytest.mark.parametrize(
        ("text", "place", "message", "fix"),
        [
            ("modl: x\n", "1:1", "unknown field", "did you mean model?"),
            ("enable_expert_parallel: true\n", "1:1", "unknown field", "into engine_args"),
            ("both: {prefill_context_parallel_size: 2}\n", "1:8", "unknown field", "one GPU"),
            ("prefill:\n  replicass: 1\n", "2:3", "unknown field", "did you mean replicas?"),
            ("port: 1\nport: 2\n", "2:1", "given twice, first on line 1", "remove"),
            ("prefill: {replicas: 1, replicas: 2}\n", "1:24", "given twice", "remove"),
            ("prefill:\n", "1:9", "must be a mapping of fields, not nothing", None),
            ("port: [1]\n", "1:7", "valid integer", None),
            ("port: !!python/object:os.system 1\n", "1:7", "tags are not supported", None),
            ("model: a\nprefill:\n  <<: *x\n", "3:7", "aliases are not supported", None),
            ("prefill: &p {env: *p}\n", "1:19", "aliases are not supported", None),
            ("prefill:\n\treplicas: 1\n", "2:1", "bad YAML", "spaces, not with tabs"),
            ("port: {\n", "2:1", "bad YAML", None),
            ("env: {A: [1]}\n", "1:10", "valid string", None),
            ("env: {A=B: 1}\n", "1:12", "not the name of an environment variable", None),
            ("port: true\n", "1:7", "boolean", None),
            ("port: 99999\n", "1:7", "less than or equal to 65535", None),
            ("max_model_len: 1\n", "1:16", "greater than or equal to 2", None),
            ("dtype: float33\n", "1:8", "'float33' is wrong", "did you mean float32?"),
            ("prefill: 2\n", "1:10", "must be a mapping", "write `field: value` lines"),
            ("prefill: {tp: 2}\n", "1:11", "unknown", "it is prefill.tensor_parallel_size"),
            ("kv_connector: file\n", "1:1", "unknown", "in a file it is kv_transfer.connector"),
            ("kv_cache_memory: 3XB\n", "1:18", "not a size", None),
            ("kv_transfer: {lease_s: inf}\n", "1:24", "finite", None),
            ("decode: {kv_offload: {memory: 1GiB}}", "1:23", "unknown field", "host_memory"),
            ("api_key: ''\n", "1:10", "must not be empty", None),
        ],
    )
    def test_names_place_and_fix(self, file, text, place, message, fix):
        found = problems(file(text))
        matching = [p for p in found if message in p.message]
        assert matching, found
        assert matching[0].where.endswith(f"deploy.yaml:{place}")
        assert fix is None or fix in (matching[0].fix or "")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"model: \xff\xfe\xfa\n", "not UTF-8"),
            (b"model: a\0b\n", "a control character, at position 8"),
            (b"# " + b"x" * 300_000, "larger than"),
            (b"[" * 1000, "nested too deeply"),
        ],
    )
    def test_odd_bytes(self, file, data, message):
        assert message in only(problems(file(data))).message

    def test_missing_file_and_folder(self, tmp_path):
        assert "no such file" in only(problems(tmp_path / "none.yaml")).message
        assert "cannot be read" in only(problems(tmp_path)).message
        assert "not a usable path" in only(problems(Path("a\0b"))).message

    def test_all_problems_of_all_sources_are_told_at_once(self, file):
        found = problems(file("modl: x\nport: 99999\n"), {"PDLAUNCH_X": "1"}, block_size=0)
        places = {p.where.rpartition("/")[2] for p in found}
        assert places == {"deploy.yaml:1:1", "deploy.yaml:2:7", "PDLAUNCH_X", "--block-size"}


class TestScalars:
    @pytest.mark.parametrize(
        ("text", "value"), [("8_000", 8000), ("0", 0), ("010", 10), ("'9000'", 9000), ("+7", 7)]
    )
    def test_ports(self, file, text, value):
        assert load(file(f"port: {text}\n")).config.port == value

    @pytest.mark.parametrize("text", ["1:30", "0x10", "0b1", "8000.5", "9" * 5000])
    def test_not_ports(self, file, text):
        assert problems(file(f"port: {text}\n"))[0].field == "port"

    @pytest.mark.parametrize(
        ("text", "value"),
        [("on", True), ("off", False), ("yes", True), ("false", False), ("'off'", False)],
    )
    def test_switches(self, file, text, value):
        assert load(file(f"kv_transfer: {{verify: {text}}}\n")).config.kv_transfer.verify is value

    def test_environment_of_ranks_takes_what_is_written(self, file):
        text = "\N{BOM}env: {A: 1, B: on, C: 010, D: '', E: 2026-01-01}\n"
        config = load(file(text)).config
        assert config.env == {"A": "1", "B": "on", "C": "010", "D": "", "E": "2026-01-01"}


SECRET = "hunter2-very-secret"


@pytest.mark.parametrize(
    "text",
    [
        *("api_key: [{s}]\n", "api_key: {{a: {s}}}\n", "apikey: {s}\n", "api_key: *{s}\n"),
        *("api_key: !{s} x\n", "api_key: '{s}\n", 'api_key: "\\x{s}"\n', "api_key: {s}: x\n"),
        *("{s}\n", "api_key: {s}\nport: 0x\n", "api_key: {s}\n  {s}: {s}\n"),
    ],
)
def test_secrets_are_never_in_messages(file, text):
    with pytest.raises(InvalidConfigError) as caught:
        load(file(text.format(s=SECRET)))
    error = caught.value
    cause = error.__context__ if error.__cause__ else ""
    assert SECRET not in f"{error} {error.problems!r} {error.value!r} {cause}"


def test_secrets_are_never_in_origins_or_shown_config():
    loaded = load(environ={"PDLAUNCH_API_KEY": SECRET})
    assert SECRET not in repr(loaded)
    assert loaded.config.api_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"port": 99999}, {}, "--port: 99999 is wrong"),
        ({"prefill__replicas": 9999}, {}, "--prefill: prefill.replicas: 9999 is wrong"),
        ({}, {"PDLAUNCH_PORT": "99999"}, "PDLAUNCH_PORT: '99999' is wrong"),
        ({}, {"PDLAUNCH_PREFILL__DTYPE": "x"}, "PDLAUNCH_PREFILL__DTYPE: 'x' is wrong"),
    ],
)
def test_a_flag_and_a_variable_are_named_once(flags, environ, said):
    assert str(only(problems(None, environ, **flags))).startswith(f"{said}: ")


@pytest.mark.parametrize(
    ("text", "environ", "flags", "counts"),
    [
        ("", {}, {}, (1, 1, 0)),
        ("", {}, {"both__replicas": 2}, (0, 0, 2)),
        ("", {"PDLAUNCH_BOTH": "2"}, {}, (0, 0, 2)),
        ("both: {replicas: 2}\nprefill: {block_size: 8}", {}, {}, (0, 0, 2)),
        # A number from anywhere puts them beside pairs.
        ("", {}, {"both__replicas": 1, "decode__replicas": 2}, (1, 2, 1)),
        ("prefill: {replicas: 3}", {}, {"both__replicas": 1}, (3, 1, 1)),
        ("", {"PDLAUNCH_DECODE": "1"}, {"both__replicas": 1}, (1, 1, 1)),
    ],
)
def test_engines_of_both_roles_alone_leave_pairs_out(file, text, environ, flags, counts):
    config = load(file(text), environ, **flags).config
    assert (config.prefill.replicas, config.decode.replicas, config.both.replicas) == counts
