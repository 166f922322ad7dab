"""Lists the cases of data: keys, tables, pictures, captions, tars, and data of which nothing can be read."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from case import Case, Outcome, Ran, last_line, run
from PIL import Image

TRAIN = """\
name: {name}
output: runs
max_steps: 16
global_batch_size: 2
micro_batch_size: 2
model: {{base: miniature, hint_channels: [16, 32, 64, 96], attention: plain}}
data: {{shards: {name}, condition: edges, resolution: 64, prompt_dropout: 0, threads: 1}}
"""
"""An epoch of 32 samples."""


def members(folder: Path) -> dict[str, bytes]:
    """Returns name -> bytes of all members of a folder's shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def pixels(data: bytes) -> np.ndarray:
    """Returns the stored pixels of a picture, (H, W) or (H, W, C)."""
    return np.asarray(Image.open(io.BytesIO(data)))


def pack(place: Path, source: str, *options: str) -> tuple[Ran, dict[str, bytes]]:
    """Packs a source of a case; returns what was said, and the members that were written."""
    ran = run(place, "controlbooth", "data", "pack", source, "-o", f"packed/{source}", *options)
    return ran, members(place / "packed" / source)


def refused(source: str, *said: str) -> Callable[[Path], Outcome]:
    """Makes a look at a source that is to be refused with these words, before anything is written."""

    def look(place: Path) -> Outcome:
        ran, written = pack(place, source, "--condition", "canny")
        right = ran.refused and not (place / "packed").exists() and all(re.search(word, ran.text) for word in said)
        return Outcome(right and not written, last_line(ran))

    return look


def equal_keys(place: Path) -> Outcome:
    counts = []
    for folder in ("same", "unique"):
        run(place, "controlbooth", "data", "index", folder)
        for step in range(8):
            order = ("controlbooth", "data", "order", folder, "--condition", "edges", "--global-batch-size", "16")
            counts.append(run(place, *order, "--prompt-dropout", "0.5", "--step", str(step)).text.count(" dropped "))
    alike = counts[:8] == counts[8:] or abs(sum(counts[:8]) - 64) < 25
    return Outcome(alike and 3 <= min(counts) and max(counts) <= 13, f"dropped of 16: {counts[:8]} and {counts[8:]}")


def dotted_names(place: Path) -> Outcome:
    sizes, longest = [], 0
    for count in (250, 500, 1000):
        ran = run(place, "controlbooth", "data", "index", f"dotted-{count}")
        sizes.append((place / f"dotted-{count}" / "00000.tar.idx").stat().st_size)
        lines = [line for line in ran.text.splitlines() if "first dot" in line and "Rename" in line]
        longest = max(longest, *map(len, ran.text.splitlines()))
    right = len(lines) == 1 and longest < 1000 and sizes[2] < 4.5 * sizes[0]
    return Outcome(right, f"indexes of {', '.join(map(str, sizes))} bytes, one message of {longest} characters")


def edited_picture(place: Path) -> Outcome:
    pack(place, "large.parquet", "--condition", "canny")
    before = members(place / "packed" / "large.parquet")
    run(place, "python", "-c", "import shutil; shutil.copy('img/7.png', 'img/1.png')")
    ran, after = pack(place, "large.parquet", "--condition", "canny")
    changed = [name for name in after if name.endswith(".png") and before[name] != after[name]]
    right = ran.status == 0 and after["00000001.png"] == (place / "img" / "1.png").read_bytes() and len(changed) == 2
    return Outcome(right, f"{len(changed)} members of the edited sample were packed anew")


def several_rows(place: Path) -> Outcome:
    ran, found = pack(place, "five", "--condition", "canny")
    captions = [json.loads(data)["captions"] for name, data in found.items() if name.endswith(".json")]
    right = ran.status == 0 and bool(captions) and all(len(own) == len(set(own)) == 5 for own in captions)
    return Outcome(right, f"captions of each picture: {[len(own) for own in captions]}")


def lists(place: Path) -> Outcome:
    ran, found = pack(place, "lists", "--condition", "canny")
    captions = [json.loads(data)["captions"] for name, data in found.items() if name.endswith(".json")]
    return Outcome(ran.status == 0 and captions == [["first 0", "second 0"], ["first 1", "second 1"]], str(captions))


def null_picture(place: Path) -> Outcome:
    ran, found = pack(place, "null-picture.parquet", "--condition", "canny", "--skip-bad")
    told = [line for line in ran.text.splitlines() if "row 2" in line]
    kept = sorted(name for name in found if name.endswith(".txt"))
    right = ran.status == 0 and bool(told) and kept == ["00000000.txt", "00000002.txt"]
    return Outcome(right, told[-1][:150] if told else last_line(ran))


def turned_webp(place: Path) -> Outcome:
    ran, found = pack(place, "webp", "--condition", "gray")
    shapes = {pixels(data).shape for name, data in found.items() if name.endswith("gray.png")}
    return Outcome(ran.status == 0 and shapes == {(96, 64)}, f"conditions of (height, width) {shapes}")


