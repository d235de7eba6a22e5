"""What the pack adds to ComfyUI's start: importing its root and listing its nodes, in a fresh process each time.

torch and ComfyUI's own modules are imported before the clock starts, as they are when ComfyUI loads its packs.
"""

import json
import statistics
import subprocess
import sys

from devtools import loading


REPEATS = 7

MEASURE = """
import asyncio, json, sys, time
sys.path.insert(0, sys.argv[1])
from devtools import loading
loading.prepare_host()
import comfy.sd, comfy.samplers, nodes, server, comfy_api.latest, comfy_extras.nodes_custom_sampler
before = set(sys.modules)
start = time.perf_counter()
package = loading.load_checkout()
imported = time.perf_counter()
asyncio.run(asyncio.run(package.comfy_entrypoint()).get_node_list())
listed = time.perf_counter()
print(json.dumps([imported - start, listed - imported, len(set(sys.modules) - before)]))
"""


def run(arguments: list[str]):
    """Yields the median of `REPEATS` processes, in milliseconds, and how many modules were loaded."""
    rows = [measure() for _ in range(REPEATS)]
    root, nodes, modules = (statistics.median(column) for column in zip(*rows, strict=True))
    yield "importing the pack", "root", "time", 1000 * root, "ms"
    yield "importing the pack", "root and nodes", "time", 1000 * (root + nodes), "ms"
    yield "importing the pack", "root and nodes", "modules", modules, ""


def measure() -> list[float]:
    command = [sys.executable, "-c", MEASURE, str(loading.ROOT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
