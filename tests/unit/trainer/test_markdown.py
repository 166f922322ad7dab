"""Words of users in Markdown, read back by a parser of CommonMark where there is one to hand."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.trainer.markdown import block, code, plain

words = st.text(st.sampled_from(list("ab`|<>&*_[]()\\~#!\n")), max_size=20)


@settings(deadline=None, derandomize=True)
@given(words)
def test_text_has_no_tag_no_emphasis_and_no_link_of_its_own(text):
    shown = plain(text)
    assert "<" not in shown and ">" not in shown and "\n" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*[`*\[\]|~]", shown)


@settings(deadline=None, derandomize=True)
@given(words)
def test_code_ends_where_it_is_meant_to(text):
    shown = code(text)
    fence = re.match("`+", shown)[0]
    assert shown.endswith(fence) and fence not in re.findall("`+", shown)[1:-1] and "\n" not in shown
    inner = shown[len(fence) : -len(fence)]
    assert inner.strip(" ") == text.replace("\n", " ").strip(" ")
    assert not re.search(r"(?<!\\)\|", code(text.replace("\\", ""), in_table=True))


@settings(deadline=None, derandomize=True)
@given(words)
def test_a_block_of_code_holds_all_its_lines(text):
    lines = block(f"{text}\n", "yaml").split("\n")
    assert lines[0].startswith("```") and lines[0].endswith("yaml") and lines[-1] + "yaml" == lines[0]
    assert not any(line.strip().startswith(lines[-1]) for line in lines[1:-1])


@pytest.mark.parametrize("text", ["photos/train", "canny_random", "a rex dog", "/data/läufe"])
def test_plain_words_stay_as_they_are(text):
    assert plain(text) == text and code(text) == f"`{text}`"
