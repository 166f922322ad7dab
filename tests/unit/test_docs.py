"""The documentation shows the code as it is: fields, verbs, metrics, the drawing of the imports, and every link."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
WRITTEN = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")])


def load(name: str) -> ModuleType:
    """Imports a program of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load("generate")


@pytest.fixture(scope="module")
def pages(generate) -> dict[str, str]:
    return {path: write() for path, write in generate.pages().items()}


def sections(generate) -> list:
    """Finds all sections of the files that the reference describes."""
    found, left = [], [root for _, _, roots in generate.FIELDS.values() for root in roots.values()]
    while left:
        section = left.pop()
        if section not in found:
            found.append(section)
            left += [one for field in section.model_fields.values() for one in generate.sections_of(field.annotation)]
    return found


def test_every_field_of_every_file_is_explained(generate, pages):
    whole = "\n".join(pages.values())
    for section in sections(generate):
        for name, field in section.model_fields.items():
            if generate.sections_of(field.annotation) and not field.description:
                continue  # has a table of its own
            assert re.search(
                rf"^\| `[\w.\[\]]*\b{name}` \| [^|]*\w[^|]* \| [^|]+ \| .*\w{{2,}}.* \|$", whole, re.MULTILINE
            ), name


def test_fields_are_explained_in_one_place_only(generate):
    there = {(section.__name__, name): f for section in sections(generate) for name, f in section.model_fields.items()}
    assert [key for key in generate.PLAIN if key not in there] == []
    assert [key for key in generate.PLAIN if there[key].description] == []


def test_every_verb_is_shown_with_its_help(generate, pages):
    page = pages["reference/commands.md"]
    for verb in generate.cli.TABLE:
        assert f"\n### {verb} {{" in page and f"usage: controlbooth {verb} " in page


def test_every_metric_that_is_logged_is_explained(generate):
    generate.check_names()
    names = generate.logged_names()
    assert {"loss", "stall_percent"} <= names["step"] and "cpu_percent" in names["system"]
    assert "train/instance_loss" in names["subjects"] and "edge_f1" in names["figures"]


def test_a_metric_without_an_explanation_is_named(generate, monkeypatch):
    monkeypatch.delitem(generate.STEP, "grad_norm")
    with pytest.raises(KeyError, match="grad_norm"):
        generate.check_names()


def test_the_run_folder_page_names_the_files_that_a_run_has(pages):
    from controlbooth.trainer.config.run import RESOLVED
    from controlbooth.trainer.evaluation.record import RESULT, SAMPLES
    from controlbooth.trainer.evaluation.verdict import CONTROL
    from controlbooth.trainer.run.continuing import RECORD

    page = pages["reference/run-folder.md"]
    for name in (RESOLVED, RESULT, SAMPLES, CONTROL, RECORD, "metrics.jsonl", "status.json", "speed.json"):
        assert name in page, name


def test_the_drawing_of_the_imports_is_of_this_code():
    drawing = load("draw_architecture")
    drawn, now = drawing.TARGET.read_text(), drawing.draw()
    assert drawn == now, "the imports have changed: python docs/draw_architecture.py"


def anchors(text: str) -> set[str]:
    """Returns the names of the headings of a page, as MkDocs and forges make them."""
    headings = re.findall(
        r"^#+ (.*?)(?: \{ #([\w-]+) \})?$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    )
    slugs = (re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title, _ in headings)
    return {re.sub(r"\s+", "-", slug) for slug in slugs} | {own for _, own in headings if own}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path, pages):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        target, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = (path.parent / target).resolve() if target else path
        generated = place.is_relative_to(DOCS) and pages.get(str(place.relative_to(DOCS)))
        assert place.exists() or generated, f"{path.relative_to(ROOT)} links to {link}"
        if anchor:
            found = anchors(generated or place.read_text())
            assert anchor in found, f"{path.relative_to(ROOT)} links to {link}, and there is {sorted(found)}"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_is_there(path):
    named = re.findall(
        r"(?<![\w./-])(?:data|deploy|docs|launch|models|tests|trainer)/[\w./-]+\.(?:py|yaml|svg)", path.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_short_and_every_page_is_in_the_navigation(pages):
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted(listed) == sorted({*(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")), *pages})


def test_the_site_asks_no_other_site_for_anything():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "analytics" not in settings and "http" not in settings


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert version is not None and citation["version"] == version[1] and citation["license"] == "Apache-2.0"


def test_issue_forms_and_hooks_can_be_read():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= form.keys(), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "pyright"]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="make docs installs mkdocs")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data.shards" in (tmp_path / "reference" / "configuration.html").read_text()
    home = (tmp_path / "index.html").read_text()
    assert re.findall(r'src="(?:https?:)?//[^"]+"|<link[^>]+href="(?:https?:)?//[^"]+"', home) == []
    assert json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]


@pytest.mark.parametrize("name", ["diffusers", "kohya", "simpletuner"])
def test_the_page_of_another_trainer_has_a_row_for_each_flag_and_their_count(name, pages):
    from controlbooth.trainer.imports.tables import counts, table

    page = pages[f"coming-from/{name}.md"]
    assert f"{len(table(name))}: {counts(name)['taken']} taken, " in page
    for flag, entry in table(name).items():
        assert f"\n| `{flag}` | {entry.kind} | " in page
