// The page of a circuit: the graph, what is known of one node, and all of them as a table.

const SHAPES = {
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
const MOST_SHOWN = 60; // nodes at first: the rest comes with the slider
const NAMED = 0.03; // of the root: latents with this much have their number below them
const LINKS = 12; // in a list of what a node is made of or goes into
const HARMLESS = new Set(["file:", "http:", "https:"]);

const circuit = {};

function read() {
  const bytes = Uint8Array.from(atob(byId("circuit").textContent), (c) => c.charCodeAt(0));
  Object.assign(circuit, JSON.parse(new TextDecoder().decode(bytes)));
  circuit.scale = Math.abs(circuit.sums.root) || 1;
  circuit.out = circuit.nodes.map(() => []);
  circuit.in = circuit.nodes.map(() => []);
  for (const edge of circuit.edges) {
    circuit.out[edge.child].push(edge);
    circuit.in[edge.parent].push(edge);
  }
  circuit.order = [...circuit.nodes].sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution));
}

const share = (node) => node.contribution / circuit.sums.root;
const sign = (x) => (x < 0 ? "minus" : "plus");
const members = (node) => (node.members > 1 ? ` (${count(node.members)} terms)` : "");
const token = (node) => (node.position === null ? null : circuit.tokens[node.position]);

/** What a screen reader says of a node. */
const spoken = (node) =>
  `${node.name}${members(node)}${node.label ? `, ${node.label}` : ""}` +
  `${node.position === null ? "" : `, token ${node.position} ${token(node)}`}, ${signed(node.contribution)}`;

/** Everything that a node is made of and goes into. */
function lineage(id) {
  const edges = new Set();
  const nodes = new Set([id]);
  for (const [links, end] of [
    [circuit.out, "parent"],
    [circuit.in, "child"],
  ]) {
    const waiting = [id];
    while (waiting.length)
      for (const edge of links[waiting.pop()]) {
        if (edges.has(edge)) continue;
        edges.add(edge);
        if (!nodes.has(edge[end])) waiting.push(edge[end]);
        nodes.add(edge[end]);
      }
  }
  return { edges, nodes };
}

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
      svg("text", { y: 20, "aria-hidden": "true" }, node.latent),
  );
}

function drawEdge(edge, at) {
  const [[x0, y0], [x1, y1]] = [at.get(edge.child), at.get(edge.parent)];
  const bend = Math.max(18, Math.abs(y0 - y1) / 2);
  const width = 0.6 + 5 * Math.sqrt(Math.min(1, Math.abs(edge.contribution) / circuit.scale));
  const path = svg(`path.edge.${sign(edge.contribution)}`, {
    d: `M${x0.toFixed(1)} ${y0.toFixed(1)}C${x0.toFixed(1)} ${(y0 - bend).toFixed(1)} ${x1.toFixed(1)} ${(y1 + bend).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`,
    "stroke-width": width.toFixed(2),
  });
  return path;
}

