// A prompt: its tokens, and a matrix of tokens by latents.

const METRICS = {
  act: ["activation", (v) => number(v)],
  quantile: ["percentile of its firings", (v) => percent(v)],
  effect: ["effect on the loss when ablated", (v) => `${signed(v)} nats`],
};
// What may colour the text instead of the metric: [name, share of the ramp's end at token t, words of both ends].
const SURPRISE = 10; // nats, the end of the ramp
const STRIP = {
  miss: ["what the SAE misses", ({ miss }, t) => (miss[t] === 255 ? 0 : miss[t] / 15), "0", "1"],
  loss: [
    "surprise of the token",
    ({ logprob }, t) => Math.min(1, -(at(logprob, t) ?? 0) / SURPRISE),
    "0",
    `${SURPRISE} nats`,
  ],
};
const MATRIX_CELLS = 1100; // rows are dropped beyond, so that a page stays light

/** A prompt's columns, with its latents gathered over tokens. */
class Prompt {
  constructor(sae, columns) {
    Object.assign(this, { sae, columns, offsets: starts(columns.n), length: columns.token.length });
    this.groups = tokenGroups(columns.token, sae.dataset.vocab);
    this.strings = Array(this.length).fill("");
    for (const { from, text: string } of this.groups) this.strings[from] = string;
    this.metrics = Object.keys(METRICS).filter((m) => columns[m]);
    this.latents = new Map(); // latent -> Map(token -> entry)
    for (let t = 0; t < this.length; t++) {
      for (const k of this.entries(t)) {
        const latent = columns.latent[k];
        if (!this.latents.has(latent)) this.latents.set(latent, new Map());
        this.latents.get(latent).set(t, k);
      }
    }
  }
  entries(t) {
    return Array.from({ length: this.columns.n[t] }, (_, i) => this.offsets[t] + i);
  }
  size(metric, k) {
    return Math.abs(this.columns[metric][k]);
  }
  words(metric, k) {
    return METRICS[metric][1](this.columns[metric][k]);
  }
  /** [latent, entries by token, largest] from the largest down; at one token only, if one is chosen. */
  ranked(metric, chosen) {
    const largest = (entries) =>
      Math.max(
        -1,
        ...[...entries].filter(([t]) => chosen === null || t === chosen).map(([, k]) => this.size(metric, k)),
      );
    return [...this.latents]
      .map(([latent, entries]) => [latent, entries, largest(entries)])
      .filter(([, , size]) => size >= 0)
      .sort((a, b) => b[2] - a[2] || a[0] - b[0]);
  }
}

async function promptPage(main, dataset, params, current) {
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
  let metric = prompt.metrics.includes(params.get("metric")) ? params.get("metric") : "act";
  let chosen = /^\d+$/.test(asked) && Number(asked) < prompt.length ? Number(asked) : null;
  let coloured = Object.hasOwn(STRIP, params.get("strip") ?? "") ? params.get("strip") : "";
  const legend = el("p.legend");
  const strip = el("div.strip.row-of-tokens", { role: "group", "aria-label": "Tokens of the prompt" });
  const body = el("div.matrix");

  function paint() {
    hoverCard.hide(true);
    const ranked = prompt.ranked(metric, chosen);
    const top = metric === "quantile" ? 1 : Math.max(1e-12, ...ranked.map(([, , size]) => size));
    const shown = ranked.slice(0, clamp(Math.floor(MATRIX_CELLS / prompt.length), 5, 32));
    const silent = chosen === null ? "in the prompt" : `at token ${chosen}`;
    const [words, share, low, high] = STRIP[coloured] ?? [
      METRICS[metric][0],
      (_, t) => Math.max(0, ...prompt.entries(t).map((k) => prompt.size(metric, k))) / top,
      "0",
      metric === "quantile" ? "100%" : number(top),
    ];
    replace(legend, rampLegend(`text: ${words}`, low, high));
    replace(
      strip,
      prompt.groups.map((group) => stripToken(prompt, group, (t) => share(prompt.columns, t), chosen)),
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
    rove(strip, strip.querySelector(".peak") ?? strip.querySelector(".t"));
    rove(body, body.querySelector(".t"));
  }
  function pick(token) {
    if (!token) return;
    const t = Number(token.dataset.t);
    chosen = chosen === t ? null : t;
    mark({ t: chosen });
    paint();
    strip.querySelector(`.t[data-t="${t}"]`)?.focus();
  }
  strip.addEventListener("click", (event) => pick(event.target.closest(".t")));
  strip.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") pick(event.target.closest(".t"));
  });
  const exporting = () => exportPrompt(prompt, n);
  const turnTo = (p) => manifest.prompts[p] && go(here({ p, t: "" }));
  Object.assign(actions, { export: exporting, next: () => turnTo(n + 1), previous: () => turnTo(n - 1) });
  const prompts = manifest.prompts.map((p, i) => [String(i), `${i + 1}. ${p.text.slice(0, 60)}`]);
  const metrics = prompt.metrics.map((m) => [m, METRICS[m][0]]);
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

function stripToken(prompt, { from, to, text: string }, share, chosen) {
  let strongest = 0;
  for (let t = from; t < to; t++) strongest = Math.max(strongest, share(t));
  const token = el(
    "span.t",
    { tabindex: -1, data: { t: from }, role: "button", "aria-pressed": chosen === from },
    string === "" ? "∅" : textNodes(string),
  );
  if (step(strongest)) token.dataset.a = step(strongest);
  if (chosen === from) token.classList.add("peak");
  return token;
}

function promptMatrix(prompt, shown, metric, top) {
  const { sae, columns, strings } = prompt;
  const heading = (string, t) =>
    el(
      "th",
      { scope: "col" },
      el("span.offscreen", null, `token ${t} `),
      el("span", null, textNodes(string.slice(0, 40))),
    );
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

/** The card of a token of the strip, or of a cell of the matrix. */
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

function exportPrompt(prompt, n) {
  const { sae, columns } = prompt;
  const header = ["position", "token", "logprob", "missed", "latent", "label", "activation", "quantile", "effect"];
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
