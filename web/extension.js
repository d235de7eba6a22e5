// Tidetable in the page: live curves of schedules and of the training loss, folders to train on, and nodes' texts.
// ComfyUI loads every .js file in this folder; this one alone registers something, the others only export.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { FOLDER_NODE, addFolderPanel } from "./folder.js";
import { LIVE_NODES, addLivePanel, receiveModel } from "./live.js";
import { TEXT_NODES, addTextPanel } from "./text.js";
import { TRAIN_NODE, addTrainingPanel, endRun, receive } from "./training.js";

function linkStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./tidetable.css", import.meta.url).href;
  document.head.append(link);
}

// At the top level and not in setup(): a page that is reloaded during a run misses as little as possible.
linkStyles();
api.addEventListener("tidetable.train", ({ detail }) => receive(detail));
api.addEventListener("tidetable.model", ({ detail }) => receiveModel(detail));
for (const name of ["execution_error", "execution_interrupted"]) {
  api.addEventListener(name, ({ detail }) => endRun(detail?.prompt_id));
}

app.registerExtension({
  name: "Tidetable",
  nodeCreated(node) {
    if (node.comfyClass === TRAIN_NODE) addTrainingPanel(node);
    if (node.comfyClass === FOLDER_NODE) addFolderPanel(node);
    if (Object.hasOwn(LIVE_NODES, node.comfyClass)) addLivePanel(node);
    if (Object.hasOwn(TEXT_NODES, node.comfyClass)) addTextPanel(node);
  },
});
