// A steering sweep: what it says of each latent, the summary, curves, texts beside each other with what differs marked.

/** @import { Child } from "./types.d.ts" */
/** @import { Ranked } from "./sweep-verdict.js" */

import { curve, curveLegend } from "./charts.js";
import { differing } from "./differing.js";
import { byId, el, replace } from "./dom.js";
import { figure, number, plural, signed } from "./numbers.js";
import { figures, pairs } from "./parts.js";
import { startReport } from "./report.js";
import { LEVEL, verdict } from "./sweep-verdict.js";
import { chip, textNodes } from "./text.js";

/** @typedef {{ kind: string, control: number | null, text: string, figures: Record<string, number | null> }} Steered */
/** @typedef {{ strength: number | null, texts: Steered[] }} AtStrength */
/** @typedef {{ prompt: string, seed: number, unsteered: string, strengths: AtStrength[] }} Prompted */
/** @typedef {{ operation: string, points: [strength: number, effect: number, kl: number][], band: [number, number, number][], prompts: Prompted[] }} Operation */
/** @typedef {{ latent: number, top_tokens: string[], scores: Record<string, number | null>, operations: Operation[] }} Latent */
/** @typedef {{ about: Record<string, string>, effect: string, kl: string, budget: number, columns: string[], summary: (Ranked & Record<string, string | number | null>)[], latents: Latent[] }} Sweep */

/** @param {string} name */
const spaced = (name) => name.replaceAll("_", " ");

/** @param {Sweep} sweep */
function summary({ columns, summary: rows, effect, kl, budget }) {
  if (!rows.length) return el("p.empty", null, "No steered text yet.");
  const link = (/** @type {number} */ latent) => el("a", { href: `#latent-${latent}` }, latent);
  return [
    el(
      "ul.verdicts",
      null,
      rows.map((row) => {
        const [place, why] = verdict(row, effect);
        return el("li", null, el("b", null, place), why);
      }),
    ),
    el(
      "p.lead",
      null,
      `${effect}: unless another was chosen, the rise of the probability of the latent's own top logit tokens. It is taken ` +
        `at the strength whose ${kl} is ${figure(budget)} nats (or the most that all reach), found on other prompts, for the ` +
        "latent and for random directions on their own tokens; p is the latent's rank among them. Above the band is a p of " +
        `at most ${LEVEL}, which one in twenty of latents without any effect of their own reaches by chance.`,
    ),
    el("h2.offscreen", null, "Summary"),
    figures(
      columns.map(spaced),
      rows.map((row) => columns.map((name) => (name === "latent" ? link(row.latent) : (row[name] ?? null)))),
      "Summary",
    ),
    el(
      "p.lead",
      null,
      "The best strength within the budget is chosen on the prompts that its effect is shown for, which flatters it; " +
        "intervals are 95% over prompts.",
    ),
  ];
}

/** @param {Steered} steered @param {string} unsteered */
const text = ({ kind, control, text: words, figures: of }, unsteered) =>
  el(
    "div",
    null,
    el("h4", null, spaced(kind), control !== null && ` ${control}`),
    el("p.text", null, differing(unsteered, words)),
    el(
      "p.note.muted",
      null,
      Object.entries(of)
        .map(([name, value]) => `${spaced(name)}: ${number(value)}`)
        .join(", "),
    ),
  );

/** @param {Prompted} prompted */
const texts = ({ prompt, seed, unsteered, strengths }) => [
  el(
    "div.prompt",
    null,
    el("h4", null, `Prompt, and the unsteered text (seed ${seed})`),
    el(
      "p",
      null,
      el("span.text.asked", null, textNodes(prompt)),
      el("span.text.unsteered", null, textNodes(unsteered)),
    ),
  ),
  strengths.map(({ strength, texts: all }) =>
    el(
      "div.steered",
      null,
      strength !== null && el("h4", null, `strength ${figure(strength)}`),
      el(
        "div.beside",
        null,
        all.map((one) => text(one, unsteered)),
      ),
    ),
  ),
];

/** @param {Operation} operation @param {Sweep} sweep */
function operationPart({ operation, points, band, prompts }, { effect, kl }) {
  /** @type {(name: string, x: number, around?: Operation["band"]) => Child} */
  const chart = (name, x, around) => {
    const series = [
      {
        name: effect,
        points: points.map((p) => /** @type {[number, number]} */ ([p[x], p[1]])).sort((a, b) => a[0] - b[0]),
      },
    ];
    const label = `${effect} by ${name}: ${series[0].points.map(([at, y]) => `${figure(at)}, ${signed(y)}`).join("; ")}`;
    const legend = curveLegend([effect], around?.length ? "random directions, mean and standard deviation" : undefined);
    return el("div", null, curve({ label, series, band: around, xName: name }), legend);
  };
  return [
    el("h3", null, operation),
    points.length > 1 && el("div.beside", null, chart("strength", 0, band), chart(kl, 2)),
    prompts.map(texts),
  ];
}

/** @param {Latent} latent @param {Sweep} sweep */
const latentPart = ({ latent, top_tokens, scores, operations }, sweep) =>
  el(
    "section.part",
    { id: `latent-${latent}` },
    el("h2", null, `Latent ${latent}`),
    pairs("facts", [
      ["top logit tokens", top_tokens.length ? top_tokens.map((token) => [chip(token), " "]) : "none"],
      ...Object.entries(scores).map(([name, value]) => [spaced(name), number(value)]),
    ]),
    operations.map((one) => operationPart(one, sweep)),
  );

/** @param {Sweep} sweep */
function paint(sweep) {
  document.title = `Steering sweep: ${sweep.about.model}`;
  replace(
    byId("main"),
    el("div.page-head", null, el("h1", null, "Steering sweep")),
    summary(sweep),
    sweep.latents.map((latent) => latentPart(latent, sweep)),
  );
  const about = Object.entries(sweep.about).map(([name, value]) => [name, el("span.text", null, textNodes(value))]);
  return el(
    "div",
    null,
    pairs("facts", about),
    el("p", null, `${plural(sweep.latents.length, "latent")}. Made by saelab; this page reaches no network.`),
  );
}

startReport("saelab steering", paint);
