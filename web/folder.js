// Dataset Folder: choose a folder of input/, or drop one of this computer, whose pictures and captions are copied there.
import { api } from "../../scripts/api.js";
import { addPanel, block, text } from "./panel.js";

export const FOLDER_NODE = "Tidetable_DatasetFolder";

const ENDINGS = /\.(png|jpe?g|webp|bmp|gif|tiff?|avif|txt|caption|json)$/i;
const PICTURES = /\.(png|jpe?g|webp|bmp|gif|tiff?|avif)$/i;
const HINT = "or drop a folder here: its pictures and captions are copied into input/";
const AT_ONCE = 4;

export function addFolderPanel(node) {
  const element = block("tidetable-folder");
  const select = document.createElement("select");
  select.title = "Folders of input/ that have pictures in them.";
  const message = text(HINT, "tidetable-quiet");
  const bar = document.createElement("progress");
  const stop = document.createElement("button");
  stop.textContent = "Stop";
  bar.hidden = stop.hidden = true;
  const row = block("tidetable-head");
  row.append(message, bar, stop);
  element.append(select, row);

  let running = false;
  const setFolder = (name) => {
    const widget = node.widgets.find((one) => one.name === "folder");
    widget.value = name;
    widget.callback?.(name);
    node.setDirtyCanvas(true, true);
    refill();
  };
  const refill = async () => {
    const { folders } = await offered();
    const shown = folders.map(({ name, pictures }) => new Option(`${name}, ${pictures} pictures`, name));
    select.replaceChildren(new Option("choose a folder of input/ …", ""), ...shown);
    select.value = "";
  };
  select.addEventListener("change", () => select.value && setFolder(select.value));
  element.addEventListener("pointerenter", refill);

  const copy = async (entries) => {
    let stopped = false;
    running = true;
    bar.hidden = stop.hidden = false;
    bar.removeAttribute("value");
    stop.onclick = () => (stopped = true);
    const say = (done, total) => {
      message.textContent = `copied ${done} of ${total} files`;
      Object.assign(bar, { max: total, value: done });
    };
    try {
      message.textContent = await copyFolder(entries, say, () => stopped, setFolder);
    } catch (error) {
      message.textContent = `Not copied: ${error.message ?? error}`;
    }
    bar.hidden = stop.hidden = true;
    running = false;
    element.dataset.done = String(Number(element.dataset.done ?? 0) + 1);
  };
  // The browser empties what was dropped when the event is over: take all that is needed before anything waits.
  const drop = (event) => {
    const entries = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const path = event.dataTransfer?.getData("text/plain")?.trim();
    if (running) message.textContent = "Wait until the folder before is copied, or stop that.";
    else if (entries.length) copy(entries);
    else if (path) setFolder(path);
    else return false;
    return true;
  };
  node.onDragOver = () => true;
  node.onDragDrop = drop;
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation(); // the page would load a picture as a workflow
    drop(event);
  });
  addPanel(node, element, { name: "folder_chooser", minWidth: 340, minHeight: 62, draw() {} });
  refill();
}

/** What the server offers; nothing where it does not answer. */
async function offered() {
  try {
    const response = await api.fetchApi("/tidetable/folders");
    if (response.ok) return await response.json();
  } catch {} // the text field still works
  return { folders: [], taken: [] };
}

/** Copies the one dropped folder; what to say at the end. */
async function copyFolder(entries, say, isStopped, setFolder) {
  const folders = entries.filter((entry) => entry.isDirectory);
  if (folders.length !== 1) return "Drop one folder: single files and several folders are not taken.";
  const files = (await filesOf(folders[0], "")).filter(({ file }) => ENDINGS.test(file.name));
  const pictures = files.filter(({ file }) => PICTURES.test(file.name)).length;
  if (!pictures) return `There are no pictures in ${folders[0].name}.`;
  const name = await freeName(folders[0].name);
  const refused = [];
  let done = 0;
  const waiting = [...files];
  const work = async () => {
    while (waiting.length && !isStopped()) {
      const { file, place } = waiting.shift();
      const problem = await upload(file, [name, place].filter(Boolean).join("/"));
      if (problem) refused.push(`${file.name} (${problem})`);
      say(++done, files.length);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (isStopped()) return `Stopped: ${done} of ${files.length} files are in input/${name}, which is not chosen.`;
  if (refused.length === files.length) return `Not copied: the server refused every file: ${refused[0]}`;
  setFolder(name);
  const rest = refused.length ? `; refused: ${refused.slice(0, 5).join(", ")}${refused.length > 5 ? " …" : ""}` : "";
  return `${files.length - refused.length} files are in input/${name}${rest}`;
}

/** [{file, place}] of a dropped folder and the folders in it; hidden ones are left out. */
async function filesOf(folder, place) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // 100 at most
    if (!part.length) break;
    for (const entry of part.filter(({ name }) => !name.startsWith("."))) {
      if (entry.isDirectory) found.push(...(await filesOf(entry, place ? `${place}/${entry.name}` : entry.name)));
      else found.push({ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), place });
    }
  }
  return found;
}

/** `name`, or with a number behind it: what is already in input/ stays as it is. */
async function freeName(name) {
  const taken = new Set((await offered()).taken.map((one) => one.toLowerCase())); // not every disk tells cases apart
  const isFree = (one) => !taken.has(one.toLowerCase());
  let number = 1;
  const numbered = () => (number > 1 ? `${name}_${number}` : name);
  while (!isFree(numbered())) number += 1;
  return numbered();
}

/** Why the server did not take a file; nothing where it did. */
async function upload(file, subfolder) {
  const body = new FormData();
  body.append("image", file, file.name);
  body.append("subfolder", subfolder);
  body.append("type", "input");
  body.append("overwrite", "true");
  try {
    const response = await api.fetchApi("/upload/image", { method: "POST", body });
    if (response.ok) return "";
    return response.status === 413 ? "larger than the server takes" : `status ${response.status}`;
  } catch {
    return "the server does not answer";
  }
}
