"""Write the pages that are tables of the code, docs/life.md and docs/settings.md: `just docs`. A test compares."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from penstock.runs import CAUSES, COMPLETING, RunStatus
from penstock.supervisor.settings import Settings

FOLDER = Path(__file__).parent


def life() -> str:
    """The page on a run's life: a diagram and a table, drawn from `CAUSES`."""
    lines = [
        "# A run's life",
        "",
        "Drawn from the table `CAUSES` in `penstock/runs.py` by `just docs`. A terminal status is final: the first",
        "ending that the log stores is the run's ending.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> running: start",
    ]
    for status in dict.fromkeys(row.status for row in CAUSES.values()):
        causes = ", ".join(cause.value for cause, row in CAUSES.items() if row.status is status)
        lines.append(f"    {RunStatus.RUNNING.value} --> {status.value}: {causes}")
    lines += [f"    {status.value} --> [*]" for status in RunStatus if status.terminal]
    lines += [
        "```",
        "",
        "| cause | status | stop reason | the producer reads | readers get, before `[DONE]` |",
        "|---|---|---|---|---|",
    ]
    for cause, row in CAUSES.items():
        told = "–" if row.scope_reason is None else f"`Cancelled`, “{row.scope_reason}”"
        shown = "–" if row.code is None else f"`{row.code}`: {row.message}"
        lines.append(f"| {cause.value} | {row.status.value} | {row.stop_reason} | {told} | {shown} |")
    lines += [
        "",
        "A producer that says why it stopped (`Event.stop(reason)`) completes its run with",
        f"{_listed(COMPLETING)};",
        "with `cancelled` the run ends cancelled, and with any other reason it ends failed.",
        "",
    ]
    return "\n".join(lines)


def settings() -> str:
    """The page on the supervisor's knobs, from the fields of `Settings`."""
    lines = [
        "# Settings",
        "",
        "Each is a keyword argument of `open_supervisor` and `create_app`, an option of `penstock serve`",
        "(`--cancel-grace`) and an environment variable (`PENSTOCK_CANCEL_GRACE`). Written from `penstock/settings.py`",
        "by `just docs`.",
        "",
        "| name | default | | what it is |",
        "|---|---|---|---|",
    ]
    for knob in fields(Settings):
        unit = knob.metadata.get("unit", "")
        lines.append(f"| `{knob.name}` | {knob.default} | {unit} | {knob.metadata['help']} |")
    lines.append("")
    return "\n".join(lines)


def _listed(words: frozenset[str]) -> str:
    return ", ".join(f"`{word}`" for word in sorted(words))


PAGES = {"life.md": life, "settings.md": settings}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
        print(f"wrote docs/{name}")
