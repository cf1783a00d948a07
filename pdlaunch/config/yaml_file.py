"""Read a YAML file into settings by dotted path, each with its line and column.

Whatever bytes the file holds, the result is settings or problems. Messages repeat no text of the
file but names of fields, so that a misplaced secret does not show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pdlaunch.config.kv_transfer import RENAMED
from pdlaunch.config.problems import InvalidConfigError, Problem, nearest, shown_name, shown_path
from pdlaunch.config.settings import all_flags, all_settings, known_names, sections
from pdlaunch.config.vllm_arguments import is_name

MAX_FILE_BYTES = 256 * 1024
MAX_VALUES = 10_000

_DECIMAL = re.compile(r"[-+]?\d{1,400}")
_FRACTION = re.compile(r"[-+]?\d{1,20}\.\d{1,20}([eE][-+]?\d{1,2})?")
_LEADING_ZERO = re.compile(r"[-+]?0\d")
_QUOTED = re.compile(r"'[^'<>]{2,}'")


@dataclass(frozen=True, slots=True)
class FileValue:
    """Holds the value of a setting, and where it stands in the file."""

    value: object
    line: int
    column: int


def read_yaml(path: Path) -> tuple[dict[str, FileValue], list[Problem]]:
    """Return the settings of a file by dotted path, and the problems of single fields.

    Raises InvalidConfigError when the file as a whole cannot be read.
    """
    reader = _Reader(str(path))
    root = _compose(_read_text(path), path)
    if root is not None:
        reader.read_section(root, "")
    return reader.values, reader.problems


class _Reader:
    """Walks the nodes of one document."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._num_seen = 0
        self.values: dict[str, FileValue] = {}
        self.problems: list[Problem] = []

    def read_section(self, node: yaml.Node, section: str) -> None:
        """Read the fields of a section, or of the top level when ``section`` is empty."""
        names = known_names(section)
        for name, path, key, value in self._entries(node, section):
            if name not in names:
                match = nearest(name, names)
                fix = f"did you mean {match}?" if match else f"known here: {', '.join(names)}"
                if path in RENAMED:
                    fix = f"it is {RENAMED[path]} now"
                elif meant := _path_of_flag(path):
                    fix = f"in a file it is {meant}"
                self._problem(key, "unknown field", path, fix)
            elif path in sections():
                self.read_section(value, path)
            elif all_settings()[path].is_mapping:
                self._read_mapping(value, path, has_flags=all_settings()[path].holds_flags)
            elif all_settings()[path].is_list and isinstance(value, yaml.SequenceNode):
                self._read_list(value, path)
            else:
                self._keep(path, value, self._scalar(value, path))

    def _read_list(self, node: yaml.SequenceNode, path: str) -> None:
        """Read a list of texts as they were written; some lists may have mappings of texts."""
        found: list[object] = []
        names = all_settings()[path].item_fields
        for item in node.value:
            self._count(item)
            if names and isinstance(item, yaml.MappingNode):
                found.append(self._read_item(item, path, names))
            elif (text := self._text_of_list(item, path)) is None:
                return
            else:
                found.append(text)
        self._keep(path, node, found)

    def _text_of_list(self, item: yaml.Node, path: str) -> str | None:
        """Return an entry of a list of texts, None after noting that it is none."""
        if isinstance(item, yaml.ScalarNode) and not item.tag.endswith(":null"):
            return str(item.value)
        message = f"must be a list of texts; one of its entries is {_kind(item)}"
        self._problem(item, message, path, None)
        return None

    def _read_item(
        self, node: yaml.MappingNode, path: str, names: Mapping[str, bool]
    ) -> dict[str, object]:
        fields: dict[str, object] = {}
        for name, field, key, value in self._entries(node, path):
            if name not in names:
                match = nearest(name, names)
                fix = f"did you mean {match}?" if match else f"known here: {', '.join(names)}"
                self._problem(key, "unknown field", field, fix)
            elif names[name] and isinstance(value, yaml.SequenceNode):
                for each in value.value:
                    self._count(each)
                texts = [self._text_of_list(each, field) for each in value.value]
                fields[name] = None if None in texts else texts
            else:
                found = self._scalar(value, field)
                fields[name] = None if isinstance(found, yaml.Node) else found
        return fields

    def _read_mapping(self, node: yaml.Node, parent: str, *, has_flags: bool) -> None:
        """Read a mapping of free names to texts, such as ``env``, or to flags' values.

        Numbers and switches are the text that was written; but flags may be switches, and hold
        lists and mappings.
        """
        for name, path, key, value in self._entries(node, parent):
            if has_flags and not is_name(name):
                self._problem(key, "not the name of a flag", path, "write it as in vLLM's help")
            elif not name or "=" in name or "\0" in name:
                self._problem(key, "not the name of an environment variable", path, None)
            elif isinstance(value, yaml.ScalarNode):
                if value.tag.endswith(":null"):
                    self._problem(
                        value, "must be a text", path, "write a value, or remove the line"
                    )
                elif has_flags and value.tag.endswith(":bool"):
                    self._keep(path, value, self._scalar(value, path))
                else:
                    self._keep(path, value, value.value)
            elif has_flags:
                self._keep(path, value, self._json(value, path))
            else:
                self._problem(value, "must be a text", path, "write a value, or remove the line")

    def _json(self, node: yaml.Node, path: str) -> object:
        """Return what a node holds; fractions are numbers here."""
        match node:
            case yaml.SequenceNode():
                items = list(node.value)
                for item in items:
                    self._count(item)
                return [self._json(item, path) for item in items]
            case yaml.MappingNode():
                return {
                    name: self._json(value, path) for name, _, _, value in self._entries(node, path)
                }
            case _:
                value = self._scalar(node, path)
                is_fraction = node.tag.endswith(":float") and _FRACTION.fullmatch(node.value)
                return float(node.value) if is_fraction else value

    def _entries(
        self, node: yaml.Node, parent: str
    ) -> Iterator[tuple[str, str, yaml.Node, yaml.Node]]:
        """Yield name, dotted path, key node and value node of each entry; each name once."""
        if not isinstance(node, yaml.MappingNode):
            self._problem(
                node,
                f"must be a mapping of fields, not {_kind(node)}",
                parent or None,
                _as_mapping(node, parent),
            )
            return
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            self._count(key)
            if not isinstance(key, yaml.ScalarNode):
                self._problem(
                    key,
                    f"the name of a field must be a text, not {_kind(key)}",
                    parent or None,
                    None,
                )
                continue
            name = key.value
            path = f"{parent}.{name}" if parent else name
            if key.tag.endswith(":merge"):
                self._problem(
                    key,
                    "merge keys are not supported",
                    parent or None,
                    "settings of both roles go to the top level",
                )
            # YAML would keep the last of two without a word.
            elif name in first_lines:
                message = f"given twice, first on line {first_lines[name]}"
                self._problem(key, message, path, "remove one of them")
            else:
                first_lines[name] = key.start_mark.line + 1
                yield name, path, key, value

    def _count(self, node: yaml.Node) -> None:
        """Count one more value. Raises InvalidConfigError when there are too many."""
        self._num_seen += 1
        # Aliases of aliases let a short file expand without end.
        if self._num_seen > MAX_VALUES:
            raise InvalidConfigError(
                [
                    self._make(
                        node, f"more than {MAX_VALUES} fields", None, "remove repeated aliases"
                    )
                ]
            )

    def _scalar(self, node: yaml.Node, path: str) -> object:
        """Return the value of a scalar node, or the node itself after noting a problem with it."""
        if not isinstance(node, yaml.ScalarNode):
            self._problem(node, f"must be a single value, not {_kind(node)}", path, None)
            return node
        text = node.value
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return text.lower() in ("yes", "true", "on")
            # YAML 1.1 reads 010 as 8 and 1:30 as 90; such texts are left to the field to accept or
            # refuse.
            case "int" if _DECIMAL.fullmatch(text) and not _LEADING_ZERO.match(text):
                return int(text)
            case "int" | "float" | "str" | "timestamp":
                return text
            case _:
                self._problem(node, "YAML tags are not supported", path, "write the value alone")
                return node

    def _keep(self, path: str, node: yaml.Node, value: object) -> None:
        if not isinstance(value, yaml.Node):
            self.values[path] = FileValue(
                value, node.start_mark.line + 1, node.start_mark.column + 1
            )

    def _problem(self, node: yaml.Node, message: str, path: str | None, fix: str | None) -> None:
        self.problems.append(self._make(node, message, path, fix))

    def _make(self, node: yaml.Node, message: str, path: str | None, fix: str | None) -> Problem:
        field = None if path is None else shown_name(path)
        return _problem_at(
            self._file, node.start_mark.line, node.start_mark.column, message, field, fix
        )


