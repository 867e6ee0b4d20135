// What directions of h-space do to samples: a slider of strengths, the pictures, the figures.

import { curve, curveLegend } from "./charts.js";
import { all, byId, el, picture, replace } from "./dom.js";
import { figure } from "./numbers.js";
import { figures, matrix } from "./parts.js";
import { filter, startReport } from "./report.js";
import { textNodes } from "./text.js";

/** @typedef {{ kind: string, images: (string[] | null)[] }} Control pictures by strength and sample, null where there are none */
/** @typedef {{ name: string, strengths: number[], images: string[][], control: Control | null, measure: string, series: import("./charts.js").Series[], heads: string[], rows: (string | number | null)[][] }} Direction */
/** @typedef {{ title: string, strength: number, classes: string[], changes: number[][], directions: Direction[] }} Directions */

const LARGE = 4;
/** @param {number | null} x */
const change = (x) => (x === null ? "–" : `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`);
const MEANT =
  "Flip rate: share of samples whose most probable class changes. Off target: mean absolute change of the other classes' " +
  "probabilities. Confidence: the largest probability, a proxy of quality. Identity: distance to the same sample unedited in " +
  "the classifier's feature space; 1 is as far as another sample. To data: distance to the nearest real image, over that " +
  "before the edit.";
/** @type {Record<string, string>} */
const WORDS = {
  p_target: "P(target)",
  change_target: "its change",
  off_target: "off target",
  flip_rate: "flip rate",
  rms: "pixel rms",
  nearest: "to data",
  covariance: "random, covariance-matched",
  isotropic: "random, isotropic",
};
/** @param {string | number | null} name */
const words = (name) => WORDS[String(name)] ?? String(name);

/** Samples at one strength in large, under what they are. @param {string} caption @param {string[]} images @param {string} of */
const large = (caption, images, of) =>
  el(
    "figure",
    null,
    el("figcaption", null, textNodes(caption)),
    el(
      "div.strip-of-pictures",
      null,
      images.slice(0, LARGE).map((png, n) => picture(png, `sample ${n} ${of}`, "large")),
    ),
  );

/** @param {Direction} direction */
function section({ name, strengths, images, control, measure, series, heads, rows }) {
  const beside = el("div.beside");
  const reading = el("output.num");
  const slider = el("input", { type: "range", min: 0, max: strengths.length - 1, step: 1, input: () => show() });
  slider.value = String(slider.max);
  const table = el(
    "table.pictures",
    null,
    el(
      "thead",
      null,
      el(
        "tr",
        null,
        strengths.map((s) => el("th", { scope: "col" }, figure(s))),
      ),
    ),
    el(
      "tbody",
      null,
      images[0].map((_, n) =>
        el(
          "tr",
          null,
          strengths.map((s, at) =>
            el("td", { data: { at } }, picture(images[at][n], `sample ${n} at strength ${figure(s)}`)),
          ),
        ),
      ),
    ),
  );
  const show = () => {
    const at = Number(slider.value);
    const strength = figure(strengths[at]);
    reading.textContent = strength;
    for (const cell of all(table, "td")) cell.classList.toggle("now", cell.dataset.at === slider.value);
    const random = control && (control.images[at] ?? images[at]);
    replace(
      beside,
      large(name, images[at], `at strength ${strength}`),
      random && large(`${words(control.kind)} direction`, random, `along a random direction at strength ${strength}`),
    );
  };
  show();
  const title = measure === "p_target" ? "Mean probability of the target" : "Pixel rms";
  return el(
    "section.part",
    { data: { name } },
    el("h2", null, textNodes(name)),
    el("label.field", null, "strength", slider, reading),
    beside,
    el(
      "div.beside",
      null,
      el(
        "div",
        null,
        el("h3", null, "Samples at each strength"),
        el("div.scroll", { tabindex: 0, role: "region", "aria-label": `Samples at each strength of ${name}` }, table),
      ),
      el(
        "div",
        null,
        el("h3", null, title),
        curve({ label: `${title} by strength`, series, xName: "strength" }),
        curveLegend(series.map((one) => words(one.name))),
        figures(
          heads.map(words),
          rows.map(([kind, ...others]) => [words(kind), ...others]),
          `Figures of ${name} by strength`,
        ),
      ),
    ),
  );
}

/** @param {Directions} data */
function paint({ title, strength, classes, changes, directions }) {
  document.title = title;
  const sections = el("div", null, directions.map(section));
  const names = directions.map(({ name }) => name);
  replace(
    byId("main"),
    el("div.page-head", null, el("h1", null, textNodes(title))),
    el(
      "p.lead",
      null,
      "Each direction is added to the bottleneck of the denoiser at every step of the same trajectories. Strengths are in " +
        "units of the direction's scale. Random controls are as long as the direction at each step: isotropic ones point " +
        "anywhere, covariance-matched ones where the bottleneck varies.",
    ),
    el(
      "section.part",
      null,
      el("h2", null, `Change of each class's mean probability at strength ${figure(strength)}`),
      matrix("direction", names, classes, changes, change),
    ),
    names.length > 1 && el("div.facets", null, filter("Only directions with", sections)),
    sections,
  );
  return el("div", null, el("p", null, MEANT), el("p", null, "Made by saelab; this page reaches no network."));
}

startReport("saelab h-space", paint);
