from pathlib import Path

import pytest

from pdlaunch.config.engine_settings import KVOffloadSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.config.settings import all_settings
from pdlaunch.config.sources import LoadedConfig, Origin, load_config
from pdlaunch.errors import ConfigError


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "deploy.yaml"
        path.write_text(text)
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


class TestConnectors:
    def test_file_needs_a_directory(self):
        problem = only(problems(kv_transfer__connector="file"))
        assert problem.field == "kv_transfer.connector"
        assert "needs kv_transfer.file.directory" in problem.message
        loaded = load(kv_transfer__connector="file", kv_transfer__file__directory="/kv")
        assert loaded.config.kv_transfer.file.directory == "/kv"

    def test_an_unknown_connector_is_named_with_its_likeness(self):
        problem = only(problems(kv_transfer__connector="nixel"))
        assert problem.field == "kv_transfer.connector"
        assert problem.fix == "did you mean nixl?"


class TestPrecedence:
    def test_nothing_given_is_the_defaults(self):
        loaded = load()
        assert loaded.config == LaunchConfig()
        assert set(loaded.origins.values()) == {Origin("default")}
        assert set(loaded.origins) == set(all_settings())

    def test_flag_beats_environment_beats_file_beats_default(self, file):
        path = file("block_size: 32\nport: 1111\nhost: filehost\n")
        environ = {"PDLAUNCH_BLOCK_SIZE": "64", "PDLAUNCH_PORT": "2222"}
        loaded = load(path, environ, block_size=128)
        assert (loaded.config.block_size, loaded.config.port, loaded.config.host) == (
            128,
            2222,
            "filehost",
        )
        assert loaded.origins["block_size"] == Origin("flag", "--block-size")
        assert loaded.origins["port"] == Origin("environment", "PDLAUNCH_PORT")
        assert loaded.origins["host"] == Origin("file", f"{path}:3:7")
        assert loaded.origins["dtype"] == Origin("default")

    def test_sections_merge_field_by_field(self, file):
        path = file("prefill: {replicas: 2, dtype: float32}\n")
        loaded = load(path, {"PDLAUNCH_PREFILL_TP": "4"}, prefill__replicas=3)
        assert loaded.config.prefill.replicas == 3
        assert loaded.config.prefill.tensor_parallel_size == 4
        assert loaded.config.prefill.dtype == "float32"

    def test_environment_of_ranks_merges_name_by_name(self, file):
        path = file("env: {A: file, B: file}\n")
        loaded = load(path, {"PDLAUNCH_ENV__B": "variable", "PDLAUNCH_DECODE__ENV__C.d": "x"})
        assert loaded.config.env == {"A": "file", "B": "variable"}
        assert loaded.config.decode.env == {"C.d": "x"}
        assert loaded.origins["env.B"] == Origin("environment", "PDLAUNCH_ENV__B")

    def test_a_null_in_the_file_is_the_default_of_optional_fields(self, file):
        assert load(file("max_model_len: null\n")).config.max_model_len is None
        assert only(problems(file("block_size: null\n"))).field == "block_size"


class TestEnvironment:
    @pytest.mark.parametrize(
        ("name", "value", "path"),
        [
            ("PDLAUNCH_MODEL", "m", "model"),
            ("PDLAUNCH_PREFILL", "2", "prefill.replicas"),
            ("PDLAUNCH_PREFILL__REPLICAS", "2", "prefill.replicas"),
            ("PDLAUNCH_DECODE_TP", "2", "decode.tensor_parallel_size"),
            ("PDLAUNCH_KV_CONNECTOR", "nixl", "kv_transfer.connector"),
            ("PDLAUNCH_KV_TRANSFER__VERIFY", "off", "kv_transfer.verify"),
            ("PDLAUNCH_STARTUP_TIMEOUT", "5", "startup_timeout_s"),
            ("PDLAUNCH_API_KEY", "k", "api_key"),
        ],
    )
    def test_reaches_its_field(self, name, value, path):
        assert load(environ={name: value}).origins[path] == Origin("environment", name)

    @pytest.mark.parametrize("name", ["PDLAUNCH_ENGINE_ARGS", "PDLAUNCH_DECODE__ENV"])
    def test_a_mapping_is_given_entry_by_entry(self, name):
        (problem,) = problems(environ={name: '{"a": 1}'})
        assert problem.where == name
        assert f"{name}__NAME=VALUE" in problem.fix
        path = {"PDLAUNCH_ENGINE_ARGS": "engine_args.A"}.get(name, "decode.env.A")
        assert path in load(environ={f"{name}__A": "1"}).origins

    def test_unknown_variables_are_refused_with_the_nearest_name(self):
        problem = only(problems(environ={"PDLAUNCH_KV_CONECTOR": "nixl"}))
        assert problem.where == "PDLAUNCH_KV_CONECTOR"
        assert problem.fix == "did you mean PDLAUNCH_KV_CONNECTOR?"

    def test_other_variables_are_left_alone(self):
        assert (
            load(environ={"PDLAUNCH_CACHE": "/x", "HOME": "/y", "pdlaunch_model": "z"}).config
            == LaunchConfig()
        )

    def test_empty_variables_are_refused(self):
        problem = only(problems(environ={"PDLAUNCH_API_KEY": ""}))
        assert "empty" in problem.message

    def test_two_variables_for_one_field_are_refused(self):
        problem = only(
            problems(environ={"PDLAUNCH_PREFILL": "1", "PDLAUNCH_PREFILL__REPLICAS": "1"})
        )
        assert "PDLAUNCH_PREFILL" in problem.message


