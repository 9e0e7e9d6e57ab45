"""Secrets that are handed to a session's executors: values that no log, listing or traceback shows by accident."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from flame.errors import InvalidArgument

HIDDEN: Final = "***"
"""What is shown in place of a secret."""
MOST: Final = 64
NAME_LENGTH: Final = 128
SECRETS_BYTES: Final = 32 * 1024
"""The most that all secrets of one session or task may hold together, names included."""
SHORTEST_FOUND: Final = 4
"""Shorter values are not looked for in texts: they would be found in words that have nothing to do with them."""


class Secret:
    """A text that shows itself only where it is asked to: by `reveal`.

    ``str()``, ``repr()`` and formatting give ``***``, and it can't be pickled. Two secrets are equal if their texts
    are; one is never equal to a plain text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        """Hide a text."""
        if not isinstance(text, str):
            raise InvalidArgument(f"a secret: expected str, got {type(text).__name__}")
        self._text = text

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __str__(self) -> str:
        """Show nothing."""
        return HIDDEN

    def __repr__(self) -> str:
        """Show what it is and nothing of what it holds."""
        return f"Secret('{HIDDEN}')"

    def __format__(self, spec: str) -> str:
        """Show nothing, whatever the format."""
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        """Compare with another secret."""
        return self._text == other._text if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        """Return the same for equal secrets."""
        return hash((Secret, self._text))

    def __copy__(self) -> Secret:
        """Return itself: it never changes."""
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        """Return itself: it never changes."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled: a pickle would show the text."""
        raise TypeError("a flame.Secret can't be pickled: hand it to an executor as a credential")


Secrets: TypeAlias = Mapping[str, Secret]
GivenSecrets: TypeAlias = Mapping[str, str | Secret]
"""What users may give: texts, or what is hidden already; pydantic's ``SecretStr`` is understood, too."""

NO_SECRETS: Final[Secrets] = MappingProxyType({})


def check_secrets(what: str, given: object) -> Secrets:
    """Return secrets by name as a mapping that can't be changed; raise `InvalidArgument` that shows none of them."""
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{what}: expected a mapping of names to secrets, got {type(given).__name__}")
    if len(given) > MOST:
        raise InvalidArgument(f"{what}: expected at most {MOST}, got {len(given)}")
    secrets = {_name(what, name): _secret(what, name, value) for name, value in given.items()}
    size = sum(len(name.encode()) + len(secret.reveal().encode()) for name, secret in secrets.items())
    if size > SECRETS_BYTES:
        raise InvalidArgument(f"{what}: {size} bytes together, the limit is {SECRETS_BYTES}")
    return MappingProxyType(secrets) if secrets else NO_SECRETS


def _name(what: str, name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
        shown = repr(name)[:80] if isinstance(name, str) else type(name).__name__
        raise InvalidArgument(f"{what}: expected names of 1 to {NAME_LENGTH} printable characters, got {shown}")
    return name


def _secret(what: str, name: object, value: object) -> Secret:
    if isinstance(value, Secret):
        return value
    reveal = getattr(value, "get_secret_value", None)
    text = reveal() if callable(reveal) else value
    if not isinstance(text, str):
        raise InvalidArgument(f"{what}: {name!r}: expected str or a secret, got {type(value).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what}: {name!r}: is no text that UTF-8 could hold") from None
    return Secret(text)


def revealed(secrets: Secrets) -> dict[str, str]:
    """Return the texts by name, for the wire."""
    return {name: secret.reveal() for name, secret in secrets.items()}


def texts_to_hide(*groups: Mapping[str, Secret]) -> tuple[str, ...]:
    """Return the texts of secrets that are to be hidden where others may read, the longest first.

    What is inside another one must not be replaced before that.
    """
    texts = {secret.reveal() for group in groups for secret in group.values()}
    return tuple(sorted((text for text in texts if len(text) >= SHORTEST_FOUND), key=len, reverse=True))


def hide(text: str, texts: Iterable[str]) -> str:
    """Return a text with ``***`` in place of each of ``texts``, also as ``repr`` would show it."""
    for secret in texts:
        text = text.replace(secret, HIDDEN)
        shown = repr(secret)[1:-1]
        if shown != secret:
            text = text.replace(shown, HIDDEN)
    return text
