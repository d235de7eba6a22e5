"""The numbers behind the live curves: those that the nodes compute on loaded models, and clear words where none are."""

import json
import math
import re

import pytest
import torch

from tidetable.nodes import NODES
from tidetable.nodes.model_sampling import FlowShift
from tidetable.nodes.schedules import Schedule
from tidetable.runtime import live, shells
from tidetable.runtime.live import EVALUATED, MAX_BYTES, MAX_POINTS, PATH
from tidetable.runtime.model_sampling import current_sampling, detect_family, patch_flow_shift, read_sampling
from tidetable.runtime.shells import family_shell, shell_families, shell_of, tiny_shell
from tidetable.runtime.tiny import TINY_MODELS, build_patcher
from tidetable.schedules.curves import QUANTITIES
from tidetable.schedules.families import FAMILIES
from tidetable.schedules.shift import shift_t
from tidetable.schedules.spacing import SPACINGS
from tidetable.tests.host.model_zoo import FLOW, ZOO, discrete, zoo


KNOWN = {node.GET_SCHEMA().node_id: node for node in NODES}
FLOW_SHIFT, SCHEDULE, PLOT, TINY = (
    f"Tidetable_{name}" for name in ("FlowShift", "Schedule", "PlotSchedules", "LoadTinyModel")
)


pytestmark = pytest.mark.usefixtures("in_a_node")


def ask(graph: dict[str, tuple[str, dict]], target: str = "1") -> dict:
    """The answer about a graph {id: (node id, inputs)}, as JSON brings it to the page."""
    nodes = {key: {"type": node_id, "inputs": inputs} for key, (node_id, inputs) in graph.items()}
    return json.loads(json.dumps(live.answer(KNOWN, json.dumps({"target": target, "nodes": nodes}).encode())))


def levels(model) -> torch.Tensor:
    return current_sampling(model).sigmas


def drawn(answer: dict, label: str = "sigma") -> list[float]:
    assert "error" not in answer, answer
    (found,) = (one for one in answer["curves"] if one["label"].startswith(label))
    return found["y"]


# ── models without networks ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", shell_families())
def test_a_family_without_a_network_is_what_comfyui_would_load(key):
    if key.startswith("stable_audio"):
        with pytest.raises(ValueError, match="from a checkpoint only"):
            family_shell(key)
        return
    shell = family_shell(key).patcher()
    family = detect_family(shell)
    assert family is not None and family.key == key
    if FAMILIES[key].process == "flow":
        assert read_sampling(shell).shift is not None
    assert list(shell.model.parameters()) == []


@pytest.mark.parametrize("name", ZOO)
def test_a_shell_says_about_noise_what_its_model_says(name):
    model = zoo(name)
    models = [model, patch_flow_shift(model, "shift", 6.0, 0.0, 64, 64)[0]] if name in FLOW else [model]
    models += [discrete(model, "v_prediction", zsnr=True)] if name == "sdxl" else []
    for one in models:
        shell = shell_of(one).patcher()
        assert list(shell.model.parameters()) == []
        assert (shell.model is not one.model) and detect_family(shell) == detect_family(one)
        assert read_sampling(shell).prediction == read_sampling(one).prediction
        assert torch.equal(levels(shell), levels(one))
    assert sum(parameter.numel() for parameter in model.model.parameters()) > 1000, "the model keeps its own"


def test_a_shell_stays_what_it_was_when_its_model_is_changed():
    model = zoo("sd3")
    shell = shell_of(model).patcher()
    before = levels(shell).clone()
    model.get_model_object("model_sampling").set_parameters(shift=9.0, multiplier=1000)
    assert torch.equal(levels(shell), before)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_embedded_models_need_no_file_for_a_preview(name):
    assert torch.equal(levels(tiny_shell(name).patcher()), levels(build_patcher(name)))


