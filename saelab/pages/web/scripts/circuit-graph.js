// The graph of a circuit in SVG: marks, edges, what lights up, the keys that walk along it.

/** @import { CircuitNode, Edge } from "./types.d.ts" */

import { circuit, members, share, sign, spoken, token } from "./circuit-data.js";
import { layout } from "./circuit-layout.js";
import { byId, el, nearest, replace, svg } from "./dom.js";
import { clamp, percent, signed } from "./numbers.js";
import { chip, textNodes } from "./text.js";

/** @type {Record<string, [drawing: string, words: string]>} */
export const SHAPES = {
  // [drawing in a box from -1 to 1, words]
  attention: ["M0-1a1 1 0 1 0 .01 0z", "latent of an attention layer"],
  residual: ["M-.86-.86h1.72v1.72h-1.72z", "latent of the stream"],
  mlp: ["M0-1.2L1.2 0 0 1.2-1.2 0z", "MLP"],
  "attention output": ["M-1.1.8L0-1.1 1.1.8z", "whole attention layer"],
  embedding: ["M-1.1-.7h2.2L0 1.1z", "embedding"],
  error: ["M-.9-.9L.9.9M-.9.9L.9-.9", "error of an SAE"],
  bias: ["M-1.1 0h2.2", "biases"],
  rest: ["M-1.1-.4h2.2M-1.1.4h2.2", "what was pruned, summed"],
};
const LETTER = 8; // pixels: tokens that do not fit beside each other stand upright
const NAMED = 0.03; // of the root: latents with this much have their number below them

/** Everything that a node is made of and goes into. @param {number} id */
function lineage(id) {
  const edges = new Set();
  const nodes = new Set([id]);
  for (const [links, end] of /** @type {[Edge[][], "parent" | "child"][]} */ ([
    [circuit.out, "parent"],
    [circuit.in, "child"],
  ])) {
    const waiting = [id];
    for (let next = waiting.pop(); next !== undefined; next = waiting.pop())
      for (const edge of links[next]) {
        if (edges.has(edge)) continue;
        edges.add(edge);
        if (!nodes.has(edge[end])) waiting.push(edge[end]);
        nodes.add(edge[end]);
      }
  }
  return { edges, nodes };
}

/** @param {CircuitNode} node @param {readonly number[]} at */
function drawNode(node, [x, y]) {
  const size = 3 + 8 * Math.sqrt(Math.min(1, Math.abs(node.contribution) / circuit.scale));
  const mark = svg("path.shape", { d: SHAPES[node.kind][0], transform: `scale(${size.toFixed(2)})` });
  return svg(
    `g.node.${sign(node.contribution)}.${node.kind.replace(" ", "-")}`,
    {
      role: "button",
      tabindex: -1,
      "aria-label": spoken(node),
      transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
      data: { node: node.id },
    },
    svg("rect.target", { x: -13, y: -13, width: 26, height: 26 }),
    mark,
    node.latent !== null &&
      Math.abs(share(node)) >= NAMED &&
      svg("text", { y: Math.max(20, size + 13).toFixed(1), "aria-hidden": "true" }, node.latent),
  );
}

/** @param {Edge} edge @param {(id: number) => readonly number[]} at */
function drawEdge(edge, at) {
  const [[x0, y0], [x1, y1]] = [at(edge.child), at(edge.parent)];
  const bend = Math.max(18, Math.abs(y0 - y1) / 2);
  const strength = Math.sqrt(Math.min(1, Math.abs(edge.contribution) / circuit.scale));
  return svg(`path.edge.${sign(edge.contribution)}`, {
    d: `M${x0.toFixed(1)} ${y0.toFixed(1)}C${x0.toFixed(1)} ${(y0 - bend).toFixed(1)} ${x1.toFixed(1)} ${(y1 + bend).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`,
    "stroke-width": (0.6 + 5 * strength).toFixed(2),
    "stroke-opacity": Math.min(1, 0.35 + 2 * strength).toFixed(2),
  });
}

/**
 * The graph of the nodes shown; `choose(id)` is called for a click. Gives {node, light(id)}.
 * @param {CircuitNode[]} shown
 * @param {number} wide
 * @param {(id: number) => void} choose
 */
