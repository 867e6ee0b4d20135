// The page of a circuit: the graph, what is known of one node, and all of them as a table.

/** @import { Circuit, CircuitNode, Edge } from "./types.d.ts" */

import { circuit, dashboardOf, members, share, sign, take, token } from "./circuit-data.js";
import { graph, SHAPES } from "./circuit-graph.js";
import { step } from "./colour.js";
import { all, button, byId, el, nearest, replace, svg } from "./dom.js";
import { downloadCsv, downloadJson } from "./export.js";
import { clamp, count, number, percent, plural, signed } from "./numbers.js";
import { pairs } from "./parts.js";
import { arrived, startReport } from "./report.js";
import { go, here, startRoute } from "./route.js";
import { chip, textNodes } from "./text.js";

const MOST_SHOWN = 60; // nodes at first: the rest comes with the slider

const LINKS = 12; // in a list of what a node is made of or goes into

/** @param {CircuitNode} node */
function details(node) {
  /** @param {Edge} edge @param {"parent" | "child"} end */
  const link = (edge, end) => {
    const other = circuit.nodes[edge[end]];
    return el(
      "tr",
      null,
      el("td", null, el("a", { href: here({ n: other.id }) }, other.name, members(other))),
      el("td", null, other.position === null ? "" : chip(token(other))),
      el("td.num", null, edge.head === null ? "" : `head ${edge.head}`),
      el(`td.num.${sign(edge.contribution)}`, null, signed(edge.contribution)),
    );
  };
  /** @param {string} title @param {Edge[]} edges @param {"parent" | "child"} end */
  const list = (title, edges, end) =>
    edges.length > 0 &&
    el(
      "div",
      null,
      el("h3", null, title),
      el(
        "table.links",
        null,
        el(
          "tbody",
          null,
          [...edges]
            .sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution))
            .slice(0, LINKS)
            .map((edge) => link(edge, end)),
        ),
      ),
      edges.length > LINKS && el("p.note", null, `and ${count(edges.length - LINKS)} smaller ones`),
    );
  const address = dashboardOf(node);
  const open = address && el("a.button", { rel: "noreferrer" }, "Open its dashboard page");
  if (open) open.setAttribute("href", address); // checked in dashboardOf
  return [
    node.label && el("p.text", null, textNodes(node.label)),
    pairs("stats", [
      ["what", SHAPES[node.kind][1]],
      ["token", node.position === null ? undefined : [chip(token(node)), ` ${node.position}`]],
      ["activation", node.activation === null ? undefined : number(node.activation)],
      ["gives the root", signed(node.contribution)],
      ["of the root", percent(share(node))],
      ["terms", node.members > 1 ? count(node.members) : undefined],
      ["shown of what it is made of", node.kept_mass === null ? undefined : percent(node.kept_mass)],
    ]),
    open && el("p", null, open),
    list("Goes into", circuit.out[node.id], "parent"),
    list("Made of", circuit.in[node.id], "child"),
  ];
}

/** @param {CircuitNode[]} shown @param {(id: number) => void} choose */
function table(shown, choose) {
  /** @param {CircuitNode} node */
  const row = (node) =>
    el(
      "tr",
      { data: { row: node.id } },
      el("td", null, el("a", { href: here({ n: node.id }) }, node.name, members(node))),
      el("td.text", null, node.label ? textNodes(node.label) : ""),
      el("td", null, node.position === null ? "" : [chip(token(node)), el("small.muted", null, ` ${node.position}`)]),
      el("td.num", null, node.activation === null ? "" : number(node.activation)),
      el(`td.num.${sign(node.contribution)}`, null, signed(node.contribution)),
      el("td.num", null, percent(share(node))),
    );
  const titles = ["Node", "Label", "Token", "Activation", "Contribution", "Share"];
  const body = el("tbody", null, shown.map(row));
  body.addEventListener("click", (event) => {
    const id = nearest(event, "a") ? null : nearest(event, "tr")?.dataset.row;
    if (id) choose(Number(id));
  });
  const heads = titles.map((title, i) => el(i > 2 ? "th.num" : "th", { scope: "col" }, title));
  return el("table.pairs.nodes", null, el("thead", null, el("tr", null, heads)), body);
}

function strip() {
  const sums = new Float64Array(circuit.tokens.length);
  for (const node of circuit.nodes)
    if (!node.expanded && node.position !== null) sums[node.position] += node.contribution;
  const top = Math.max(...sums.map(Math.abs)) || 1;
  return el(
    "p.strip",
    { "aria-label": "The text, each token shaded by what came from it" },
    circuit.tokens.map((string, i) => {
      const k = sums[i] > 0 ? step(sums[i] / top) : 0;
      /** @type {Record<string, string>} */
      const colours = k ? { background: `var(--a${k})`, color: `var(--i${k})` } : {};
      const here_ = i === circuit.nodes[0].position ? "span.t.goal" : "span.t";
      return el(here_, { style: colours, title: `token ${i}: ${signed(sums[i])}` }, textNodes(string));
    }),
  );
}

function summary() {
  const { root, kept, rest, error, bias } = circuit.sums;
  /** @param {number} x */
  const part = (x) => [signed(x), el("small", null, `${percent(x / root)} of it`)];
  return pairs(
    "cards",
    [
      ["pre-activation", number(root)],
      ["kept nodes", part(kept)],
      ["pruned, summed", part(rest)],
      ["errors of SAEs", part(error)],
      ["biases", part(bias)],
    ],
    "figure-card",
  );
}