# ── curves ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_schedule_draws_what_it_returns(name, spacing):
    widgets = {"spacing": spacing, "steps": 13, "denoise": 0.7}
    answer = ask({"1": (SCHEDULE, {**widgets, "model": ["2", 0]}), "2": (TINY, {"name": name})})
    expected = Schedule.execute(model=build_patcher(name), **widgets).args[0]
    assert drawn(answer) == expected.double().tolist()
    assert answer["curves"][0]["x"] == list(range(14))
    assert answer["log"] == (max(expected) > 2.0) and answer["facts"][0] == "13 steps"


@pytest.mark.parametrize("mode", ["official", "shift", "mu"])
@pytest.mark.parametrize("family", ["flux", "qwen_image", "sd3", "wan"])
def test_flow_shift_draws_the_shift_that_it_sets(family, mode):
    widgets = {"mode": mode, "shift": 3.5, "mu": 0.4, "width": 1664, "height": 928}
    answer = ask({"1": (FLOW_SHIFT, {**widgets, "model": {"family": family}})})
    model, shift, mu = FlowShift.execute(model=family_shell(family).patcher(), **widgets).args[:3]
    assert answer["facts"] == [f"shift {shift:.4f}", f"mu {mu:.4f}"]
    t = [1 - x / 100 for x in answer["curves"][0]["x"]]
    assert drawn(answer, "shift 1") == pytest.approx(t, abs=1e-12)
    assert drawn(answer, "shifted") == pytest.approx([shift_t(one, shift) for one in t], abs=1e-6)
    assert read_sampling(model).shift == pytest.approx(shift)


def test_a_given_shift_needs_no_model_and_an_official_one_does():
    graph = {"1": (SCHEDULE, {"spacing": "trailing", "steps": 4, "denoise": 1.0, "model": ["2", 0]})}
    given = ask({**graph, "2": (FLOW_SHIFT, {"mode": "shift", "shift": 3.0, "model": None})})
    assert drawn(given) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    official = ask({**graph, "2": (FLOW_SHIFT, {"mode": "official", "model": None})})
    assert official["asks_model"] and "choose a family" in official["error"]
    assert ask({"1": (SCHEDULE, {"model": None})})["asks_model"]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_plot_schedules_draws_all_that_feed_it(quantity):
    graph = {
        "1": (PLOT, {"quantity": quantity, "sigmas_1": ["2", 0], "sigmas_3": ["3", 0], "label_3": "five"}),
        "2": (SCHEDULE, {"steps": 20, "model": ["4", 0]}),
        "3": (SCHEDULE, {"steps": 5, "spacing": "karras", "model": ["4", 0]}),
        "4": (FLOW_SHIFT, {"mode": "mu", "mu": 1.0, "model": {"family": "sd3"}}),
    }
    answer = ask(graph)
    assert [one["label"].split(" (")[0] for one in answer["curves"]] == ["sigmas_1", "five"]
    assert [len(one["y"]) for one in answer["curves"]] == ([20, 5] if quantity == "step_size" else [21, 6])
    if quantity == "log_snr":
        assert answer["curves"][0]["y"][0] is None, "JSON has no infinity"
    if quantity == "sigma":
        assert drawn(answer, "five") == drawn(ask(graph, "3"))


def test_a_schedule_that_is_unknown_does_not_hide_the_others():
    graph = {
        "1": (PLOT, {"sigmas_1": {"unknown": "BasicScheduler"}, "sigmas_2": ["2", 0], "sigmas_3": ["3", 0]}),
        "2": (SCHEDULE, {"model": None}),
        "3": (SCHEDULE, {"model": {"family": "flux"}}),
    }
    answer = ask(graph)
    assert len(answer["curves"]) == 1
    assert "BasicScheduler" in answer["notes"][0] and "choose a family" in answer["notes"][1]
    del graph["1"][1]["sigmas_3"]
    assert "BasicScheduler" in ask(graph)["error"]
    assert "connect SIGMAS" in ask({"1": (PLOT, {})})["error"]


