"""The documentation is true: its Python runs, its commands, files and variables exist."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastattn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's code blocks in a language, each with the line where its code begins."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in matches]


def examples() -> list:
    return [
        pytest.param(page, line, code, id=f"{page.name}-line{line}")
        for page in PAGES
        for line, code in blocks(page, "python")
    ]


def commands() -> list[str]:
    """Every command line of every page, without its comment."""
    lines = [line for page in PAGES for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]


def test_readme_has_examples():
    assert len(blocks(ROOT / "README.md", "python")) >= 3


@pytest.mark.parametrize(("page", "line", "code"), examples())
def test_example_runs(page, line, code):
    torch.manual_seed(0)
    # Compiled with its own line numbers, so that a failure points into the page.
    program = compile("\n" * (line - 1) + code, str(page), "exec")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what users are shown does not warn
            exec(program, {"__name__": "__main__"})
    finally:
        fastattn.restore_sdpa()


def test_readme_begins_with_two_commands():
    _, code = blocks(ROOT / "README.md", "sh")[0]
    assert [line.split("#")[0].strip() for line in code.splitlines()] == ["make bench", "make test"]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    used = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"bench", "test"} <= used <= targets


def test_python_commands_run():
    used = sorted({command for command in commands() if re.match(r"(\S*/)?python -m (fastattn|bench)\b", command)})
    assert any("fastattn info" in command for command in used)
    assert any("bench --help" in command for command in used)
    for command in used:
        argv = [sys.executable, *command.split()[1:]]
        done = subprocess.run(argv, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page.name}: no heading for {target}"
        elif not re.match(r"[a-z]+://", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: no file {target}"


def test_documented_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"\bfastattn\.([a-z_]+)\b", text))):
        assert hasattr(fastattn, name), f"README.md speaks of fastattn.{name}"


def test_environment_variables_are_those_of_the_source():
    python = [ROOT / "setup.py", ROOT / "scripts" / "cuda_build.py", *(ROOT / "fastattn").glob("*.py")]
    native = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    python, native = ("".join(path.read_text(encoding="utf-8") for path in paths) for paths in (python, native))
    macros = set(re.findall(r"(?<![\w\"])FASTATTN_[A-Z_]+\b", native))  # setup.py defines some of them, by name
    variables = set(re.findall(r'"(FASTATTN_[A-Z_]+)"', python + native)) - macros
    table = set(re.findall(r"^\| `(FASTATTN_[A-Z_]+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert variables == table