def transparent_tiff(place: Path) -> Outcome:
    ran, found = pack(place, "tiff", "--condition", "gray")
    colour = pixels(found["0.png"]).reshape(-1, 3).mean(axis=0) if "0.png" in found else np.zeros(3)
    right = ran.status == 0 and bool(np.abs(colour - (227, 177, 152)).max() < 1.5)  # 128/255 of (200, 100, 50) on white
    return Outcome(right, f"packed as {tuple(colour.round().astype(int).tolist())}")


def label_maps(place: Path) -> Outcome:
    """Of `segmentation` labels always stayed labels: the other kinds have to show the same colours, and all of them."""
    run(place, "controlbooth", "data", "pack", "labels", "-o", "packed/labels")
    classes = {(180, 20, 20), (6, 230, 230), (80, 50, 50), (4, 200, 3), (240, 240, 10)}  # and a gray, as captions are
    shown = {}
    for kind in ("segmentation", "seg", "semantic", "mask"):
        show = ("controlbooth", "data", "show", "packed/labels", "--resolution", "64", "--condition", kind)
        run(place, *show, "--count", "1", "-o", f"{kind}.png")
        colours = {
            tuple(colour) for colour in pixels((place / f"{kind}.png").read_bytes())[..., :3].reshape(-1, 3).tolist()
        }
        shown[kind] = {colour for colour in colours if max(colour) - min(colour) > 10}
    right = classes <= shown["segmentation"] and all(colours == shown["segmentation"] for colours in shown.values())
    return Outcome(right, f"colours in the sheets: { {kind: len(colours) for kind, colours in shown.items()} }")


def stray_bytes(place: Path) -> Outcome:
    ran, found = pack(place, "stray", "--condition", "canny", "--caption", "a ball")
    whole = sum(name.endswith(".jpg") for name in found)
    cut = place / "cut"
    cut.mkdir()
    data = (place / "stray" / "08.jpg").read_bytes()
    (cut / "0.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    damaged = run(
        place, "controlbooth", "data", "pack", "cut", "-o", "packed/cut", "--condition", "canny", "--caption", "a"
    )
    right = ran.status == 0 and whole == 30 and damaged.status == 1 and "cannot be decoded" in damaged.text
    return Outcome(right, f"{whole} of 30 packed; one of which half is missing: {last_line(damaged, 80)}")


def linked_folder(place: Path) -> Outcome:
    ran, found = pack(place, "linked", "--condition", "canny", "--caption", "a {folder}")
    words = sorted(data.decode() for name, data in found.items() if name.endswith(".txt"))
    return Outcome(ran.status == 0 and words == ["a cat"] * 5 + ["a dog"] * 3, f"{len(words)} samples")


def other_formats(place: Path) -> Outcome:
    """The .heic of this case is a stub: it is named as what cannot be decoded, and left out when that is asked."""
    (place / "formats" / "dog" / "3.psd").write_bytes(b"8BPS")
    options = ("--condition", "canny", "--caption", "a {folder}")
    ran, _ = pack(place, "formats", *options)
    kept, found = pack(place, "formats", *options, "--skip-bad")
    named = "2.heic" in ran.text and ran.status == 1 and "left out 1 .psd" in ran.text
    right = named and kept.status == 0 and sum(name.endswith(".txt") for name in found) == 2
    return Outcome(right, "the GIF is packed, the HEIC that is none is named, 1 .psd is counted")


def nothing_to_read(place: Path) -> Outcome:
    told = r"none of .* can be read, so there is nothing to train on\. The first is sample '0000', part 'json'"
    dry = run(place, "controlbooth", "train", "run.yaml", "--dry-run")
    start = run(place, "controlbooth", "train", "run.yaml")
    direct = run(place, "python", "-m", "controlbooth.trainer.controlnet.train", "run.yaml")
    status = place / "runs" / "unusable" / "status.json"
    failed = status.is_file() and json.loads(status.read_text())["state"] == "failed"
    index = run(place, "controlbooth", "data", "index", "unusable")
    commands = (dry, start, direct, index)
    right = all(re.search(told, ran.text) and not ran.traceback and ran.status for ran in commands) and failed
    return Outcome(right, f"{[ran.status for ran in commands]}: {last_line(index, 110)}")


def hostile_caption(name: str) -> Callable[[Path], Outcome]:
    """Makes a look at what index, lint and training do with a caption that is none."""

    def look(place: Path) -> Outcome:
        (place / "run.yaml").write_text(TRAIN.format(name=name))
        index = run(place, "controlbooth", "data", "index", name)
        lint = run(place, "controlbooth", "data", "lint", name, "--workers", "1")
        train = run(place, "controlbooth", "train", "run.yaml")
        ledger = place / "runs" / name / "bad-samples-0.jsonl"
        entries = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.is_file() else []
        noted = {(entry["key"], entry["part"]) for entry in entries} == {("wall-00007", "json")}
        told = all("wall-00007" in ran.text and not ran.traceback for ran in (index, lint))
        right = told and noted and train.status == 0 and "finished at step 16" in train.text
        return Outcome(
            right, f"told by index and lint: {told}; train {last_line(train, 40)}, {len(entries)} in the ledger"
        )

    return look