export function graph(shown, wide, choose) {
  const ids = new Set(shown.map((node) => node.id));
  const named = wide < 480 ? 84 : 122; // pixels for the names of the rows
  const { at: places, rows, columns, width, height } = layout(circuit, shown, wide - named - 2);
  /** @param {number} id */
  const at = (id) => places.get(id) ?? [0, 0];
  const edges = circuit.edges.filter((edge) => ids.has(edge.child) && ids.has(edge.parent));
  const paths = new Map(edges.map((edge) => [edge, drawEdge(edge, at)]));
  const marks = new Map(shown.map((node) => [node.id, drawNode(node, at(node.id))]));
  const picture = svg(
    "svg.graph",
    {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "group",
      "aria-label": "Graph: arrow keys move along edges",
    },
    rows.map((row, i) => svg(i % 2 ? "rect.band" : "rect.band.odd", { x: 0, y: row.y, width, height: row.height })),
    columns.map((column) => svg("path.column", { d: `M${column.x.toFixed(1)} 0V${height}` })),
    [...paths.values()],
    [...marks.values()],
  );
  const names = el(
    "div.rows",
    { "aria-hidden": "true" },
    rows.map((row) => el("div", { style: { height: `${row.height}px` } }, row.name)),
  );
  /** @param {{ position: number, width: number }} column */
  const fits = ({ position, width: room }) => LETTER * (circuit.tokens[position]?.length ?? 4) + 16 <= room;
  const axis = el(
    columns.every(fits) ? "div.axis" : "div.axis.upright",
    { style: { width: `${width}px` } },
    columns.map((column) =>
      el(
        "div",
        { style: { width: `${column.width}px` } },
        column.position < 0
          ? el("span.muted", null, "sums")
          : [chip(circuit.tokens[column.position]), el("small", null, column.position)],
      ),
    ),
  );
  const scroller = el("div.scroll", { role: "region", "aria-label": "Graph", tabindex: 0 }, picture, axis);
  let current = shown[0].id;
  /** @param {number} id */
  const light = (id) => {
    const { edges: on, nodes } = lineage(id);
    picture.classList.add("lit");
    for (const [edge, path] of paths) path.classList.toggle("on", on.has(edge));
    for (const [other, mark] of marks) {
      mark.classList.toggle("on", nodes.has(other));
      mark.setAttribute("aria-pressed", String(other === id));
      mark.setAttribute("tabindex", other === id ? "0" : "-1");
    }
    if (marks.has(id)) current = id;
  };
  /** @param {Event} event */
  const nodeOf = (event) => {
    const mark = nearest(event, "[data-node]");
    return mark ? Number(mark.dataset.node) : null;
  };
  picture.addEventListener("click", (event) => {
    const id = nodeOf(event);
    if (id !== null) choose(id);
  });
  picture.addEventListener("pointerover", (event) => {
    const id = nodeOf(event);
    if (id !== null) hover(circuit.nodes[id], nearest(event, "[data-node]"));
    else hover(null);
  });
  picture.addEventListener("pointerleave", () => hover(null));
  picture.addEventListener("focusin", (event) => {
    const id = nodeOf(event);
    if (id !== null) hover(circuit.nodes[id], nearest(event, "[data-node]"));
  });
  picture.addEventListener("focusout", () => hover(null));
  picture.addEventListener("keydown", (event) => {
    const id = nodeOf(event);
    if (id === null) return;
    const [x, y] = at(id);
    /** @param {Edge[]} links @param {"parent" | "child"} end */
    const strongest = (links, end) =>
      links
        .filter((edge) => ids.has(edge[end]))
        .sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution))[0]?.[end];
    /** @param {number} way */
    const beside = (way) =>
      shown
        .filter((node) => node.id !== id && Math.sign(at(node.id)[0] - x) === way && Math.abs(at(node.id)[1] - y) < 40)
        .sort((a, b) => Math.abs(at(a.id)[0] - x) - Math.abs(at(b.id)[0] - x))[0]?.id;
    const move = {
      ArrowUp: () => strongest(circuit.out[id], "parent"),
      ArrowDown: () => strongest(circuit.in[id], "child"),
      ArrowLeft: () => beside(-1),
      ArrowRight: () => beside(1),
      Home: () => 0,
    }[event.key];
    if (move) {
      const to = move();
      if (to !== undefined) {
        choose(to);
        marks.get(to)?.focus();
      }
    } else if (event.key === "Enter" || event.key === " ") choose(id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  light(current);
  const style = { "grid-template-columns": `${named}px minmax(0, 1fr)` };
  return {
    node: el("div.circuit", { style }, names, scroller),
    light,
    has: (/** @type {number} */ id) => marks.has(id),
  };
}

/** The name of a node beside it. @param {CircuitNode | null} node @param {Element | null} [mark] */
function hover(node, mark) {
  const card = byId("hover");
  card.hidden = !node;
  if (!node || !mark) return;
  replace(
    card,
    el("b", null, node.name, members(node)),
    node.label && el("div.text", null, textNodes(node.label)),
    node.position !== null && el("div", null, chip(token(node)), el("span.muted", null, ` token ${node.position}`)),
    el(
      "div",
      null,
      el(`span.${sign(node.contribution)}`, null, signed(node.contribution)),
      ` · ${percent(share(node))} of the root`,
    ),
  );
  const box = mark.getBoundingClientRect();
  card.style.left = `${clamp(box.left + 18, 4, Math.max(4, innerWidth - card.offsetWidth - 8))}px`;
  card.style.top = `${clamp(box.top + 18, 4, Math.max(4, innerHeight - card.offsetHeight - 8))}px`;
}
