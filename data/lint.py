"""`controlbooth data lint`: what a person should look at before training on a data set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, visible, whole_number
from controlbooth.data.condition_sizes import shrunk_lines
from controlbooth.data.decode import add_max_pixels
from controlbooth.data.findings import MEANINGS, Finding, find
from controlbooth.data.index import usable_cpus
from controlbooth.data.long_captions import cut_captions, open_tokenizers
from controlbooth.data.manifest import Dataset, open_dataset
from controlbooth.data.report import write_report
from controlbooth.data.scan import sample_names, scan


def main(argv: Sequence[str] | None = None) -> int:
    """`controlbooth data lint`: 0 when nothing was found, 1 when something was."""
    arguments = _parser().parse_args(argv)
    dataset = open_dataset(arguments.shards)
    kinds = sorted({kind for row in dataset.rows for kind in row.conditions})
    scanned = scan(dataset, kinds, arguments.decode, arguments.workers, arguments.max_pixels)
    findings = find(dataset, scanned, arguments.min_side)
    if arguments.resolution is not None:
        told = [(kind, shrunk_lines(dataset, kind, arguments.resolution)) for kind in kinds]
        findings += [Finding("shrunk lines", (), str(lines), kind) for kind, lines in told if lines is not None]
    if arguments.tokenizer is not None:
        cut = cut_captions(dataset, open_tokenizers(arguments.tokenizer))
        findings += [Finding("cut captions", (), cut)] if cut is not None else []
    samples = len(scanned.digests)
    looked_at = "captions, bytes and headers" if not arguments.decode else "captions, bytes and pixels"
    print(f"{dataset.location}: {samples} usable samples in {len(dataset.rows)} shards; looked at {looked_at}")
    _print_findings(dataset, findings)
    if arguments.report is not None:
        write_report(arguments.report, dataset, findings)
        print(f"wrote {arguments.report}")
    if not arguments.decode:
        print(
            "pictures were not decoded; --decode finds broken, blank, mismatched and nearly equal ones", file=sys.stderr
        )
    return 1 if findings else 0


def _print_findings(dataset: Dataset, findings: Sequence[Finding], most: int = 5) -> None:
    if not findings:
        print("nothing was found")
    name = sample_names(dataset)
    for kind, meaning in MEANINGS.items():
        own = [finding for finding in findings if finding.kind == kind]
        if not own:
            continue
        print(f"\n{kind}: {len(own)}  ({meaning})")
        for finding in own[:most]:
            names = ", ".join(name(number) for number in finding.samples[:3])
            more = f" and {len(finding.samples) - 3} more" if len(finding.samples) > 3 else ""
            message = visible(finding.message)
            print(f"  {visible(names)}{more}: {message}" if names else f"  {message}")
        if len(own) > most:
            print(f"  ... and {len(own) - most} more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth data lint",
        description="Look for samples that spoil a training: copies, conditions of other pictures, broken, blank and "
        "small pictures, empty captions. Status 1 when there are any.",
        epilog="examples:\n  controlbooth data lint shards/train\n"
        "  controlbooth data lint shards/train --decode --min-side 512 --resolution 512 --report report.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--decode", action="store_true", help="decode all pictures and look at them too")
    parser.add_argument(
        "--min-side", type=whole_number(), default=64, help="shorter sides than this are small (default: 64)"
    )
    parser.add_argument(
        "--resolution", type=whole_number(), help="data.resolution of the run: tells of lines that do not survive it"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="BASE", help="a base, or the folder of a tokenizer: tells of captions it cuts"
    )
    add_max_pixels(parser)
    parser.add_argument("--report", type=file_to_write, help="write an HTML page with pictures of what was found")
    parser.add_argument("--workers", type=whole_number(), default=usable_cpus(), help="processes (default: the CPUs)")
    return parser
