"""Fills the Jinja templates of pages, which stand beside the code that gathers what they show.

A page is one file that needs no other and no network: the style sheet and the pictures are inside it.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FRAME = Path(__file__).parent
"""Holds base.html, which every page extends, and style.css, which base.html includes."""


def render_page(template: Path, **values: Any) -> str:
    """Returns the page as HTML. All values are text and are escaped, but for those that the template calls safe.

    Raises jinja2.UndefinedError where the template names something that is not among the values.
    """
    return environment(template.parent).get_template(template.name).render(values)


@cache
def environment(folder: Path) -> Environment:
    """Returns what fills the templates of a folder; each is read once, and again where it has changed."""
    return Environment(
        loader=FileSystemLoader([folder, FRAME]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
