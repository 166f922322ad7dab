"""Words of users in Markdown: as text or as code that they are, whatever they hold. Standard library only.

MLflow's pages and model hubs show descriptions and cards as Markdown, in which HTML is HTML.
"""

import html
import re


def plain(text: object) -> str:
    """A text of one line that is shown letter by letter."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(_one_line(text), quote=False))


def code(text: object, in_table: bool = False) -> str:
    """A text of one line as code, which is shown letter by letter. in_table: of which `|` ends a cell, also in code."""
    shown = _one_line(text)
    fence = "`" * (_longest_run(shown) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{shown.replace('|', chr(92) + '|') if in_table else shown}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """Lines of code in a block of their own, of which none ends it. text: ends with a line break."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}{fence}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split("\n"))


def _longest_run(text: str) -> int:
    """Backquotes in a row, at most."""
    return max(map(len, re.findall("`+", text)), default=0)
