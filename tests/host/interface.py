"""What graphs that people have saved depend on: every node's id, inputs and outputs, as data.

After a wanted change, write the golden file anew and say so in CHANGELOG.md:

    python3 dev.py exec tests/host/interface.py
"""

import json
from pathlib import Path
from typing import Any

import comfy.samplers


GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "node-interface.json"


def describe_node(node) -> dict[str, Any]:
    """The interface of one node class, without what only explains it (tooltips, display names of inputs)."""
    schema = node.GET_SCHEMA()
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "output_node": bool(schema.is_output_node),
        "takes_lists": bool(schema.is_input_list),
        # In order: saved graphs hold widget values by position.
        "inputs": [describe_input(entry) for entry in schema.inputs or ()],
        "outputs": [describe_output(entry) for entry in schema.outputs or ()],
    }


def describe_input(entry) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.id, "type": type_name(entry)}
    for name in ("optional", "default", "min", "max", "options", "multiline"):
        value = getattr(entry, name, None)
        if name == "options" and value == comfy.samplers.SAMPLER_NAMES:
            value = "comfy.samplers.SAMPLER_NAMES"  # each ComfyUI has its own
        if value is not None and value is not False:
            found[name] = value
    return found


def describe_output(entry) -> dict[str, Any]:
    found = {"type": type_name(entry), "name": entry.display_name}
    return found | ({"list": True} if entry.is_output_list else {})


def type_name(entry) -> str:
    """The socket's type as a string; ComfyUI 0.3.75 gives a COMBO's options in its place."""
    kind = entry.get_io_type() if hasattr(entry, "get_io_type") else entry.io_type
    return str(kind) if isinstance(kind, str) else entry.io_type


def describe_pack() -> dict[str, dict[str, Any]]:
    from tidetable.nodes import NODES

    return {
        node.GET_SCHEMA().node_id: describe_node(node) for node in sorted(NODES, key=lambda n: n.GET_SCHEMA().node_id)
    }


def to_text(interface: dict[str, Any]) -> str:
    return json.dumps(interface, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(to_text(describe_pack()), encoding="utf-8")
    print(f"wrote {GOLDEN}")
