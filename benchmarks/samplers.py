"""Which samplers are right on which models? All of ComfyUI's, as they are and through our nodes, and our own.

`python3 dev.py bench samplers` judges each as tests/host/conformance.py says and yields per sampler (case) and arm:
`error` (cfg 1: distance to the ODE's end, or sliced Wasserstein distance to the mixture; both in units of data whose
standard deviation is 1), `order` (deterministic ones), `error_cfg3` (CFG++: distance to the first-order form) and
`pass`, 1 or 0, for all of its measures.

--few-steps compares the corrected names at 4 to 30 steps with ComfyUI's own, and with ComfyUI's own run in
variance-exploding coordinates (sigma/(1 − sigma), t at most 0.999). --markdown FILE writes a table for docs/samplers.md
"""

import argparse
import os
from pathlib import Path

import torch

from tidetable.runtime.samplers import CORRECTED
from tidetable.tests.host import conformance


ARMS = tuple(conformance.ARMS)
FEW = (4, 8, 12, 20, 30)


def run(arguments: list[str]):
    parser = argparse.ArgumentParser(prog="bench samplers")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--names", nargs="+", default=None, help="only these samplers")
    parser.add_argument("--count", type=int, default=4096, help="samples per run")
    parser.add_argument("--few-steps", action="store_true")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if options.few_steps:
        yield from few_steps(options.names or list(CORRECTED), options.count)
        return
    verdicts = {}
    for arm in options.arms:
        for name in conformance.cases(arm):
            if options.names is None or name in options.names:
                verdicts[name, arm] = plain, guided = conformance.judge(arm, name, options.count)
                yield from rows(name, arm, plain, guided)
    if options.markdown:
        options.markdown.write_text(markdown(verdicts, options.count), encoding="utf-8")


def rows(name: str, arm: str, plain: conformance.Verdict, guided: conformance.Verdict | None):
    yield name, arm, "error", plain.error, "std"
    if plain.order is not None:
        yield name, arm, "order", plain.order, ""
    if guided is not None:
        yield name, arm, "error_cfg3", guided.error, "std"
    yield name, arm, "pass", float(passed(plain, guided)), ""


def passed(plain: conformance.Verdict, guided: conformance.Verdict | None) -> bool:
    return plain.passed and (guided is None or guided.passed)


def count_passed(verdicts: dict, arm: str) -> str:
    """As "35 of 38"."""
    judged = [passed(*verdict) for (_, judged_arm), verdict in verdicts.items() if judged_arm == arm]
    return f"{sum(judged)} of {len(judged)}"


def few_steps(names: list[str], count: int):
    """(name at n steps, way, error, …): distance of what is drawn to the mixture, or to first-order CFG++ at cfg 3."""
    for name in names:
        for steps in FEW:
            for way in ("stock-flow", "stock in ve", "sampler-safe"):
                yield f"{name} @{steps}", way, "error", conformance.distance_at(way, name, steps, count), "std"


def markdown(verdicts: dict, count: int) -> str:
    """A table with a row per sampler and a column per arm: error, and in bold what did not pass; how many passed."""
    from comfyui_version import __version__

    arms = [arm for arm in ARMS if any(key[1] == arm for key in verdicts)]
    names = list(dict.fromkeys(name for name, _ in verdicts))
    lines = [
        f"ComfyUI {__version__}, torch {torch.__version__}, {count} samples (deterministic: {count // 4}).",
        "",
        f"| sampler | {' | '.join(arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(verdicts.get((name, arm))) for arm in arms)} |" for name in names]
    lines.append(f"| passed | {' | '.join(count_passed(verdicts, arm) for arm in arms)} |")
    return "\n".join(lines) + "\n"


def cell(verdict) -> str:
    if verdict is None:
        return "–"
    plain, guided = verdict
    text = f"{plain.error:.3f}" + (f", cfg 3: {guided.error:.3f}" if guided else "")
    failures = (*plain.failures, *(guided.failures if guided else ()))
    return f"**{text}** ({', '.join(failures)})" if failures else text