def large_picture(place: Path) -> Outcome:
    (place / "run.yaml").write_text(TRAIN.format(name="large"))
    index = run(place, "controlbooth", "data", "index", "large")
    lint = run(place, "controlbooth", "data", "lint", "large", "--decode", "--workers", "1")
    train = run(place, "controlbooth", "train", "run.yaml")
    ledger = place / "runs" / "large" / "bad-samples-0.jsonl"
    entries = ledger.read_text() if ledger.is_file() else ""
    figure = "30000 x 30000 pixels, 900.0 million, and the limit is 200 million"
    right = all(figure in text for text in (index.text, lint.text, entries)) and train.status == 0
    run(place, "controlbooth", "data", "index", "middle")
    fine = run(place, "controlbooth", "data", "lint", "middle", "--decode", "--workers", "1")
    return Outcome(
        right and "broken" not in fine.text, f"index, lint and ledger: {figure}" if right else last_line(train)
    )


def short_memory(place: Path) -> Outcome:
    run(place, "controlbooth", "data", "index", "large")
    lint = "controlbooth data lint large --decode --workers 1 --max-pixels 1000000000"
    ran = run(place, "bash", "-c", f"ulimit -v 1000000; {lint}")
    told = "'wall-00007'" in ran.text and "no memory left for this picture of 30000 x 30000 pixels" in ran.text
    return Outcome(ran.refused and told and "broken" not in ran.text, last_line(ran))


def pax_size(place: Path) -> Outcome:
    ran = run(place, "controlbooth", "data", "index", "superscript.tar")
    told = (
        "the PAX header at byte 0 states the size '²'" in ran.text or "the PAX header at this byte states" in ran.text
    )
    return Outcome(
        ran.status == 1 and told and not ran.traceback, f"{ran.status}: " + ran.text.strip().splitlines()[-2][:100]
    )


def _inputs(script: str, *cases: tuple[str, str, Callable[[Path], Outcome]]) -> tuple[Case, ...]:
    return tuple(Case("inputs", name, script, before, look) for name, before, look in cases)


NOT_TEXT = ("is a number and no text", r"row \d of")
CASES: tuple[Case, ...] = (
    *_inputs(
        "keys.py",
        ("equal keys", "all prompts of a step dropped, or none", equal_keys),
        ("dotted names", "indexes of 1.5, 6 and 24 MB, messages of thousands of characters", dotted_names),
    ),
    *_inputs(
        "tables.py",
        ("unquoted comma", "the caption is cut", refused("comma.csv", "line 3 has 4 cells, the header 2")),
        ("quote not closed", "2 of 4 rows packed", refused("quote.csv", "line 3: the quote that opens there")),
        ("large_string, edited picture", "the old picture is kept", edited_picture),
        ("large_string, missing file", "stops in mid-pack", refused("absent.parquet", "1 of 9 .*row 9 .*img/8.png")),
        (
            "two splits in one folder",
            "test and train in one set",
            refused("splits", "the splits test, train: name one"),
        ),
        ("several rows for a picture", "the last of five captions is kept", several_rows),
        ("list in metadata.jsonl", "AttributeError", lists),
        ("caption that is a number", "AttributeError", refused("number.jsonl", *NOT_TEXT)),
        ("caption that is NaN", "AttributeError", refused("nan.jsonl", *NOT_TEXT)),
        ("captions that are floats", "AttributeError", refused("numbers.parquet", *NOT_TEXT)),
        ("null among captions", "trains on nothing", refused("null-in-list.jsonl", "is null and no text", "row 1 of")),
        ("picture that is null", "nothing is packed", null_picture),
    ),
    *_inputs(
        "pictures.py",
        ("orientation in WebP", "sideways", turned_webp),
        ("half transparent TIFF", "alpha applied twice: (177, 152, 140)", transparent_tiff),
        ("label maps of another name", "blended into colours of no class", label_maps),
        ("stray bytes in a JPEG", "refused", stray_bytes),
        ("linked class folder", "passed over", linked_folder),
        ("formats that are not read", "no word of .gif and .heic", other_formats),
    ),
    *_inputs("runs.py", ("nothing can be read", "finished, loss 0, exit status 0", nothing_to_read)),
    Case(
        "integrity",
        "caption of nested brackets",
        "captions.py",
        "RecursionError at every start",
        hostile_caption("deep"),
    ),
    Case(
        "integrity", "half a surrogate pair", "captions.py", "TypeError and abort (134)", hostile_caption("surrogate")
    ),
    Case("integrity", "PNG of 858 MiB", "pictures.py", "decoded, 2.5 GiB; no limit", large_picture),
    Case("integrity", "memory is short", "pictures.py", "called damaged", short_memory),
    Case("integrity", "PAX size of a superscript", "tar_sizes.py", "ValueError with a stack", pax_size),
)
