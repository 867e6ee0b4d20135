// A prompt: its tokens, and a matrix of tokens by latents.

/** @import { Child, Columns, Manifest, Numbers, Shown, TokenGroup } from "./types.d.ts" */
/** @import { Dataset, Sae } from "./feature-data.js" */

import { hoverCard, rove, tokenCards } from "./card.js";
import { chunk } from "./chunks.js";
import { step } from "./colour.js";
import { choice } from "./dialogs.js";
import { button, el, first, nearest, replace } from "./dom.js";
import { LEFT_OUT, leftOutLegend, rampLegend } from "./examples.js";
import { openExport } from "./export.js";
import { at, starts, tokenGroups } from "./feature-data.js";
import { latentLink, latentName } from "./latents.js";
import { clamp, count, number, percent, plural, signed } from "./numbers.js";
import { pairs } from "./parts.js";
import { actions, go, here, mark } from "./route.js";
import { textNodes } from "./text.js";

/** @type {Record<string, [name: string, words: (value: number) => string]>} */
const METRICS = {
  act: ["activation", (v) => number(v)],
  quantile: ["percentile of its firings", (v) => percent(v)],
  effect: ["effect on the loss when ablated", (v) => `${signed(v)} nats`],
};
/** @typedef {[name: string, share: (columns: Columns, t: number) => number, low: string, high: string]} Strip */

// What may colour the text instead of the metric: [name, share of the ramp's end at token t, words of both ends].
const SURPRISE = 10; // nats, the end of the ramp
/** @type {Record<string, Strip>} */
const STRIP = {
  miss: ["what the SAE misses", ({ miss }, t) => (miss[t] === LEFT_OUT ? 0 : miss[t] / 15), "0", "1"],
  loss: [
    "surprise of the token",
    ({ logprob }, t) => Math.min(1, -(at(logprob, t) ?? 0) / SURPRISE),
    "0",
    `${SURPRISE} nats`,
  ],
};
const MATRIX_CELLS = 1100; // rows are dropped beyond, so that a page stays light

/** @typedef {[latent: number, entries: Map<number, number>, largest: number]} Ranked */

/** A prompt's columns, with its latents gathered over tokens. */
class Prompt {
  /** @param {Sae} sae @param {Columns} columns */
  constructor(sae, columns) {
    this.sae = sae;
    this.columns = columns;
    this.offsets = starts(columns.n);
    this.length = columns.token.length;
    this.groups = tokenGroups(columns.token, sae.dataset.vocab);
    this.strings = /** @type {string[]} */ (Array(this.length).fill(""));
    for (const { from, text: string } of this.groups) this.strings[from] = string;
    this.metrics = Object.keys(METRICS).filter((m) => columns[m]);
    /** @type {Map<number, Map<number, number>>} the entries of each latent, by token */
    this.latents = new Map();
    for (let t = 0; t < this.length; t++) {
      for (const k of this.entries(t)) {
        const latent = columns.latent[k];
        const entries = this.latents.get(latent) ?? new Map();
        this.latents.set(latent, entries.set(t, k));
      }
    }
  }
  /** @param {number} t */
  entries(t) {
    return Array.from({ length: this.columns.n[t] }, (_, i) => this.offsets[t] + i);
  }
  /** @param {string} metric @param {number} k */
  size(metric, k) {
    return Math.abs(this.columns[metric][k]);
  }
  /** @param {string} metric @param {number} k */
  words(metric, k) {
    return METRICS[metric][1](this.columns[metric][k]);
  }
  /**
   * [latent, entries by token, largest] from the largest down; at one token only, if one is chosen.
   * @param {string} metric
   * @param {number | null} chosen
   */
  ranked(metric, chosen) {
    /** @param {Map<number, number>} entries */
    const largest = (entries) =>
      Math.max(
        -1,
        ...[...entries].filter(([t]) => chosen === null || t === chosen).map(([, k]) => this.size(metric, k)),
      );
    return [...this.latents]
      .map(([latent, entries]) => /** @type {Ranked} */ ([latent, entries, largest(entries)]))
      .filter(([, , size]) => size >= 0)
      .sort((a, b) => b[2] - a[2] || a[0] - b[0]);
  }
}

