"""A folder of pictures dropped on Dataset Folder, as a user's file manager drops it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tidetable.tests.browser.pages import Page, node_box, save_part
from tidetable.tests.browser.test_live_plots import BUILD


pytestmark = pytest.mark.browser

READ = """id => {
    const node = app.graph._nodes.find(node => String(node.id) === id)
    const element = node.widgets.find(widget => widget.name === 'folder_chooser').element
    return {
        folder: node.widgets.find(widget => widget.name === 'folder').value, text: element.innerText,
        options: [...element.querySelector('select').options].map(option => option.value),
        done: element.dataset.done, box: JSON.parse(JSON.stringify(element.getBoundingClientRect())),
    }
}"""


@pytest.fixture
def pictures(tmp_path):
    """A folder with a picture in it and one below, each with a caption, and a file that nobody wants."""
    folder = tmp_path / "my cats"
    (folder / "3_siam").mkdir(parents=True)
    for place, name in enumerate(("one", "3_siam/two")):
        Image.new("RGB", (64, 64), (40 * place, 90, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a cat")
    (folder / "thumbs.db").write_bytes(b"?")
    return folder


def drop(page: Page, box: dict, path) -> None:
    """What Chromium is told by the system when files are dragged into its window."""
    session = page.page.context.new_cdp_session(page.page)
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})


def test_a_dropped_folder_is_copied_chosen_and_runs(page: Page, client, pictures):
    (node,) = page.evaluate(BUILD, [["Tidetable_DatasetFolder", [100, 100], {}, {}]])
    for number in (1, 2):
        drop(page, page.evaluate(READ, node)["box"], pictures)
        page.page.wait_for_function(
            "([read, id, number]) => eval(read)(id).done === String(number)", arg=[READ, node, number]
        )
    seen = page.evaluate(READ, node)
    save_part(page, "dataset-folder", node_box(page, node))
    second = seen["folder"]
    assert second.startswith("my cats_") and f"4 files are in input/{second}" in seen["text"]
    names = {one["name"]: one["pictures"] for one in client.get("/tidetable/folders")["folders"]}
    assert names["my cats"] == names[second] == 2 and names[f"{second}/3_siam"] == 1, "the first copy stays"
    prompt = {
        "1": {"class_type": "Tidetable_DatasetFolder", "inputs": {"folder": second, "regularization_folder": ""}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }
    with ThreadPoolExecutor() as pool:  # Playwright's event loop runs in this thread
        (report,) = pool.submit(client.run, prompt).result().outputs["2"]["text"]
    assert "2 pictures" in report and "4 with repeats" in report
    page.evaluate(
        """id => {
            const node = app.graph._nodes.find(node => String(node.id) === id)
            const select = node.widgets.find(widget => widget.name === 'folder_chooser').element.firstChild
            select.value = 'my cats'
            select.dispatchEvent(new Event('change'))
        }""",
        node,
    )
    assert page.evaluate(READ, node)["folder"] == "my cats"
    assert page.complaints == []


def test_what_is_not_a_folder_of_pictures_is_refused_in_words(page: Page, pictures):
    (node,) = page.evaluate(BUILD, [["Tidetable_DatasetFolder", [100, 100], {}, {}]])
    drop(page, page.evaluate(READ, node)["box"], pictures / "one.png")
    page.page.wait_for_function("([read, id]) => eval(read)(id).done === '1'", arg=[READ, node])
    seen = page.evaluate(READ, node)
    assert "Drop one folder" in seen["text"] and seen["folder"] == ""
