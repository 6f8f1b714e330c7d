"""The pages of docs/: every Python block is run, and every console block that can be.

The blocks of a page run in order, in a folder with a copy of examples/; its Python blocks share one
namespace. A console block (lines `$ command`) that needs a network or a device says so in a comment
before it, `<!-- not run: why -->`, and is shown here as skipped for that reason.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page):
    """(kind, code, line of the code, why it is not run) of each fenced block."""
    text = page.read_text()
    return [
        (m["kind"], m["code"], text[: m.start("code")].count("\n") + 1, m["why"])
        for m in BLOCK.finditer(text)
    ]


NOT_RUN = [
    pytest.param(why, id=f"{page.stem}:{line}")
    for page in PAGES for _, _, line, why in blocks(page) if why
]  # fmt: skip


def test_pages_have_only_blocks_that_are_looked_at():
    kinds = {kind for page in PAGES for kind, *_ in blocks(page)}
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert kinds <= {"python", "console", "json"}
    assert fences == 2 * sum(len(blocks(page)) for page in PAGES) > 0
    assert not any(why for page in PAGES for kind, _, _, why in blocks(page) if kind == "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    found = [(kind, code, line) for kind, code, line, why in blocks(page) if not why]
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    skip_without(page, [code for kind, code, _ in found if kind == "python"])
    namespace = {"__name__": "page"}
    for kind, code, line in found:
        if kind == "python":
            # As many lines before it as on the page, so that an error names the page's line.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        elif kind == "console":
            commands = [x.removeprefix("$ ") for x in code.splitlines() if x.startswith("$ ")]
            assert commands, f"{page}:{line}: expected lines '$ command'"
            run = subprocess.run(
                ["bash", "-ec", "\n".join(commands)], capture_output=True, text=True
            )
            assert run.returncode == 0, f"{page}:{line}\n{run.stdout}{run.stderr}"


def skip_without(page, codes):
    imported = {m for code in codes for m in re.findall(r"^(?:from|import) (\w+)", code, re.M)}
    if any("BitsAndBytesConfig" in code for code in codes):
        imported.add("bitsandbytes")
    for module in sorted(imported):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{page.name}: {module} is not installed")


@pytest.mark.parametrize("why", NOT_RUN)
def test_block_is_not_run_because(why):
    pytest.skip(why)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", page.read_text())):
        file, _, anchor = target.partition("#")
        if file.startswith(("http:", "https:")):
            continue
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", there.read_text()), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_the_site_builds_without_a_warning(tmp_path):
    """Links inside docs/ and the reference, whose docstrings must parse."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "fastrm.listwise_loss" in reference and "center_coef" in reference
