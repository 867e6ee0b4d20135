// The columns of the index, and the figures above it.

/** @import { Column } from "./grid.js" */
/** @import { Child, Columns } from "./types.d.ts" */
/** @import { Sae } from "./feature-data.js" */
/** @typedef {{ rows: Uint32Array, more: Columns | undefined }} View what the index shows, and its columns that come later */

import { selectRows } from "./columns.js";
import { el } from "./dom.js";
import { at, FLAG } from "./feature-data.js";
import { linked, tokenChips } from "./latents.js";
import { latentsOf, notes, togglePin } from "./notes.js";
import { count, density, number, percent } from "./numbers.js";
import { textNodes } from "./text.js";

/** @param {Sae} sae */
export function saeCards(sae) {
  const {
    info,
    dataset: { manifest },
  } = sae;
  const e = info.evaluation ?? {};
  /** @param {string} term @param {Child} value @param {Child} [note] */
  const card = (term, value, note) =>
    el("div.figure-card", null, el("dt", null, term), el("dd", null, value, note && el("small", null, note)));
  return el("dl.cards", null, [
    card("latents", count(sae.size), `${count(info.pages)} with a page`),
    card(
      info.dead === info.silent ? "dead" : "silent", // of few tokens it is not known which are dead
      percent(info.silent / sae.size, 2),
      `${count(info.silent)} silent in ${count(manifest.corpus.counted)} tokens`,
    ),
    card("dense", count(info.dense), "fire on over a tenth"),
    card(
      "duplicates",
      count(info.duplicates),
      `decoder cosine above 0.9${info.pages < sae.size ? ", of those with a page" : ""}`,
    ),
    card("L0", number(e.l0 ?? info.l0), `latents a token${info.null ? `; null ${number(info.null.l0)}` : ""}`),
    card(
      "variance explained",
      percent(e.explained_variance ?? info.explained_variance),
      e.explained_variance == null ? "on the tokens read" : "held out",
    ),
    Number.isFinite(e.ce_score) &&
      card(
        "CE recovered",
        percent(e.ce_score),
        e.delta_ce == null && e.ce_sae == null
          ? null
          : `+${number(e.delta_ce ?? Number(e.ce_sae) - Number(e.ce_clean))} nats`,
      ),
    Number.isFinite(e.kl) && card("KL", number(e.kl), "nats a token"),
  ]);
}

