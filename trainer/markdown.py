"""Words of users in Markdown: as text or as code that they are, whatever they hold. Standard library only.

MLflow's pages and model hubs show descriptions and cards as Markdown, in which HTML is HTML.
"""

import html
import re


def plain(text: object) -> str:
    """Escapes a text for Markdown, in one line, so that each character is shown as it is."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(_one_line(text), quote=False))


def code(text: object, in_table: bool = False) -> str:
    """Formats a text as Markdown code, in one line, so that each character is shown as it is.

    in_table: whether it stands in a table, where `|` would end the cell even in code, and is escaped.
    """
    shown = _one_line(text)
    fence = "`" * (_longest_run(shown) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{shown.replace('|', chr(92) + '|') if in_table else shown}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """Formats lines as a Markdown code block that none of them can end. text: ends with a line break."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}{fence}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split("\n"))


def _longest_run(text: str) -> int:
    """Returns the length of the longest run of backquotes."""
    return max(map(len, re.findall("`+", text)), default=0)
