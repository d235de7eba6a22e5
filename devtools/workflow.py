"""Turn a workflow as the page saves it (nodes with widget values, links) into the prompt that the API takes.

Enough for the workflows of this repository: no subgraphs, no primitive or reroute nodes. The browser test compares the
result with what the page itself makes of the same file.
"""

from collections.abc import Mapping
from typing import Any

from .errors import DevError


WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
"""The page writes one of these after each seed; it is a widget of the page's own, not an input of the node."""
# Drawn on the page only.
NOTES = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The API prompt for a UI workflow. `object_info` is the server's, which gives each node's inputs in order.

    Raises DevError for a node that the server does not have and for what is not supported (see the top of this file).
    """
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise DevError("Workflows with subgraphs are not supported here: unpack them in the page and save again.")
    sources = {_link_id(link): _link_source(link) for link in workflow["links"]}
    prompt: dict[str, dict[str, Any]] = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES or node.get("mode") == MUTED:
            continue
        if node.get("mode") == BYPASSED:
            raise DevError(
                f"Node {node['id']} ({kind}) is bypassed, which is not supported: delete it or switch it on."
            )
        if kind not in object_info:
            raise DevError(f"Node {node['id']} is a {kind}, which this ComfyUI does not have.")
        inputs = widget_values(node, object_info[kind])
        for slot in node.get("inputs") or ():
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        prompt[str(node["id"])] = {
            "class_type": kind,
            "inputs": inputs,
            "_meta": {"title": node.get("title") or object_info[kind].get("display_name") or kind},
        }
    return prompt


def widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Input name -> the value that the widget of this name holds, from the page's nameless list."""
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        return {name: values[name] for name, _ in _widgets(info) if name in values}
    rest = list(values)
    result: dict[str, Any] = {}
    for name, options in _widgets(info):
        if not rest:  # saved before this input existed: the page gives it its default
            if "default" in options:
                result[name] = options["default"]
            continue
        result[name] = rest.pop(0)
        has_control = options.get("control_after_generate") or name in ("seed", "noise_seed")
        if has_control and rest and rest[0] in AFTER_GENERATE:
            rest.pop(0)
        if options.get("image_upload") and rest and rest[0] == "image":
            rest.pop(0)
    return result


def _widgets(info: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, options) of the inputs that the page shows as widgets, in its order."""
    found = []
    for group in ("required", "optional"):
        for name, spec in (info["input"].get(group) or {}).items():
            options = spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(spec[0], list) or spec[0] in WIDGET_TYPES or "widgetType" in options
            if is_widget and not options.get("forceInput"):
                found.append((name, options))
    return found


def _link_id(link: Any) -> int:
    return link["id"] if isinstance(link, Mapping) else link[0]


def _link_source(link: Any) -> list[Any]:
    """[node id, output index], as the API names what an input is connected to."""
    if isinstance(link, Mapping):
        return [str(link["origin_id"]), link["origin_slot"]]
    return [str(link[1]), link[2]]
