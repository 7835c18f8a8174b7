"""Each example does what its docstring says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(example: str) -> list[str]:
    done = subprocess.run([sys.executable, EXAMPLES / example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_embedded_stops_the_build_and_both_readers_see_its_end() -> None:
    lines = output_of("embedded.py")
    assert "build: stopped (run cancelled: Ann pressed stop), tidying up" in lines
    assert lines[-1].startswith("cancelled: Ann pressed stop, ")
    ann, ben = (next(line for line in lines if line.startswith(name)) for name in ("Ann: ", "Ben: "))
    assert int(ann.split()[2]) == int(ben.split()[2]) + 10


def test_by_hand_reads_back_from_the_cursor_what_it_wrote() -> None:
    lines = output_of("by_hand.py")
    assert lines[0] == "wrote 20.5 as entry 1"
    assert lines[3:] == ['2 data: {"degrees":20.7}', '3 data: {"degrees":21.0}', "4 data: [DONE]"]
