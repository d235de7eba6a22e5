"""Curves that nodes in the page show while a widget is dragged, without a prompt.

The page sends the node and what is upstream of it, as a small graph of widget values and links; the answer is computed
by the nodes' own `execute` on models without networks (`shells.py`). So there is one formula for a curve, and it is the
one that runs.
"""

import asyncio
import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..schedules.families import FAMILIES
from ..schedules.shift import shift_t
from .model_sampling import read_sampling
from .plots import schedule_lines
from .server import json_response, prompt_server
from .shells import all_remembered, family_shell, remembered, shell_families, tiny_shell, unknown_flow_shell
from .zero_terminal import wasted_steps


logger = logging.getLogger(__name__)

PATH = "/tidetable/curve"
MAX_BYTES, MAX_NODES, MAX_TEXT, MAX_ERROR = 64 * 1024, 64, 10_000, 500
MAX_POINTS = 500

FLOW_SHIFT, SCHEDULE = "Tidetable_FlowShift", "Tidetable_Schedule"
PLOT, TINY = "Tidetable_PlotSchedules", "Tidetable_LoadTinyModel"
EVALUATED = (
    FLOW_SHIFT,
    "Tidetable_ZeroTerminalSNR",
    "Tidetable_Prediction",
    "Tidetable_FlowGraft",
    SCHEDULE,
    "Tidetable_OfficialSchedule",
    "Tidetable_EditSchedule",
    "Tidetable_JoinSchedules",
    "Tidetable_SplitSchedule",
    "Tidetable_ScheduleFromText",
)
"""Nodes that are run for a preview where they exist: quick, without side effects, and in need of no network."""

Nodes = Mapping[str, type[io.ComfyNode]]


class UnknownModelError(ValueError):
    """The answer depends on a model that nobody has described yet."""


def serve_curves(nodes: Sequence[type[io.ComfyNode]]) -> None:
    """Add the route to the running server; without a server, or with the route already there, do nothing."""
    routes = getattr(prompt_server(), "routes", None)
    if routes is None or any(getattr(route, "path", None) == PATH for route in routes):
        return
    known = {node.GET_SCHEMA().node_id: node for node in nodes}

    @routes.get(PATH)
    async def _options(request):
        return json_response(options(known))

    @routes.post(PATH)
    async def _curve(request):
        if request.content_length is None or request.content_length > MAX_BYTES:
            return json_response({"error": f"the question is longer than {MAX_BYTES} bytes, or has no length"})
        body = await request.read()
        # Not on the server's own loop: a spacing may import scipy, or place 10 000 steps.
        return json_response(await asyncio.get_running_loop().run_in_executor(None, answer, known, body))


def options(nodes: Nodes) -> dict[str, Any]:
    """What the page must know before it asks: inputs of the nodes it may name, families to choose from, models seen."""
    families = [FAMILIES[key] for key in shell_families()]
    named = [node_id for node_id in (*EVALUATED, PLOT, TINY) if node_id in nodes]
    return {
        # name -> whether it may stay unconnected
        "nodes": {one: {entry.id: entry.optional for entry in nodes[one].GET_SCHEMA().inputs} for one in named},
        "families": [{"key": one.key, "title": one.title, "process": one.process} for one in families],
        "models": all_remembered(),
    }


def answer(nodes: Nodes, body: bytes) -> dict[str, Any]:
    """What `picture` makes, or {"error": why not}.

    `body` is JSON: {"target": id, "nodes": {id: {"type": node id, "inputs": {name: value}}}}. An input's value is a
    widget's value, a link [id, output], {"unknown": where it comes from}, or for a MODEL {"family": key}, {"seen":
    token} or null where nobody has described it.
    """
    try:
        with torch.inference_mode():
            return Question(nodes, body).answer()
    except UnknownModelError as error:
        return {"error": str(error), "asks_model": True}
    except ValueError as error:
        return {"error": str(error)[:MAX_ERROR]}
    except Exception as error:
        logger.warning("the preview of a node failed", exc_info=True)
        return {"error": f"no preview: {type(error).__name__}"}