def _path_of_flag(name: str) -> str | None:
    """Return the setting whose flag is spelt like this: ``kv_connector``, ``prefill.tp``."""
    plain = name.replace("_", "-").replace(".", "-")
    return next((path for path, flag in all_flags().items() if flag.name == plain), None)


def _as_mapping(node: yaml.Node, section: str) -> str:
    """Return how to write a section that has a single value: that of the flag of its name."""
    path = _path_of_flag(section) if isinstance(node, yaml.ScalarNode) else None
    if path is None:
        return "write `field: value` lines"
    return f"write {section}: {{{path.removeprefix(f'{section}.')}: {shown_name(node.value)}}}"


def _kind(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
        case _:
            return "nothing" if node.tag.endswith(":null") else "a single value"


def _problem_at(
    file: str,
    line: int,
    column: int,
    message: str,
    field: str | None = None,
    fix: str | None = None,
) -> Problem:
    """Make a problem at a YAML mark, whose ``line`` and ``column`` count from 0."""
    where = f"{shown_path(file)}:{line + 1}:{column + 1}"
    return Problem(message, field, fix=fix, where=where, line=line + 1, column=column + 1)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, _reason(error), "check the path") from None
    if len(data) > MAX_FILE_BYTES:
        raise _unreadable(
            path,
            f"larger than {MAX_FILE_BYTES // 1024} KiB",
            "this is no configuration of pdlaunch",
        )
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _unreadable(path, "encoded as UTF-16 or UTF-32", "save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        raise _at_offset(path, before, "not UTF-8", "save the file as UTF-8") from None


def _reason(error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case OSError(strerror=str(reason)):
            return f"cannot be read: {reason}"
        case _:
            return "not a usable path"


def _compose(text: str, path: Path) -> yaml.Node | None:
    """Return the node tree of a document. Unlike constructing, composing keeps positions and builds
    no objects.
    """
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        raise _at_offset(
            path, text[: error.position], "a character that YAML does not allow", "remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from None
    except RecursionError:
        raise _unreadable(path, "nested too deeply", "a configuration has two levels") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _unreadable(
            path, f"bad YAML ({type(error).__name__})", "check the file with a YAML linter"
        ) from None
    return root


def _syntax_error(path: Path, error: yaml.MarkedYAMLError) -> InvalidConfigError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    fix = None
    parts = [part for part in (error.context, error.problem) if part]
    if any("'\\t'" in part for part in parts):
        fix = "indent with spaces, not with tabs"
    elif "single document" in (error.context or ""):
        fix = "keep one document, without further `---` lines"
    message = _QUOTED.sub("'...'", f"bad YAML: {' '.join(parts)}")
    return InvalidConfigError([_problem_at(str(path), line, column, message, fix=fix)])


def _at_offset(path: Path, before: str, message: str, fix: str) -> InvalidConfigError:
    line = before.count("\n")
    column = len(before) - (before.rfind("\n") + 1)
    return InvalidConfigError([_problem_at(str(path), line, column, message, fix=fix)])


def _unreadable(path: Path, message: str, fix: str) -> InvalidConfigError:
    return InvalidConfigError([Problem(message, fix=fix, where=shown_path(path))])