/** The graph of the nodes shown; `choose(id)` is called for a click. Gives {node, light(id)}. */
function graph(shown, wide, choose) {
  const ids = new Set(shown.map((node) => node.id));
  const { at, rows, columns, width, height } = layout(circuit, shown, wide);
  const edges = circuit.edges.filter((edge) => ids.has(edge.child) && ids.has(edge.parent));
  const paths = new Map(edges.map((edge) => [edge, drawEdge(edge, at)]));
  const marks = new Map(shown.map((node) => [node.id, drawNode(node, at.get(node.id))]));
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
  const axis = el(
    "div.axis",
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
  const light = (id) => {
    const { edges: on, nodes } = lineage(id);
    picture.classList.add("lit");
    for (const [edge, path] of paths) path.classList.toggle("on", on.has(edge));
    for (const [other, mark] of marks) {
      mark.classList.toggle("on", nodes.has(other));
      mark.setAttribute("aria-pressed", other === id);
      mark.setAttribute("tabindex", other === id ? 0 : -1);
    }
    if (marks.has(id)) current = id;
  };
  const nodeOf = (event) => {
    const mark = event.target.closest?.("[data-node]");
    return mark ? Number(mark.dataset.node) : null;
  };
  picture.addEventListener("click", (event) => {
    const id = nodeOf(event);
    if (id !== null) choose(id);
  });
  picture.addEventListener("pointerover", (event) => {
    const id = nodeOf(event);
    if (id !== null) hover(circuit.nodes[id], event.target.closest("[data-node]"));
    else hover(null);
  });
  picture.addEventListener("pointerleave", () => hover(null));
  picture.addEventListener("focusin", (event) => {
    const id = nodeOf(event);
    if (id !== null) hover(circuit.nodes[id], event.target);
  });
  picture.addEventListener("focusout", () => hover(null));
  picture.addEventListener("keydown", (event) => {
    const id = nodeOf(event);
    if (id === null) return;
    const [x, y] = at.get(id);
    const strongest = (links, end) =>
      links
        .filter((edge) => ids.has(edge[end]))
        .sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution))[0]?.[end];
    const beside = (way) =>
      shown
        .filter(
          (node) =>
            node.id !== id && Math.sign(at.get(node.id)[0] - x) === way && Math.abs(at.get(node.id)[1] - y) < 40,
        )
        .sort((a, b) => Math.abs(at.get(a.id)[0] - x) - Math.abs(at.get(b.id)[0] - x))[0]?.id;
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
  return { node: el("div.circuit", null, names, scroller), light, has: (id) => marks.has(id) };
}

/** The name of a node beside it. */
function hover(node, mark) {
  const card = byId("hover");
  card.hidden = !node;
  if (!node) return;
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

/** The address of a latent's page in the dashboard of its SAE; null where there is none, or the address is of another kind. */
function dashboardOf(node) {
  const base = circuit.saes.find((sae) => sae.kind === node.kind && sae.block === node.block)?.page;
  if (!base) return null;
  try {
    const url = new URL(base, location.href);
    return HARMLESS.has(url.protocol) ? `${url.href}#f=${node.latent}` : null;
  } catch {
    return null;
  }
}

function details(node) {
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

function table(shown, choose) {
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
    const id = event.target.closest("a") ? null : event.target.closest("tr")?.dataset.row;
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
      const colours = k ? { background: `var(--a${k})`, color: `var(--i${k})` } : {};
      const here_ = i === circuit.nodes[0].position ? "span.t.goal" : "span.t";
      return el(here_, { style: colours, title: `token ${i}: ${signed(sums[i])}` }, textNodes(string));
    }),
  );
}

function summary() {
  const { root, kept, rest, error, bias } = circuit.sums;
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
  const least = () => (slider.value === "0" ? 0 : 10 ** (-4 + (4 * slider.value) / 100));
  const first = sizes.length > MOST_SHOWN ? sizes[MOST_SHOWN] : 0;
  slider.value = first > 0 ? clamp(Math.ceil(25 * (Math.log10(first) + 4)), 1, 100) : 0;
  let picture;
  let chosen = 0;
  const choose = (id) => go(here({ n: id }));
  const paint = () => {
    const shown = circuit.order.filter(
      (node) => Math.abs(share(node)) >= least() || node.id === 0 || node.id === chosen,
    );
    picture = graph(shown, Math.max(300, place.clientWidth - 130), choose);
    replace(place, picture.node);
    replace(rows, table(shown, choose));
    replace(
      shownCount,
      `${count(shown.length)} of ${plural(circuit.nodes.length, "node")}, each at least ${percent(least(), 2)} of the root`,
    );
  };
  const select = (id) => {
    chosen = id;
    if (!picture.has(id)) paint();
    picture.light(id);
    replace(side, el("h2", null, circuit.nodes[id].name), details(circuit.nodes[id]));
    for (const row of rows.querySelectorAll("tr[data-row]"))
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
    document.documentElement.dataset.shown = String(Number(document.documentElement.dataset.shown ?? 0) + 1);
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

function begin() {
  loadPreferences();
  byId("theme").addEventListener("click", () => prefer({ theme: isDark() ? "light" : "dark" }));
  try {
    read();
    const keys = [
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
    byId("csv").addEventListener("click", () =>
      downloadCsv(
        "circuit.csv",
        [...keys, "token"],
        circuit.nodes.map((node) => [...keys.map((key) => node[key]), token(node)]),
      ),
    );
    byId("json").addEventListener("click", () => {
      const { format, version, model, tokens, saes, settings, sums, nodes, edges } = circuit;
      downloadJson("circuit.json", { format, version, model, tokens, saes, settings, sums, nodes, edges });
    });
    replace(byId("provenance"), provenanceOfCircuit());
    startCircuit();
  } catch (error) {
    replace(
      byId("main"),
      errorCard(
        "This circuit could not be read",
        Object.assign(error, { hint: "The file may be cut off or changed." }),
      ),
    );
    document.documentElement.dataset.shown = "0";
  }
}

addEventListener("DOMContentLoaded", begin); // the graph stands below this script
