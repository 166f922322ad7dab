import json
import os
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlbooth.data.files.records import (
    Damaged,
    each,
    having,
    is_figure,
    is_moment,
    is_number,
    is_text,
    is_whole,
    maybe,
    parse_json,
    read_json,
    read_json_lines,
    read_json_list,
    read_yaml,
)

FIELDS = {
    "state": is_text,
    "step": is_whole,
    "time": is_moment,
    "error": maybe(is_text),
    "more": maybe(each(having({"a": is_number}))),
}
WHOLE = {"state": "running", "step": 3, "time": 1.7e9, "error": None, "more": [{"a": 1}], "of": "another version"}
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "x"]), inner, max_size=4),
    ).map(lambda tree: json.dumps(tree).encode()),
)
HOSTILE = [
    b"", b"{", b"[]", b"null", b'{"state": 1e400}', b'{"a":' * 99_999, b"[" * 99_999, b'{"state": "\\ud800"}',
    b"\xff\xfe", b'{"step": ' + b"9" * 9999 + b"}", b'{"time": 1e18, "state": "", "step": 1}', b'{"step": true}',
    b"\xef\xbb\xbf{}", b'{"\\udcff": 1}', b'{"state": "x", "step": 1, "time": NaN}',
]  # fmt: skip


def told(path, read):
    """-> what was read; None where it was refused as damage is, in one line that names the file and the remedy."""
    try:
        return read(path)
    except Damaged as error:
        assert str(path) in str(error) and str(error).endswith("Delete it") and "\n" not in str(error)
        str(error).encode()
        return None


def test_a_whole_record_comes_back_with_fields_that_nobody_asks_for(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(WHOLE))
    assert read_json(tmp_path / "one.json", "", FIELDS) == WHOLE
    assert read_json(tmp_path / "none.json", "", FIELDS, missing={}) == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", "", FIELDS)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("state", None, "its 'state' is None"),
        ("step", 1.5, "its 'step' is 1.5"),
        ("step", True, "its 'step' is True"),
        ("time", -1, "its 'time' is -1"),
        ("time", 1e18, "its 'time' is 1e\\+18"),
        ("more", [{"a": "b"}], "its 'more' is"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_value(tmp_path, name, value, said):
    (tmp_path / "one.json").write_text(json.dumps(WHOLE | {name: value}))
    with pytest.raises(Damaged, match=rf"one\.json cannot be read \({said}.*\)\. Delete it"):
        read_json(tmp_path / "one.json", "Delete it", FIELDS)


def test_a_field_that_is_missing_is_named():
    with pytest.raises(Damaged, match=r"line 3 cannot be read \(it has no 'state'"):
        parse_json("{}", "line 3", "", FIELDS)


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("kind", ["json", "list", "lines", "yaml"])
def test_hostile_contents_are_refused_in_one_line_or_read(tmp_path, kind, content):
    (tmp_path / "one").write_bytes(content)
    readers = {
        "json": lambda path: read_json(path, "Delete it", FIELDS),
        "list": lambda path: read_json_list(path, "Delete it", FIELDS),
        "lines": lambda path: list(read_json_lines(path, "Delete it", FIELDS)),
        "yaml": lambda path: read_yaml(path, "Delete it"),
    }
    found = told(tmp_path / "one", readers[kind])
    assert kind == "yaml" or not found


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(CONTENTS)
def test_whatever_lies_there_is_read_with_its_fields_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    found = told(path, lambda one: read_json(one, "Delete it", FIELDS))
    assert found is None or all(check(found.get(name)) for name, check in FIELDS.items())
    told(path, lambda one: read_yaml(one, "Delete it"))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * len(json.dumps(WHOLE)) - 1), st.integers(0, len(json.dumps(WHOLE))))
def test_a_record_with_one_bit_changed_or_cut_is_read_with_its_fields_or_refused(tmp_path_factory, bit, end):
    path = tmp_path_factory.getbasetemp() / "bit.json"
    data = bytearray(json.dumps(WHOLE).encode())
    for changed in (data[:end], data[:]):
        if len(changed) == len(data):
            changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = told(path, lambda one: read_json(one, "Delete it", FIELDS))
        assert found is None or all(check(found.get(name)) for name, check in FIELDS.items())


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab01.:-_ \n\t[]{}&*!#|>'\"\\<=?~%@\x00\x85\ud800"), max_size=24).map(str))
@example("2001-99-99")
@example("!!timestamp x")
@example("!!int ''")
@example("? {a: b}\n: c")
@example("&a [*a]")
@example("{=: 1}")
@example("0b_")
@example("1:60_")
def test_any_text_is_yaml_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(content, errors="replace")
    tree = told(path, lambda one: read_yaml(one, "Delete it"))
    repr(tree)


def test_references_of_yaml_that_stand_for_too_much_are_refused_at_once(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "laughs.yaml").write_text("\n".join(levels))
    chain = ["b0: &b0 " + "[" * 90 + "]" * 90]
    chain += [f"b{n}: &b{n} {'[' * 90}*b{n - 1}{']' * 90}" for n in range(1, 30)]
    (tmp_path / "chain.yaml").write_text("\n".join(chain))
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        with pytest.raises(Damaged, match="more than 10,000,000 values"):
            read_yaml(tmp_path / "laughs.yaml", "")
        with pytest.raises(Damaged, match="more than 100 levels"):
            read_yaml(tmp_path / "chain.yaml", "")
    finally:
        sys.setprofile(None)
    assert calls < 2_000_000  # parsing takes half a million, and what the references stand for is a million times that
    shared = yaml.safe_dump([WHOLE] * 3)
    (tmp_path / "shared.yaml").write_text(shared)
    assert "*id" in shared and read_yaml(tmp_path / "shared.yaml", "") == [WHOLE] * 3


@pytest.mark.parametrize("what", ["folder", "pipe", "link to a pipe"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, what):
    path = tmp_path / "one.json"
    if what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path if what == "pipe" else tmp_path / "pipe")
    if what == "link to a pipe":
        path.symlink_to(tmp_path / "pipe")
    for read in (read_json, read_json_list, read_yaml):
        with pytest.raises(Damaged, match=r"\(it is no file\). Delete it"):
            read(path, "Delete it")


def test_a_measured_figure_may_be_none_and_a_number_may_not():
    assert is_figure(float("nan")) and not is_number(float("nan")) and not is_whole(2**64) and not is_figure("1")
