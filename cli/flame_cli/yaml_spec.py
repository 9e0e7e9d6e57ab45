"""Application files: YAML to what the SDK registers. Pure, and every complaint says where in the file.

A file holds any number of documents::

    metadata:
      name: openai-agent
    spec:
      command: uv
      arguments: [run, main.py]
      environments:
        DEEPSEEK_BASE_URL: https://api.deepseek.com

Text is taken as it is written: ``VERSION: 1.10`` is ``1.10``. What YAML reads as a truth value or as nothing
is refused where text belongs, since ``no`` may have been meant as a word. Environments may refer to variables of
whoever reads the file: see `flame_cli.expansion`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Final, NoReturn, get_args, get_origin

import yaml

from flame.errors import ConfigurationError, InvalidArgument
from flame.protocol.records import ApplicationSpec
from flame.protocol.subjects import check_application
from flame_cli.expansion import ExpansionFailed, expand

_YAML: Final = "tag:yaml.org,2002:"
_TEXT_TAGS: Final = frozenset(f"{_YAML}{tag}" for tag in ("str", "int", "float", "timestamp"))
_NULL: Final = f"{_YAML}null"
_BOOL: Final = f"{_YAML}bool"
_MERGE: Final = f"{_YAML}merge"

_ENVIRONMENTS: Final = "spec.environments"
_ALIASES: Final = {name.removesuffix("_s"): name for name in ApplicationSpec.model_fields if name.endswith("_s")}
"""What the file calls a field, where that differs from its name in the specification: times are in seconds."""


@dataclass(frozen=True, slots=True)
class DeclaredApplication:
    """An application as a file declares it."""

    name: str
    spec: ApplicationSpec


def read_applications(
    text: str, *, source: str, folder: Path, variables: Mapping[str, str]
) -> list[DeclaredApplication]:
    """Read every application that a YAML text declares.

    Args:
        text: The text.
        source: How to name it in errors.
        folder: Where a relative ``working_directory`` starts from, and a ``command`` with a slash in it.
        variables: What environments may refer to.

    Raises:
        ConfigurationError: It is no YAML, or not what an application looks like; the text says where.
    """
    reader = _Reader(source, folder, variables)
    declared = [reader.application(node) for node in _documents(text, source)]
    if not declared:
        raise ConfigurationError(f"{source}: expected an application (metadata, spec), the file is empty")
    names = [application.name for application in declared]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{source}: application {name!r} is declared twice")
    return declared


def _documents(text: str, source: str) -> Iterator[yaml.Node]:
    """Return the documents that hold something."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                if node is not None and node.tag != _NULL:
                    yield node
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise ConfigurationError(f"{_where(source, mark)}: not YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigurationError(
            f"{source}, line {line}, column {column}: not YAML: a character that has no place in a text"
        ) from None
    except RecursionError:
        raise ConfigurationError(f"{source}: not an application: nested too deeply") from None


def _where(source: str, mark: yaml.Mark | None) -> str:
    return source if mark is None else f"{source}, line {mark.line + 1}, column {mark.column + 1}"


