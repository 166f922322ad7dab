"""Numbers with bounds and ranges of names, as people write them on command lines."""

import argparse
import shlex
from pathlib import Path

import pytest

from controlbooth.data.arguments import (
    expand_braces,
    file_to_write,
    finite_number,
    folder_to_write,
    quoted,
    seed_number,
    visible,
    whole_number,
)


def refusal(parse, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    return str(caught.value)


def test_whole_numbers_are_taken_between_their_bounds_only():
    assert [whole_number()("1"), whole_number(0)("0"), whole_number(1, 3)("3"), whole_number(-5)("-5")] == [1, 0, 3, -5]
    assert refusal(whole_number(), "0") == "0 is less than 1"
    assert refusal(whole_number(1, 3), "4") == "4 is more than 3"
    assert refusal(whole_number(), "2.5") == "'2.5' is not a whole number"
    assert refusal(whole_number(), "nan") == "'nan' is not a whole number"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_numbers_are_finite(text):
    assert refusal(finite_number(), text) == f"{text} is not finite"


def test_numbers_are_taken_between_their_bounds_only():
    assert [finite_number()("-2.5"), finite_number(least=0)("0"), finite_number(above=0, most=1)("1")] == [
        -2.5,
        0.0,
        1.0,
    ]
    assert refusal(finite_number(least=1), "0.5") == "0.5 is less than 1"
    assert refusal(finite_number(above=0), "0") == "0 is not more than 0"
    assert refusal(finite_number(most=1), "1.5") == "1.5 is more than 1"
    assert refusal(finite_number(), "much") == "'much' is not a number"


def test_a_seed_has_63_bits():
    assert seed_number(str(2**63 - 1)) == 2**63 - 1
    assert refusal(seed_number, str(2**63)).endswith("is more than 9223372036854775807")
    assert refusal(seed_number, "-1") == "-1 is less than 0"


def test_a_file_is_no_folder_to_write_into_and_a_folder_no_file(tmp_path):
    (tmp_path / "run.yaml").touch()
    assert folder_to_write(f"{tmp_path}/new/one") == tmp_path / "new/one"
    assert folder_to_write(str(tmp_path)) == tmp_path
    for name in (f"{tmp_path}/run.yaml", f"{tmp_path}/run.yaml/one"):
        assert refusal(folder_to_write, name).startswith(f"{tmp_path}/run.yaml is a file, and a folder is wanted")
    assert file_to_write(f"{tmp_path}/run.yaml") == tmp_path / "run.yaml"
    assert refusal(file_to_write, str(tmp_path)).startswith(f"{tmp_path} is a folder, and a file is wanted")
    assert f"there is no folder {tmp_path}/none: make it" in refusal(file_to_write, f"{tmp_path}/none/x.png")


def test_an_option_and_its_value_are_named(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=whole_number())
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "0"])
    assert "argument --steps: 0 is less than 1" in capsys.readouterr().err


def test_ranges_are_expanded_and_counted_before_they_are():
    assert expand_braces("a-{08..11}-{x,y}.tar")[:3] == ["a-08-x.tar", "a-08-y.tar", "a-09-x.tar"]
    assert expand_braces("{3..1}") == ["3", "2", "1"] and expand_braces("{0..10..5}") == ["0", "5", "10"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for endless in ("{000..009999999999}", "{0..999}/{0..9999}", "{9999999..0}"):
        with pytest.raises(ValueError, match="stands for 10,000,000"):
            expand_braces(endless)
    with pytest.raises(ValueError, match="braces of .* do not match"):
        expand_braces("{0..9")


def test_words_of_a_data_set_do_not_steer_the_terminal():
    assert visible("a \x1b]0;title\x07 dog\r\n\udc80") == "a \\x1b]0;title\\x07 dog\\r\\n\\udc80"
    assert visible("läufe 图 👩 a_b") == "läufe 图 👩 a_b"


def test_a_word_of_a_printed_command_is_taken_as_it_is():
    assert shlex.split(f"run {quoted(Path('a $(b)'))}") == ["run", "a $(b)"]
