"""`python3 dev.py bench NAME [--json FILE]`: run one benchmark, print its table, and write its rows.

A benchmark is a file `benchmarks/NAME.py` with a function `run(arguments: list[str])` that yields rows
`(case, arm, metric, value, unit)`: what was measured, on which of the things compared, in which unit.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from devtools import loading
from devtools.errors import DevError


FIELDS = ("case", "arm", "metric", "value", "unit")
WIDTHS = (28, 24, 24, 14, 10)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench")
    parser.add_argument("name")
    parser.add_argument("--json", type=Path, default=None)
    options, rest = parser.parse_known_args()
    rows = []
    print("".join(f"{name:<{width}}" for name, width in zip(FIELDS, WIDTHS, strict=True)))
    for row in checked(load(loading.ROOT / "benchmarks" / f"{options.name}.py").run(rest)):
        rows.append(row)
        print(format_row(row), flush=True)
    if options.json:
        record = {"bench": options.name, "environment": describe_environment(), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def load(file: Path) -> Any:
    """The benchmark's module; its folder is importable, so that benchmarks can share helpers."""
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "run"):
        raise DevError(f"{file} has no function run(arguments) that yields (case, arm, metric, value, unit).")
    return module


def checked(rows: Iterable[Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Each row as a dictionary; raises DevError for one that has not five fields. A value None is not known."""
    for row in rows:
        values = tuple(row)
        if len(values) != len(FIELDS):
            raise DevError(f"A benchmark yielded {values!r}: a row is ({', '.join(FIELDS)}).")
        named: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
        named["value"] = None if named["value"] is None else float(named["value"])
        yield named


def format_row(row: dict[str, Any]) -> str:
    value = "unknown" if row["value"] is None else f"{row['value']:.5g}"
    cells = [value if name == "value" else str(row[name]) for name in FIELDS]
    return "".join(f"{cell:<{width - 1}} " for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def describe_environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "comfyui": comfyui_version(),
    }


def comfyui_version() -> str:
    """The version that the ComfyUI under COMFYUI_PATH gives itself."""
    from comfyui_version import __version__

    return __version__


if __name__ == "__main__":
    main()
