// A latent as rows and as JSON.

/** @import { Example, Feature } from "./feature-data.js" */

import { openExport } from "./export.js";
import { at } from "./feature-data.js";
import { sameLatent } from "./latents.js";
import { notes } from "./notes.js";
import { coactive } from "./panel-neighbours.js";

const EXAMPLE = "sae,latent,label,group,activation,document,context,position,peak_token,text,repeat".split(",");

/** The examples of a latent as rows under EXAMPLE. @param {Feature} feature */
function exampleRows({ vocab, sae, latent, heading, windows }) {
  const { groups } = sae.dataset.manifest;
  /** @param {Example} w */
  const place = (w) => [w.document, w.context, w.start + w.peak];
  return windows.map((w) => [
    sae.letter,
    latent,
    heading,
    groups[w.group].name,
    w.act,
    ...place(w),
    vocab.string(w.tokens[w.peak]),
    w.text,
    w.repeat ? 1 : 0,
  ]);
}

const FIGURES = "count,contexts,max,min,mean,std,skew,kurtosis,square,dec_norm,enc_norm,enc_dec,b_enc".split(",");

/** All that the page knows of a latent, as JSON. @param {Feature} feature */
function featureJson(feature) {
  const { vocab, sae, latent } = feature;
  const kinds = sae.dataset.manifest.groups;
  /** @param {string} name @param {string} value */
  const tokens = (name, value) =>
    Array.from(feature.list(name).keys()).flatMap((i) => {
      const token = at(feature.list(name), i);
      if (token === null) return [];
      return [{ id: vocab.ids[token], text: vocab.string(token), value: feature.list(value)[i] }];
    });
  /** @param {string} name @param {string} value */
  const near = (name, value) =>
    Array.from(feature.list(name), (l, i) => ({ latent: l, value: feature.list(value)[i] })).filter(
      ({ latent: l }) => l < sae.size,
    );
  const bins = "bin b is [2^(b/4), 2^((b+1)/4))";
  return {
    latent,
    sae: sae.info.name,
    site: sae.info.site,
    digest: sae.info.digest,
    label: feature.heading,
    note: notes.notes.get(sae.key(latent)) ?? "",
    density: feature.density,
    ...Object.fromEntries(FIGURES.map((name) => [name, feature.value(name)])),
    histogram: { bins, ...feature.histogram() },
    null_histogram: feature.histogram("null") ?? undefined,
    heads: feature.columns.heads && feature.list("heads", sae.info.heads ?? 0),
    tokens: tokens("tok", "tok_count"),
    raises: tokens("top", "top_value"),
    lowers: tokens("bottom", "bottom_value"),
    decoder_neighbours: near("dec_near", "dec_cos"),
    encoder_neighbours: near("enc_near", "enc_cos"),
    together: coactive(feature),
    examples: feature.windows.map((w) => ({
      group: kinds[w.group].name,
      document: w.document,
      context: w.context,
      start: w.start,
      peak: w.peak,
      activation: w.act,
      repeat: w.repeat,
      text: w.text,
      token_ids: Array.from(w.tokens, (t) => vocab.ids[t]),
      activations: Array.from(w.tokens, (_, i) => w.activation(i)),
      effects: w.storedEffects && Array.from(w.tokens, (_, i) => w.effect(i)),
      sources: w.sources.length ? w.sources : undefined,
    })),
  };
}

/**
 * Asks how to export these latents: all their examples as rows, or all that is known of them.
 * @param {Feature[]} features
 */
export function exportFeatures(...features) {
  const name = features.map(({ latent, sae: { letter } }) => sameLatent({ latent, letter })).join("-");
  const json = features.map(featureJson);
  openExport(
    `latent-${name}`,
    EXAMPLE,
    () => features.flatMap(exampleRows),
    () => (features.length > 1 ? json : json[0]),
  );
}
