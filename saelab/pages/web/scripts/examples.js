// Examples: windows of text around a peak, drawn with as few nodes as possible.

/** @import { Child, Mode, Numbers, TokenGroup } from "./types.d.ts" */
/** @import { Feature, Example } from "./feature-data.js" */

import { STEPS, step } from "./colour.js";
import { el } from "./dom.js";
import { number, percent, signed } from "./numbers.js";
import { pairs, table, tinted } from "./parts.js";
import { decoder, joinBytes, textNodes } from "./text.js";

export const LEFT_OUT = 255; // of what the SAE misses a token: it is not applied there

/** What hatched tokens are. */
export const leftOutLegend = () =>
  el(
    "span",
    null,
    el("i.t.left-out", { "aria-hidden": "true" }, "\u2003"),
    " left out: the SAE is not applied (first positions, special tokens, large norms)",
  );

/**
 * Nodes for the tokens [from, to) of a window. `mode`: {missed, misses, sources, effects, top}: what the SAE misses a token
 * and whether that colours, what else does (the activation without the two), what underlines, the end of the scale. The sources of the peak are tokens whatever colours.
 * @param {Example} window
 * @param {TokenGroup[]} groups
 * @param {Mode} mode
 */
function windowNodes(window, groups, mode) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(...textNodes(plain));
    plain = "";
  };
  for (const { from, to, text: string } of groups) {
    let act = 0,
      effect = 0,
      miss = 0,
      leftOut = false;
    for (let i = from; i < to; i++) {
      act = Math.max(act, window.activation(i));
      if (mode.effects && Math.abs(window.effect(i)) > Math.abs(effect)) effect = window.effect(i);
      const missed = mode.missed?.[window.poolStart + i] ?? 0;
      if (missed === LEFT_OUT) leftOut = true;
      else if (mode.misses) miss = Math.max(miss, missed / 15);
    }
    const peak = window.peak >= from && window.peak < to;
    const source = window.sourceOf(from, to);
    const share = mode.misses ? miss : mode.sources ? Math.abs(source) / window.largestSource : act / mode.top;
    if (!peak && !(share > 0) && !effect && !source && !leftOut) {
      plain += string;
      continue;
    }
    flush();
    const token = el(
      "span.t",
      { tabindex: -1, data: { i: from, n: to - from } },
      string === "" ? "∅" : textNodes(string),
    );
    if (step(share)) token.dataset.a = String(step(share));
    if (leftOut) token.classList.add("left-out");
    if (peak) token.classList.add("peak");
    // A difference below a fiftieth of the latent's largest effect is not worth a line.
    if (Math.abs(effect) > mode.effects / 50) token.classList.add(effect > 0 ? "up" : "down");
    if (source) token.dataset.source = source > 0 ? "▲" : "▽";
    nodes.push(token);
  }
  flush();
  return nodes;
}

/**
 * One example: its activation, its text with the peak in line with those above, where it is from.
 * @param {Example} window
 * @param {Mode} mode
 * @param {number} [times]
 */
function exampleRow(window, mode, times = 1) {
  const { groups } = window;
  const centre = groups.findIndex((g) => window.peak < g.to);
  const near = kindOf(window) === "near";
  const line = el(
    "div.line",
    { dir: "auto" },
    el("span.before", null, el("span", null, windowNodes(window, groups.slice(0, centre), mode))),
    el("span.centre", null, windowNodes(window, groups.slice(centre, centre + 1), mode)),
    el("span.after", null, windowNodes(window, groups.slice(centre + 1), mode)),
  );
  const row = el(
    "li.example.row-of-tokens",
    { data: { w: window.number, context: window.context } },
    el(
      "div.act.num",
      { title: near ? "pre-activation at the peak: the latent did not fire" : "activation at the peak" },
      near ? `(${number(window.act)})` : number(window.act),
    ),
    line,
    el(
      "div.where",
      null,
      times > 1 && el("span.badge", { title: "windows with the same text" }, `×${times}`),
      " ",
      el(
        "span",
        {
          title: `document ${window.document ?? "–"}, context ${window.context}, position ${window.start + window.peak}`,
        },
        `${window.document ?? "–"}:${window.start + window.peak}`,
      ),
      el(
        "button",
        {
          type: "button",
          "aria-expanded": "false",
          "aria-label": `Whole text of example ${window.number + 1}`,
          click: (event) => event.currentTarget.setAttribute("aria-expanded", row.classList.toggle("whole")),
        },
        "⤢",
      ),
    ),
  );
  if (window.repeat) row.classList.add("repeat");
  return row;
}

/** @param {Example} window */
export const kindOf = (window) => window.feature.sae.dataset.manifest.groups[window.group]?.kind;

/**
 * A list of examples; a window that repeats an earlier one of the list is shown as a number beside that.
 * @param {Example[]} windows
 * @param {(window: Example) => Mode} modeOf
 */