/**
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function promptPage(main, dataset, params, current) {
  const { manifest } = dataset;
  const n = /^\d{1,5}$/.test(params.get("p") ?? "") ? Number(params.get("p")) : -1;
  const described = manifest.prompts[n];
  if (!described) {
    if (current()) replace(main, noSuchPrompt(manifest));
    return { title: "No such prompt" };
  }
  const sae = await dataset.sae(dataset.saes.find((s) => s.prefix === described.prefix)?.letter);
  const prompt = new Prompt(sae, (await chunk(manifest, described.chunk)).columns);
  if (!current()) return;
  const asked = params.get("t") ?? "";
  const wanted = params.get("metric") ?? "";
  let metric = prompt.metrics.includes(wanted) ? wanted : "act";
  let chosen = /^\d+$/.test(asked) && Number(asked) < prompt.length ? Number(asked) : null;
  const colour = params.get("strip") ?? "";
  let coloured = Object.hasOwn(STRIP, colour) ? colour : "";
  const legend = el("p.legend");
  const strip = el("div.strip.row-of-tokens", { role: "group", "aria-label": "Tokens of the prompt" });
  const body = el("div.matrix");

  function paint() {
    hoverCard.hide(true);
    const ranked = prompt.ranked(metric, chosen);
    const top = metric === "quantile" ? 1 : Math.max(1e-12, ...ranked.map(([, , size]) => size));
    const shown = ranked.slice(0, clamp(Math.floor(MATRIX_CELLS / prompt.length), 5, 32));
    const silent = chosen === null ? "in the prompt" : `at token ${chosen}`;
    /** @type {Strip} */
    const byMetric = [
      METRICS[metric][0],
      (_, t) => Math.max(0, ...prompt.entries(t).map((k) => prompt.size(metric, k))) / top,
      "0",
      metric === "quantile" ? "100%" : number(top),
    ];
    const [words, share, low, high] = STRIP[coloured] ?? byMetric;
    const left = Array.from(prompt.columns.miss ?? []).includes(LEFT_OUT);
    replace(legend, rampLegend(`text: ${words}`, low, high), left && leftOutLegend());
    replace(
      strip,
      prompt.groups.map((group) => stripToken(group, (t) => share(prompt.columns, t), chosen, prompt.columns.miss)),
    );
    replace(
      body,
      promptMatrix(prompt, shown, metric, top),
      el(
        "p.muted",
        null,
        `${count(shown.length)} of ${plural(ranked.length, "latent")} that fire ${silent}, by `,
        `${METRICS[metric][0]}. Press a token of the text to keep its latents only.`,
      ),
    );
    rove(strip, first(strip, ".peak") ?? first(strip, ".t"));
    rove(body, first(body, ".t"));
  }
  /** @param {HTMLElement | null} token */
  function pick(token) {
    if (!token) return;
    const t = Number(token.dataset.t);
    chosen = chosen === t ? null : t;
    mark({ t: chosen });
    paint();
    first(strip, `.t[data-t="${t}"]`)?.focus();
  }
  strip.addEventListener("click", (event) => pick(nearest(event, ".t")));
  strip.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") pick(nearest(event, ".t"));
  });
  const exporting = () => exportPrompt(prompt, n);
  /** @param {string | number} p */
  const turnTo = (p) => manifest.prompts[Number(p)] && go(here({ p, t: "" }));
  Object.assign(actions, { export: exporting, next: () => turnTo(n + 1), previous: () => turnTo(n - 1) });
  const prompts = manifest.prompts.map((p, i) => [String(i), `${i + 1}. ${p.text.slice(0, 60)}`]);
  const metrics = prompt.metrics.map((m) => [m, METRICS[m][0]]);
  /** @param {string} m */
  const useMetric = (m) => {
    metric = m;
    mark({ metric: m === "act" ? "" : m });
    paint();
  };
  const colours = choice(
    "Text",
    coloured,
    [["", "by the metric"], ...Object.entries(STRIP).map(([k, [w]]) => [k, w])],
    (k) => {
      coloured = k;
      mark({ strip: k });
      paint();
    },
  );
  actions.errors = () => {
    const select = colours.querySelector("select");
    if (!select) return;
    select.value = coloured === "miss" ? "" : "miss";
    select.dispatchEvent(new Event("change"));
  };
  replace(
    main,
    el(
      "div.page-head",
      null,
      el("h1", null, `Prompt ${n + 1} of ${manifest.prompts.length}`),
      el(
        "div.actions",
        null,
        choice("Prompt", String(n), prompts, turnTo),
        choice("Metric", metric, metrics, useMetric),
        prompt.columns.miss && colours,
        button("Export", exporting),
      ),
    ),
    legend,
    strip,
    body,
  );
  paint();
  for (const root of [strip, body]) tokenCards(root, (token) => promptCard(prompt, token));
  actions.repaint = paint;
  return { title: `Prompt ${n + 1}` };
}

