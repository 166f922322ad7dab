"""What tokenizers cut off prompts is told, and subjects of which nothing could be learnt for it are refused."""

import pytest

from controlbooth.data.loading.tokens import cut_prompts, describe_cut, equal_prompts
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.measuring.identifiers import candidates
from controlbooth.trainer.dreambooth.words import check_words, is_t5, pieces_of, tokenizers_of

TOKENS = 12  # of conftest's tokenizers, whose words are single letters, begin and end included
NINE = "a b c d e f g h i"


def task(name, identifier, prompt, class_prompt="a d"):
    return Task(name, (), "d", identifier, prompt, class_prompt, 1, 1.0, 1)


@pytest.fixture
def config(base_folder):
    def make(family="sd15", **changes):
        return SubjectRunConfig(name="x", model={"base": str(base_folder(family))}, **changes)

    return make


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_identifier_that_the_tokenizer_cuts_off_is_a_fault_of_its_subject_alone(family, config):
    tasks = [task("late", "z", f"{NINE} j z"), task("last", "y", f"{NINE} y"), task("none", "x", "a b c")]
    faults, warnings = check_words(tasks, config(family))
    assert faults.keys() == {"late"} and warnings.keys() == {"late"}
    assert faults["late"].startswith(
        "its instance_prompt has 13 tokens, and the identifier 'z' is not among the first 12, which are all that the"
    )


def test_a_prompt_that_is_cut_behind_its_identifier_is_told(config):
    tasks = [task("one", "z", f"z {NINE} j k", class_prompt=f"{NINE} j k l")]
    faults, warnings = check_words(tasks, config(validation=dict(prompts=[f"{{identifier}} {NINE} l m n"])))
    assert not faults
    assert (
        "its instance_prompt 'z a b c d e f g h i j k' has 14 tokens, and the base reads the first 12"
        in warnings["one"]
    )
    assert "its class_prompt 'a b c d e f g h i j k l' has 14 tokens" in warnings["one"]
    assert "its validation.prompts 'z a b c d e f g h i l m n' has 15 tokens" in warnings["one"]


def test_subjects_that_are_one_to_the_base_are_refused_with_each_others_names(config):
    tasks = [task("small", "z", "a z"), task("large", "Z", "a Z"), task("other", "y", "a y")]
    faults, _ = check_words(tasks, config())
    assert faults.keys() == {"small", "large"}
    assert faults["small"].startswith("its identifier is 'z', which is the same to the base as 'Z' of large: its ")
    tasks = [task("one", "z", f"a z b c d e f g h i {end}") for end in "j"]
    tasks += [task("two", "y", f"a z b c d e f g h i {end}") for end in "k"]
    faults, _ = check_words(tasks, config())
    assert faults.keys() == {"one", "two"}
    assert "its tokenizer keeps 12 tokens. Change one of them" in faults["one"]


def test_equal_prompts_of_several_subjects_are_no_fault(config):
    """Each has an adapter of its own, and may be trained under the same words."""
    assert check_words([task("one", "z", "a d"), task("two", "y", "a d")], config()) == ({}, {})


def test_what_is_cut_is_counted_and_told_once(load_tiny):
    tokenizers = load_tiny("sdxl").tokenizers
    assert describe_cut(tokenizers, ["a", "", NINE], "captions") is None
    assert describe_cut(tokenizers, [], "captions") is None
    long = f"{NINE} j k"
    (cut,) = cut_prompts(tokenizers, [long, "a", long])
    assert (cut.prompt, cut.tokens, cut.kept) == (long, 13, TOKENS)
    line = describe_cut(tokenizers, [long, "a", long], "captions")
    assert line == (
        "2 of 3 captions are longer than the base reads and are cut, such as 'a b c d e f g h i j k': "
        "it has 13 tokens, and the tokenizer keeps 12"
    )


def test_prompts_are_equal_only_where_all_tokenizers_take_them_for_one(load_tiny):
    first, second = load_tiny("sdxl").tokenizers
    prompts = [f"{NINE} j k", f"{NINE} j l", "a b", "A B"]
    assert equal_prompts((first, second), prompts) == [(prompts[0], prompts[1]), ("a b", "A B")]
    second.model_max_length = 20
    assert equal_prompts((first, second), prompts) == [("a b", "A B")]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_t5_reads_an_identifier_in_up_to_three_pieces_that_it_knows(family, config):
    tasks = [task("known", "z", "a z"), task("capital", "Q", "a Q")]
    faults, _ = check_words(tasks, config(family))
    assert faults.keys() == {"capital"}
    assert faults["capital"].startswith("T5's tokenizer reads the identifier 'Q' as")
    (long,) = [task("long", "abcd", "a abcd")]
    assert "splits the identifier 'abcd' into a b c d" in check_words([long], config(family))[0]["long"]


def test_t5s_length_is_the_runs_and_a_run_without_t5_leaves_its_tokenizer_out(base_folder):
    model = {"base": str(base_folder("sd3")), "text_tokens": 9}
    tokenizers = tokenizers_of(SubjectRunConfig(name="x", model=model))
    assert [one.model_max_length for one in tokenizers] == [TOKENS, TOKENS, 9]
    assert [is_t5(one) for one in tokenizers] == [False, False, True]
    assert len(tokenizers_of(SubjectRunConfig(name="x", model=model | {"t5": False}))) == 2


def test_proposed_identifiers_are_rare_in_clip_and_those_that_are_in_t5_too_come_first():
    pytest.importorskip("wordfreq")
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = ["qzx", "kvq", "wqz", "zzqv"]
    letters = sorted(set("".join(words)))
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[-2], parts[-1]))
            parts[-2:] = ["".join(parts[-2:])]
            pieces.append(parts[-1])
    merges = list(dict.fromkeys(merges))
    clip = CLIPTokenizer(vocab={piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, merges=merges)
    begin = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0), *((letter, -9.0) for letter in letters)]
    filler = [(f"<filler {number}>", -99.0) for number in range(5000 - len(begin))]
    t5 = T5TokenizerFast(vocab=[*begin, *filler, ("▁kvq", -5.0), ("zqv", -5.0), ("▁z", -5.0)], extra_ids=0)
    assert [pieces_of(t5, word) for word in ("kvq", "zzqv")] == [["▁kvq"], ["▁z", "zqv"]]
    found = candidates([clip, t5])
    assert set(found[:3]) == {"kvq", "zzqv", "zqv"}
    assert set(found[3:]) == {"qzx", "wqz"}  # three letters, three pieces
    assert set(candidates([clip])) == {*words, "zqv"}
