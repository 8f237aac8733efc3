"""Text of strangers made safe to print: ids, topics and payloads come from devices. Pure."""

from __future__ import annotations


def shown(text: str, limit: int | None = None) -> str:
    r"""The text, what is not printable in it as an escape (\n, \x1b, \u202e), at most `limit` long.

    Control characters, terminal escapes, line breaks, direction marks and lone surrogates all count.
    """
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
        )
    if limit is not None and len(text) > limit:
        return text[: limit - 1] + "…"
    return text


def shown_bytes(data: bytes, limit: int | None = None) -> str:
    r"""Bytes as text where they are UTF-8, other bytes as \xNN; safe to print."""
    taken = data if limit is None else data[: limit * 4]
    return shown(taken.decode("utf-8", "backslashreplace"), limit)