def test_steps_wasted_above_the_plain_range_are_said_before_anything_runs():
    graph = {"1": (SCHEDULE, {"spacing": "karras", "model": ["2", 0]}), "2": (TINY, {"name": "unet-v"})}
    assert "13 of 20 steps start above sigma 14.61" in ask(graph)["notes"][0]
    for spacing, name in (("trailing", "unet-v"), ("karras", "unet-eps"), ("karras", "mmdit-flow")):
        graph["1"][1]["spacing"], graph["2"][1]["name"] = spacing, name
        assert ask(graph)["notes"] == []


def test_long_schedules_are_thinned_for_the_page_with_both_ends():
    (one,) = ask({"1": (SCHEDULE, {"steps": 10_000, "model": {"family": "flux"}})})["curves"]
    assert len(one["x"]) <= MAX_POINTS + 1 and (one["x"][0], one["x"][-1]) == (0, 10_000)
    assert (one["y"][0], one["y"][-1]) == (1.0, 0.0)


def test_asking_changes_no_family():
    before = levels(family_shell("flux").patcher()).clone()
    ask({"1": (FLOW_SHIFT, {"mode": "shift", "shift": 9.0, "model": {"family": "flux"}})})
    assert torch.equal(levels(family_shell("flux").patcher()), before)


# ── what is refused ────────────────────────────────────────────────────────────────────────────────

FLUX = {"family": "flux"}


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"1": (SCHEDULE, {"model": FLUX, "color": 3})}, "has no input 'color'; it has model, spacing"),
        ({"1": (SCHEDULE, {"model": FLUX, "steps": 0})}, "steps must be 1 to 10000, got 0"),
        ({"1": (SCHEDULE, {"model": FLUX, "steps": "20"})}, "steps must be a finite number, got '20'"),
        ({"1": (SCHEDULE, {"model": FLUX, "steps": True})}, "steps must be a finite number, got True"),
        ({"1": (SCHEDULE, {"model": FLUX, "denoise": math.nan})}, "denoise must be a finite number, got nan"),
        ({"1": (SCHEDULE, {"model": FLUX, "denoise": 2})}, "denoise must be 0.01 to 1, got 2"),
        ({"1": (SCHEDULE, {"model": FLUX, "spacing": "x" * 9000})}, "spacing must be one of trailing"),
        ({"1": (SCHEDULE, {"model": FLUX, "spacing": ["2", 0]})}, "has no node '2'"),
        ({"1": (SCHEDULE, {"model": FLUX, "spacing": ["2", 0]}), "2": (TINY, {})}, "takes COMBO"),
        ({"1": (SCHEDULE, {"model": {"family": "dall-e"}})}, "no model of family 'dall-e'; known here: flux"),
        ({"1": (SCHEDULE, {"model": {"seen": "nothing"}})}, "is forgotten.*Run it once"),
        ({"1": (SCHEDULE, {"model": "flux"})}, "a model is a link, a family"),
        ({"1": (SCHEDULE, {"model": {"unknown": "Some Node"}})}, "model comes from Some Node"),
        ({"1": (SCHEDULE, {"model": ["1", 0]})}, "takes MODEL, which that output is not"),
        ({"1": (SCHEDULE, {"model": ["2", 7]}), "2": (FLOW_SHIFT, {})}, "takes MODEL"),
        ({"1": (SCHEDULE, {"model": ["2"]})}, "a link is"),
        ({"1": (FLOW_SHIFT, {"model": ["2", 0]}), "2": (FLOW_SHIFT, {"model": ["1", 0]})}, "feed themselves"),
        ({"1": (FLOW_SHIFT, {"model": {"family": "sdxl"}})}, "this is not a flow model"),
        ({"1": (TINY, {})}, "has no curve"),
        ({"1": ("KSampler", {})}, "KSampler can be computed only when it runs"),
        ({"1": ("Tidetable_TrainLoRA", {})}, "can be computed only when it runs"),
        ({"2": (SCHEDULE, {})}, "has no node '1'"),
        ({str(i): (SCHEDULE, {}) for i in range(65)}, "at most 64 nodes"),
        ({"1": (PLOT, {"sigmas_1": {"unknown": "x"}, "label_1": "x" * 10_001})}, "label_1.*more than 10000"),
        ({"1": (PLOT, {"sigmas_1": ["2", 0]}), "2": (SCHEDULE, {"model": FLUX, "steps": 1e9})}, "steps.*got 10000"),
    ],
)  # fmt: skip
def test_bad_questions_are_answered_with_their_fault(graph, message):
    error = ask(graph)["error"]
    assert re.search(message, error), error
    assert len(error) <= live.MAX_ERROR


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"3", b"null", b'{"nodes": []}', b'{"target": 1, "nodes": {}}', b"[" * 60_000,
             b'{"target": "1", "nodes": {"1": 3}}', b'{"target": "1", "nodes": {"1": {"type": "x"}}}'],
)  # fmt: skip
def test_a_body_that_is_no_question(body):
    assert live.answer(KNOWN, body)["error"]


