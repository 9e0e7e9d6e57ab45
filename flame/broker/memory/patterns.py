"""NATS's rules of subjects: ``*`` stands for one token, a final ``>`` for one or more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_WILDCARD: Final = re.compile(r"\{\{wildcard\((\d+)\)\}\}")


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    tokens = [r"[^.]+" if token == "*" else r".+" if token == ">" else re.escape(token) for token in pattern.split(".")]
    return re.compile(r"\.".join(tokens), re.DOTALL)


def is_literal(pattern: str) -> bool:
    """Whether a pattern matches just one subject: itself."""
    return "*" not in pattern and ">" not in pattern


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one of those that a pattern stands for."""
    return pattern == subject or _compiled(pattern).fullmatch(subject) is not None


def collide(one: str, other: str) -> bool:
    """Whether some subject matches both patterns."""
    ours, theirs = one.split("."), other.split(".")
    for mine, yours in zip(ours, theirs, strict=False):
        if ">" in (mine, yours):
            return True
        if mine != yours and "*" not in (mine, yours):
            return False
    return len(ours) == len(theirs)


def rewrite(source: str, target: str, subject: str) -> str | None:
    """Return ``target`` with its ``{{wildcard(n)}}`` filled in from a subject; ``None`` if ``source`` doesn't match."""
    if not matches(source, subject):
        return None
    parts = subject.split(".")
    found = [part for part, token in zip(parts, source.split("."), strict=False) if token == "*"]
    return _WILDCARD.sub(lambda match: found[int(match[1]) - 1], target)


class _Node(Generic[T]):
    __slots__ = ("children", "items", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.items: dict[T, None] = {}
        self.rest: dict[T, None] = {}
        """Those whose pattern goes on with ``>``."""


class PatternTree(Generic[T]):
    """Things under patterns, found by subject in the time that its tokens take."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._root: _Node[T] = _Node()

    def add(self, pattern: str, item: T) -> None:
        """Put a thing under a pattern; once, however often it is added."""
        node = self._root
        for token in pattern.split("."):
            if token == ">":
                node.rest[item] = None
                return
            node = node.children.setdefault(token, _Node())
        node.items[item] = None

    def remove(self, pattern: str, item: T) -> None:
        """Take a thing away from a pattern, if it is there."""
        path: list[tuple[_Node[T], str]] = []
        node = self._root
        for token in pattern.split("."):
            if token == ">":
                node.rest.pop(item, None)
                break
            child = node.children.get(token)
            if child is None:
                return
            path.append((node, token))
            node = child
        else:
            node.items.pop(item, None)
        for parent, token in reversed(path):
            if node.children or node.items or node.rest:
                return
            del parent.children[token]
            node = parent

    def find(self, subject: str) -> list[T]:
        """Return what stands under patterns that match, always in the same order."""
        return list(self._find(self._root, subject.split("."), 0))

    def _find(self, node: _Node[T], tokens: list[str], at: int) -> Iterator[T]:
        if at == len(tokens):
            yield from node.items
            return
        yield from node.rest
        for token in (tokens[at], "*"):
            child = node.children.get(token)
            if child is not None:
                yield from self._find(child, tokens, at + 1)
