"""Every schema constructs on this ComfyUI, explains itself, and is what saved graphs rely on (see interface.py)."""

import json
import re

import pytest

from tidetable.nodes import NODES
from tidetable.tests.host import interface
from tidetable.tests.host.interface import GOLDEN
from tidetable.tests.test_architecture import ROOT


SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
each_node = pytest.mark.parametrize("node", NODES, ids=[node.GET_SCHEMA().node_id for node in NODES])
each_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))


def test_the_interface_is_the_golden_one():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    live = json.loads(interface.to_text(interface.describe_pack()))
    assert list(golden) == list(live)
    for node_id, described in live.items():
        assert described == golden[node_id], f"{node_id} changed: see the top of {interface.__file__}"


def test_ids_are_unique_and_follow_the_rule():
    assert len(SCHEMAS) == len(NODES)
    for node_id in SCHEMAS:
        assert re.fullmatch(r"Tidetable_[A-Z][A-Za-z0-9]+", node_id)


@each_node
def test_the_host_accepts_the_schema(node):
    """What ComfyUI does with a node when it lists it for the page."""
    node.GET_SCHEMA().validate()
    assert node.GET_NODE_INFO_V1()["name"] == node.GET_SCHEMA().node_id
    assert callable(node.execute)


@each_schema
def test_a_node_explains_itself(schema):
    assert schema.category.startswith("Tidetable/")
    assert len(schema.description) > 20
    for entry in schema.inputs:
        assert entry.tooltip, f"{schema.node_id}.{entry.id} has no tooltip"
        assert entry.tooltip.endswith((".", ")")), f"{schema.node_id}.{entry.id}: a tooltip is a sentence"
    for entry in schema.outputs:
        assert entry.display_name, f"{schema.node_id}: an output without display_name shows differently in each version"


@each_schema
def test_defaults_lie_in_their_ranges(schema):
    for entry in schema.inputs:
        default = getattr(entry, "default", None)
        low, high = getattr(entry, "min", None), getattr(entry, "max", None)
        if default is not None and low is not None:
            assert low <= default <= high, f"{schema.node_id}.{entry.id}"
        if default is not None and getattr(entry, "options", None):
            assert default in entry.options, f"{schema.node_id}.{entry.id}"


@each_schema
def test_a_help_page_names_every_input(schema):
    page = ROOT / "web" / "docs" / f"{schema.node_id}.md"
    assert page.is_file(), f"{page} is missing"
    text = page.read_text(encoding="utf-8")
    for entry in schema.inputs:
        assert f"`{entry.id}`" in text or f"**{entry.id}**" in text, f"{page.name} does not mention {entry.id}"
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (page.parent / name).is_file(), f"{page.name} shows {name}, which is not there"
