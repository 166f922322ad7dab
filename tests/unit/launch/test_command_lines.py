"""Numbers and names that the heavy verbs cannot work with, told before torch is imported."""

import pytest

from controlbooth.launch.cli import main as controlbooth


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate RUN --steps 0", "argument --steps: 0 is less than 1"),
        ("evaluate RUN --guidance 0", "argument --guidance: 0 is less than 1"),
        ("evaluate RUN --guidance nan", "argument --guidance: nan is not finite"),
        ("evaluate RUN --samples 0", "argument --samples: 0 is less than 1"),
        ("evaluate RUN -o FILE", "argument -o/--out: FILE is a file, and a folder is wanted"),
        ("sample --seed -1", "argument --seed: -1 is less than 0"),
        ("sample --seed 99999999999999999999", "is more than 9223372036854775807"),
        ("sample --guidance -5", "argument --guidance: -5 is less than 1"),
        ("sample --count 0", "argument --count: 0 is less than 1"),
        ("sample --end 1.5", "argument --end: 1.5 is more than 1"),
        ("sample -o FILE", "argument -o/--out: FILE is a file, and a folder is wanted"),
        ("report RUN -o NONE/x.html", "argument -o/--out: NONE/x.html: there is no folder NONE: make it"),
        ("compare A B --json NONE/x.json", "argument --json: NONE/x.json: there is no folder NONE: make it"),
        ("plan RUN.yaml --nodes 0", "argument --nodes: 0 is less than 1"),
        ("plan RUN.yaml --processes-per-node 0", "argument --processes-per-node: 0 is less than 1"),
        ("plan RUN.yaml --price nan", "argument --price: nan is not finite"),
        ("dreambooth measure RUN --prompts 26", "argument --prompts: 26 is more than 25"),
        ("dreambooth identifiers miniature --images 1", "argument --images: 1 is less than 2"),
        ("export RUN OUT --step -1", "argument --step: -1 is less than 0"),
    ],
)
def test_an_option_with_a_value_that_cannot_be_meant_is_named_with_it(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert controlbooth(words.split()) == 2
    assert message in capsys.readouterr().err.replace(f"{tmp_path}/", "")
