"""The commands of the tutorials work. tests/support/tutorial_blocks.py says how each block is marked, and why."""

import re

import pytest
import tutorial_blocks as tutorials

from controlbooth.launch.job.cluster import Cluster
from controlbooth.trainer.dreambooth.manifest import Subject

PAGES = tutorials.pages()
ALL = ["index.md", "tutorials/index.md", *PAGES, *tutorials.pages("concepts")]


def test_every_block_of_shell_in_the_tutorials_says_how_it_is_checked():
    kinds = (*tutorials.CHECKED, "shell", "file", "subjects")
    for page in ("index.md", "tutorials/index.md", *PAGES):
        for block in tutorials.blocks(page):
            assert block.kind in kinds or (block.kind == "" and block.language != "sh"), block.place
            assert not (block.kind in ("run", "slow") and block.words) or len(block.commands) == 1, (
                f"{block.place}: words are put behind one command; make it a block of its own"
            )


@pytest.mark.parametrize("page", ALL)
def test_every_command_names_verbs_options_and_fields_that_there_are(page):
    found = [block for block in tutorials.blocks(page) if block.kind in tutorials.CHECKED]
    # Pages of concepts show commands too, beside those of torchrun and others
    found += [
        block
        for block in tutorials.blocks(page)
        if block.kind == "" and block.language == "sh" and all(words[0] == "controlbooth" for words in block.commands)
    ]
    assert [problem for block in found for problem in tutorials.problems(block)] == []


@pytest.mark.parametrize("page", ["index.md", "tutorials/index.md", *PAGES])
def test_every_make_target_is_in_the_makefile(page):
    targets = re.findall(r"^([a-z-]+):", (tutorials.ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in tutorials.blocks(page):
        for words in block.commands if block.kind == "shell" else ():
            assert words[0] != "make" or words[1] in targets, block.place


@pytest.mark.parametrize("page", PAGES)
def test_files_and_rows_that_are_shown_are_valid(page):
    for block in tutorials.blocks(page):
        if block.kind == "file":
            Cluster.model_validate(tutorials.as_yaml(block))
        elif block.kind == "subjects":
            assert [Subject.model_validate(row).name for row in tutorials.as_yaml(block)]
        elif block.language == "python":
            compile(block.text, block.place, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_runs_in_a_smaller_size(page, tmp_path):
    tutorials.prepare(tmp_path)
    for block in tutorials.blocks(page):
        if block.kind in (*tutorials.RUNS, "file"):
            for _, _, wrong in tutorials.run(block, tmp_path):
                assert not wrong, wrong
