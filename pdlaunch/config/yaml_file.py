"""Reads a YAML file into settings by dotted path, each with its line and column.

PyYAML's loader would lose line numbers, keep the last of two equal fields and read 010 as 8, so
this module reads PyYAML's nodes. Any file gives settings or problems, whatever bytes it holds.
Messages quote only names of fields from the file, so that they never show a misplaced secret.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pdlaunch.config.problems import InvalidConfigError, Problem, nearest, shown_name, shown_path
from pdlaunch.config.settings import all_settings, sections, variable_name, variable_paths
from pdlaunch.config.vllm_arguments import fix_of_field

MAX_FILE_BYTES = 256 * 1024

_SCALARS = frozenset({"null", "bool", "int", "float", "str", "timestamp"})
_WHOLE = re.compile(r"[-+]?(?!0\d)\d{1,400}")
_FRACTION = re.compile(r"[-+]?\d{1,20}\.\d{1,20}([eE][-+]?\d{1,2})?")
_QUOTED = re.compile(r"'[^'<>]{2,}'")

# Dotted path -> ``deploy.yaml:3:5``. Entries of lists have paths too: ``hosts.0.roles``
Places = dict[str, str]


def read_yaml(path: Path) -> tuple[dict[str, object], Places, list[Problem]]:
    """Return the settings of a file by dotted path, their places, and problems of single fields.
    Raises InvalidConfigError for a file that is not readable or no YAML.
    """
    reader = _Reader(path)
    root = _compose(_read_bytes(path), path)
    if root is not None:
        reader.read_section(root, "")
    return reader.values, reader.places, reader.problems


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # Refuse aliases: nested aliases let a short file expand to an enormous size.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


class _Reader:
    """Collects the settings, places and problems of one YAML document."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, object] = {}
        self.places: Places = {}
        self.problems: list[Problem] = []

    def read_section(self, node: yaml.Node, section: str) -> None:
        """Read the fields of a section, or of the top level when ``section`` is empty."""
        # Check keys here: an error of pydantic would show the place of the value, not of the key.
        names = sections()[section]
        for name, path, key, value in self._entries(node, section):
            if name not in names:
                match = nearest(name, names)
                fix = f"did you mean {match}?" if match else f"known here: {', '.join(names)}"
                # Variables are named after flags, too: ``kv_connector``, ``prefill.tp``.
                if meant := variable_paths().get(variable_name(path.replace(".", "_"))):
                    fix = f"in a file it is {meant}"
                fix = fix_of_field(name) or fix
                self._problem(key, "unknown field", path, fix)
            elif path in sections():
                self.read_section(value, path)
            elif (setting := all_settings()[path]).is_mapping:
                # Keep values as texts, such as those of `env`. Flags may also be booleans or JSON.
                for _, entry, _, item in self._entries(value, path):
                    if item.tag.endswith(":null"):
                        self._problem(item, "needs a value", entry, "or remove the line")
                        continue
                    is_json = not isinstance(item, yaml.ScalarNode) or item.tag.endswith(":bool")
                    is_text = not (setting.holds_flags and is_json)
                    self.values[entry] = self._plain(item, entry, is_text=is_text)
            else:
                self.values[path] = self._plain(value, path, is_text=tuple in setting.kinds)

    def _plain(self, node: yaml.Node, path: str, *, is_text: bool) -> object:
        """Return the value of a node. ``is_text``: keep numbers and booleans as texts."""
        self.places[path] = _place(self._file, node.start_mark.line, node.start_mark.column)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._plain(item, f"{path}.{index}", is_text=is_text)
                for index, item in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode):
            entries = self._entries(node, path)
            return {name: self._plain(it, at, is_text=is_text) for name, at, _, it in entries}
        kind, text = node.tag.rpartition(":")[2], str(node.value)
        if kind not in _SCALARS:
            self._problem(node, "YAML tags are not supported", path, "write the value alone")
        if kind == "null":
            return None
        if kind == "bool" and not is_text:
            return text.lower() in ("yes", "true", "on")
        # YAML 1.1 reads 010 as 8 and 1:30 as 90. Here both stay texts, which the field may refuse.
        if kind == "int" and _WHOLE.fullmatch(text) and not is_text:
            return int(text)
        if kind == "float" and _FRACTION.fullmatch(text) and not is_text:
            return float(text)
        return text

    def _entries(
        self, node: yaml.Node, parent: str
    ) -> Iterator[tuple[str, str, yaml.Node, yaml.Node]]:
        """Yield name, dotted path, key node and value node of each entry, without duplicates."""
        if not isinstance(node, yaml.MappingNode):
            message = f"must be a mapping of fields, not {_kind(node)}"
            self._problem(node, message, parent, "write `field: value` lines")
            return
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            path = f"{parent}.{name}" if parent else name
            if not isinstance(key, yaml.ScalarNode):
                message = f"the name of a field must be a text, not {_kind(key)}"
                self._problem(key, message, parent)
            # PyYAML would silently keep the last of two equal names.
            elif name in first_lines:
                message = f"given twice, first on line {first_lines[name]}"
                self._problem(key, message, path, "remove one of them")
            else:
                first_lines[name] = key.start_mark.line + 1
                yield name, path, key, value

    def _problem(self, node: yaml.Node, message: str, path: str, fix: str | None = None) -> None:
        where = _place(self._file, node.start_mark.line, node.start_mark.column)
        field = shown_name(path) if path else None
        self.problems.append(Problem(message, field, fix=fix, where=where))


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
    return "nothing" if node.tag.endswith(":null") else "a single value"


def _place(file: Path, line: int, column: int) -> str:
    return f"{shown_path(file)}:{line + 1}:{column + 1}"


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or "not a usable path").lower()
        raise _unreadable(path, f"cannot be read: {reason}", "check the path") from None
    if len(data) > MAX_FILE_BYTES:
        size = f"larger than {MAX_FILE_BYTES // 1024} KiB"
        raise _unreadable(path, size, "this is not a configuration of pdlaunch")
    return data


def _compose(data: bytes, path: Path) -> yaml.Node | None:
    """Return the node tree of a document, with positions. Composing builds no Python objects."""
    try:
        root: yaml.Node | None = yaml.compose(data, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        message = f"not UTF-8, or a control character, at position {error.position}"
        raise _unreadable(path, message, "save the file as UTF-8, without that character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _place(path, mark.line, mark.column) if mark else shown_path(path)
        said = " ".join(part for part in (error.context, error.problem) if part)
        fix = None
        if "'\\t'" in said:
            fix = "indent with spaces, not with tabs"
        elif "single document" in said:
            fix = "keep one document, without further `---` lines"
        message = _QUOTED.sub("'...'", f"bad YAML: {said}")
        raise InvalidConfigError([Problem(message, fix=fix, where=where)]) from None
    except RecursionError:
        fix = "a configuration has two levels"
        raise _unreadable(path, "nested too deeply", fix) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        message = f"bad YAML ({type(error).__name__})"
        raise _unreadable(path, message, "check the file with a YAML linter") from None
    return root


def _unreadable(path: Path, message: str, fix: str) -> InvalidConfigError:
    return InvalidConfigError([Problem(message, fix=fix, where=shown_path(path))])
