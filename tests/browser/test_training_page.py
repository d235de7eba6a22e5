"""A training run in the real page: the numbers while it goes on, and the previews during it and after."""

import pytest

from tidetable.tests.browser.pages import Page, node_box, save_part
from tidetable.tests.browser.test_live_plots import BUILD


pytestmark = pytest.mark.browser

STEPS, EVERY = 80, 10
TRAIN = 9  # place in GRAPH
# [type, [x, y], {widget: value}, {input: [index of node, output]}]
GRAPH = [
    ["Tidetable_LoadTinyModel", [0, 0], {"name": "unet-v"}, {}],
    ["Tidetable_TinyDataset", [0, 200], {"count": 12}, {}],
    ["CLIPTextEncode", [350, 0], {}, {"clip": [0, 1], "text": [1, 1]}],
    ["VAEEncode", [350, 250], {}, {"vae": [0, 2], "pixels": [1, 0]}],
    ["CLIPTextEncode", [350, 320], {"text": "a bright green letter K on a dark blue background"}, {"clip": [0, 1]}],
    ["CLIPTextEncode", [350, 570], {"text": ""}, {"clip": [0, 1]}],
    ["KSamplerSelect", [0, 500], {"sampler_name": "euler"}, {}],
    ["BasicScheduler", [0, 620], {"steps": 6}, {"model": [0, 0]}],
    [
        "Tidetable_TrainingPreview",
        [750, 500],
        {"every": EVERY, "width": 256, "height": 256},
        {"sampler": [6, 0], "sigmas": [7, 0], "positive": [4, 0], "negative": [5, 0], "vae": [0, 2]},
    ],
    [
        "Tidetable_TrainLoRA",
        [1150, 0],
        {"steps": STEPS, "batch_size": 2, "rank": 4, "validation_percent": 10, "validate_every": 20},
        {"model": [0, 0], "latents": [3, 0], "positive": [2, 0], "preview": [8, 0]},
    ],
    ["Tidetable_SaveLoRA", [750, 900], {"filename_prefix": "tests/page"}, {"lora": [9, 1]}],
]
# The texts of the panel, the pictures of the node by their addresses, and how many the page has for the node's output.
READ = """id => {
    const node = app.graph._nodes.find(node => String(node.id) === id)
    const element = node.widgets.find(widget => widget.name === 'loss_curve').element
    const part = index => element.children[index].innerText
    const shown = document.querySelectorAll(`[data-node-id="${id}"] img`)
    return {
        step: Number(element.dataset.step), head: part(0), facts: part(1), foot: part(3),
        previews: LiteGraph.vueNodesMode ? shown.length : (node.imgs ?? []).length,
        pictures: (app.nodeOutputs[id]?.images ?? []).map(image => image.subfolder + '/' + image.filename),
    }
}"""


def test_a_run_shows_its_numbers_and_its_pictures(page: Page):
    seed = 1 if page.mode == "canvas" else 2  # another run, so that nothing is cached
    graph = [[*node] for node in GRAPH]
    graph[TRAIN][2] = {**graph[TRAIN][2], "seed": seed}
    ids = page.evaluate(BUILD, graph)
    page.evaluate("app.canvas.ds.scale = 0.8")
    widgets = page.evaluate("LiteGraph.createNode('Tidetable_TrainingPreview').widgets.map(widget => widget.name)")
    assert widgets == ["every", "cfg", "seed", "width", "height"], "no control that changes the seed"
    train = ids[TRAIN]
    page.evaluate("""() => {
        window.ended = null
        for (const name of ['execution_success', 'execution_error'])
            window.comfyAPI.api.api.addEventListener(name, event => { window.ended = [name, event.detail] })
        app.queuePrompt(0, 1)
    }""")
    page.page.wait_for_function(
        "([read, id, step]) => { const seen = eval(read)(id); return seen.step >= step && seen.previews }",
        arg=[READ, train, 3 * EVERY],
    )
    during = page.evaluate(READ, train)
    save_part(page, "training-during", node_box(page, train))
    assert 0 < during["step"] < STEPS and during["pictures"] == [], "while it goes on"
    assert f"step {during['step']} / {STEPS}" in during["head"] and " it/s, " in during["head"]
    assert all(word in during["facts"] for word in ("lr ", "gradient ", "memory ", " GB"))
    assert all(word in during["foot"] for word in ("loss ", "validation ", "before "))
    page.page.wait_for_function("window.ended")
    assert page.evaluate("window.ended[0]") == "execution_success"
    page.page.wait_for_timeout(1500)
    save_part(page, "training-after", node_box(page, train))
    after = page.evaluate(READ, train)
    assert [name.rsplit("/", 1)[1] for name in after["pictures"]] == [
        f"step{step:06}_prompt01.png" for step in range(EVERY, STEPS + 1, EVERY)
    ]
    assert len({name.rsplit("/", 1)[0] for name in after["pictures"]}) == 1
    assert after["previews"] > 0 and f"step {STEPS} / {STEPS}" in after["head"]
    assert page.complaints == []