class TestFileProblems:
    @pytest.mark.parametrize(
        ("text", "place", "message", "fix"),
        [
            ("modl: x\n", (1, 1), "unknown field", "did you mean model?"),
            ("prefill:\n  replicass: 1\n", (2, 3), "unknown field", "did you mean replicas?"),
            ("port: 1\nport: 2\n", (2, 1), "given twice, first on line 1", "remove"),
            ("prefill: {replicas: 1, replicas: 2}\n", (1, 24), "given twice", "remove"),
            ("prefill:\n", (1, 9), "must be a mapping of fields, not nothing", None),
            ("port: [1]\n", (1, 7), "valid integer", None),
            ("port: !!python/object:os.system 1\n", (1, 7), "tags are not supported", None),
            ("model: a\nprefill:\n  <<: *x\n", (3, 7), "aliases are not supported", None),
            ("prefill:\n  <<: {port: 1}\n", (2, 3), "unknown field", None),
            ("prefill:\n\treplicas: 1\n", (2, 1), "bad YAML", "spaces, not with tabs"),
            ("port: {\n", (2, 1), "bad YAML", None),
            ("model: a\0b\n", (1, 9), "does not allow", "remove it"),
            ("env: {A: [1]}\n", (1, 10), "valid string", None),
            ("env: {A=B: 1}\n", (1, 12), "not the name of an environment variable", None),
            ("port: true\n", (1, 7), "switch", None),
            ("port: 99999\n", (1, 7), "less than or equal to 65535", None),
            ("dtype: float33\n", (1, 8), "'float33' is wrong", "did you mean float32?"),
            ("prefill: 2\n", (1, 10), "must be a mapping", "write `field: value` lines"),
            ("prefill: {tp: 2}\n", (1, 11), "unknown", "it is prefill.tensor_parallel_size"),
            ("kv_connector: file\n", (1, 1), "unknown", "in a file it is kv_transfer.connector"),
            ("dtype: half\n", (1, 8), "'half' is wrong", "did you mean float16?"),
            ("kv_cache_memory: 3XB\n", (1, 18), "not a size", None),
            ("kv_transfer: {lease_s: inf}\n", (1, 24), "finite", None),
            ("prefill: {replicas: 1000000000}\n", (1, 21), "1024", None),
            ("api_key: ''\n", (1, 10), "must not be empty", None),
        ],
    )
    def test_names_place_and_fix(self, file, text, place, message, fix):
        found = problems(file(text))
        matching = [p for p in found if message in p.message]
        assert matching, found
        assert matching[0].where.endswith("deploy.yaml:{}:{}".format(*place))
        assert fix is None or fix in (matching[0].fix or "")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"model: \xff\xfe\xfa\n", "not UTF-8"),
            ("model: x\n".encode("utf-16"), "UTF-16"),
            (b"# " + b"x" * 300_000, "larger than"),
            (b"[" * 1000, "nested too deeply"),
            (b"model: \x07\n", "does not allow"),
        ],
    )
    def test_odd_bytes(self, tmp_path, data, message):
        path = tmp_path / "odd.yaml"
        path.write_bytes(data)
        assert message in only(problems(path)).message

    def test_missing_file_and_folder(self, tmp_path):
        assert only(problems(tmp_path / "none.yaml")).message == "no such file"
        assert "cannot be read" in only(problems(tmp_path)).message
        assert "not a usable path" in only(problems(Path("a\0b"))).message

    @pytest.mark.parametrize("text", ["prefill: &p {env: *p}\n", "a: &a [x]\nb: [*a, *a, *a]\n"])
    def test_aliases_expand_nothing(self, file, text):
        assert "aliases are not supported" in only(problems(file(text))).message

    def test_all_problems_of_all_sources_are_told_at_once(self, file):
        found = problems(file("modl: x\nport: 99999\n"), {"PDLAUNCH_X": "1"}, block_size=0)
        assert {p.where.rpartition("/")[2] for p in found} == {
            "deploy.yaml:1:1",
            "deploy.yaml:2:7",
            "PDLAUNCH_X",
            "--block-size",
        }


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
        config = load(file("env: {A: 1, B: on, C: 010, D: '', E: 2026-01-01}\n")).config
        assert config.env == {"A": "1", "B": "on", "C": "010", "D": "", "E": "2026-01-01"}

    def test_a_byte_order_mark_is_no_matter(self, tmp_path):
        path = tmp_path / "bom.yaml"
        path.write_bytes(b"\xef\xbb\xbfport: 1\n")
        assert load(path).config.port == 1