class _Reader:
    """Turns nodes into an application. Follows what a field may hold, so it goes no deeper than that."""

    def __init__(self, source: str, folder: Path, variables: Mapping[str, str]) -> None:
        self._source = source
        self._folder = folder
        self._variables = variables

    def application(self, node: yaml.Node) -> DeclaredApplication:
        """Read one document."""
        parts = self._map(node, "", known=("metadata", "spec"))
        metadata = self._map(self._needed(parts, node, "metadata"), "metadata", known=("name",))
        name_node = self._needed(metadata, parts["metadata"], "name", "metadata")
        name = self._text(name_node, "metadata.name")
        try:
            check_application(name)
        except InvalidArgument as error:
            self._refuse(name_node, "metadata.name", str(error))
        known = [*ApplicationSpec.model_fields, *_ALIASES]
        spec_node = self._needed(parts, node, "spec")
        given = self._map(spec_node, "spec", known=known)
        fields: dict[str, Any] = {}
        for key, value in given.items():
            field = _ALIASES.get(key, key)
            if field in fields:
                self._refuse(value, f"spec.{key}", "given twice")
            read = self._field(ApplicationSpec.model_fields[field].annotation, value, f"spec.{key}")
            if read is not None:
                fields[field] = read
        self._place(fields)
        what = f"{self._source}: application {name!r}: spec"
        try:
            return DeclaredApplication(name, ApplicationSpec.check(what, fields))
        except InvalidArgument as error:
            text = str(error)
            for alias, field in _ALIASES.items():
                text = re.sub(rf"\b{field}\b", alias, text) if alias in given else text
            raise InvalidArgument(text) from None

    def _field(self, annotation: object, node: yaml.Node, path: str) -> object:
        """Read a field of the specification; ``None`` if it is to have its default."""
        origin = get_origin(annotation)
        if origin is UnionType:  # such as ``int | None``
            return None if _is_null(node) else self._field(get_args(annotation)[0], node, path)
        if origin is tuple:
            return None if _is_null(node) else self._texts(node, path)
        if origin is dict:
            if _is_null(node):
                return None
            if get_args(annotation)[1] is Any:
                return self._schema(node, path)
            read = self._expanded if path == _ENVIRONMENTS else self._text
            return {key: read(value, f"{path}.{key}") for key, value in self._map(node, path).items()}
        if annotation is bool:
            return self._truth(node, path)
        if annotation in (int, float):
            return self._number(node, path)
        return self._text(node, path)

    def _schema(self, node: yaml.Node, path: str) -> dict[str, Any]:
        """Read a map of anything that JSON has."""
        try:
            return {key: self._json(value, f"{path}.{key}") for key, value in self._map(node, path).items()}
        except RecursionError:  # an alias may lie inside of what it stands for
            self._refuse(node, path, "nested too deeply")

    def _json(self, node: yaml.Node, path: str) -> object:
        if isinstance(node, yaml.MappingNode):
            return {key: self._json(value, f"{path}.{key}") for key, value in self._map(node, path).items()}
        if isinstance(node, yaml.SequenceNode):
            return [self._json(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        if node.tag == _BOOL:
            return self._truth(node, path)
        if node.tag == _NULL:
            return None
        if node.tag in (f"{_YAML}int", f"{_YAML}float"):
            return self._number(node, path)
        return self._text(node, path)

    def _place(self, fields: dict[str, Any]) -> None:
        """Turn relative paths into those that they mean where the file is."""
        if fields.get("working_directory"):
            fields["working_directory"] = str((self._folder / fields["working_directory"]).resolve())
        if "/" in fields.get("command", ""):
            # Not resolved: a virtual environment's python is a link, and knows by its name where it is.
            fields["command"] = str(self._folder / fields["command"])

    def _map(self, node: yaml.Node, path: str, known: Collection[str] | None = None) -> dict[str, yaml.Node]:
        """Return a map's values by key; with ``known``, any other key is refused."""
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, path, f"expected name: value pairs, got {_described(node)}")
        result: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                self._refuse(key_node, path, "merge keys (<<) are not supported, write the values out")
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, f"expected a name, got {_described(key_node)}")
            key = key_node.value
            where = f"{path}.{key}" if path else key
            if key in result:
                self._refuse(key_node, where, "given twice")
            if known is not None and key not in known:
                self._refuse(key_node, where, f"unknown field, {_suggestion(key, known)}")
            result[key] = value
        return result

    def _needed(self, parts: dict[str, yaml.Node], parent: yaml.Node, key: str, path: str = "") -> yaml.Node:
        if key not in parts:
            self._refuse(parent, f"{path}.{key}" if path else key, "missing")
        return parts[key]

    def _texts(self, node: yaml.Node, path: str) -> list[str]:
        if not isinstance(node, yaml.SequenceNode):
            self._refuse(node, path, f"expected a list ([first, second] or a '- ' line each), got {_described(node)}")
        return [self._text(item, f"{path}[{index}]") for index, item in enumerate(node.value)]

    def _text(self, node: yaml.Node, path: str) -> str:
        """Return a scalar as it is written."""
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, path, f"expected text, got {_described(node)}")
        if node.tag == _BOOL:
            self._refuse(node, path, f'{node.value} is a truth value in YAML, quote it to mean text: "{node.value}"')
        if node.tag == _NULL:
            self._refuse(node, path, 'expected text, got nothing; write "" for an empty one')
        if node.tag not in _TEXT_TAGS:
            self._refuse(node, path, f"expected text, got {node.tag}")
        text: str = node.value
        return text

    def _expanded(self, node: yaml.Node, path: str) -> str:
        """Return a scalar with its references to variables replaced."""
        text = self._text(node, path)
        try:
            return expand(text, self._variables)
        except ExpansionFailed as error:
            self._refuse(node, path, str(error))

    def _truth(self, node: yaml.Node, path: str) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _BOOL:
            self._refuse(node, path, f"expected true or false, got {_described(node)}")
        return bool(yaml.SafeLoader("").construct_object(node))

    def _number(self, node: yaml.Node, path: str) -> object:
        """Return a number, or a text for the specification to refuse."""
        if not isinstance(node, yaml.ScalarNode) or node.tag in (_BOOL, _NULL):
            self._refuse(node, path, f"expected a number, got {_described(node)}")
        if node.tag not in (f"{_YAML}int", f"{_YAML}float"):
            self._refuse(node, path, f"expected a number, got {node.value!r}")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except ValueError:  # such as 0b2, which the grammar takes for a number
            self._refuse(node, path, f"expected a number, got {node.value!r}")

    def _refuse(self, node: yaml.Node, path: str, why: str) -> NoReturn:
        where = f"{self._source}, line {node.start_mark.line + 1}"
        raise ConfigurationError(f"{where}: {path}: {why}" if path else f"{where}: {why}")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "name: value pairs"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node.tag == _NULL:
        return "nothing"
    return repr(node.value[:60])


def _suggestion(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(known))}"
