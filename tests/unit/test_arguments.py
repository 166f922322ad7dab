"""Numbers with bounds and ranges of names, as people write them on command lines."""

import argparse

import pytest

from controlbooth.data.arguments import expand_braces, number, seed, whole


def refusal(parse, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    return str(caught.value)


def test_whole_numbers_are_taken_between_their_bounds_only():
    assert [whole()("1"), whole(0)("0"), whole(1, 3)("3"), whole(-5)("-5")] == [1, 0, 3, -5]
    assert refusal(whole(), "0") == "0 is less than 1"
    assert refusal(whole(1, 3), "4") == "4 is more than 3"
    assert refusal(whole(), "2.5") == "'2.5' is not a whole number"
    assert refusal(whole(), "nan") == "'nan' is not a whole number"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_numbers_are_finite(text):
    assert refusal(number(), text) == f"{text} is not finite"


def test_numbers_are_taken_between_their_bounds_only():
    assert [number()("-2.5"), number(least=0)("0"), number(above=0, most=1)("1")] == [-2.5, 0.0, 1.0]
    assert refusal(number(least=1.0), "0.5") == "0.5 is less than 1.0"
    assert refusal(number(above=0), "0") == "0 is not more than 0"
    assert refusal(number(most=1), "1.5") == "1.5 is more than 1"
    assert refusal(number(), "much") == "'much' is not a number"


def test_a_seed_has_63_bits():
    assert seed(str(2**63 - 1)) == 2**63 - 1
    assert refusal(seed, str(2**63)).endswith("is more than 9223372036854775807")
    assert refusal(seed, "-1") == "-1 is less than 0"


def test_an_option_and_its_value_are_named(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=whole())
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
