// Where a node is in the graph. Ids are numbers in older frontends and strings in newer ones: compare them as strings.
import { app } from "../../scripts/app.js";

/** The node for an id as the server sends it, "7", or "4:1" for node 1 inside the subgraph node 4; else undefined. */
export function findNode(executionId) {
  let graph = app.graph;
  let node;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id) ?? undefined;
    graph = node?.subgraph;
  }
  return node;
}

/** A key that stays the same when the page rebuilds a node (undo, tabs), and differs between workflows. */
export function placeOf(node) {
  return `${node.graph?.id}/${node.id}`;
}
