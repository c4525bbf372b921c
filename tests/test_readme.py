"""The documentation is true: its Python runs, its commands, files, links and variables exist."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastattn
import fastattn.nn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# A block with no language, or "text", is a formula or a drawing.
LANGUAGES = {"python", "sh", "text", ""}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[int, str, str]]:
    """The page's code blocks: the line where the code begins, language, code."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(3)) + 1, match.group(2).strip(), match.group(3)) for match in matches]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's code blocks in a language, each with the line where its code begins."""
    return [(line, code) for line, found, code in fences(page) if found == language]


def examples() -> list:
    return [
        pytest.param(page, line, code, id=f"{name(page)}-line{line}")
        for page in PAGES
        for line, code in blocks(page, "python")
    ]


def commands() -> list[tuple[str, str]]:
    """Every command of every page, without its comment, and the page: what stands between && is one for itself."""
    found = []
    for page in PAGES:
        for _, block in blocks(page, "sh"):
            for line in block.splitlines():
                bare = re.sub(r"\s+#.*", "", line)
                found += [(name(page), part.strip()) for part in re.split(r"\s&&\s", bare) if part.strip()]
    return found


def run(command: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip(), f"{command} printed nothing"
    return done.stdout


# --- Code blocks ------------------------------------------------------------------------------------------------------


def test_readme_has_examples():
    assert len(blocks(ROOT / "README.md", "python")) >= 3


def test_first_example_is_short():
    """Under ten lines, imports included."""
    _, code = blocks(ROOT / "README.md", "python")[0]
    assert len(code.splitlines()) < 10


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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_tested(page):
    text = page.read_text(encoding="utf-8")
    assert 2 * len(fences(page)) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), "a block has no end"
    for line, language, code in fences(page):
        where = f"{name(page)}, line {line}"
        assert language in LANGUAGES, f"{where}: a block in {language!r} is run by nobody"
        if language in ("text", ""):
            program = re.search(
                r"^ *(>>> |\$ |import |from \S+ import |make |pip |python3? )", code, flags=re.MULTILINE
            )
            assert not program, f"{where}: {program.group().strip()!r} belongs into a block that is run"
    indented = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n {4,}(import |>>> |pip |make )", indented), "an indented block is run by nobody"


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_readme_begins_with_two_commands():
    _, code = blocks(ROOT / "README.md", "sh")[0]
    assert [line.split("#")[0].strip() for line in code.splitlines()] == ["make bench", "make test"]


def test_three_commands_lead_to_a_replaced_model():
    """The README's second block; the last of its commands is run, here from the checkout."""
    _, code = blocks(ROOT / "README.md", "sh")[1]
    environment, install, use = code.splitlines()
    assert re.search(r"-m venv env\b.*\bactivate\b.*\bpip install torch\b", environment)
    packages = environment.split("pip install ")[1].split()
    # What an unisolated build takes from the environment; ninja is how torch compiles, and a venv may lack setuptools.
    assert {"torch", "setuptools", "ninja"} <= set(packages)
    assert install == "pip install --no-build-isolation ."
    assert use.startswith("cd .. && python -c ")
    assert "replace_" in use
    assert "served by fastattn: 1" in run(use, *shlex.split(use.split(" && ")[1])[1:])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "command"), sorted(set(commands())), ids=lambda value: re.sub(r"[^\w.=-]+", "-", value)[:60]
)
def test_command_exists(page, command):
    """Run where that is cheap; else what it names is there. A command of a kind that is not known here fails."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        target = [word for word in rest if "=" not in word]
        assert set(target) <= make_targets(), f"{page}: make has no {target}"
        variables = [word.split("=")[0] for word in rest if "=" in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"\b{variable}\b", makefile) for variable in variables), f"{page}: {variables}"
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        if rest[1] in ("fastattn", "bench"):
            run(command, *rest)
        elif rest[1] == "venv":
            importlib.import_module("venv")
        else:
            assert rest[1].startswith("examples."), f"{page}: {command}"
            listed = run(command, "-m", rest[1], "--help")
            assert all(option in listed for option in rest[2:]), f"{page}: {command}"
    elif program in ("python", "python3") and rest[:1] == ["-c"]:
        run(command, *rest)
    elif program in ("python", "python3"):
        assert (ROOT / rest[0]).exists(), f"{page}: {command}"
        options = [word.split("=")[0] for word in rest[1:] if word.startswith("--")]
        assert all(option in run(command, rest[0], "--help") for option in options), f"{page}: {command}"
    elif program == "pip":
        assert rest[0] == "install", f"{page}: {command}"
        for path in [word for word in rest[1:] if word.startswith(".")]:
            extras = re.findall(r"\[(.*)\]", path)
            text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras), f"{page}: {command}"
    elif words[0].startswith("scripts/"):
        assert (ROOT / words[0]).exists(), f"{page}: {command}"
    else:
        assert command in (". env/bin/activate", "cd .."), f"{page}: nobody checks {command!r}"


def test_the_commands_that_users_start_with_are_there():
    known = {command for _, command in commands()}
    assert any("fastattn info" in command for command in known)
    assert any("bench --help" in command for command in known)
    assert {"make bench", "make test", "make docs"} <= known


def test_make_targets_in_the_text_exist():
    """`make x` in running text too."""
    for page in PAGES:
        used = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
        assert used <= make_targets(), f"{name(page)}: {used - make_targets()}"


# --- Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub names them."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"[`*]", "", heading) for heading in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name(page)}: no file {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: no heading for {target}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r"([\w/-]+\.md)(?=\s|$)", re.sub(r"#.*", "", nav))
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}
    assert set(listed) == there | {"contributing.md", "changelog.md"}


def test_every_picture_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = {path.name for path in DOCS.rglob("*") if path.suffix in (".png", ".svg")}
    assert pictures == {picture for picture in pictures if picture in text}


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documented_names_exist(page):
    for found in sorted(set(re.findall(r"(?<![\w./])fastattn\.([a-z_]+)\b", page.read_text(encoding="utf-8")))):
        assert hasattr(fastattn, found), f"{name(page)} speaks of fastattn.{found}"


def test_the_reference_of_the_api_is_complete():
    listed = re.findall(r"^::: (fastattn\.\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    public = {f"fastattn.{found}" for found in fastattn.__all__ if not inspect.ismodule(getattr(fastattn, found))}
    public |= {f"fastattn.nn.{found}" for found in fastattn.nn.__all__}
    assert {found for found in listed if not re.search(r"\.(integrations|reference)\.", found)} == public


def test_environment_variables_are_those_of_the_source():
    python = [
        ROOT / "setup.py",
        ROOT / "scripts" / "cuda_build.py",
        ROOT / "scripts" / "glibc_stubs.py",
        *(ROOT / "fastattn").glob("*.py"),
    ]
    native = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    python, native = ("".join(path.read_text(encoding="utf-8") for path in paths) for paths in (python, native))
    macros = set(re.findall(r"(?<![\w\"])FASTATTN_[A-Z_]+\b", native))  # setup.py defines some of them, by name
    variables = set(re.findall(r'"(FASTATTN_[A-Z_]+)"', python + native)) - macros
    table = re.findall(r"^\| `(FASTATTN_[A-Z_]+)`", (DOCS / "environment.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert variables == set(table)


# --- What is generated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["performance_page", "figures"])
def test_what_scripts_write_is_new(script):
    """The tables of docs/performance.md, and the figures. tests/test_support_matrix.py has the third."""
    command = f"python scripts/{script}.py --check"
    done = subprocess.run([sys.executable, *command.split()[1:]], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_warnings(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the documentation's tools are not installed: `make docs` installs them")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(argv, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?://[^\"]+)", text)
        assert not fetched, f"{page.name} fetches {fetched}"
        # Markdown that was taken for text: a list or a table without an empty line before it, reStructuredText.
        left = re.findall(r"<p>[^<]*\n[-*] |<p>\||<p>:::|<p>```|::\s*</p>|:(?:func|class):", text)
        assert not left, f"{page.name}: {left}"
