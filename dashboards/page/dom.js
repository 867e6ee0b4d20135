// Elements are made here and nowhere else. Text enters as text nodes, never as markup; the only URLs are fragments and blobs.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || (value === false && !key.startsWith("aria-"))) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key === "style") for (const [name, v] of Object.entries(value)) node.style.setProperty(name, v);
    else if (key === "value") node.value = value;
    else if (key === "href" && !/^(#|blob:)/.test(value)) throw new Error(`a link to ${value} is not of this page`);
    else if (/^(on|src)/i.test(key)) throw new Error(`attribute ${key} is not for this page`);
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

/** el("a.button", {href: "#f=1"}, "text", node, [more]): an HTML element; functions among the properties are listeners. */
function el(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  return fill(node, props, children);
}

/** The same for SVG. */
function svg(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElementNS(SVG, tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  return fill(node, props, children);
}

function button(label, action, props = {}) {
  return el("button.button", { type: "button", click: action, ...props }, label);
}

const byId = (id) => document.getElementById(id);
const replace = (node, ...children) => append((node.replaceChildren(), node), children);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

let identifiers = 0;
const freshId = (stem) => `${stem}-${++identifiers}`;

/** A section with a title: the unit of which pages are made. */
function panel(title, props, ...body) {
  const id = freshId("panel");
  return el("div.panel", { role: "group", "aria-labelledby": id, ...props }, el("h2", { id }, title), body);
}

/** Definition list of [name, value] pairs. */
function pairs(kind, entries, item = "") {
  const wrap = (term, value) => el(item ? `div.${item}` : "div", null, el("dt", null, term), el("dd", null, value));
  return el(
    `dl.${kind}`,
    null,
    entries.filter(([, value]) => value !== undefined && value !== null).map(([t, v]) => wrap(t, v)),
  );
}

/** A table. heads: a text a column, "#" first where its cells are numbers, "" for none; rows of cells, null for no row. */
function table(heads, rows, hidden = false) {
  const kind = (head) => (head.startsWith("#") ? ".num" : "");
  const title = (head) => {
    const words = head.replace("#", "");
    return words ? el(`th${kind(head)}`, { scope: "col" }, textNodes(words)) : el("td");
  };
  const cells = (row) => row.map((cell, i) => el(`td${kind(heads[i])}`, null, cell));
  return el(
    "table.pairs",
    null,
    el("thead", { class: hidden && "offscreen" }, el("tr", null, heads.map(title))),
    el(
      "tbody",
      null,
      rows.filter(Boolean).map((row) => el("tr", null, cells(row))),
    ),
  );
}
const tinted = (x, words) => el(x < 0 ? "span.minus" : "span.plus", null, words);

/** Tabs with roving focus. `choices` is [[key, label, panelMaker?]]; `onChange(key)` paints into the panel of id `panelId`. */
function tabs(label, choices, current, panelId, onChange, small = false) {
  const bar = el(small ? "div.tabs.small" : "div.tabs", { role: "tablist", "aria-label": label });
  const choose = (key, focus) => {
    for (const tab of bar.children) {
      const on = tab.dataset.key === key;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
      if (on) byId(panelId)?.setAttribute("aria-labelledby", tab.id);
    }
  };
  for (const [key, text] of choices) {
    bar.append(
      el(
        "button",
        {
          type: "button",
          role: "tab",
          id: freshId("tab"),
          data: { key },
          "aria-controls": panelId,
          click: () => {
            choose(key);
            onChange(key);
          },
        },
        text,
      ),
    );
  }
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const keys = choices.map(([key]) => key);
    const at = keys.indexOf(document.activeElement.dataset.key);
    const key = keys[Number.isFinite(step) ? (at + step + keys.length) % keys.length : clamp(step, 0, keys.length - 1)];
    choose(key, true);
    onChange(key);
  });
  choose(current);
  bar.choose = choose;
  return bar;
}

/** A short message at the foot of the page, read out by screen readers. */
function say(message) {
  const status = byId("status");
  status.textContent = message;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => {
    status.textContent = "";
  }, 3500);
}

/** What a person sees where something could not be shown: what failed, and that the rest goes on. */
function errorCard(title, error, again) {
  return el(
    "div.alert",
    { role: "alert" },
    el("h2", null, title),
    el("p", null, error.hint || "The rest of the page works on."),
    el("p", null, el("code", null, error.message || String(error))),
    again && button("Try again", again),
  );
}