class TestSecrets:
    SECRET = "hunter2-very-secret"

    @pytest.mark.parametrize(
        "text",
        [
            "api_key: [{s}]\n",
            "api_key: {{a: {s}}}\n",
            "apikey: {s}\n",
            "api_key: *{s}\n",
            "api_key: !{s} x\n",
            "api_key: '{s}\n",
            'api_key: "\\x{s}"\n',
            "api_key: {s}: x\n",
            "{s}\n",
            "api_key: {s}\nport: 0x\n",
            "api_key: {s}\n  {s}: {s}\n",
        ],
    )
    def test_never_in_messages(self, file, text):
        with pytest.raises(InvalidConfigError) as caught:
            load(file(text.format(s=self.SECRET)))
        error = caught.value
        cause = error.__context__ if error.__cause__ else ""
        assert self.SECRET not in f"{error} {error.problems!r} {error.value!r} {cause}"

    def test_never_in_origins_or_shown_config(self):
        loaded = load(environ={"PDLAUNCH_API_KEY": self.SECRET})
        assert self.SECRET not in repr(loaded)
        assert loaded.config.api_key.get_secret_value() == self.SECRET


class TestHostTier:
    def test_a_role_overrides_single_settings_of_the_section(self, file):
        loaded = load(
            file("kv_offload: {host_memory: 8GiB}\nprefill:\n  kv_offload:\n    host_memory: 0\n")
        )
        assert loaded.config.engine_settings("prefill").kv_offload.host_memory == 0
        assert loaded.config.engine_settings("decode").kv_offload == KVOffloadSettings(
            host_memory=8 * 1024**3
        )
        assert loaded.origins["prefill.kv_offload.host_memory"].detail.endswith(":4:18")

    @pytest.mark.parametrize(
        ("text", "field"),
        [
            ("kv_offload: {host_memory: lots}", "kv_offload.host_memory"),
            ("decode: {kv_offload: {host_memory: -1}}", "decode.kv_offload.host_memory"),
            ("decode: {kv_offload: {memory: 1GiB}}", "decode.kv_offload.memory"),
            ("kv_offload: 32GiB", "kv_offload"),
        ],
    )
    def test_what_is_wrong_is_named(self, file, text, field):
        with pytest.raises(InvalidConfigError) as caught:
            load(file(text + "\n"))
        assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"port": 99999}, {}, "--port: 99999 is wrong"),
        ({"block_size": -1}, {}, "--block-size: -1 is wrong"),
        ({"prefill.replicas": 9999}, {}, "--prefill: prefill.replicas: 9999 is wrong"),
        ({}, {"PDLAUNCH_PORT": "99999"}, "PDLAUNCH_PORT: '99999' is wrong"),
        ({}, {"PDLAUNCH_PREFILL__DTYPE": "x"}, "PDLAUNCH_PREFILL__DTYPE: 'x' is wrong"),
    ],
)
def test_a_flag_and_a_variable_are_named_once(flags, environ, said):
    with pytest.raises(ConfigError) as raised:
        load_config(None, environ, flags)
    assert str(raised.value).startswith(f"{said}: ")


class TestBothRoles:
    """Engines of both roles alone leave pairs out."""

    @staticmethod
    def counts(loaded: LoadedConfig) -> tuple[int, int, int]:
        config = loaded.config
        return config.prefill.replicas, config.decode.replicas, config.both.replicas

    def test_no_pair_is_started_unless_somebody_says_how_many(self, file):
        assert self.counts(load()) == (1, 1, 0)
        assert self.counts(load(both__replicas=2)) == (0, 0, 2)
        assert self.counts(load(environ={"PDLAUNCH_BOTH": "2"})) == (0, 0, 2)
        assert self.counts(load(file("both: {replicas: 2}\nprefill: {block_size: 8}"))) == (0, 0, 2)

    def test_a_number_from_anywhere_puts_them_beside_pairs(self, file):
        assert self.counts(load(both__replicas=1, decode__replicas=2)) == (1, 2, 1)
        in_file = file("prefill: {replicas: 3}")
        assert self.counts(load(in_file, both__replicas=1)) == (3, 1, 1)
        assert self.counts(load(environ={"PDLAUNCH_DECODE": "1"}, both__replicas=1)) == (1, 1, 1)
