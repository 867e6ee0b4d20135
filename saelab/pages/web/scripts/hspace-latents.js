// Latents of an SAE of h-space: when along the trajectory each fires, where in the image, on which samples.

import { histogram } from "./charts.js";
import { byId, el, picture, replace } from "./dom.js";
import { count, number, percent } from "./numbers.js";
import { figures } from "./parts.js";
import { filter, startReport } from "./report.js";
import { textNodes } from "./text.js";

/** @typedef {{ sample: number, t: number, peak: number, x0: string, heat: string, done: string }} Sample */
/** @typedef {{ latent: number, density: number, largest: number, peaks_at: number, most: string | null, profile: number[], map: string, map_largest: number, examples: Sample[] }} Latent */
/** @typedef {{ title: string, d_sae: number, live: number, samples: number, timesteps: number[], latents: Latent[] }} Latents */

/** @param {Sample} sample */
const example = ({ sample, t, peak, x0, heat, done }) =>
  el(
    "figure",
    null,
    picture(x0, `predicted x0 of sample ${sample} at t = ${t}`),
    el("span.over", null, picture(x0, ""), picture(heat, "where the latent is active")),
    picture(done, `sample ${sample}`),
    el("figcaption", null, number(peak), el("br"), `t = ${t}`),
  );

/** @param {Latent} latent @param {number[]} timesteps */
const section = ({ latent, density, largest, most, profile, map, map_largest, examples }, timesteps) =>
  el(
    "section.part",
    { id: `latent-${latent}`, data: { name: `latent ${latent} ${most ?? ""}` } },
    el(
      "h2",
      null,
      `Latent ${latent}`,
      el("small", null, `fires at ${percent(density)} of places, largest activation ${number(largest)}`),
    ),
    el(
      "div.beside",
      null,
      el(
        "div",
        null,
        el("h3", null, "By timestep"),
        histogram({
          label: `Mean activation of latent ${latent} by timestep`,
          counts: profile,
          axis: [
            { share: 0, words: `t = ${timesteps[0]}` },
            { share: 1, words: String(timesteps[timesteps.length - 1]) },
          ],
          describe: (i) => `t = ${timesteps[i]}: ${number(profile[i])}`,
        }),
        el("h3", null, "By place"),
        picture(map, `mean activation at each place, at most ${number(map_largest)}`, "large"),
      ),
      el("div", null, el("h3", null, "Strongest samples"), el("div.samples", null, examples.map(example))),
    ),
  );

/** @param {Latents} data */
function paint({ title, d_sae, live, samples, timesteps, latents }) {
  document.title = title;
  const sections = el(
    "div",
    null,
    latents.map((latent) => section(latent, timesteps)),
  );
  replace(
    byId("main"),
    el("div.page-head", null, el("h1", null, textNodes(title))),
    el(
      "p.lead",
      null,
      `${count(d_sae)} latents read the bottleneck at each place and step; ${count(live)} fire on these ${count(samples)} ` +
        "samples. Bars: mean activation at each timestep, noise to image from left to right. Map: mean activation at each " +
        "place. Examples: predicted x0 at the step of the latent's peak, where it is active there, and the finished sample.",
    ),
    el(
      "section.part",
      null,
      el("h2", null, `${count(latents.length)} latents`),
      figures(
        ["latent", "density", "largest", "peaks at t", "most active for"],
        latents.map((one) => [
          el("a", { href: `#latent-${one.latent}` }, one.latent),
          one.density,
          one.largest,
          one.peaks_at,
          one.most ?? "–",
        ]),
        "Table of latents",
      ),
    ),
    el("div.facets", null, filter("Only latents with", sections)),
    sections,
  );
  return el("p", null, "Made by saelab; this page reaches no network.");
}

startReport("saelab h-space", paint);