export function exampleList(windows, modeOf) {
  const kept = [];
  const times = new Map(); // text -> its entry
  for (const window of windows) {
    const before = window.repeat ? times.get(window.text) : undefined;
    if (before) before.times++;
    else {
      const entry = { window, times: 1 };
      kept.push(entry);
      times.set(window.text, entry);
    }
  }
  return el(
    "ol",
    null,
    kept.map(({ window, times: n }) => exampleRow(window, modeOf(window), n)),
  );
}

/**
 * Under a log histogram: the share of firings below an activation, to the bin.
 * @param {Feature} feature
 * @param {number} act
 */
function shareBelow(feature, act) {
  const { first, counts } = feature.activations;
  const bin = Math.floor(4 * Math.log2(act)) - first;
  let below = 0,
    all = 0;
  for (let i = 0; i < counts.length; i++) {
    all += counts[i];
    if (i < bin) below += counts[i];
  }
  return all ? below / all : null;
}

/** @type {Record<number, string>} */
const METHODS = { 1: "direct path, norms frozen", 2: "full forward pass" };

/**
 * What the hover card says of token i (and the n - 1 that share its characters).
 * @param {Example} window
 * @param {number} i
 * @param {number} n
 * @param {Numbers | null} misses
 * @returns {Child[]}
 */
export function tokenCard(window, i, n, misses) {
  const { feature } = window;
  const { vocab } = feature;
  const last = i + n - 1;
  const at_ =
    window.peak >= i && window.peak <= last
      ? window.peak
      : [...Array(n).keys()].map((k) => i + k).reduce((a, b) => (window.activation(b) > window.activation(a) ? b : a));
  const act = window.activation(at_);
  /** @type {[Child, Child][]} */
  const entries = [];
  const near = kindOf(window) === "near" && at_ === window.peak;
  entries.push(near ? ["pre-activation", number(window.act)] : ["activation", act ? number(act) : "0"]);
  if (act && !near) {
    entries.push(["of its maximum", percent(act / feature.figure("max"))]);
    const below = shareBelow(feature, act);
    if (below !== null) entries.push(["larger than", `${percent(below)} of firings`]);
  }
  if (window.storedEffects) entries.push(["loss without it", `${signed(window.effect(at_))} nats, first order`]);
  if (misses)
    entries.push([
      "SAE misses",
      misses[window.poolStart + at_] === LEFT_OUT
        ? "left out: not applied here"
        : percent(misses[window.poolStart + at_] / 15, 2),
    ]);
  const given = window.sourceOf(i, last + 1);
  if (given) entries.push(["gives to the peak", `${signed(given)} of the pre-activation`]);
  entries.push(["position", `${window.start + at_} of context ${window.context}`]);
  const ids = Array.from(window.tokens.subarray(i, last + 1));
  entries.push([n > 1 ? "token ids" : "token id", ids.map((t) => vocab.ids[t]).join(" ")]);
  const string = decoder.decode(joinBytes(ids.map((t) => vocab.bytes(t))));
  /** @type {Child[]} */
  const body = [el("h3", null, string === "" ? "∅" : textNodes(string.slice(0, 500))), pairs("stats", entries)];
  if (at_ === window.peak) body.push(explainedBody(window), sourcesBody(window));
  return body;
}

/** @param {Example} window */
function explainedBody(window) {
  const x = window.explained;
  if (!x) return null;
  const { vocab } = window.feature;
  /** @param {[token: number, delta: number]} pair */
  const row = ([token, delta]) => [vocab.chip(token), tinted(delta, `${signed(100 * delta)} pp`)];
  return [
    el("h4", null, `Next token with the latent ablated (${METHODS[x.method] ?? "method unknown"})`),
    pairs("stats", [
      ["loss", `${signed(x.loss)} nats`],
      ["KL", `${number(x.kl)} nats`],
    ]),
    x.next !== null && el("p", null, vocab.chip(x.next), ` ${percent(x.p)} → ${percent(x.ablated)}`),
    table(["token", "#probability"], [...x.up, ...x.down].map(row), true),
  ];
}

/** The sources of the pre-activation at the peak, and what is left of it. @param {Example} window */
function sourcesBody(window) {
  const list = window.sources;
  if (!list.length) return null;
  const { vocab } = window.feature;
  /** @param {{ back: number, head: number, value: number }} source */
  const row = ({ back, head, value }) => {
    const token = window.tokens[window.peak - back];
    const far = back === 0 ? "itself" : `${back} before`;
    return [token === undefined ? "earlier" : vocab.chip(token), far, `head ${head}`, tinted(value, signed(value))];
  };
  const rest = ["all else", "", "", tinted(window.rest, signed(window.rest))];
  return [
    el("h4", null, "Where the pre-activation at the peak comes from"),
    table(["source", "#place", "#mostly by", "#contribution"], [...list.slice(0, 8).map(row), rest], true),
  ];
}

/** The legend of the ramp. @param {string} words @param {string} from @param {string} to */
export function rampLegend(words, from, to) {
  return el(
    "span",
    null,
    words,
    " ",
    from,
    " ",
    el(
      "span.ramp",
      { "aria-hidden": "true" },
      Array.from({ length: STEPS }, (_, i) => el("i.t", { data: { a: i + 1 } })),
    ),
    " ",
    to,
  );
}
