"""The program `penstock`, also run as `python -m penstock`: says in one line which extra of penstock it lacks."""

import gc
import sys

from penstock.errors import missing_extra


def main() -> None:
    """Run the command line; without the libraries of `penstock[server]`, exit with code 2 and one line."""
    try:
        gc.disable()  # an import makes no garbage, and the collector would take a fifth of its time
        from penstock.cli.main import main as run  # noqa: PLC0415  (its libraries are an extra)

        gc.freeze()
        gc.enable()
        run(prog_name="penstock")
    except ModuleNotFoundError as error:
        if (advice := missing_extra(error, "the program penstock")) is None:
            raise
        print(advice, file=sys.stderr)  # noqa: T201  (click may be what is missing)
        sys.exit(2)


if __name__ == "__main__":
    main()
