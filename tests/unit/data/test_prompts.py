import pytest

from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards.captions import prompt, read_captions


@pytest.mark.parametrize(
    ("data", "extension", "captions"),
    [
        (b"a cat\n", "txt", ["a cat"]),
        ("eine größe".encode(), "txt", ["eine größe"]),
        (b"\xef\xbb\xbfa cat", "txt", ["a cat"]),
        (b"", "txt", [""]),
        (b'"a cat"', "json", ["a cat"]),
        (b'{"caption": "a cat", "url": 1}', "json", ["a cat"]),
        (b'{"captions": ["a cat", "one cat"], "caption": "x"}', "json", ["a cat", "one cat"]),
    ],
)
def test_captions_are_read_from_text_and_json(data, extension, captions):
    assert read_captions(data, extension, "k") == captions


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (b"\xff\xfe\x00", "txt"),
        (b"{", "json"),
        (b"{}", "json"),
        (b'{"caption": null}', "json"),
        (b'{"captions": []}', "json"),
        (b'["a", 3]', "json"),
        (b"7", "json"),
    ],
)
def test_what_is_no_caption_is_a_bad_sample_with_its_key(data, extension):
    with pytest.raises(BadSample, match=f"sample 'dir/k', part '{extension}'"):
        read_captions(data, extension, "dir/k")


def test_a_dropped_prompt_is_the_empty_one():
    assert prompt(["a", "b"], 1, dropped=False) == "b"
    assert prompt(["a", "b"], 1, dropped=True) == ""
