"""A MODEL from the graph that made it, in a process without a page: what is upstream of an input, run by ComfyUI."""

import asyncio
import importlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_patcher
import execution
import folder_paths


nodes: Any = importlib.import_module("nodes")  # ComfyUI's; a type checker would find ours
server: Any = importlib.import_module("server")
Prompt = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id -> class_type and inputs; a link is [node id, output index]."""
SINK = "Tidetable_JobModel"


def upstream(prompt: Mapping[str, Any], link: Any) -> Prompt:
    """The node of `link` and all that it needs. ValueError where the link is none or leads nowhere."""
    found: Prompt = {}
    waiting = [link]
    while waiting:
        link = waiting.pop()
        if not is_link(link) or str(link[0]) not in prompt:
            raise ValueError(f"{link!r} does not lead to a node of the graph: connect the input and queue again")
        node = str(link[0])
        if node not in found:
            found[node] = {"class_type": prompt[node]["class_type"], "inputs": dict(prompt[node]["inputs"])}
            waiting += [value for value in found[node]["inputs"].values() if is_link(value)]
    return found


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and not isinstance(value[1], bool)


def model_of(prompt: Prompt, link: list) -> comfy.model_patcher.ModelPatcher:
    """Run the graph in this process and return what the link gives. ValueError with ComfyUI's reason where it fails."""
    load_missing(prompt)
    caught: list[Any] = []

    class JobModel:
        """Where the graph ends in this process; no node of any menu."""

        RETURN_TYPES = ()
        FUNCTION = "take"
        OUTPUT_NODE = True
        CATEGORY = ""

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"model": ("MODEL",)}}

        def take(self, model):
            caught.append(model)
            return {}

    whole = {**prompt, SINK: {"class_type": SINK, "inputs": {"model": list(link)}}}
    nodes.NODE_CLASS_MAPPINGS[SINK] = JobModel
    try:
        valid = asyncio.run(execution.validate_prompt(SINK, whole, None))
        if not valid[0]:
            raise ValueError(f"ComfyUI does not take the job's graph: {_reasons(valid)}")
        executor = execution.PromptExecutor(server.PromptServer.instance, cache_args=defaultdict(int))
        executor.execute(whole, SINK, {}, [SINK])
    finally:
        del nodes.NODE_CLASS_MAPPINGS[SINK]
    if not caught:
        errors = [data for event, data in executor.status_messages if event == "execution_error"]
        reason = f"{errors[0]['node_type']}: {errors[0]['exception_message']}" if errors else "no reason was given"
        raise ValueError(f"the job's graph did not make a model: {reason}")
    return caught[0]


def _reasons(answer: Any) -> str:
    """ComfyUI's words on a prompt that it does not take."""
    _, error, _, by_node = answer
    found = [f"{n['class_type']}: {e['message']}: {e['details']}" for n in by_node.values() for e in n["errors"]]
    return "; ".join(found) or str(error)


def load_missing(prompt: Prompt) -> None:
    """Load the other packs of this ComfyUI if the graph has nodes that are not there yet."""
    if missing_nodes(prompt):
        for folder in folder_paths.get_folder_paths("custom_nodes"):
            Path(folder).mkdir(parents=True, exist_ok=True)  # ComfyUI fails on one that is not there
        asyncio.run(nodes.init_external_custom_nodes())
    if missing := missing_nodes(prompt):
        raise ValueError(f"this ComfyUI does not have {', '.join(missing)}: install the packs of the job's graph")


def missing_nodes(prompt: Prompt) -> list[str]:
    return sorted({node["class_type"] for node in prompt.values()} - set(nodes.NODE_CLASS_MAPPINGS))