# ── the server ─────────────────────────────────────────────────────────────────────────────────────


def test_the_route_answers_and_never_fails(client):
    offered = client.get(PATH)
    assert set(offered["nodes"]) == {*EVALUATED, PLOT, TINY} & set(KNOWN)
    assert offered["nodes"][SCHEDULE] == {entry.id: entry.optional for entry in KNOWN[SCHEDULE].GET_SCHEMA().inputs}
    assert {"flux", "sd3", "sdxl"} <= {family["key"] for family in offered["families"]}
    question = {"target": "1", "nodes": {"1": {"type": SCHEDULE, "inputs": {"steps": 3, "model": {"family": "sd3"}}}}}
    expected = Schedule.execute(family_shell("sd3").patcher(), "trailing", 3, 1.0).args[0].tolist()
    assert drawn(client.post(PATH, question)) == expected
    assert "longer than" in client.post(PATH, {"target": "x" * MAX_BYTES})["error"]
    assert client.post(PATH, 3)["error"]


def test_a_run_tells_what_its_models_are(client):
    """The page learns a model from the nodes that ran with it, and can ask about exactly that one."""
    prompt = {
        "1": {"class_type": TINY, "inputs": {"name": "mmdit-flow"}},
        "2": {"class_type": FLOW_SHIFT, "inputs": {"model": ["1", 0], "mode": "shift", "shift": 5.0}},
        "3": {"class_type": "Tidetable_DescribeModel", "inputs": {"model": ["2", 0]}},
    }
    schema = client.object_info(FLOW_SHIFT)[FLOW_SHIFT]["input"]
    for name, spec in {**schema["required"], **schema.get("optional", {})}.items():
        if len(spec) > 1 and "default" in spec[1]:
            prompt["2"]["inputs"].setdefault(name, spec[1]["default"])
    seen = {}
    client.run(prompt, lambda kind, data: seen.update({data["node"]: data}) if kind == shells.EVENT else None)
    assert set(seen) == {"2", "3"} and seen["3"]["title"] == FAMILIES["tidetable_tiny"].title
    for node, shift in (("2", 1.0), ("3", 5.0)):
        inputs = {"spacing": "trailing", "steps": 2, "model": {"seen": seen[node]["token"]}}
        answer = client.post(PATH, {"target": "1", "nodes": {"1": {"type": SCHEDULE, "inputs": inputs}}})
        assert drawn(answer) == pytest.approx([1.0, shift_t(0.5, shift), 0.0], abs=1e-6)


def test_remembering_is_bounded_and_silent_outside_a_prompt():
    model = build_patcher("mmdit-flow")
    count = len(shells._remembered)
    assert shells.remember(model) is model
    assert len(shells._remembered) == count
