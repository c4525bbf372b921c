"""bench/compare.py: what counts as slower, and what does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def times(median: float, spread: float = 0.01, samples: int = 10) -> dict[str, Any]:
    return {"median_ms": median, "q25_ms": median * (1 - spread / 2), "q75_ms": median * (1 + spread / 2)} | {
        "samples": samples
    }


def document(ours: float = 10.0, sdpa: float = 20.0, peak: float = 200.0, **spread: float) -> dict[str, Any]:
    """A result with one case, one point of a sweep and one target."""
    return {
        "schema": 1,
        "machine": {"cpu": "a processor", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "d"},
        "rows": [
            {
                "id": "a-case",
                "flop": 1_000_000_000,
                "peak_gflops": peak,
                "results": {"fastattn": times(ours, **spread), "sdpa": times(sdpa, **spread)},
            }
        ],
        "sweep": {"points": [{"id": "a-point", "ours_us": 10 * ours, "sdpa_us": 10 * sdpa, "error": ""}]},
        "targets": [{"name": "a-case", "quantity": "x SDPA", "relation": ">=", "goal": 1.1, "measured": sdpa / ours}],
    }


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    before = {figure.id: figure for figure in compare.figures(old)}
    found = {}
    for figure in compare.figures(new):
        change = compare.compare(before[figure.id], figure)
        assert change is not None
        found[figure.id] = change.verdict
    return found


def test_a_result_compared_with_itself_has_not_changed() -> None:
    assert set(verdicts(document(), document()).values()) == {""}


def test_slower_in_every_unit_is_slower() -> None:
    found = verdicts(document(), document(ours=14.0))
    assert found == {"a-case": "SLOWER", "a-point": "SLOWER", "a-case, x SDPA": "SLOWER"}
    found = verdicts(document(), document(ours=7.0))
    assert found == {"a-case": "faster", "a-point": "faster", "a-case, x SDPA": "faster"}


def test_a_slower_machine_is_no_slower_case() -> None:
    assert verdicts(document(), document(ours=14.0, sdpa=28.0, peak=143.0))["a-case"] == ""


def test_a_faster_peer_makes_nothing_slower() -> None:
    """SDPA became faster; in units of the peak nothing has changed."""
    assert verdicts(document(), document(sdpa=15.0))["a-case"] == ""


def test_noise_excuses() -> None:
    assert verdicts(document(), document(ours=11.5))["a-case"] == "SLOWER"
    assert verdicts(document(), document(ours=11.5, spread=0.3))["a-case"] == ""
    old, new = (next(compare.figures(x)) for x in (document(), document(ours=11.5)))
    assert compare.compare(old, new, floor=0.2).verdict == ""  # type: ignore[union-attr]


def test_a_sweep_point_needs_a_larger_change() -> None:
    assert verdicts(document(), document(ours=12.0))["a-point"] == ""


def test_targets_that_should_be_small() -> None:
    old, new = document(), document()
    for x, value in ((old, 2.0), (new, 3.0)):
        x["targets"][0] |= {"relation": "<=", "measured": value}
    assert verdicts(old, new)["a-case, x SDPA"] == "SLOWER"
    assert verdicts(new, old)["a-case, x SDPA"] == "faster"


def test_report_names_what_is_slower_missing_and_different() -> None:
    old, new = document(), document(ours=14.0)
    new["machine"]["versions"] = {"torch": "2.14.1"}
    new["rows"].append(copy.deepcopy(new["rows"][0]) | {"id": "a-new-case"})
    old["sweep"]["points"].append({"id": "an-old-point", "ours_us": 1.0, "sdpa_us": 1.0, "error": ""})
    text, slower = compare.report(old, new)
    assert {change.new.id for change in slower} == {"a-case", "a-point", "a-case, x SDPA"}
    assert "differs: torch: 2.13.0 / 2.14.1" in text
    assert "1 only in OLD: an-old-point" in text
    assert "1 only in NEW: a-new-case" in text
    assert "3 compared: 3 slower beyond noise, 0 faster" in text
    assert "slower: a-case: 1.40 times its time" in text


def test_no_unit_in_common() -> None:
    new = document()
    del new["rows"][0]["results"]["sdpa"], new["rows"][0]["peak_gflops"]
    assert compare.compare(next(compare.figures(document())), next(compare.figures(new))) is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_in_the_repository_can_be_compared(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(path), str(path), "--fail"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(" compared: 0 slower beyond noise, 0 faster")
    assert not last.startswith("0 ")


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, ours in zip(paths, (10.0, 14.0), strict=True):
        path.write_text(json.dumps(document(ours=ours)), encoding="utf-8")
    arguments = [str(path) for path in paths]
    assert compare.main(arguments) == 0
    assert compare.main([*arguments, "--fail"]) == 1
    assert compare.main([*arguments, "--fail", "--floor", "50"]) == 0
    for text, said in (("no json", "cannot be read as JSON"), ("{}", "is not a result of"), ("[]", "is not a result")):
        paths[1].write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as caught:
            compare.main(arguments)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
