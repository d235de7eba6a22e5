"""What `python3 dev.py` can do. Standard library only: the rest runs inside the environment, as another process."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from . import browser, environment
from .environment import ROOT, Environment
from .errors import DevError, as_dev_error


DEVTOOLS = Path(__file__).absolute().parent
RUN_FILE = DEVTOOLS / "run_file.py"

# The embedded models are tiny: more threads mostly wait for each other, on a busy machine for minutes.
ONE_THREAD = ("OMP_NUM_THREADS", "1")
IN_TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")
"""The whole suite: half the time, and a file's models and servers are made once."""

DESCRIPTION = """\
Develop and try ComfyUI-Tidetable. The first run makes an environment inside this folder (.venv, .comfyui), unless
COMFYUI_PATH names a ComfyUI (and COMFYUI_PYTHON the Python that runs it) or this folder sits in its custom_nodes.
"""


def main(arguments: list[str]) -> int:
    """Run one command; failures that have a remedy are shown as one line."""
    options, rest = _parser().parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except DevError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        known = as_dev_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dev.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run, help_text: str, **options) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False, **options)
        command.set_defaults(run=run)
        return command

    add("demo", _demo, "load, plot, sample, train a LoRA and sample again in a real ComfyUI; pictures in demo-output/")
    add("test", _test, "run the tests (arguments go to pytest)", add_help=False)
    serve = add("serve", _serve, "ComfyUI with the pack in it, for a person; further arguments go to ComfyUI")
    serve.add_argument("--port", type=int, default=8188, help="port on 127.0.0.1 (default 8188)")
    command = add("exec", _exec, "run a Python file inside the environment, with `tidetable` and ComfyUI importable")
    command.add_argument("file", metavar="FILE")
    command.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    bench = add("bench", _bench, "run benchmarks/NAME.py and print its table; further arguments go to it")
    bench.add_argument("name", metavar="NAME")
    bench.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    lint = add("lint", _lint, "check style (ruff) and types (pyright)")
    lint.add_argument("--fix", action="store_true", help="repair and format what ruff can, before checking")
    # argparse offers no way to hand everything after a command on, options included, but this one.
    commands.choices["demo"].add_argument("--keep", action="store_true", help="leave the server up and print its URL")
    return parser


# ── the commands ───────────────────────────────────────────────────────────────────────────────────


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    os.environ.setdefault(*ONE_THREAD)
    return _run_file(environment.ensure(), DEVTOOLS / "demo.py", [*(["--keep"] if options.keep else []), *rest])


def _serve(options: argparse.Namespace, rest: list[str]) -> int:
    return _run_file(environment.ensure(), DEVTOOLS / "serve.py", ["--port", str(options.port), *rest])


def _exec(options: argparse.Namespace, rest: list[str]) -> int:
    return _run_file(environment.ensure(), Path(options.file), [*options.arguments, *rest])


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    known = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    if options.name not in known:
        raise DevError(f"There is no benchmark {options.name!r}: choose one of {', '.join(known) or '(none yet)'}.")
    arguments = [options.name, *(["--json", str(Path(options.json).absolute())] if options.json else []), *rest]
    return _run_file(environment.ensure(), DEVTOOLS / "bench.py", arguments)


def _test(options: argparse.Namespace, rest: list[str]) -> int:
    here = environment.ensure()
    here.require("pytest", "pytest_timeout", "xdist", "hypothesis", "playwright")
    variables = here.variables()
    variables.setdefault(*ONE_THREAD)
    if browser.is_wanted(rest):
        found = browser.find() or browser.install()
        if found:
            variables["TIDETABLE_BROWSER"] = found
    whole = all(argument.startswith("-") and not argument.startswith(("-n", "--pdb")) for argument in rest)
    workers = IN_TWO_PROCESSES if whole else ()
    command = [str(here.python), "-m", "pytest", *workers, *rest]
    return _become(command, variables, ROOT)


def _lint(options: argparse.Namespace, rest: list[str]) -> int:
    here = environment.ensure()
    here.require("ruff", "pyright")
    python = str(here.python)
    if options.fix:
        subprocess.run([python, "-m", "ruff", "check", "--fix", "--quiet", "."], cwd=ROOT)
        subprocess.run([python, "-m", "ruff", "format", "--quiet", "."], cwd=ROOT)
    checks = {
        "ruff check": [python, "-m", "ruff", "check", "--output-format", "concise", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "--output-format", "concise", "."],
        "pyright": [python, "-m", "pyright", "--pythonpath", python, "--level", "error"],
    }
    failed = []
    for name, command in checks.items():
        print(f"── {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=_quiet_pyright(here.variables())).returncode:
            failed.append(name)
    if failed:
        print(f"error: {' and '.join(failed)} found something; `python3 dev.py lint --fix` repairs what ruff can.")
    return 1 if failed else 0


# ── helpers ────────────────────────────────────────────────────────────────────────────────────────


def _quiet_pyright(variables: Mapping[str, str]) -> dict[str, str]:
    return {**variables, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_UPDATE_NOTIFIER": "1"}


def _run_file(here: Environment, file: Path, arguments: list[str]) -> int:
    if not file.is_file():
        raise DevError(f"There is no file {file}.")
    return _become([str(here.python), str(RUN_FILE), str(file), *arguments], here.variables(), None)


def _become(command: list[str], variables: dict[str, str], folder: Path | None) -> int:
    """Run `command` in place of this process where the system can, so that signals and the exit status are its own."""
    if folder is not None:
        os.chdir(folder)
    if os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, variables)
    return subprocess.run(command, env=variables).returncode
