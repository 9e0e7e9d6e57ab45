"""The file in which a user keeps the clusters that they work with, by default ``~/.flame/flame.yaml``.

It looks like this::

    current-context: home
    contexts:
      - name: home
        cluster:
          endpoint: nats://127.0.0.1:4222
      - name: work
        cluster:
          endpoint: tls://nats1.example:4222,tls://nats2.example:4222
        credentials: work.creds
        tls:
          ca: ca.pem
          certificate: me.pem
          key: me.key

Paths are relative to the file. ``credentials``, ``tls`` and each of its fields are optional, and so is
``current-context`` where there is one context only. Every complaint names the file, the line and the field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from flame.config import Security, Target, absolute, check_endpoint
from flame.errors import ConfigurationError

Node = Any
"""A ``yaml.Node``, whose attributes are not typed."""

_PATHS = {"tls_ca": "ca", "tls_certificate": "certificate", "tls_key": "key"}


def read_context(path: Path) -> Target:
    """Return the cluster of the current context, or raise `ConfigurationError`."""
    return _File(path).target()


class _File:
    """One file that is being read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def target(self) -> Target:
        root = self._parse()
        top = self._map(root, "", ("current-context", "contexts"))
        contexts = self._contexts(self._needed(top, root, "contexts"))
        if "current-context" in top:
            current = self._text(top["current-context"], "current-context")
            if current not in contexts:
                known = ", ".join(contexts)
                self._refuse(top["current-context"], "current-context", f"{current!r} is none of the contexts: {known}")
        elif len(contexts) == 1:
            current = next(iter(contexts))
        else:
            self._refuse(root, "current-context", f"missing; expected one of {', '.join(contexts)}")
        return self._context(*contexts[current])

    def _parse(self) -> Node:
        try:
            text = self._path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigurationError(f"{self._path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"{self._path}: not UTF-8 text, expected YAML") from None
        try:
            import yaml  # noqa: PLC0415  # comes with the extra cli, and most programs have no such file
        except ImportError:
            raise ConfigurationError(
                f"{self._path}: PyYAML is needed to read it: pip install 'flame-engine[cli]', or set FLAME_ENDPOINT"
            ) from None
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = "" if mark is None else f", line {mark.line + 1}"
            raise ConfigurationError(f"{self._path}{where}: not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigurationError(f"{self._path}: not YAML: {' '.join(str(error).split())}") from None
        if root is None:
            raise ConfigurationError(f"{self._path}: contexts: missing, the file is empty")
        return root

    def _contexts(self, node: Node) -> dict[str, tuple[str, dict[str, Node], Node]]:
        """Return each context by its name: its place, its fields and itself."""
        if node.id != "sequence" or not node.value:
            self._refuse(node, "contexts", "expected a list of contexts, each beginning with '- name: NAME'")
        found: dict[str, tuple[str, dict[str, Node], Node]] = {}
        for index, item in enumerate(node.value):
            place = f"contexts[{index}]"
            fields = self._map(item, place, ("name", "cluster", "credentials", "tls"))
            name_node = self._needed(fields, item, "name", place)
            name = self._text(name_node, f"{place}.name")
            if name in found:
                self._refuse(name_node, f"{place}.name", f"there is a context {name!r} already")
            found[name] = (place, fields, item)
        return found

    def _context(self, place: str, fields: dict[str, Node], node: Node) -> Target:
        cluster_node = self._needed(fields, node, "cluster", place)
        cluster = self._map(cluster_node, f"{place}.cluster", ("endpoint",))
        endpoint_node = self._needed(cluster, cluster_node, "endpoint", f"{place}.cluster")
        endpoint = self._text(endpoint_node, f"{place}.cluster.endpoint")
        try:
            check_endpoint(endpoint)
        except ConfigurationError as error:
            self._refuse(endpoint_node, f"{place}.cluster.endpoint", str(error))
        files: dict[str, Path] = {}
        if "credentials" in fields:
            files["credentials"] = self._file(fields["credentials"], f"{place}.credentials")
        if "tls" in fields:
            tls = self._map(fields["tls"], f"{place}.tls", tuple(_PATHS.values()))
            for field, name in _PATHS.items():
                if name in tls:
                    files[field] = self._file(tls[name], f"{place}.tls.{name}")
            if ("certificate" in tls) != ("key" in tls):
                self._refuse(fields["tls"], f"{place}.tls", "certificate and key go together: expected both or none")
        return Target(endpoint, Security(**files))

    # ---- nodes

    def _map(self, node: Node, place: str, known: tuple[str, ...]) -> dict[str, Node]:
        if node.id != "mapping":
            self._refuse(node, place, "expected name: value pairs")
        fields: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value)
            where = f"{place}.{name}" if place else name
            if name not in known:
                self._refuse(key, where, f"unknown field; expected one of {', '.join(known)}")
            if name in fields:
                self._refuse(key, where, "given twice")
            fields[name] = value
        return fields

    def _needed(self, fields: dict[str, Node], node: Node, name: str, place: str = "") -> Node:
        if name not in fields:
            self._refuse(node, f"{place}.{name}" if place else name, "missing")
        return fields[name]

    def _text(self, node: Node, place: str) -> str:
        if node.id != "scalar" or node.tag.endswith(":null") or not node.value:
            self._refuse(node, place, "expected a text")
        return str(node.value)

    def _file(self, node: Node, place: str) -> Path:
        path = absolute(self._text(node, place), self._path.parent)
        try:
            path.open("rb").close()
        except OSError as error:
            self._refuse(node, place, f"{path}: {error.strerror}")
        return path

    def _refuse(self, node: Node, place: str, why: str) -> NoReturn:
        where = f"{self._path}, line {node.start_mark.line + 1}"
        raise ConfigurationError(f"{where}: {place}: {why}" if place else f"{where}: {why}")
