"""The workflows of GitHub: what they run is what runs here, and nothing that they use can change under them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_tag  # noqa: E402
import wheel_gates  # noqa: E402

yaml = pytest.importorskip("yaml", reason="transformers and mkdocs bring it")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")

PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# The only command that is no target of the Makefile: packages of the runner's system.
SYSTEM_PACKAGES = re.compile(r"sudo apt-get update && sudo apt-get install -y [\w+. -]+")


def workflow(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def jobs() -> list[Any]:
    return [
        pytest.param(job, id=f"{path.stem}-{name}") for path in PATHS for name, job in workflow(path)["jobs"].items()
    ]


def test_there_are_both() -> None:
    assert [path.name for path in PATHS] == ["ci.yml", "wheels.yml"]


@pytest.mark.parametrize("job", jobs())
def test_every_step_is_a_make_target(job: dict[str, Any]) -> None:
    """So that it can be run, and was run, without GitHub."""
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for step in job["steps"]:
        if "run" in step and not SYSTEM_PACKAGES.fullmatch(step["run"]):
            words = re.search(r"\bmake ((?:-C \w+ |--silent )*)([a-z -]+)", step["run"])
            assert words is not None, step["run"]
            assert set(words[2].split()) <= targets, step["run"]


@pytest.mark.parametrize("job", jobs())
def test_jobs_end_and_have_no_more_rights_than_they_need(job: dict[str, Any]) -> None:
    assert job["timeout-minutes"] <= 120
    assert "latest" not in str(job["runs-on"])
    for step in job["steps"]:
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        # What comes from outside reaches a shell as a variable alone.
        assert "${{" not in step.get("run", "")


def test_publishing_alone_has_a_right() -> None:
    for path in PATHS:
        loaded = workflow(path)
        assert loaded["permissions"] == {"contents": "read"}
        rights = {name: job["permissions"] for name, job in loaded["jobs"].items() if "permissions" in job}
        assert rights == ({"publish": {"id-token": "write"}} if path.stem == "wheels" else {})
    publish = workflow(PATHS[1])["jobs"]["publish"]
    assert set(publish["needs"]) == {"sdist", "wheel", "try"}
    assert "refs/tags/v" in publish["if"]


def test_actions_are_pinned() -> None:
    """By commit, with the release beside it; one release of each."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PATHS)
    used = re.findall(r"uses: *(\S+)(.*)", text)
    assert used
    releases: dict[str, set[str]] = {}
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action + comment
        releases.setdefault(action.split("@")[0], set()).add(action + comment)
    assert all(len(found) == 1 for found in releases.values())


def test_every_level_is_tested() -> None:
    levels = workflow(PATHS[0])["jobs"]["level"]["strategy"]["matrix"]["level"]
    text = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8")
    assert {"baseline", "avx2", "avx512", "avx512_bf16"} == set(levels)
    assert all(f"cpu/isa_{level}.cpp" in text for level in levels)


def test_the_wheel_is_tried_under_the_lowest_and_the_newest_torch() -> None:
    tried = [entry["torch"] for entry in workflow(PATHS[1])["jobs"]["try"]["strategy"]["matrix"]["include"]]
    found = re.search(r"^WHEEL_TORCH \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    lowest, *_, newest, unpinned = found[1].split()
    assert unpinned == "torch"
    assert lowest == f"torch=={wheel_gates.OLDEST_TORCH}.0"
    assert {lowest, f"{lowest}+cpu", newest, f"{newest}+cpu"} <= set(tried)


def test_cibuildwheel_repairs_as_make_does() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    repair = options["repair-wheel-command"]
    excluded = set(re.findall(r"--exclude '\S+'", repair))
    assert len(excluded) == 3
    assert excluded == set(re.findall(r"--exclude '\S+'", MAKEFILE))
    glibc = re.search(r"^GLIBC := (\d+)\.(\d+)$", MAKEFILE, re.MULTILINE)
    assert glibc is not None
    image = f"manylinux_{glibc[1]}_{glibc[2]}"
    assert f"--plat {image}_" in repair
    assert {options["manylinux-x86_64-image"], options["manylinux-aarch64-image"]} == {image}


@pytest.mark.parametrize(
    ("tag", "heading", "wrong"),
    [
        ("v1.2.0", "## [1.2.0] - 2026-12-01", []),
        ("v1.2.1", "## [1.2.0] - 2026-12-01", ["the tag is 'v1.2.1', and fastattn.__version__ is '1.2.0'"]),
        ("1.2.0", "## [1.2.0] - 2026-12-01", ["the tag is '1.2.0', and fastattn.__version__ is '1.2.0'"]),
        ("v1.2.0", "## [Unreleased]", ["CHANGELOG.md has no heading '## [1.2.0] - <date>'"]),
        ("v1.2.0", "## [1.2.0]", ["CHANGELOG.md has no heading '## [1.2.0] - <date>'"]),
    ],
)
def test_tags(tag: str, heading: str, wrong: list[str]) -> None:
    assert check_tag.offences(tag, '__version__ = "1.2.0"\n', f"# Changelog\n\n{heading}\n") == wrong