class Question:
    """One question of the page: a graph, and the node in it whose curve is wanted."""

    def __init__(self, nodes: Nodes, body: bytes):
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("the question is no JSON") from None
        graph = data.get("nodes") if isinstance(data, dict) else None
        if not isinstance(graph, dict) or not isinstance(data.get("target"), str) or len(graph) > MAX_NODES:
            raise ValueError(f"the question must have a target and at most {MAX_NODES} nodes")
        self.nodes = nodes
        self.graph = graph
        self.target: str = data["target"]
        self.results: dict[str, tuple] = {}
        self.running: set[str] = set()

    def answer(self) -> dict[str, Any]:
        node_id, _ = self.node(self.target)
        if node_id == PLOT:
            return self.plot()
        if node_id not in EVALUATED:
            raise ValueError(f"{node_id[:80]} has no curve")
        outputs = self.run(self.target)
        if node_id == FLOW_SHIFT:
            return shift_curves(*outputs[:3])
        notes = []
        if node_id == SCHEDULE:
            model = self.value(self.target, self.entries(self.target)["model"], self.inputs(self.target).get("model"))
            notes = [warning for warning in [wasted_steps(model, outputs[0])] if warning]
        return {**schedule_curves(outputs[0]), "notes": notes}

    def plot(self) -> dict[str, Any]:
        """The curves of Plot Schedules; a schedule that cannot be computed is a note, not the end of the others."""
        values, notes = {}, []
        for name, entry in self.entries(self.target).items():
            given = self.inputs(self.target).get(name)
            try:
                if given is not None or isinstance(entry, io.WidgetInput):
                    values[name] = self.value(self.target, entry, given)
            except ValueError as error:
                if not name.startswith("sigmas_"):
                    raise
                notes.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
        if not any(name.startswith("sigmas_") for name in values) and notes:
            return {"error": "\n".join(notes)[:MAX_ERROR]}
        wanted = set(inspect.signature(schedule_lines).parameters)
        lines, log, more = schedule_lines(values, **{name: value for name, value in values.items() if name in wanted})
        curves = [curve(line.label, line.x, line.y, dots=line.dots) for line in lines]
        x_title = values.get("x_axis", "step")
        return {**picture(curves, values["quantity"], log, x_title), "notes": [*notes, *more]}

    # ── the graph ───────────────────────────────────────────────────────────────────────────────────

    def node(self, key: str) -> tuple[str, type[io.ComfyNode]]:
        entry = self.graph.get(key)
        if not isinstance(entry, dict) or not isinstance(entry.get("inputs"), dict):
            raise ValueError(f"the question has no node {key[:40]!r}, or one without inputs")
        node_id = str(entry.get("type"))
        if node_id not in self.nodes or node_id not in (*EVALUATED, PLOT, TINY):
            raise ValueError(f"{node_id[:80]} can be computed only when it runs")
        return node_id, self.nodes[node_id]

    def inputs(self, key: str) -> dict[str, Any]:
        return self.graph[key]["inputs"]

    def entries(self, key: str) -> dict[str, io.Input]:
        """The node's declared inputs by name. ValueError where the question has others."""
        node_id, node = self.node(key)
        entries = {entry.id: entry for entry in node.GET_SCHEMA().inputs}
        unknown = [name for name in self.inputs(key) if name not in entries]
        if unknown:
            raise ValueError(f"{node_id} has no input {unknown[0][:80]!r}; it has {', '.join(entries)}")
        return entries

    def run(self, key: str) -> tuple:
        """What the node `key` returns."""
        if key in self.results:
            return self.results[key]
        if key in self.running:
            raise ValueError("the nodes feed themselves")
        self.running.add(key)
        node_id, node = self.node(key)
        values = {}
        for name, entry in self.entries(key).items():
            given = self.inputs(key).get(name)
            if given is not None or not entry.optional or isinstance(entry, io.WidgetInput):
                values[name] = self.value(key, entry, given)
        if node_id == TINY:
            self.results[key] = (tiny_shell(values["name"]).patcher(),)
            return self.results[key]
        try:
            self.results[key] = tuple(node.execute(**values).args)
        except ValueError as error:
            if node_id == FLOW_SHIFT and values["model"].model is unknown_flow_shell().model:
                raise UnknownModelError(_ASK) from error
            raise
        return self.results[key]

    def value(self, key: str, entry: io.Input, given: Any) -> Any:
        """The value of one input: a link followed, a model found, or a widget's value checked."""
        node_id, _ = self.node(key)
        if isinstance(given, list):
            return self.linked(node_id, entry, given)
        if isinstance(given, dict) and "unknown" in given:
            raise ValueError(f"{entry.id} comes from {str(given['unknown'])[:80]}, which is known only when it runs")
        if entry.get_io_type() == "MODEL":
            return model_of(node_id, given)
        if isinstance(entry, io.WidgetInput):
            return entry.default if given is None else checked(node_id, entry, given)
        raise ValueError(f"connect {entry.id} of {node_id}")

    def linked(self, node_id: str, entry: io.Input, link: list) -> Any:
        if len(link) != 2 or not isinstance(link[0], str) or type(link[1]) is not int:
            raise ValueError(f"{node_id}.{entry.id}: a link is [node, output]")
        outputs = self.node(link[0])[1].GET_SCHEMA().outputs
        if not 0 <= link[1] < len(outputs) or outputs[link[1]].get_io_type() != entry.get_io_type():
            raise ValueError(f"{node_id}.{entry.id} takes {entry.get_io_type()}, which that output is not")
        result = self.run(link[0])
        if link[1] >= len(result):
            raise ValueError(f"{node_id}.{entry.id}: that output is known only when the node runs")
        return result[link[1]]


