"""The command line of dicomnode. Exit codes: 0 done, 1 you can mend it, 2 usage, 70 a bug."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dicomnode import __version__, commands, log
from dicomnode.commands import MENDABLE, OK
from dicomnode.config import load_config
from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.premises import reason_of

BUG = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters that a route has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log.configure("INFO" if args.command in ("serve", "demo") else "WARNING")
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a closed pipe is caught
        return code
    except DicomNodeError as error:
        print(f"dicomnode {args.command}: {error}", file=sys.stderr)
        return MENDABLE
    except BrokenPipeError:  # the reader has seen enough: `dicomnode status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"dicomnode {args.command}:{where} {error.strerror or error}", file=sys.stderr)
        return MENDABLE
    except Exception:  # the one place where a bug ends the program, with its traceback
        logging.getLogger(__name__).exception("this is a bug of dicomnode")
        return BUG


def serve(args: argparse.Namespace) -> int:
    """run the node until SIGTERM; a second SIGTERM stops at once"""
    from dicomnode.node import Node

    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            os._exit(128 + signal.SIGTERM)  # at once, whatever runs: the journal recovers
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, on_signal)
    os.umask(os.umask(0o077) | 0o027)  # the journal names patients' studies: not for everybody
    config = load_config(args.config)
    node = Node(config)
    try:
        node.start()
    except ConfigError:
        node.stop()  # else its threads keep the process
        raise
    except OSError as error:
        node.stop()
        where = f"{config.node.bind}:{config.node.port}"
        raise ConfigError(f"node.port: cannot listen on {where}: {reason_of(error)}") from error
    while not stop.wait(1.0):
        pass
    node.stop()
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dicomnode", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int], *, as_json: bool = False) -> Any:
        command = subparsers.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.add_argument("--config", type=Path, default=Path("config.yaml"))
        if as_json:
            command.add_argument("--json", action="store_true", help="for programs")
        command.set_defaults(run=run)
        return command

    add(serve)
    command = add(commands.check)
    command.add_argument("--schema", action="store_true", help="print the JSON Schema")
    command.add_argument("--storage", action="store_true", help="compare stored bytes and journal")
    add(commands.explain, as_json=True).add_argument("paths", type=Path, nargs="+")
    command = add(commands.run, as_json=True)
    command.add_argument("--model", required=True)
    command.add_argument("--classifier", help="package whose report goes beside the images")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("paths", type=Path, nargs="+")
    add(commands.echo).add_argument("peer")
    command = add(commands.send)
    command.add_argument("peer")
    command.add_argument("paths", type=Path, nargs="+")
    add(commands.status, as_json=True).add_argument("series_uid", nargs="?")
    command = add(commands.retry)
    command.add_argument("what", nargs="?", metavar="JOB|DELIVERY|COMMITMENT")
    command.add_argument("--all-failed", action="store_true")
    command = add(commands.discard)
    command.add_argument("job")
    command.add_argument("--why", required=True)
    add(commands.backup).add_argument("folder", type=Path, help="a new or empty folder")
    command = add(commands.models, as_json=True)
    command.add_argument("action", choices=["list", "verify", "bench", "export-monai"])
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: as configured")
    command.add_argument("name", nargs="?")
    add(commands.conformance)
    add(commands.doctor).add_argument("peer")
    command = add(commands.demo)
    command.add_argument("--dicom", type=Path)
    command.add_argument("--model")
    command.add_argument("--out", type=Path, default=Path("demo-out"))
    return parser
