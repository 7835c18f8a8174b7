"""What importing penstock loads, what it says of a library that is not installed, and which module imports which."""

from __future__ import annotations

import json
import subprocess
import sys
from graphlib import TopologicalSorter

import grimp
import pytest

import penstock

LIBRARIES = {
    "click": "server",
    "h11": "server",
    "h2": "server",
    "httpx2": "server",
    "hypercorn": "server",
    "jwt": "server",
    "prometheus_client": "server",
    "pythonjsonlogger": "server",
    "redis": "redis",
    "rich": "server",
    "trio_asyncio": "redis",
}
"""The optional libraries, and the extra that installs each."""

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""

IN_MEMORY = """
import penstock, trio

async def producer():
    yield penstock.Event(data="hello")

async def main():
    async with penstock.open_log("memory://") as log, penstock.open_supervisor(log) as supervisor:
        run = await supervisor.start(producer)
        print((await supervisor.wait(run.id)).status)

penstock.EventStreamResponse(producer())
trio.run(main)
"""

OPEN_REDIS = """
import penstock, trio

async def main():
    async with penstock.open_log("redis://127.0.0.1"):
        pass

try:
    trio.run(main)
except penstock.ConfigurationError as error:
    print(error)
"""

NEW_EVENT_LOOP = """
import {imported}
import sys
import uvicorn.importer  # an asyncio server

loop = __import__("asyncio").new_event_loop()
print(type(loop).__module__, "trio_asyncio" in sys.modules)
loop.close()
"""


def run(program: str, *argv: str, missing: object = ()) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, in which the libraries in `missing` cannot be imported."""
    program = WITHOUT.format(missing=missing) + program
    return subprocess.run([sys.executable, "-c", program, *argv], check=False, capture_output=True, text=True)


def output_of(program: str, *, missing: object = ()) -> str:
    done = run(program, missing=missing)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_penstock_loads_no_library() -> None:
    loaded = set(json.loads(output_of("import json, sys, penstock; print(json.dumps(list(sys.modules)))")))
    assert not loaded & {*LIBRARIES, "anyio", "starlette", "tenacity", "trio"}


def test_a_run_in_memory_and_a_response_load_no_optional_library() -> None:
    loaded = output_of(f"{IN_MEMORY}\nimport sys\nprint(*sys.modules)", missing=[*LIBRARIES]).split()
    assert loaded[0] == "completed"


def test_every_public_name_is_listed_and_a_star_import_gives_them_all() -> None:
    program = "import penstock; names = dir(penstock); from penstock import *; import json"
    listed, given = json.loads(output_of(f"{program}; print(json.dumps([names, sorted(globals())]))"))
    assert set(listed) & set(given) >= set(penstock.__all__)
    assert len(penstock.__all__) == 62


def test_a_public_name_is_the_same_object_each_time_and_in_its_module() -> None:
    from penstock.sources.command import command  # noqa: PLC0415

    assert penstock.command is penstock.command is command


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        penstock.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from penstock import nothing  # type: ignore[attr-defined]  # noqa: F401, PLC0415


def test_a_name_whose_library_is_missing_says_how_to_install_it() -> None:
    done = run("from penstock import create_app", missing=["jwt"])
    advice = "penstock.create_app needs jwt, which is not installed: pip install 'penstock[server]'"
    assert done.stderr.splitlines()[-1] == f"ImportError: {advice}"


def test_opening_a_redis_log_without_its_libraries_says_how_to_install_them() -> None:
    advice = "a log at redis:// needs redis, which is not installed: pip install 'penstock[redis]'"
    assert output_of(OPEN_REDIS, missing=["redis"]) == advice


@pytest.mark.parametrize("library", ["click", "hypercorn"])
def test_the_program_without_its_libraries_says_in_one_line_how_to_install_them(library: str) -> None:
    done = run("from penstock.__main__ import main; main()", "serve", missing=[library])
    advice = f"the program penstock needs {library}, which is not installed: pip install 'penstock[server]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", advice)


@pytest.mark.parametrize("what", ["name", "log", "program"])
def test_any_other_missing_module_is_reported_as_it_is(what: str) -> None:
    programs = {
        "name": ("import penstock; penstock.EventStreamResponse", "starlette"),
        "log": (OPEN_REDIS, "ssl"),
        "program": ("from penstock.__main__ import main; main()", "shlex"),
    }
    program, library = programs[what]
    done = run(program, missing=[library])
    assert done.stderr.splitlines()[-1].startswith(f"ModuleNotFoundError: No module named '{library}")


@pytest.mark.parametrize("library, extra", LIBRARIES.items())
def test_each_optional_library_belongs_to_an_extra(library: str, extra: str) -> None:
    from penstock.errors import missing_extra  # noqa: PLC0415

    error = ModuleNotFoundError(name=f"{library}.sub")
    advice = f"it needs {library}, which is not installed: pip install 'penstock[{extra}]'"
    assert missing_extra(error, "it") == advice


def test_a_program_on_asyncio_that_imports_penstock_keeps_its_event_loops() -> None:
    every_name = "penstock; [getattr(penstock, name) for name in penstock.__all__]"
    assert output_of(NEW_EVENT_LOOP.format(imported=every_name)) == "asyncio.unix_events False"


def test_it_is_trio_asyncio_that_would_change_them() -> None:
    assert output_of(NEW_EVENT_LOOP.format(imported="penstock.log.redis.client")) == "trio_asyncio._sync True"


KNOWN_CIRCLES: list[set[str]] = [
    {"penstock.errors", "penstock.runs"},
    {"penstock.asgi.response", "penstock.asgi.sender"},
    {"penstock.log.redis.backend", "penstock.log.redis.client", "penstock.log.redis.slots"},
    {"penstock.supervisor.committer", "penstock.supervisor.write_buffer"},
]


def test_no_module_imports_itself_by_a_detour_not_even_for_its_types() -> None:
    graph = grimp.build_graph("penstock", exclude_type_checking_imports=False, cache_dir=None)
    imports = {
        module: {
            imported
            for imported in graph.find_modules_directly_imported_by(module)
            if not any({module, imported} <= circle for circle in KNOWN_CIRCLES)
        }
        for module in graph.modules
    }
    TopologicalSorter(imports).prepare()  # raises a CycleError, which holds the modules of a circle
