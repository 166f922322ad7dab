"""`controlbooth dreambooth identifiers`: words that mean nothing to a base yet, one for each subject.

DreamBooth (arXiv 2208.12242, section 3.2) wants a word with a weak prior in the language model and in the diffusion
model. Its rule for T5, ids 5000 to 10000 and at most three characters, is none for other vocabularies. The rule here:

1. One token of the base's tokenizer that ends a word, of three or four Latin letters.
2. In the rarer half of its vocabulary. Byte-pair vocabularies (CLIP's) are in the order in which pieces were merged,
   the most frequent first, so a token's id is its rank.
3. No word: at most one in ten million (a Zipf frequency of 2.0) in each of nine languages, by the package wordfreq.
4. Words without vowels first: most of the others are ends of words, which lend them a meaning.
5. Where T5 reads prompts beside CLIP (SD3, FLUX.1), at most three pieces of its vocabulary. Those whose pieces are all
   of the paper's ids come before all others, and how many are not is said.

With --draw the base itself is asked: pictures of `a [identifier]` and of `a [identifier] [class noun]` are to be no
more alike than pictures of `a [class noun]`. A word that the base has an image for, such as a club's, makes them alike.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

from controlbooth.data.errors import UserError
from controlbooth.data.order.draws import hash64
from controlbooth.models.base import Base
from controlbooth.models.pretrained import load_base, load_tokenizers
from controlbooth.models.sampling import sample
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.dreambooth.measuring.fidelity import mean_off_diagonal
from controlbooth.trainer.dreambooth.prior import DRAWN_AT_ONCE
from controlbooth.trainer.dreambooth.words import MOST_PIECES, is_t5, pieces_of
from controlbooth.trainer.engine.deepspeed import DTYPES, resolve_precision
from controlbooth.trainer.evaluation.encoders import Encoder, encoder_folders, open_encoders

LETTERS = (3, 4)
PAPERS_IDS = range(5000, 10001)
"""Of T5's vocabulary, the most frequent pieces first: rare ones, and not yet long words."""
MOST_FREQUENT = 2.0
"""On the Zipf scale: the logarithm of how often a word comes in a billion words."""
LANGUAGES = ("en", "es", "fr", "de", "it", "pt", "nl", "id", "tr")
VOWELS = frozenset("aeiouy")


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth dreambooth identifiers` is asked, and returns its exit status."""
    if options.draw and not options.class_noun:
        raise UserError("--draw compares with pictures of a class: give --class-noun, once or several times")
    where = base_folder(options.base)
    tokenizers = load_tokenizers(where)
    found = candidates(tokenizers)
    if not found:
        raise UserError(f"the tokenizer of {options.base} has no rare token of {LETTERS[0]} to {LETTERS[1]} letters")
    if options.draw:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = DTYPES[resolve_precision("auto", device, zero_stage=1)]
        base = load_base(where, "auto", dtype, device)
        encoder = open_encoders(encoder_folders(options.encoder), device).subject
        settings = dict(images=options.images, steps=options.steps, guidance_scale=options.guidance)
        found = without_a_prior(base, encoder, found, options.class_noun, options.count, settings)
    chosen = found[: options.count]
    if len(chosen) < options.count:
        print(f"only {len(chosen)} of {options.count} were found", file=sys.stderr)
    if common := sum(not is_rare_in_t5(tokenizers, word) for word in chosen):
        told = f"{common} of them have pieces outside of T5's ids {PAPERS_IDS[0]} to {PAPERS_IDS[-1]}"
        print(f"{told}, the paper's range", file=sys.stderr)
    print(f"identifiers: [{', '.join(chosen)}]")
    return 0


def candidates(tokenizers: Sequence[Any]) -> list[str]:
    """Returns the words by rules 1 to 5 that are one token of every tokenizer of CLIP.

    Those that are rare in T5 come first, then those without vowels, and among them the rarest.
    """
    from wordfreq import zipf_frequency  # reads its lists, and only this command wants them

    tokens = tokenizers[0].get_vocab()
    found = []
    for token, number in tokens.items():
        word = token.removesuffix("</w>")
        if word == token or not (word.isascii() and word.isalpha() and word.islower()):
            continue
        if not LETTERS[0] <= len(word) <= LETTERS[1] or len(set(word)) == 1 or number < len(tokens) // 2:
            continue
        frequency = max(zipf_frequency(word, language) for language in LANGUAGES)
        if frequency > MOST_FREQUENT or any(len(pieces_of(one, word)) > most_pieces(one) for one in tokenizers):
            continue
        found.append((not is_rare_in_t5(tokenizers, word), bool(VOWELS & set(word)), frequency, -number, word))
    return [word for *_, word in sorted(found)]


def most_pieces(tokenizer: Any) -> int:
    return MOST_PIECES if is_t5(tokenizer) else 1


def is_rare_in_t5(tokenizers: Sequence[Any], word: str) -> bool:
    """Tells whether all pieces of a word have the paper's ids in T5's vocabulary; true where no tokenizer is T5's."""
    numbers = [one.convert_tokens_to_ids(pieces_of(one, word)) for one in tokenizers if is_t5(one)]
    return all(number in PAPERS_IDS for row in numbers for number in row)


def without_a_prior(
    base: Base, encoder: Encoder, words: Sequence[str], nouns: Sequence[str], count: int, settings: dict[str, Any]
) -> list[str]:
    """Returns the first `count` words whose pictures are no more alike than those of each class noun.

    Prints the figures of every word that it tries.
    """
    alike = {noun: likeness(base, encoder, f"a {noun}", settings) for noun in nouns}
    for noun, value in alike.items():
        print(f"a {noun}: pictures alike {value:.3f}", file=sys.stderr)
    limit = min(alike.values())
    kept: list[str] = []
    for word in tqdm(words, unit="word", desc="drawing"):
        own = likeness(base, encoder, f"a {word}", settings)
        with_nouns = {noun: likeness(base, encoder, f"a {word} {noun}", settings) for noun in nouns}
        good = own <= limit and all(with_nouns[noun] <= alike[noun] for noun in nouns)
        figures = ", ".join(f"a {word} {noun} {value:.3f}" for noun, value in with_nouns.items())
        tqdm.write(f"{'kept' if good else 'left out':9} a {word} {own:.3f}, {figures}", file=sys.stderr)
        if good:
            kept.append(word)
        if len(kept) == count:
            break
    return kept


def likeness(base: Base, encoder: Encoder, prompt: str, settings: dict[str, Any]) -> float:
    """Returns the mean cosine of two pictures of a prompt.

    Seeds are the same for all prompts, so that only words differ.
    """
    pictures = []
    for first in range(0, settings["images"], DRAWN_AT_ONCE):
        seeds = [
            hash64("identifier", number) >> 1 for number in range(first, min(first + DRAWN_AT_ONCE, settings["images"]))
        ]
        made = sample(
            base,
            [prompt] * len(seeds),
            seeds=seeds,
            steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
        )
        pictures.append(made)
    rows = encoder.images(torch.cat(pictures).numpy())
    return mean_off_diagonal(rows @ rows.T)