/** @param {Sae} sae @param {View} view @returns {Column[]} */
export function indexColumns(sae, view) {
  const { index, info } = sae;
  const compact = matchMedia("(max-width: 48rem)").matches;
  const other = sae.dataset.saes.find((one) => one.prefix === info.matches);
  /** @param {HTMLElement} star @param {boolean} on */
  const mark = (star, on) => {
    star.setAttribute("aria-pressed", String(on));
    star.textContent = on ? "★" : "☆";
  };
  /** @param {number} latent */
  const pin = (latent) => {
    const star = el("button.star", {
      type: "button",
      tabindex: -1,
      "aria-label": `Pin latent ${latent}`,
      click: () => mark(star, togglePin(sae.key(latent))),
    });
    mark(star, notes.pins.has(sae.key(latent)));
    return star;
  };
  /** @param {number} latent @param {Child} words @param {Sae} [to] */
  const link = (latent, words, to = sae) => linked(to, latent, words, { tab: "" }, { tabindex: -1 });
  // Where nothing has a label, or there is little room, what a latent fires on stands for it.
  const named = sae.labels.size > 0 || latentsOf(sae, notes.labels.keys()).length > 0;
  /** @param {number} latent */
  const name = (latent) => {
    const label = sae.label(latent);
    if (label) return link(latent, el("span.text", null, textNodes(label.slice(0, 300))));
    const chips = compact || !named ? tokenChips(sae, latent) : null;
    if (chips) return link(latent, chips);
    const words = !sae.hasPage(latent) ? "no page" : named && !compact ? "unlabelled" : "silent";
    return link(latent, el("span.muted", null, words));
  };
  /** @param {number} latent @param {Columns} more @param {string} key @param {Sae} to */
  const near = (latent, more, key, to) => {
    const found = at(more[key], latent);
    return found === null ? "–" : [link(found, `#${found}`, to), " ", number(more[`${key}_cos`][latent], 2)];
  };
  /** @type {(cell: (latent: number, more: Columns) => Child) => (latent: number) => Child} */
  const later = (cell) => (latent) => (view.more ? cell(latent, view.more) : "…");
  /**
   * @param {string} key
   * @param {string} title
   * @param {number} rem
   * @param {(latent: number) => Child} cell
   * @param {Partial<Column>} [more]
   * @returns {Column}
   */
  const column = (key, title, rem, cell, more = {}) => ({
    key,
    title,
    width: `${rem}rem`,
    right: true,
    sort: true,
    cell,
    ...more,
  });
  /** @param {number} least @param {number} share */
  const wide = (least, share) => ({ width: `minmax(${least}rem, ${share}fr)`, right: false });
  /** @param {number} count_ */
  const density_ = (count_) => density(count_ / sae.dataset.manifest.corpus.counted);
  const all = [
    column("pin", "★", 1.6, pin, { right: false }),
    column("id", "latent", compact ? 3.4 : 4.2, (l) => link(l, l)),
    (named || compact) && column("label", "label", 0, name, wide(compact ? 0 : 6.5, 1.5)),
    column("tokens", "fires on", 0, named ? (l) => tokenChips(sae, l) : name, {
      ...wide(named ? 6 : 9, 1.2),
      sort: false,
    }),
    index.focus && column("focus", "focus", 3.8, (l) => percent(index.focus[l], 2)),
    column("density", "density", 4.6, (l) => density(sae.density(l))),
    info.null &&
      column(
        "null_count",
        "null",
        5.2,
        later((l, more) => el("span.muted", null, density_(more.null_count[l]))),
      ),
    column("max", "max", 3.8, (l) => number(index.max[l])),
    column("mean", "mean", 3.8, (l) => number(index.mean[l])),
    sae.has("idx-1") &&
      column(
        "near_cos",
        "nearest",
        5.6,
        later((l, more) => near(l, more, "near", sae)),
      ),
    other &&
      column(
        "match_cos",
        `in SAE ${other.letter}`,
        6.4,
        later((l, more) => near(l, more, "match", other)),
      ),
    info.seeds &&
      column(
        "seeds",
        "seeds",
        3.6,
        later((l, more) => `${at(more.seeds, l) ?? "–"} of ${info.seeds?.others}`),
      ),
  ];
  return all.filter((c) => !!c).filter((c) => !compact || ["pin", "id", "label", "density"].includes(c.key));
}

export const LATENT = (
  "sae,latent,label,note,pinned,focus,density,count,max,mean,dead,silent,dense,duplicate,nearest,nearest_cosine,match,match_cosine," +
  "seeds,null_count,null_max,token_1,token_2,token_3"
).split(",");

/**
 * Latents of the index as rows under LATENT: all, or those of `rows`.
 * @param {Sae} sae
 * @param {Columns | undefined} more
 * @param {Iterable<number>} [rows]
 */
export function latentRows(sae, more, rows = sae.index.count.keys()) {
  const { index } = sae;
  const flagged = [FLAG.dead, FLAG.silent, FLAG.dense, FLAG.duplicate];
  const later = ["near", "near_cos", "match", "match_cos", "seeds", "null_count", "null_max"];
  /** @param {number | null} t */
  const token = (t) => (t === null ? "" : sae.dataset.vocab.string(t));
  return Array.from(rows, (l) => [
    sae.letter,
    l,
    sae.label(l),
    notes.notes.get(sae.key(l)) ?? "",
    notes.pins.has(sae.key(l)) ? 1 : 0,
    index.focus?.[l],
    sae.density(l),
    index.count[l],
    index.max[l],
    index.mean[l],
    ...flagged.map((flag) => (index.flags[l] & flag ? 1 : 0)),
    ...later.map((key) => at(more?.[key], l)),
    ...[index.tok0, index.tok1, index.tok2].map((column) => token(at(column, l))),
  ]);
}

/** The rows that j and k walk through: those of the index as the URL has it. */
export const order = { key: "", rows: new Uint32Array(0), message: "", ordered: false };
/** @param {Sae} sae @param {URLSearchParams} params */
export async function currentOrder(sae, params) {
  const key = [
    sae.letter,
    ...["q", "s", "show", "d", "m", "at"].map((k) => params.get(k) ?? ""),
    notes.pins.size,
    notes.labels.size,
    notes.notes.size,
  ].join("\n");
  if (order.key !== key) {
    Object.assign(order, { key, ...(await selectRows(sae, params)) });
  }
  return order;
}
