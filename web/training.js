// The live loss curve on Train LoRA, fed by the event that runtime/progress.py sends.
import { findNode, placeOf } from "./graph.js";
import { addPanel, block, text } from "./panel.js";
import { drawLoss } from "./plot.js";
import { Run } from "./run.js";

export const TRAIN_NODE = "Tidetable_TrainLoRA";

const MIN_WIDTH = 370;
const MIN_HEIGHT = 230;
const MAX_KEPT = 50;

/** Server's node id -> its latest run. */
const runs = new Map();
/** Place in a workflow -> the latest run there: the same id in another tab is another node. */
const runAt = new Map();
/** Node -> the function that draws its panel. */
const panels = new WeakMap();

/**
 * Take one event: {node, prompt_id, step} and either {validation_loss, base, by_t} or {steps, loss, smooth, lr,
 * grad_norm, seconds, speed, seconds_left, memory}.
 */
export function receive(event) {
  const id = String(event.node);
  let run = runs.get(id);
  if (!run || run.isOver(event)) {
    run = new Run(event.prompt_id);
    keep(runs, id, run);
  }
  run.add(event);
  // Once known, the place holds: the user may look at another tab while this run goes on.
  if (!run.place) {
    const node = findNode(id);
    if (node?.comfyClass !== TRAIN_NODE) return;
    run.place = placeOf(node);
    keep(runAt, run.place, run);
  }
  show(id, run);
}

/** The prompt was cancelled or failed. */
export function endRun(promptId) {
  for (const [id, run] of runs) {
    if (run.promptId !== promptId || run.done) continue;
    run.stopped = true;
    show(id, run);
  }
}

function show(id, run) {
  const node = findNode(id);
  if (node && placeOf(node) === run.place) panels.get(node)?.();
}

function keep(map, key, run) {
  map.delete(key); // so that the oldest stands first
  map.set(key, run);
  if (map.size > MAX_KEPT) map.delete(map.keys().next().value);
}

export function addTrainingPanel(node) {
  const element = block("tidetable-training");
  const [head, facts, chart, foot] = ["head", "head", "chart", "foot"].map((name) => block(`tidetable-${name}`));
  facts.classList.add("tidetable-quiet");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("role", "img");
  chart.append(svg);
  element.append(head, facts, chart, foot);

  let planned = false;
  const draw = () => {
    planned = false;
    const run = runAt.get(placeOf(node));
    head.replaceChildren(...headOf(run));
    facts.replaceChildren(...factsOf(run));
    facts.hidden = !facts.childElementCount;
    foot.replaceChildren(...footOf(run));
    element.dataset.step = run?.step ?? "";
    svg.setAttribute("aria-label", `Training loss. ${head.textContent}. ${foot.textContent}`);
    const hasCurve = run && run.points.length + run.validations.length > 0;
    if (hasCurve && chart.clientWidth) drawLoss(svg, run, chart.clientWidth, chart.clientHeight);
    else if (!hasCurve) svg.replaceChildren();
  };
  const refresh = addPanel(node, element, {
    name: "loss_curve",
    minWidth: MIN_WIDTH,
    minHeight: MIN_HEIGHT,
    // At most once a frame, however often the page lays the node out.
    draw() {
      if (planned) return;
      planned = true;
      requestAnimationFrame(draw);
    },
  });
  panels.set(node, refresh);
  refresh();
}

/** Left: where the run is. Right: how fast. */
function headOf(run) {
  if (!run) return [text("The loss is drawn here while the node trains.", "tidetable-quiet")];
  if (!run.steps) return [text(run.stopped ? "stopped" : "measuring the loss before training …")];
  const where = text(`step ${run.step} / ${run.steps}`);
  if (run.done) return [where, text(`done in ${clock(run.seconds)}`)];
  if (run.stopped) return [where, text("stopped")];
  const { speed, seconds_left: left } = run.now;
  return [where, text(speed ? `${short(speed)} it/s, ${clock(left)} left` : "")];
}

/** What is looked at when something is wrong: learning rate, gradient norm, memory. */
function factsOf(run) {
  const { lr, grad_norm: norm, memory } = run?.now ?? {};
  const parts = [
    Number.isFinite(lr) && `lr ${lr.toExponential(1)}`,
    Number.isFinite(norm) && `gradient ${short(norm)}`,
    Number.isFinite(memory) && `memory ${(memory / 1e9).toFixed(1)} GB`,
  ];
  return parts.filter(Boolean).map((part) => text(part));
}

/** The legend, with the latest numbers. */
function footOf(run) {
  const last = run?.points.at(-1);
  const validation = run?.validations.at(-1);
  const parts = [];
  if (last) parts.push(text(`loss ${short(last.smooth)}`, "tidetable-key tidetable-key-smooth"));
  if (validation) parts.push(text(`validation ${short(validation.loss)}`, "tidetable-key tidetable-key-validation"));
  if (run?.base !== undefined) parts.push(text(`before ${short(run.base)}`, "tidetable-key tidetable-key-base"));
  return parts;
}

function short(value) {
  return value.toPrecision(3);
}

/** 75 -> "1:15", 3700 -> "1:01:40". */
function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const shown = parts[0] ? parts : parts.slice(1);
  return shown.map((part, index) => (index ? String(part).padStart(2, "0") : part)).join(":");
}
