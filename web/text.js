// The text that a node returned ({"ui": {"text": …}}), below its inputs: to read, scroll, select and copy.
import { placeOf } from "./graph.js";
import { addPanel, after } from "./panel.js";

/** Node type -> the smallest panel that shows its usual text. */
export const TEXT_NODES = {
  Tidetable_EncodeDataset: { minWidth: 360, minHeight: 120 },
  Tidetable_DescribeModel: { minWidth: 420, minHeight: 220 },
  Tidetable_FlowShift: { minWidth: 320, minHeight: 96 },
  Tidetable_ScheduleToText: { minWidth: 320, minHeight: 120 },
  Tidetable_SamplerSafeFlow: { minWidth: 420, minHeight: 220 },
  Tidetable_SaveLoRA: { minWidth: 320, minHeight: 64 },
  Tidetable_ZeroTerminalSNR: { minWidth: 380, minHeight: 150 },
};
const MAX_KEPT = 200;

/** Last text per place in a workflow: nodes are rebuilt by undo and by switching tabs, and their text should stay. */
const texts = new Map();

export function addTextPanel(node) {
  const area = document.createElement("textarea");
  area.readOnly = true;
  area.spellcheck = false;
  area.placeholder = "The text appears here when the node has run.";
  area.setAttribute("aria-label", "Text returned by the node");
  area.dataset.captureWheel = "true"; // Vue mode: scroll the text, not the canvas, once it has the focus

  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.title = "Copy the text";
  button.addEventListener("click", async () => {
    button.textContent = (await copy(area)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

  const element = document.createElement("div");
  element.className = "tidetable-text";
  element.append(area, button);

  const refresh = addPanel(node, element, {
    name: "text",
    ...TEXT_NODES[node.comfyClass],
    draw() {
      const text = texts.get(placeOf(node)) ?? "";
      if (area.value !== text) area.value = text;
      button.hidden = !text;
    },
  });
  refresh();
  after(node, "onExecuted", (output) => {
    if (output?.text === undefined) return;
    keep(placeOf(node), [output.text].flat().join("\n\n"));
    refresh();
  });
}

function keep(place, text) {
  texts.delete(place); // so that the oldest stands first
  texts.set(place, text);
  if (texts.size > MAX_KEPT) texts.delete(texts.keys().next().value);
}

/** Copy all of the area's text; true when that worked. Without https there is no clipboard: it is selected then. */
async function copy(area) {
  try {
    await navigator.clipboard.writeText(area.value);
    return true;
  } catch {
    area.focus();
    area.select();
    return document.execCommand("copy");
  }
}
