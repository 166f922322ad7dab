"""What raters are asked, in the words that they read, and what they see beside the pictures meanwhile."""

from dataclasses import dataclass

PAIRS, RANKINGS = "pairs", "rankings"
FORMS = (PAIRS, RANKINGS)
CONDITION, REFERENCES, PROMPT = "condition", "references", "prompt"
"""What stands beside the pictures: the condition that they were drawn under, photographs of the subject, the text."""


@dataclass(frozen=True)
class Question:
    """A question, in the words of each form."""

    pair: str
    ranking: str
    given: str | None
    """What the answer depends on, which every item of the study must have; quality depends on nothing."""


QUESTIONS = {
    "quality": Question("Which picture looks better?", "Order the pictures: the best-looking first.", None),
    "fidelity": Question(
        "Which picture follows the guide picture more closely?",
        "Order the pictures: the one that follows the guide picture most closely first.",
        CONDITION,
    ),
    "subject": Question(
        "Which picture shows more exactly the thing in the photographs?",
        "Order the pictures: the one that shows the thing in the photographs most exactly first.",
        REFERENCES,
    ),
    "prompt": Question(
        "Which picture fits the text better?", "Order the pictures: the one that fits the text best first.", PROMPT
    ),
}
"""Quality and fidelity are ControlNet's (arXiv 2302.05543), subject and prompt fidelity DreamBooth's (2208.12242)."""


def wording(name: str, form: str) -> str:
    """Returns the sentence that a rater reads."""
    question = QUESTIONS[name]
    return question.pair if form == PAIRS else question.ranking


def usual_questions(given: set[str]) -> tuple[str, ...]:
    """Returns the questions of the paper whose pictures these are. given: what every item has."""
    if CONDITION in given:
        return ("quality", "fidelity")
    if REFERENCES in given:
        return ("subject", "prompt") if PROMPT in given else ("subject",)
    return ("quality", "prompt") if PROMPT in given else ("quality",)
