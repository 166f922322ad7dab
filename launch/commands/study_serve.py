"""`controlbooth study serve`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser
from controlbooth.launch.serving import add_options, middleware, serve, token_for

PORT = 8420


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "study serve",
        "Serves the page of a study to browsers, for any number of raters at once. Each has a link, which brings them "
        "back to where they were: /?rater=NAME, or / for a name that is made. An answer is in answers.sqlite and "
        "answers.jsonl before the page is told so. Nothing is sent anywhere else, and no page names a method.",
        """examples:
  controlbooth study serve study
  controlbooth study serve study --host 0.0.0.0     for other machines, by a token in the address""",
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="the folder that `study new` made")
    add_options(parser, PORT)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.study.answers import Answers
    from controlbooth.trainer.study.page.application import application
    from controlbooth.trainer.study.plan import read_plan

    plan = read_plan(options.study)
    answers = Answers(options.study, plan.digest)
    token = token_for(options.host)
    app = application(options.study, plan, answers, middleware(options.host, token))
    serve(app, options.host, options.port, token, pages=("/", "/?rater=NAME"))
    return 0
