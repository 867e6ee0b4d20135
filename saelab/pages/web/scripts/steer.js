// Steering replayed: a sweep that was run before, its texts by strength beside the unsteered one.

/** @import { Sae } from "./feature-data.js" */
/** @typedef {Record<string, unknown> & { text: string, strength?: number | null, kl?: number | null }} Entry */

import { curve } from "./charts.js";
import { cutTexts } from "./chunks.js";
import { choice } from "./dialogs.js";
import { differing } from "./differing.js";
import { el, replace } from "./dom.js";
import { starts } from "./feature-data.js";
import { clamp, number, plural } from "./numbers.js";
import { panel } from "./parts.js";
import { textNodes } from "./text.js";

/** The drawer for a latent, or null where no sweep has it. @param {Sae} sae @param {number} latent */
export async function steering(sae, latent) {
  if (!sae.has("steer")) return null;
  const { latent: latents, rows, length, text: all } = (await sae.chunk("steer")).columns;
  const at_ = latents.indexOf(latent);
  if (at_ < 0) return null;
  const from = starts(rows)[at_];
  const entries = cutTexts(all, length)
    .slice(from, from + rows[at_])
    .flatMap((json) => {
      try {
        return [JSON.parse(json)];
      } catch {
        return [];
      }
    })
    .filter((e) => typeof e?.text === "string");
  return entries.length ? sweepDrawer(entries) : null;
}

/** @param {Entry[]} entries */
function sweepDrawer(entries) {
  /** @param {string} key */
  const distinct = (key) => [...new Set(entries.map((e) => String(e[key] ?? "–")))];
  /** @type {Record<string, string>} */
  const chosen = { operation: distinct("operation")[0], prompt: distinct("prompt")[0], seed: distinct("seed")[0] };
  const body = el("div.sweep", { "aria-live": "polite" });
  const rows = () =>
    entries
      .filter((e) => Object.entries(chosen).every(([key, value]) => String(e[key] ?? "–") === value))
      .sort((a, b) => (a.strength ?? 0) - (b.strength ?? 0));
  const slider = el("input", {
    type: "range",
    min: 0,
    step: 1,
    value: "0",
    "aria-label": "Strength",
    input: () => paint(),
  });
  const reading = el("output.num");
  function paint() {
    const list = rows();
    slider.max = String(Math.max(0, list.length - 1));
    const entry = list[clamp(Number(slider.value), 0, list.length - 1)];
    if (!entry) {
      replace(body, el("p.empty", null, "No text with this choice."));
      return;
    }
    const unit = String(entry.unit ?? "").replaceAll("_", " ");
    const words = entry.strength === null ? "" : `${number(entry.strength)} ${unit}`; // ablation has none
    reading.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    const kls = list.flatMap(({ strength, kl }) =>
      Number.isFinite(strength) && Number.isFinite(kl) ? [/** @type {[number, number]} */ ([strength, kl])] : [],
    );
    replace(
      body,
      el("p.text.muted", null, textNodes(String(entry.prompt ?? "").slice(0, 2000))),
      el(
        "div.texts",
        null,
        panel("Unsteered", null, el("p.text", null, textNodes(String(entry.baseline ?? "not kept")))),
        panel(
          `Steered: ${chosen.operation} ${words}`,
          null,
          el("p.text", null, differing(String(entry.baseline ?? ""), entry.text)),
        ),
        kls.length > 1 &&
          panel(
            "KL to the unsteered model, nats a token",
            null,
            curve({
              label: `KL by strength, ${kls.map(([s, k]) => `${number(s)}: ${number(k)}`).join(", ")}`,
              series: [{ name: "KL", points: kls }],
              mark: entry.strength,
            }),
          ),
      ),
    );
  }
  const pickers = Object.keys(chosen)
    .filter((key) => distinct(key).length > 1)
    .map((key) =>
      choice(
        key,
        chosen[key],
        distinct(key).map((v) => [v, v.slice(0, 60)]),
        (value) => {
          chosen[key] = value;
          paint();
        },
      ),
    );
  paint();
  return el(
    "details.drawer",
    { open: true },
    el("summary", null, `Steering: ${plural(entries.length, "text")}`),
    el("div.facets", null, pickers, el("label.field", null, "strength", slider, reading)),
    body,
  );
}