/** @param {Manifest} manifest */
function noSuchPrompt(manifest) {
  return el(
    "div.alert",
    { role: "alert" },
    el("h1", null, "There is no such prompt"),
    el(
      "p",
      null,
      plural(manifest.prompts.length, "prompt"),
      " in this dashboard. ",
      el("a", { href: "#" }, "Back to the index"),
    ),
  );
}

/**
 * @param {TokenGroup} group
 * @param {(t: number) => number} share
 * @param {number | null} chosen
 * @param {Numbers} [miss]
 */
function stripToken({ from, to, text: string }, share, chosen, miss) {
  let strongest = 0;
  for (let t = from; t < to; t++) strongest = Math.max(strongest, share(t));
  const token = el(
    "span.t",
    { tabindex: -1, data: { t: from }, role: "button", "aria-pressed": chosen === from },
    string === "" ? "∅" : textNodes(string),
  );
  if (step(strongest)) token.dataset.a = String(step(strongest));
  if (chosen === from) token.classList.add("peak");
  if (miss?.[from] === LEFT_OUT) token.classList.add("left-out");
  return token;
}

/** @param {Prompt} prompt @param {Ranked[]} shown @param {string} metric @param {number} top */
function promptMatrix(prompt, shown, metric, top) {
  const { sae, columns, strings } = prompt;
  /** @param {string} string @param {number} t */
  const heading = (string, t) =>
    el(
      "th",
      { scope: "col" },
      el("span.offscreen", null, `token ${t} `),
      el("span", null, textNodes(string.slice(0, 40))),
    );
  /** @param {number} latent @param {Map<number, number>} entries @param {number} t */
  const cell = (latent, entries, t) => {
    const k = entries.get(t);
    if (k === undefined) return el("td");
    const sign = metric === "effect" ? ["−", "", "+"][Math.sign(columns.effect[k]) + 1] : "";
    const data = { t, k, latent, a: step(prompt.size(metric, k) / top) || 1 };
    return el(
      "td",
      null,
      el("span.t", { tabindex: -1, role: "img", "aria-label": `${prompt.words(metric, k)} at token ${t}`, data }, sign),
    );
  };
  /** @param {Ranked} ranked */
  const row = ([latent, entries]) =>
    el(
      "tr.row-of-tokens",
      null,
      el(
        "th",
        { scope: "row" },
        el("div.name", null, latentLink(sae, latent, { t: "", metric: "" }), " ", latentName(sae, latent)),
      ),
      strings.map((_, t) => cell(latent, entries, t)),
    );
  return el(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": "Tokens by latents" },
    el(
      "table.heat",
      null,
      el("thead", null, el("tr", null, el("th", { scope: "col" }, "latent"), strings.map(heading))),
      el("tbody", null, shown.map(row)),
    ),
  );
}

/**
 * The card of a token of the strip, or of a cell of the matrix.
 * @param {Prompt} prompt
 * @param {HTMLElement} token
 * @returns {Child[]}
 */
function promptCard({ sae, columns, strings, metrics }, token) {
  const t = Number(token.dataset.t);
  const entries = [
    ["position", t],
    ["log-probability", at(columns.logprob, t) === null ? "–" : number(columns.logprob[t])],
    ["active latents kept", columns.n[t]],
  ];
  if (columns.miss && columns.miss[t] !== 255) entries.push(["SAE misses", percent(columns.miss[t] / 15, 2)]);
  const head = el("h3", null, strings[t] === "" ? "∅" : textNodes(strings[t].slice(0, 500)));
  if (token.dataset.k === undefined) return [head, pairs("stats", entries)];
  const k = Number(token.dataset.k);
  const latent = Number(token.dataset.latent);
  const figures = metrics.map((m) => [METRICS[m][0], METRICS[m][1](columns[m][k])]);
  return [
    head,
    pairs("stats", [["latent", `#${latent}`], ...figures, ...entries]),
    el("p", null, latentName(sae, latent)),
  ];
}

/** @param {Prompt} prompt @param {number} n */
function exportPrompt(prompt, n) {
  const { sae, columns } = prompt;
  const header = ["position", "token", "logprob", "missed", "latent", "label", "activation", "quantile", "effect"];
  /** @param {number} t @param {number} k */
  const row = (t, k) => [
    t,
    sae.dataset.vocab.string(columns.token[t]),
    at(columns.logprob, t),
    columns.miss && columns.miss[t] !== 255 ? columns.miss[t] / 15 : null,
    columns.latent[k],
    sae.label(columns.latent[k]),
    columns.act[k],
    columns.quantile[k],
    columns.effect?.[k],
  ];
  openExport(`prompt-${n}`, header, () =>
    [...columns.token.keys()].flatMap((t) => prompt.entries(t).map((k) => row(t, k))),
  );
}
