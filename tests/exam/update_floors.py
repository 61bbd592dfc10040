"""Writes floors.json: the shares of every model, where they are higher than what stands there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(1, str(Path(__file__).parents[2]))  # bench

from models import EXAMS
from test_exam import FLOORS, SHARES, shares

if __name__ == "__main__":
    floors = json.loads(FLOORS.read_text()) if FLOORS.exists() else {}
    for name, exam in EXAMS.items():
        found, before = shares(exam), floors.get(name, {})
        floors[name] = {what: max(found[what], before.get(what, 0.0)) for what in SHARES}
        print(name, *floors[name].values())
    FLOORS.write_text(json.dumps(floors, indent=1) + "\n")
