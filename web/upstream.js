// What a node's curve depends on: widget values and links upstream, as runtime/live.py takes them. Nothing is computed here.
import { app } from "../../scripts/app.js";
import { placeOf } from "./graph.js";

const MUTED = 2;
const BYPASSED = 4;
const SUBGRAPH_INPUTS = "-10"; // the id that stands for a subgraph's own inputs, inside it
/** Nodes that hand a MODEL on with the same noise: their input "model" is looked at instead. */
const TRANSPARENT = new Set(["LoraLoader", "LoraLoaderModelOnly", "Tidetable_PerturbedAttention"]);
/** node.properties: the family that the user chose for previews. */
export const FAMILY = "tidetable_family";

/** Place of a node -> {token, title} of the model that it ran with last; the last entry is the latest run. */
export const models = new Map();
/** The server's id of a node -> {token, title} of the model that it ran with before this page was there. */
export const earlier = new Map();

/** The server does not know this model any more. */
export function forget(token) {
  for (const map of [models, earlier]) {
    for (const [key, model] of map) if (model.token === token) map.delete(key);
  }
}

/**
 * {target, nodes} for the server, and `leaf`: {node, source} of the model that the curve starts from, or undefined where
 * none is needed. `known` says which inputs each node has that the server can compute.
 */
export function questionAbout(node, known) {
  const question = { target: "0", nodes: {}, leaf: undefined };
  const keys = new Map();
  const hint = node.properties?.[FAMILY];

  const add = (one, path) => {
    if (keys.has(one)) return keys.get(one);
    const key = String(keys.size);
    keys.set(one, key);
    const entry = { type: one.comfyClass, inputs: {} };
    question.nodes[key] = entry;
    for (const [name, isOptional] of Object.entries(known[one.comfyClass])) {
      const value = valueOf(one, name, isOptional, path);
      if (value !== undefined) entry.inputs[name] = value;
    }
    return key;
  };

  const valueOf = (one, name, isOptional, path) => {
    const index = one.inputs?.findIndex((input) => input.name === name) ?? -1;
    const isModel = one.inputs?.[index]?.type === "MODEL";
    let source = index < 0 ? undefined : sourceOf(one, index, path);
    while (isModel && TRANSPARENT.has(source?.node?.comfyClass)) {
      const { node: passing, path: way } = source;
      source = sourceOf(passing, passing.inputs.findIndex((input) => input.name === "model"), way);
    }
    if (source?.node && Object.hasOwn(known, source.node.comfyClass)) {
      return [add(source.node, source.path), source.slot];
    }
    if (isModel && !(isOptional && source === undefined)) {
      const model = modelOf(one, source, hint);
      question.leaf ??= { node: one, source: model };
      return model.value;
    }
    if (source === undefined) return one.widgets?.find((widget) => widget.name === name)?.value;
    if (source.node) return primitive(source.node) ?? { unknown: source.node.title || source.node.type };
    return source.unknown === undefined ? source.value : { unknown: source.unknown };
  };

  add(node, []);
  return question;
}

/** The value of a node that is nothing but a value. */
function primitive(node) {
  return node.type?.startsWith("Primitive") ? node.widgets?.[0]?.value : undefined;
}

/** What stands for a MODEL: {value for the server, kind, title}. The user's choice, else what was seen to run. */
function modelOf(node, source, hint) {
  const family = node.properties?.[FAMILY] || hint;
  if (family) return { value: { family }, kind: "family" };
  const beside = source?.node?.outputs?.[source.slot]?.links ?? [];
  const targets = beside.map((id) => source.node.graph.getNodeById(source.node.graph.getLink(id)?.target_id));
  for (const one of [node, ...targets]) {
    const seen = one && models.get(placeOf(one));
    if (seen) return { value: { seen: seen.token }, kind: "seen", title: seen.title };
  }
  const last = earlier.get(String(node.id)) ?? [...earlier.values(), ...models.values()].at(-1);
  if (last) return { value: { seen: last.token }, kind: "last", title: last.title };
  return { value: null, kind: "none" };
}

/**
 * Where input `index` of `node` comes from: {node, slot, path}, {value} of a widget that a subgraph shows, {unknown: why},
 * or undefined where nothing is connected. `path` holds the subgraph nodes that were entered on the way.
 */
function sourceOf(node, index, path) {
  const id = node.inputs?.[index]?.link;
  const link = id == null ? undefined : node.graph?.getLink(id);
  return link ? originOf(link, node.graph, path) : undefined;
}

function originOf(link, graph, path) {
  if (String(link.origin_id) === SUBGRAPH_INPUTS) return outside(graph, link.origin_slot, path);
  const origin = graph.getNodeById(link.origin_id);
  if (!origin || path.length > 50) return { unknown: "a node that cannot be followed" };
  const name = origin.title || origin.type;
  if (origin.mode === MUTED) return { unknown: `${name} (muted)` };
  if (origin.mode === BYPASSED) {
    const type = origin.outputs[link.origin_slot].type;
    const same = [link.origin_slot, ...origin.inputs.keys()].find((index) => origin.inputs[index]?.type === type);
    return (same === undefined ? undefined : sourceOf(origin, same, path)) ?? { unknown: `${name} (bypassed)` };
  }
  if (origin.type === "Reroute") return sourceOf(origin, 0, path);
  if (!origin.subgraph) return { node: origin, slot: link.origin_slot, path };
  const inner = origin.subgraph.getLink(origin.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0]);
  return inner ? originOf(inner, origin.subgraph, [...path, origin]) : { unknown: name };
}

/** What feeds input `slot` of the subgraph node around `graph`. */
function outside(graph, slot, path) {
  const around = path.at(-1)?.subgraph === graph ? [path.at(-1)] : containers(graph);
  if (around.length !== 1) return { unknown: "a subgraph that is used in several places" };
  const [container] = around;
  const source = sourceOf(container, slot, path.slice(0, -1));
  if (source) return source;
  const input = container.inputs?.[slot];
  const widget = container.widgets?.find((one) => one.name === (input?.widget?.name ?? input?.name));
  return widget && { value: widget.value };
}

/** All subgraph nodes that show `graph`. */
function containers(graph) {
  const root = graph.rootGraph ?? app.graph;
  const graphs = [root, ...(root.subgraphs?.values() ?? [])];
  return graphs.flatMap((one) => (one.nodes ?? one._nodes).filter((node) => node.subgraph === graph));
}
