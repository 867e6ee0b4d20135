// The SAEs of a dashboard beside each other.

/** @import { Child, Numbers, Shown } from "./types.d.ts" */
/** @import { Dataset, Sae } from "./feature-data.js" */

import { histogram } from "./charts.js";
import { button, el, replace } from "./dom.js";
import { openExport } from "./export.js";
import { LATENT, latentRows } from "./index-columns.js";
import { parseLatent, sameLatent } from "./latents.js";
import { clamp, count, number, percent, plural } from "./numbers.js";
import { panel, say, table } from "./parts.js";
import { preferences } from "./preferences.js";
import { actions, again, go, here } from "./route.js";

/**
 * The SAEs of the dashboard, figure by figure, and how their latents match.
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function compareSaes(main, dataset, current) {
  const saes = await Promise.all(dataset.saes.map((sae) => dataset.sae(sae.letter)));
  const mores = await Promise.all(saes.map((sae) => sae.openMore().catch(() => undefined)));
  if (!current()) return;
  const exporting = () => openExport("saes", LATENT, () => saes.flatMap((sae, i) => latentRows(sae, mores[i])));
  Object.assign(actions, { repaint: again, export: exporting });
  const fields = [...new Set(saes.flatMap((sae) => Object.keys(sae.info.evaluation ?? {})))];
  /** @param {string} name @param {(sae: Sae) => Child} value */
  const row = (name, value) => [name, ...saes.map(value)];
  const one = el("input", { type: "text", "aria-label": "First latent", placeholder: "123" }),
    two = el("input", { type: "text", "aria-label": "Second latent", placeholder: saes.length > 1 ? "45@B" : "45" });
  const matches = saes.map(
    (sae, i) =>
      mores[i]?.match_cos &&
      panel(
        `How well SAE ${sae.letter}'s latents are found in the other`,
        null,
        matchHistogram(sae, mores[i].match_cos),
      ),
  );
  replace(
    main,
    el(
      "div.page-head",
      null,
      el("h1", null, saes.length > 1 ? "Two SAEs" : "Compare"),
      el("div.actions", null, button("Export", exporting)),
    ),
    panel(
      "Two latents",
      null,
      el(
        "div.facets",
        null,
        one,
        two,
        button("Compare", () => {
          const both = [one, two].map((input) => parseLatent(input.value.trim().replace(/^#/, "")));
          const [a, b] = both;
          if (a && b) go(here({ f: [a, b].map(sameLatent).join(","), view: "" }));
          else say("Give two numbers, such as 12 and 77@B");
        }),
      ),
    ),
    panel(
      "Figures",
      null,
      el(
        "div.scroll",
        { tabindex: 0, role: "region", "aria-label": "Figures of the SAEs" },
        table(
          ["", ...saes.map((s) => `#${s.letter}: ${s.name.slice(0, 60)}`)],
          [
            row("architecture", (s) => s.info.architecture),
            row("site", (s) => s.info.site),
            row("latents", (s) => count(s.size)),
            row("dead", (s) => count(s.info.dead)),
            row("dense", (s) => count(s.info.dense)),
            row("duplicates", (s) => count(s.info.duplicates)),
            row("L0 here", (s) => number(s.info.l0)),
            row("variance explained here", (s) => percent(s.info.explained_variance)),
            ...fields.map((field) => row(field.replaceAll("_", " "), (s) => number(s.info.evaluation?.[field]))),
          ],
        ),
      ),
    ),
    el("div.compare", null, matches),
  );
  return { title: saes.length > 1 ? "Two SAEs" : "Compare" };
}

/** @param {Sae} sae @param {Numbers} cosines */
function matchHistogram(sae, cosines) {
  const bins = new Uint32Array(40);
  for (const c of cosines) if (!Number.isNaN(c)) bins[clamp(Math.floor(((c + 1) / 2) * 40), 0, 39)]++;
  /** @param {number} i */
  const edge = (i) => -1 + i / 20;
  return histogram({
    label: `Largest decoder cosine of SAE ${sae.letter}'s latents with the other SAE`,
    counts: bins,
    log: preferences.logY,
    axis: [
      { share: 0, words: "−1" },
      { share: 0.5, words: "0" },
      { share: 1, words: "1" },
    ],
    describe: (i) => `${number(edge(i))} to ${number(edge(i + 1))}: ${plural(bins[i], "latent")}`,
    pick: () => go(here({ view: "", f: "", sae: sae.letter === "A" ? "" : sae.letter, s: "match_cos" })),
  });
}
