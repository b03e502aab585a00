"""A part of a model, named in one word, as a command line and a report have it.

`mixture:num_components=20`, `conv:channels=16-32`: a name, and arguments of its class.
"""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Part", "make_checked", "name_of", "parse_part", "part_text"]

Part = str | Mapping[str, Any]

_LISTS = ("channels", "hidden", "image_shape", "upper_hidden")


def parse_part(text: str) -> Part:
    """Reads a part from one word, ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``; lists are ``16-32``.

    Raises:
        ValueError: If the word has another form.

    Example:
        >>> parse_part("iaf:num_steps=4,hidden=64-64")
        {'name': 'iaf', 'num_steps': 4, 'hidden': [64, 64]}
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip().replace("-", "_")
    if not name or (colon and not rest.strip()):
        raise _no_part(text)
    if not colon:
        return name
    part: dict[str, Any] = {"name": name}
    for setting in rest.split(","):
        key, equals, value = (word.strip() for word in setting.partition("="))
        key = key.replace("-", "_")
        if not (key and equals and (value or key in _LISTS)) or key in part:
            raise _no_part(text)
        part[key] = _parse_list(text, value) if key in _LISTS else _parse_value(value)
    return part


def part_text(part: Part) -> str:
    """Writes a part as `parse_part` reads it; settings that are None are left out."""
    if isinstance(part, str):
        return part
    settings = [
        f"{key}={'-'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in part.items()
        if key != "name" and value is not None
    ]
    return f"{part['name']}:{','.join(settings)}" if settings else str(part["name"])


def _parse_value(text: str) -> Any:
    if text in ("True", "true", "False", "false"):
        return text in ("True", "true")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parse_list(part: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split("-") if text]
    except ValueError:
        raise _no_part(part) from None


def _no_part(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not NAME or NAME:KEY=VALUE,KEY=VALUE, as in mixture:num_components=20 or "
        "conv:channels=16-32."
    )


def make_checked(what: str, make: Callable[[Any], Any], part: Any) -> Any:
    """Makes a part, and says which arguments it has where one is not of them.

    Args:
        what: What the part is, for messages.
        make: Such as `make_likelihood`; what it makes has a `config`.
        part: What it is given.

    Raises:
        ValueError: If the part is unknown, or has no such argument; where `make` says so itself, in
            its words.
    """
    if not isinstance(part, Mapping):
        return make(part)
    name = part.get("name")
    if len(part) > 1:
        known = [key for key in make({"name": name}).config if key != "name"]
        unknown = sorted(set(part) - {"name", *known})
        if unknown:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the {what} {name!r} has no argument {unknown[0]!r}: {has}")
    try:
        return make(part)
    except TypeError as error:  # text where a number belongs
        raise ValueError(
            f"an argument of the {what} {part_text(part)} is wrong: {error}"
        ) from error


def name_of(part: Part) -> str:
    """The name of a part."""
    return part if isinstance(part, str) else str(part.get("name"))