function legend() {
  const kinds = [...new Set(circuit.nodes.map((node) => node.kind))];
  return el(
    "p.kinds",
    null,
    kinds.map((kind) =>
      el(
        "span",
        null,
        svg(
          `svg.node.plus.${kind.replace(" ", "-")}`,
          { width: 16, height: 16, viewBox: "-2 -2 4 4", "aria-hidden": "true" },
          svg("path.shape", { d: SHAPES[kind][0] }),
        ),
        SHAPES[kind][1],
      ),
    ),
    el("span.plus", null, "adds"),
    el("span.minus", null, "takes away (dashed)"),
  );
}

function startCircuit() {
  const root = circuit.nodes[0];
  document.title = `${root.name} · saelab circuit`;
  const place = el("div", { id: "place" });
  const side = el("aside.panel", { "aria-label": "The chosen node", tabindex: -1 });
  const rows = el("div.scroll.list", { role: "region", "aria-label": "Table of nodes", tabindex: 0 });
  const shownCount = el("output", null);
  const sizes = circuit.order.map((node) => Math.abs(share(node)));
  // in thousandths of the root: the slider is logarithmic
  const slider = el("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": "Smallest share shown" });
  const least = () => (slider.value === "0" ? 0 : 10 ** (-4 + (4 * Number(slider.value)) / 100));
  const first = sizes.length > MOST_SHOWN ? sizes[MOST_SHOWN] : 0;
  slider.value = String(first > 0 ? clamp(Math.ceil(25 * (Math.log10(first) + 4)), 1, 100) : 0);
  /** @type {ReturnType<typeof graph>} */
  let picture;
  let chosen = 0;
  /** @param {number} id */
  const choose = (id) => go(here({ n: id }));
  const paint = () => {
    const shown = circuit.order.filter(
      (node) => Math.abs(share(node)) >= least() || node.id === 0 || node.id === chosen,
    );
    picture = graph(shown, place.clientWidth, choose);
    replace(place, picture.node);
    replace(rows, table(shown, choose));
    replace(
      shownCount,
      `${count(shown.length)} of ${plural(circuit.nodes.length, "node")}, each at least ${percent(least(), 2)} of the root`,
    );
  };
  /** @param {number} id */
  const select = (id) => {
    chosen = id;
    if (!picture.has(id)) paint();
    picture.light(id);
    replace(side, el("h2", null, circuit.nodes[id].name), details(circuit.nodes[id]));
    for (const row of all(rows, "tr[data-row]"))
      if (row.dataset.row === String(id)) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
  };
  replace(
    byId("main"),
    el(
      "div.page-head",
      null,
      el(
        "h1",
        null,
        root.name,
        " at",
        chip(token(root)),
        root.label && el("span.text.muted", null, textNodes(root.label)),
      ),
    ),
    summary(),
    strip(),
    el("div.toolbar", null, legend(), el("label.field", null, "Least share", slider, shownCount)),
    el("div.overview", null, el("div", null, place, el("h2.offscreen", null, "Nodes"), rows), side),
    el("div.hover", { id: "hover", hidden: true, "aria-hidden": "true" }),
  );
  slider.addEventListener("input", () => {
    paint();
    select(chosen);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    paint();
    select(chosen);
  }).observe(place);
  paint();
  startRoute((params) => {
    const id = Number(params.get("n") ?? 0);
    select(Number.isInteger(id) && id >= 0 && id < circuit.nodes.length ? id : 0);
    arrived();
  });
}

function provenanceOfCircuit() {
  const { depth, keep: kept, most, share: smallest } = circuit.settings;
  return el(
    "div",
    null,
    el(
      "p",
      null,
      "Model ",
      el("span.text", null, textNodes(circuit.model)),
      ". ",
      circuit.saes.map((sae) => [el("span.text", null, textNodes(`${sae.site}: ${sae.cfg}`)), "; "]),
      `expanded ${plural(depth, "time")}, ${percent(kept)} of the absolute contributions and at most ${plural(most, "child", "children")} kept of each node, nodes under ${percent(smallest)} of the root left as they are.`,
    ),
    el(
      "p",
      null,
      "Attention patterns, norms and codes are held at what they were: contributions add up to the pre-activation, and do not say what another input would do. Made by saelab; this page reaches no network.",
    ),
  );
}

/** @type {(keyof CircuitNode)[]} */
const KEYS = [
  "id",
  "name",
  "label",
  "kind",
  "of",
  "block",
  "position",
  "latent",
  "activation",
  "contribution",
  "depth",
  "expanded",
  "members",
];
const asCsv = () =>
  downloadCsv(
    "circuit.csv",
    [...KEYS, "token"],
    circuit.nodes.map((node) => [...KEYS.map((key) => node[key]), token(node)]),
  );
function asJson() {
  const { format, version, model, tokens, saes, settings, sums, nodes, edges } = circuit;
  downloadJson("circuit.json", { format, version, model, tokens, saes, settings, sums, nodes, edges });
}

/** @param {Circuit} data */
function paint(data) {
  take(data);
  startCircuit();
  return provenanceOfCircuit();
}
const plain = { class: "button plain" };
startReport("saelab circuit", paint, button("CSV", asCsv, plain), button("JSON", asJson, plain));