_ASK = "The model is known only when the node has run. Run it once, or choose a family for its preview."


def model_of(node_id: str, given: Any) -> ModelPatcher:
    """The shell that stands for a MODEL: of a family, of what a node has run with, or of some flow model."""
    match given:
        case None:
            if node_id == FLOW_SHIFT:
                return unknown_flow_shell().patcher()
            raise UnknownModelError(_ASK)
        case {"family": str(key)}:
            return family_shell(key).patcher()
        case {"seen": str(token)}:
            shell = remembered(token)
            if shell is None:
                raise UnknownModelError(f"The model that ran here is forgotten. {_ASK}")
            return shell.patcher()
    raise ValueError(f"{node_id}: a model is a link, a family or one that a node has run with")


def checked(node_id: str, entry: Any, value: Any) -> Any:
    """A widget's value if its node would accept it, else ValueError."""
    name = f"{node_id}.{entry.id}"
    shown = repr(value)[:80]
    match entry:
        case io.Combo.Input():
            if value not in entry.options:
                raise ValueError(f"{name} must be one of {', '.join(map(str, entry.options))}, got {shown}")
            return value
        case io.Boolean.Input():
            if isinstance(value, bool):
                return value
        case io.String.Input():
            if isinstance(value, str) and len(value) <= MAX_TEXT:
                return value
            shown = f"{len(value)} characters, more than {MAX_TEXT}" if isinstance(value, str) else shown
        case io.Int.Input() | io.Float.Input():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {shown}")
            low, high = (-math.inf if entry.min is None else entry.min), (math.inf if entry.max is None else entry.max)
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low:g} to {high:g}, got {shown}")
            return int(value) if isinstance(entry, io.Int.Input) else float(value)
    raise ValueError(f"{name} ({entry.get_io_type()}) cannot be {shown}")


# ── answers ────────────────────────────────────────────────────────────────────────────────────────


def picture(curves: list[dict], y_title: str, log: bool = False, x_title: str = "step") -> dict[str, Any]:
    """An answer. Where all values are shares of the noise its axis is 0 to 1, so that a curve visibly moves."""
    values = [y for one in curves for y in one["y"]]
    is_share = y_title in ("sigma", "t") and not log and all(y is not None and y <= 1.0 + 1e-6 for y in values)
    return {
        "curves": curves,
        "x_title": x_title,
        "x_falls": x_title == "t",  # noise is on the left
        "y_title": y_title,
        "y_range": [0.0, 1.0] if is_share else None,
        "log": log,
        "facts": [],
        "notes": [],
    }


def curve(label: str, x: Sequence[float], y: Sequence[float], **more: Any) -> dict[str, Any]:
    """One curve as JSON has it: at most about MAX_POINTS points with both ends, and null for what is not finite."""
    stride = max(1, math.ceil(len(x) / MAX_POINTS))
    kept = sorted({*range(0, len(x), stride), len(x) - 1})
    return {
        "label": label,
        "x": [x[i] for i in kept],
        "y": [y[i] if math.isfinite(y[i]) else None for i in kept],
        **more,
    }


def shift_curves(model: ModelPatcher, shift: float, mu: float) -> dict[str, Any]:
    """sigma over the share of the steps that are done, for equal steps in t, beside that of shift 1."""
    t = torch.linspace(1.0, 0.0, 51, dtype=torch.float64)
    x = (100.0 * (1.0 - t)).tolist()
    stored = read_sampling(model).shift  # what the model would be sampled with, not what the node says about it
    assert stored is not None, "Flow Shift returns flow models"
    shifted = curve("shifted", x, shift_t(t, stored).tolist())
    plain = curve("shift 1", x, t.tolist(), faint=True)
    facts = [f"shift {shift:.4f}", f"mu {mu:.4f}"]
    return {**picture([shifted, plain], "sigma", x_title="% of the steps"), "facts": facts}


def schedule_curves(sigmas: torch.Tensor) -> dict[str, Any]:
    """A list of noise levels over the step number."""
    (line,), log, _ = schedule_lines({"sigmas_1": sigmas}, "sigma", "auto", "auto")
    steps = len(line.y) - 1
    levels = [value for value in line.y if value > 0.0]
    facts = [f"{steps} step{'' if steps == 1 else 's'}", f"sigma {levels[0]:.4g} to {levels[-1]:.4g}"]
    if line.y[-1] == 0.0:
        facts[-1] += ", then 0"
    return {**picture([curve("sigma", line.x, line.y, dots=line.dots)], "sigma", log), "facts": facts}
