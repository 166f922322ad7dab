"""The command line as a person meets it: help, slips of the finger, errors on one line, Ctrl-C."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

from controlbooth.launch import cli

ROOT = Path(__file__).parents[3]


@pytest.fixture
def verb(monkeypatch):
    """Registers a function as the verb `try it`, defined in a module of this project."""

    def register(source: str) -> None:
        module = types.ModuleType("controlbooth.launch.tried")
        exec(compile(source, "tried.py", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.TABLE, "try it", ("launch.tried:main", "for this test"))

    return register


@pytest.mark.parametrize("verb", cli.TABLE)
def test_every_verb_names_a_function_that_takes_a_list_of_arguments(verb):
    module, _, function = cli.TABLE[verb][0].partition(":")
    function = function or "main"
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in functions, f"{path} has no function {function}"
    assert len(functions[function].args.args) == 1


@pytest.mark.parametrize("verb", cli.TABLE)
def test_help_of_every_verb_shows_how_it_is_typed_with_examples(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: controlbooth {verb} ") and "xample" in shown
    assert shown.count(f"controlbooth {verb}") >= 2


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_in_groups_with_examples(words, capsys):
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    for group, verbs in cli.VERBS.items():
        assert f"{group}:" in shown
        for verb, (_, text) in verbs.items():
            assert verb in shown and text in shown
    assert "Examples:" in shown


def test_a_group_shows_its_own_verbs(capsys):
    assert cli.main(["data"]) == 0
    shown = capsys.readouterr().out
    assert "data index" in shown and "  train " not in shown


@pytest.mark.parametrize("group", sorted({verb.split()[0] for verb in cli.TABLE if " " in verb} | {""}))
def test_help_of_a_group_has_examples_of_its_own_with_options_that_its_verbs_take(group, capsys):
    for line in cli.EXAMPLES[group]:
        verb = next(name for name in cli.TABLE if line.startswith(f"{name} ") or line == name)
        assert verb.startswith(group)
        assert cli.main([*verb.split(), "--help"]) == 0
        options = [word for word in line.split() if word.startswith("-")]
        shown = capsys.readouterr().out
        assert all(option in shown for option in options), line
    assert cli.main([group] if group else []) == 0
    assert all(f"  controlbooth {line}\n" in capsys.readouterr().out for line in cli.EXAMPLES[group][:1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x.yaml"], "there is no verb 'trian'; did you mean 'train'?"),
        (["data", "indx"], "there is no verb 'data indx'; did you mean 'data index'?"),
        (["order"], "there is no verb 'order'; did you mean 'data order'?"),
        (
            ["zzzzz"],
            "there is no verb 'zzzzz'; verbs are: quickstart, init, train, plan, sample, evaluate, compare, report, "
            "watch, mirror, ablate, export, dreambooth",
        ),
    ],
)
def test_an_unknown_verb_suggests_the_nearest(words, message, capsys):
    assert cli.main(words) == cli.USER_ERROR
    assert message in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("controlbooth 0.")


def test_a_verb_gets_the_rest_of_the_line_and_its_status_is_returned(verb, capsys):
    verb("def main(arguments):\n    print(arguments)\n    return 7")
    assert cli.main(["try", "it", "--now", "x"]) == 7
    assert capsys.readouterr().out == "['--now', 'x']\n"
    verb("def main(arguments):\n    pass")
    assert cli.main(["try", "it"]) == 0


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (
            "raise errors.UserError('lanes=3 is odd. Use 4')",
            "controlbooth try it: lanes=3 is odd. Use 4\n",
        ),
        (
            "raise errors.MissingFile('no shards at x')",
            "controlbooth try it: no shards at x\n",
        ),
        ("open('/not/there')", "controlbooth try it: [Errno 2] No such file or directory: '/not/there'\n"),
        ("import pathlib; pathlib.Path('/not/there').read_text()", "No such file or directory: '/not/there'\n"),
        ("raise SystemExit('give a run')", "controlbooth try it: give a run\n"),
    ],
)
def test_an_error_with_a_message_for_the_user_is_one_line_and_status_2(verb, body, shown, capsys):
    verb(f"from controlbooth.data import errors\ndef main(arguments):\n    {body}")
    assert cli.main(["try", "it"]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.endswith(shown) and error.count("\n") == 1


@pytest.mark.parametrize(
    "body", ["raise ValueError('of a library')", "int('x')", "import json; json.loads('{')", "[].remove(1)", "1 / 0"]
)
def test_an_error_that_nobody_wrote_a_message_for_keeps_its_traceback(verb, body):
    verb(f"def main(arguments):\n    {body}")
    with pytest.raises((ValueError, ZeroDivisionError)):
        cli.main(["try", "it"])


def test_a_status_from_argparse_passes_through(verb):
    verb("import argparse\ndef main(arguments):\n    argparse.ArgumentParser().parse_args(arguments)")
    assert cli.main(["try", "it", "--bogus"]) == 2
    assert cli.main(["try", "it", "--help"]) == 0


def test_ctrl_c_ends_with_130_and_without_a_traceback(verb, capsys):
    verb("def main(arguments):\n    raise KeyboardInterrupt")
    assert cli.main(["try", "it"]) == 130
    assert capsys.readouterr().err == "\ncontrolbooth: interrupted\n"


def test_a_reader_that_goes_away_is_no_error():
    program = (
        "import sys, types; from controlbooth.launch import cli; m = types.ModuleType('controlbooth.launch.tried')\n"
        "def main(arguments):\n    while True: print('x' * 1000)\n"
        "m.main = main; sys.modules[m.__name__] = m; cli.TABLE['try it'] = ('launch.tried:main', '')\n"
        "sys.exit(cli.main(['try', 'it']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).parent / "controlbooth"
    done = subprocess.run([command, "data", "indx"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'data index'" in done.stderr
