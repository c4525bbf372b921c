"""The example that trains a real model, run as a step of the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import ROOT

EXAMPLE = "examples.train_vit_digits"


def train_model(*, threads: int, plot: Path | None, smoke: bool) -> dict[str, Any]:
    """What the example writes as JSON; its table and its progress bar go to the terminal. Raises where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", EXAMPLE, f"--threads={threads}", f"--json={result}"]
        command.append(f"--plot={plot}" if plot else "--no-plot")
        if smoke:
            command.append("--smoke")
        sys.stdout.flush()
        subprocess.run(command, cwd=ROOT, check=True)
        document: dict[str, Any] = json.loads(result.read_text())
        return document
