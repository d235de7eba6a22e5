// A DOM element as the last row of a node, in canvas mode and in Vue mode ("Nodes 2.0"), never saved with the workflow.
import { app } from "../../scripts/app.js";

/**
 * Add `element` to `node`. The panel is at least `minWidth` by `minHeight` pixels and grows with the node.
 * `draw` is called whenever the element may need its content again: shown, resized, rebuilt by undo.
 * The first class of `element` must be its own: it is how a stale copy is found.
 */
export function addPanel(node, element, { name, minWidth, minHeight, draw }) {
  element.classList.add("tidetable-panel", "widget-expands"); // the latter lets it grow in Vue mode
  element.style.minHeight = `${minHeight}px`; // Vue mode reads this, canvas mode getMinHeight
  const widget = node.addDOMWidget(name, `tidetable_${name}`, element, {
    serialize: false, // not in prompts
    hideOnZoom: false,
    hideInPanel: true, // newer pages list widgets in a side panel too, where there is nothing to set here
    getMinHeight: () => minHeight,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // not in workflows
  passOn(element);

  const refresh = () => {
    replaceStale(node, element);
    draw();
  };
  const observer = new ResizeObserver(draw);
  observer.observe(element);
  after(node, "onConfigure", () => requestAnimationFrame(() => requestAnimationFrame(refresh)));
  after(node, "onRemoved", () => observer.disconnect());

  // Without this the first frame draws the panel below the node's box, and its later growth counts as a user's change.
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, minWidth), Math.max(node.size[1], height)]);
  return refresh;
}

/** A <div> of this class. */
export function block(className) {
  const element = document.createElement("div");
  element.className = className;
  return element;
}

/** A <span> with this content. */
export function text(content, className = "") {
  const element = document.createElement("span");
  element.textContent = content;
  element.className = className;
  return element;
}

/** Call `action` after the node's own `method`, with the same arguments. */
export function after(node, method, action) {
  const original = node[method];
  node[method] = function (...values) {
    const result = original?.apply(this, values);
    action.apply(this, values);
    return result;
  };
}

/** In Vue mode, frontend 1.32 keeps showing the element of the node that undo has replaced: put ours there. */
function replaceStale(node, element) {
  const isShown = globalThis.LiteGraph?.vueNodesMode && node.graph && node.graph === app.canvas?.graph;
  if (!isShown || element.isConnected) return;
  const host = document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`);
  host?.getElementsByClassName(element.classList[0])[0]?.replaceWith(element);
}

/** In canvas mode, wheel and middle button would end in the element. The user means the canvas, or scrolling text. */
function passOn(element) {
  const pass = (name, method, isMeant) =>
    element.addEventListener(name, (event) => {
      if (globalThis.LiteGraph?.vueNodesMode || !isMeant(event)) return; // Vue nodes do it themselves
      event.preventDefault();
      app.canvas[method](event);
    });
  pass("wheel", "processMouseWheel", (event) => {
    const area = event.target.closest?.("textarea");
    return event.ctrlKey || !area || area.scrollHeight <= area.clientHeight;
  });
  pass("pointerdown", "processMouseDown", (event) => event.button === 1);
  pass("pointermove", "processMouseMove", (event) => (event.buttons & 4) !== 0);
  pass("pointerup", "processMouseUp", (event) => event.button === 1);
}
