"""The command line: demo, compile, split, build, run, bench, inspect, doctor.

Each command parses its arguments, calls one function of the library and prints what came of it. Whatever a user can
cause ends as one sentence on stderr: exit code 0 is done, 1 failed, 2 wrong usage. Heavy imports (ONNX Runtime, PyAV,
matplotlib, torch) happen inside the commands, so that ``--help`` answers at once. The commands that make bundles are in
`make`, those that stream frames through them in `stream`; their options are the fields of `tasks.choices`.
"""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engine.errors import DeviceError, WarpcacheError
from ..tasks.options import PATH, one_line, writable
from .failure import Failure
from .make import build, compile_command, split
from .stream import bench, demo, run

__all__ = ["cli", "main"]

EPILOG_INSPECT = "Example:  warpcache inspect generator.warp --report report.html"
EPILOG_DOCTOR = "Example:  warpcache doctor --json"


class Commands(click.Group):
    """The command group; it turns everything a user can cause into a `Failure`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for.

        Raises:
            Failure: If the command failed on its input, on the disk, or was interrupted.
        """
        try:
            return super().invoke(ctx)
        except DeviceError as exc:
            raise Failure(_with_doctor(one_line(str(exc)))) from exc
        except WarpcacheError as exc:
            raise Failure(one_line(str(exc))) from exc
        except KeyboardInterrupt as exc:
            raise Failure("interrupted; nothing was written") from exc
        except MemoryError as exc:
            raise Failure("out of memory; use fewer frames or a machine with more memory") from exc
        except BrokenPipeError:
            raise  # the reader of stdout went away (`| head`): click ends quietly
        except OSError as exc:
            raise Failure(_os_sentence(exc)) from exc


def _with_doctor(message: str) -> str:
    """What went wrong with a GPU or its driver, and who says what is there."""
    return message if "warpcache doctor" in message else f"{message}; `warpcache doctor` says what is here"


def _os_sentence(exc: OSError) -> str:
    """What an error of the operating system means and what to do."""
    where = f" {str(exc.filename)!r}" if exc.filename is not None else ""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing{where}; free some space and try again"
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for{where or ' a file'}; choose another place or change its permissions"
    return one_line(f"{exc.strerror or exc}{where}")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="warpcache")
def cli() -> None:
    """Answer a heavy image generator's frames at a shallow network's latency, with the quality measured."""


@click.command(epilog=EPILOG_INSPECT, short_help="Show what is in a bundle.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.option(
    "--report",
    type=PATH,
    callback=writable(".html"),
    help="Write a page about it too, e.g. report.html: the tables, and the exits' Pareto front as a picture.",
)
def inspect(bundle: Path, report: Path | None) -> None:
    """Show what is in a bundle: tensors, cut, exits, measured quality by age, files.

    Of a bundle that was compiled with --exits, also what it promises: its rule, every exit's cost and quality, which
    exits are on the Pareto front, and what each threshold saves.
    """
    from ..engine.bundle.bundle import Bundle
    from ..report.bundle_tables import print_bundle, sheets_of

    opened = Bundle.open(bundle)
    print_bundle(opened)
    if report is not None:
        from ..report.bundle_page import write_bundle_report

        write_bundle_report(report, opened, sheets_of(opened.manifest))
        click.echo(f"wrote {report}")


@click.command(epilog=EPILOG_DOCTOR, short_help="Show what is here and what fits together.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor(as_json: bool) -> None:
    """Show what is here: GPUs, driver, packages; what fits together, and what to do about the rest."""
    import json

    from ..tasks.doctor import examine, print_report

    report = examine()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)


for _command in (demo, compile_command, split, build, run, bench, inspect, doctor):
    cli.add_command(_command)


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    # What ends a job from outside (timeout, a service manager, a closed terminal) is to clean up as Ctrl-C does.
    for name in ("SIGTERM", "SIGHUP"):
        ended = getattr(signal, name, None)
        if ended is not None and signal.getsignal(ended) is signal.SIG_DFL:
            signal.signal(ended, signal.default_int_handler)
    cli(prog_name="warpcache")
