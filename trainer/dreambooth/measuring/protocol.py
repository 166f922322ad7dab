"""What is drawn of a subject to measure it: the paper's prompts (arXiv 2208.12242, section 4.1), or fewer of them.

The lists are those that the authors published with their photographs (github.com/google/dreambooth, CC BY 4.0).
"""

from dataclasses import dataclass
from pathlib import Path

from controlbooth.data.order.draws import hash64
from controlbooth.data.scenes.render import COLOURS
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.dreambooth.manifest import Task

_PLACES = (
    "a {thing} in the jungle",
    "a {thing} in the snow",
    "a {thing} on the beach",
    "a {thing} on a cobblestone street",
    "a {thing} on top of pink fabric",
    "a {thing} on top of a wooden floor",
    "a {thing} with a city in the background",
    "a {thing} with a mountain in the background",
    "a {thing} with a blue house in the background",
    "a {thing} on top of a purple rug in a forest",
)
_PROPERTIES = ("a red {thing}", "a purple {thing}", "a shiny {thing}", "a wet {thing}", "a cube shaped {thing}")
OBJECT_PROMPTS = (
    *_PLACES,
    "a {thing} with a wheat field in the background",
    "a {thing} with a tree and autumn leaves in the background",
    "a {thing} with the Eiffel Tower in the background",
    "a {thing} floating on top of water",
    "a {thing} floating in an ocean of milk",
    "a {thing} on top of green grass with sunflowers around it",
    "a {thing} on top of a mirror",
    "a {thing} on top of the sidewalk in a crowded street",
    "a {thing} on top of a dirt road",
    "a {thing} on top of a white rug",
    *_PROPERTIES,
)
LIVE_PROMPTS = (
    *_PLACES,
    "a {thing} wearing a red hat",
    "a {thing} wearing a santa hat",
    "a {thing} wearing a rainbow scarf",
    "a {thing} wearing a black top hat and a monocle",
    "a {thing} in a chef outfit",
    "a {thing} in a firefighter outfit",
    "a {thing} in a police outfit",
    "a {thing} wearing pink glasses",
    "a {thing} wearing a yellow shirt",
    "a {thing} in a purple wizard outfit",
    *_PROPERTIES,
)
_PAIRS = list(zip(COLOURS, [*list(COLOURS)[5:], *list(COLOURS)[:5]], strict=True))
EMBEDDED_PROMPTS = (
    *(f"a {{thing}} on a {colour} background" for colour in COLOURS),
    *(f"a {{thing}} on a {upper} and {lower} background" for upper, lower in [*_PAIRS, ("red", "white")]),
)
"""For the embedded world, whose captions know nothing but backgrounds."""
LIVE_NOUNS = frozenset(
    "dog puppy cat kitten bird parrot rabbit hamster horse cow sheep pig goat fox wolf bear monkey man woman boy girl "
    "person".split()
)
"""Class nouns that take the prompts for live subjects; all others take those for objects."""


@dataclass(frozen=True)
class Drawing:
    """One picture that is drawn of a subject."""

    path: Path
    prompt: str
    described: str
    """The prompt without the identifier, whose meaning no text encoder but the trained base's could know."""
    group: int
    """Number of its prompt in the list; -1 for pictures of the class."""
    seed: int


def prompts_for(class_noun: str, embedded: bool) -> tuple[str, ...]:
    """Returns the 25 prompts for a kind of subject, with {thing} for what it is called."""
    if embedded:
        return EMBEDDED_PROMPTS
    return LIVE_PROMPTS if class_noun.split()[-1].lower() in LIVE_NOUNS else OBJECT_PROMPTS


def chosen_prompts(count: int, available: int) -> list[int]:
    """Returns `count` of the numbers 0 .. available - 1, evenly spread, so that every kind of prompt is among them.

    Both ends are included, and for a count of 1 only 0 is. Raises ConfigError unless 1 <= count <= available.
    """
    if not 1 <= count <= available:
        raise ConfigError(f"--prompts is {count}; the protocol has 1 to {available}")
    return [round(place * (available - 1) / max(count - 1, 1)) for place in range(count)]


def drawings(task: Task, folder: Path, embedded: bool, prompts: int, images: int) -> list[Drawing]:
    """Lists all pictures of a subject: `images` of each of `prompts` prompts, then `prompts` pictures of its class.

    A picture's file and seed depend on the subject's name, its prompt and its number alone, so a larger set holds a
    smaller one where the prompts are the same. Raises ConfigError for fewer than 2 images.
    """
    if images < 2:
        raise ConfigError(f"--images is {images}; diversity compares pictures of one prompt, so at least 2 are needed")
    # What the instance prompt leaves out is left out here too: a subject may be trained without a class noun.
    thing = " ".join(word for word in (task.identifier, task.class_noun) if word in task.instance_prompt)
    templates = prompts_for(task.class_noun, embedded)

    def drawing(name: str, prompt: str, described: str, group: int, number: int) -> Drawing:
        return Drawing(
            folder / f"{name}-{number}.png", prompt, described, group, hash64("measure", task.name, prompt, number) >> 1
        )

    rows = [
        drawing(f"{n:02d}", templates[n].format(thing=thing), templates[n].format(thing=task.class_noun), n, number)
        for n in chosen_prompts(prompts, len(templates))
        for number in range(images)
    ]
    return rows + [drawing("class", task.class_prompt, task.class_prompt, -1, number) for number in range(prompts)]


def asked_background(described: str) -> tuple[str, ...]:
    """Returns the colours of the background that a prompt of EMBEDDED_PROMPTS asks for."""
    return tuple(described.partition(" on a ")[2].removesuffix(" background").split(" and "))
