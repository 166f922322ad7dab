"""How templates of pages are filled."""

import re
from pathlib import Path

import jinja2
import pytest

from controlbooth.data.inspection import report as lint
from controlbooth.data.pages.rendering import FRAME, render_page
from controlbooth.trainer.evaluation import report as runs


def write(folder, body):
    template = folder / "page.html"
    start = '{% extends "base.html" %}{% block title %}{{ title }}{% endblock %}{% block kind %}lint{% endblock %}'
    template.write_text(f"{start}{{% block body %}}{body}{{% endblock %}}")
    return template


def test_values_are_shown_letter_by_letter_unless_the_template_calls_them_safe(tmp_path):
    template = write(tmp_path, "{{ text }}{{ drawing|safe }}")
    page = render_page(template, title="<&>", text="<b> {{ 1 }}", drawing="<svg>")
    assert "<title>&lt;&amp;&gt;</title>" in page and "&lt;b&gt; {{ 1 }}<svg>" in page


def test_a_value_that_is_missing_is_an_error_and_not_a_gap(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="'absent' is undefined"):
        render_page(write(tmp_path, "{{ absent }}"), title="")


def test_the_style_sheet_is_in_the_page_once_and_knows_its_kind(tmp_path):
    sheet = (FRAME / "style.css").read_text()
    assert render_page(write(tmp_path, ""), title="").count(sheet) == 1
    for template in (lint.TEMPLATE, runs.TEMPLATE):
        kind = re.search(r"block kind %}(\w+)", Path(template).read_text())
        assert kind is not None and f".{kind[1]} {{" in sheet
