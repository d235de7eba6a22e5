// Curves on nodes while their widgets are dragged. The page only looks what changed and asks; runtime/live.py computes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { classOf, drawCurves } from "./curves.js";
import { findNode, placeOf } from "./graph.js";
import { addPanel, block, text } from "./panel.js";
import { FAMILY, earlier, forget, models, questionAbout } from "./upstream.js";

/** Node type -> the smallest panel that shows its curve. */
export const LIVE_NODES = {
  Tidetable_FlowShift: { minWidth: 300, minHeight: 180 },
  Tidetable_Schedule: { minWidth: 300, minHeight: 180 },
  Tidetable_OfficialSchedule: { minWidth: 300, minHeight: 180 },
  Tidetable_PlotSchedules: { minWidth: 360, minHeight: 240 },
};
const PATH = "/tidetable/curve";
const LOOK_EVERY = 60; // milliseconds
const RETRY_AFTER = 3000; // milliseconds, when the server did not answer
const MAX_KEPT = 64;

/** Node -> the function that looks whether its curve must be asked for again. */
const panels = new WeakMap();
let options;
let looking = false;

/** A node has run with a model: {node, token, title}. */
export function receiveModel({ node: id, token, title }) {
  const node = findNode(id);
  if (!node) return;
  models.delete(placeOf(node)); // so that the latest stands last
  models.set(placeOf(node), { token, title });
  if (models.size > MAX_KEPT) models.delete(models.keys().next().value);
}

/** What the server can compute; asked for once. */
async function start() {
  if (looking) return;
  looking = true;
  options = await ask();
  for (const model of options.models ?? []) earlier.set(String(model.node), model);
  setInterval(() => {
    // What is shown decides, not what exists: other tabs and closed subgraphs cost nothing.
    const nodes = app.canvas?.graph?.nodes ?? app.canvas?.graph?._nodes ?? [];
    for (const node of nodes) if (!node.flags?.collapsed) panels.get(node)?.();
  }, LOOK_EVERY);
}

/** GET without a question, else POST; what the server says, or {error}. */
async function ask(question) {
  try {
    const request = question && { method: "POST", body: question, headers: { "Content-Type": "application/json" } };
    const response = await api.fetchApi(PATH, request);
    if (response.ok) return await response.json();
    return { error: `The server answers with status ${response.status}.`, failed: true };
  } catch {
    return { error: "The server does not answer.", failed: true };
  }
}

export function addLivePanel(node) {
  start();
  const element = block("tidetable-live");
  const [head, chart, message, foot] = ["head", "chart", "message", "foot"].map((name) => block(`tidetable-${name}`));
  const facts = text("");
  const select = document.createElement("select");
  select.title = "The model of the preview. What runs is the model that is connected.";
  select.addEventListener("change", () => {
    node.properties[FAMILY] = select.value || undefined;
    look();
  });
  head.append(facts, select);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("role", "img");
  chart.append(svg);
  element.append(head, chart, message, foot);

  let asked;
  let answer;
  let busy = false;
  let planned = false;

  // One question under way; what changes meanwhile is seen at the next look.
  const look = async () => {
    if (busy || !options?.nodes?.[node.comfyClass]) return;
    const { leaf, ...question } = questionAbout(node, options.nodes);
    const body = JSON.stringify(question);
    const shown = JSON.stringify([body, leaf?.source]);
    if (shown === asked) return;
    asked = shown;
    busy = true;
    answer = await ask(body);
    busy = false;
    if (answer.asks_model && leaf?.source.value?.seen) forget(leaf.source.value.seen);
    if (answer.failed) setTimeout(() => (asked = undefined), RETRY_AFTER);
    fillSelect(select, node, leaf?.source, answer);
    refresh();
  };
  const draw = () => {
    planned = false;
    const curves = answer?.curves;
    facts.textContent = answer?.facts?.join(" · ") ?? "";
    message.textContent = answer?.error ?? answer?.notes?.join("\n") ?? "";
    chart.hidden = !curves;
    foot.replaceChildren(...(curves?.length > 1 ? curves.map(legend) : []));
    foot.hidden = !foot.childElementCount;
    head.hidden = !facts.textContent && select.hidden;
    svg.setAttribute("aria-label", `${facts.textContent} ${curves?.map((curve) => curve.label).join(", ") ?? ""}`);
    if (curves && chart.clientWidth) drawCurves(svg, answer, chart.clientWidth, chart.clientHeight);
    element.dataset.answered = asked ?? "";
  };
  const refresh = addPanel(node, element, {
    name: "curve",
    ...LIVE_NODES[node.comfyClass],
    // At most once a frame, however often the page lays the node out.
    draw() {
      if (planned) return;
      planned = true;
      requestAnimationFrame(draw);
    },
  });
  select.hidden = true;
  panels.set(node, look);
  refresh();
}

/** The model that the curve is for, and the families to choose from; hidden where it depends on no model. */
function fillSelect(select, node, source, answer) {
  // Many models may feed Plot Schedules: each is chosen where its schedule is made.
  select.hidden =
    !source || node.comfyClass === "Tidetable_PlotSchedules" || (source.kind === "none" && !answer.asks_model);
  if (select.hidden) return;
  const wanted = node.properties?.[FAMILY] ?? "";
  const first = {
    seen: `as run: ${source.title}`,
    last: `last run: ${source.title}`,
    none: "choose a family …",
    family: wanted ? "as run" : "as chosen upstream",
  }[source.kind];
  const isFlow = node.comfyClass === "Tidetable_FlowShift";
  const families = options.families.filter((family) => !isFlow || family.process === "flow");
  select.replaceChildren(new Option(first, ""), ...families.map(({ title, key }) => new Option(title, key)));
  select.value = wanted;
}

function legend(curve, index) {
  return text(curve.label, `tidetable-key ${classOf(curve, index)}`);
}
