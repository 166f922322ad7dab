"""`controlbooth data lint`: what a person should look at before training on a data set."""

import argparse
import sys
from collections.abc import Sequence

from controlbooth.data.arguments import visible
from controlbooth.data.conditions.sizes import shrunk_lines
from controlbooth.data.inspection.findings import MEANINGS, Finding, find
from controlbooth.data.inspection.report import write_report
from controlbooth.data.inspection.scan import sample_names, scan
from controlbooth.data.loading.long_captions import cut_captions, open_tokenizers
from controlbooth.data.shards.manifest import Dataset, open_dataset


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data lint`; returns 0 when nothing was found, 1 when something was."""
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
