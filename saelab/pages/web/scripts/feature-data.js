// The data set as objects: Dataset, Sae (A or B), and Feature, one latent's page with what belongs to it cut out of its chunk.

/** @import { Columns, Container, Manifest, Numbers, SaeInfo, TokenGroup } from "./types.d.ts" */

import { ChunkError, chunk, cutTexts, hasChunk } from "./chunks.js";
import { notes } from "./notes.js";
import { count } from "./numbers.js";
import { characterGroups, chip, decoder, joinBytes } from "./text.js";

/** @type {Record<string, number>} */
const NONE = { Uint8Array: 0xff, Uint16Array: 0xffff, Uint32Array: 0xffffffff };
/** Element i of a column, null where it is None. @param {Numbers | undefined} column @param {number} i */
export function at(column, i) {
  const value = column?.[i];
  return value === undefined || value === NONE[column?.constructor.name ?? ""] || Number.isNaN(value) ? null : value;
}

/** Where each of consecutive runs of these lengths starts, and the end of the last. @param {Numbers} lengths */
export function starts(lengths) {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
}

export class Vocab {
  /** @param {Container} chunk */
  constructor({ columns }) {
    this.ids = columns.id;
    this.flags = columns.flags;
    this.counts = columns.count;
    this.bytesOfAll = /** @type {Uint8Array} */ (/** @type {unknown} */ (columns.bytes));
    this.offsets = starts(columns.length);
    /** @type {Map<number, string>} */
    this.strings = new Map();
  }
  get size() {
    return this.ids.length;
  }
  /** @param {number} token @returns {Uint8Array} */
  bytes(token) {
    return this.bytesOfAll.subarray(this.offsets[token], this.offsets[token + 1]);
  }
  /** @param {number} token @returns {string} */
  string(token) {
    let string = this.strings.get(token);
    if (string === undefined) this.strings.set(token, (string = decoder.decode(this.bytes(token))));
    return string;
  }
  /** A token to look at: text, or the bytes of one that is only part of a character. @param {number} token */
  chip(token) {
    const part = (this.flags[token] & 2) === 2 && this.string(token).includes("\ufffd");
    return chip(this.string(token), part ? Array.from(this.bytes(token).subarray(0, 8)) : null);
  }
  /** @param {number} token */
  special(token) {
    return (this.flags[token] & 1) === 1;
  }
  /** @param {number} token */
  missing(token) {
    return (this.flags[token] & 4) === 4;
  }
}

export class Sae {
  /** @param {Dataset} dataset @param {SaeInfo} info @param {string} letter */
  constructor(dataset, info, letter) {
    this.dataset = dataset;
    this.info = info;
    this.letter = letter;
    this.prefix = info.prefix;
    this.size = info.d_sae;
    this.index = /** @type {Columns} */ ({}); // until it is opened
    /** @type {Columns | undefined} */
    this.more = undefined;
    this.opened = false;
    this.pageLatents = /** @type {Numbers} */ (new Uint32Array(0));
    /** @type {Map<number, { text: string, source: string, score: number | null }>} */
    this.labels = new Map();
  }
  /** @param {string} name */
  chunk(name) {
    return chunk(this.dataset.manifest, this.prefix + name);
  }
  /** @param {string} name */
  has(name) {
    return hasChunk(this.dataset.manifest, this.prefix + name);
  }
  /** What to call the SAE: its name, or what it is where it has none but its letter. */
  get name() {
    const { name, architecture } = this.info;
    return !name || name === this.letter ? `${architecture}, ${count(this.size)} latents` : name;
  }
  /** @param {number} latent */
  key(latent) {
    return `${this.letter}:${latent}`;
  }
  /** Index columns, pages and labels: what every page of this SAE needs. */
  async open() {
    const [index, pages, labels] = await Promise.all([
      this.chunk("idx-0"),
      this.chunk("pages"),
      this.has("lab") ? this.chunk("lab") : null,
    ]);
    this.index = index.columns;
    this.pageLatents = pages.columns.latent;
    this.labels.clear();
    this.opened = true;
    if (labels) {
      const { latent, length, text: all, source, score } = labels.columns;
      for (const [i, string] of cutTexts(all, length).entries())
        this.labels.set(latent[i], {
          text: string,
          source: labels.header.sources?.[source?.[i]] ?? "",
          score: at(score, i),
        });
    }
    return this;
  }
  /** Columns that come later, and the SAE that they point into. */
  async openMore() {
    const rival = this.dataset.saes.find((one) => one.prefix === this.info.matches);
    if (rival && !rival.opened) await rival.open();
    if (!this.more && this.has("idx-1")) this.more = (await this.chunk("idx-1")).columns;
    return this.more;
  }
  /**
   * What a latent is called: the reader's label before the one that came with the data.
   * @param {number} latent
   * @returns {string}
   */
  label(latent) {
    return notes.labels.get(this.key(latent)) ?? this.labels.get(latent)?.text ?? "";
  }
  /** @param {number} latent */
  density(latent) {
    return this.index.count[latent] / this.dataset.manifest.corpus.counted;
  }
  /** @param {number} latent */
  hasPage(latent) {
    return (this.index.flags[latent] & 1) === 1;
  }
  /** Rank of a latent among those with a page, -1 if it has none. @param {number} latent */
  rank(latent) {
    let low = 0,
      high = this.pageLatents.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.pageLatents[middle] < latent) low = middle + 1;
      else high = middle;
    }
    return this.pageLatents[low] === latent ? low : -1;
  }
  /** @param {number} rank */
  chunkOf(rank) {
    return String(Math.floor(rank / this.info.per_chunk)).padStart(5, "0");
  }
  /** @param {number} latent */
  async feature(latent) {
    const rank = this.rank(latent);
    if (rank < 0) return null;
    const number = this.chunkOf(rank);
    return new Feature(this, latent, rank % this.info.per_chunk, await this.chunk(`f-${number}`), number);
  }
}

export class Dataset {
  /** @param {Manifest} manifest */
  constructor(manifest) {
    this.manifest = manifest;
    this.vocab = /** @type {Vocab} */ (/** @type {unknown} */ (undefined)); // until it is opened
    this.saes = manifest.saes.map((info, i) => new Sae(this, info, "AB"[i]));
  }
  async open() {
    [this.vocab] = await Promise.all([chunk(this.manifest, "vocab").then((c) => new Vocab(c)), this.saes[0].open()]);
    return this;
  }
  /** The SAE of a letter, opened. @param {string | null} [letter] */
  async sae(letter) {
    const sae = this.saes.find((s) => s.letter === letter) ?? this.saes[0];
    return sae.opened ? sae : sae.open();
  }
}

/** @typedef {{ windows: Uint32Array, hist: Uint32Array, nullHist?: Uint32Array, tokens: Uint32Array, dfa?: Uint32Array }} Layout */

/** Offsets that all features of a chunk share, computed once. @param {Container & { layout?: Layout }} pages */
function layout(pages) {
  if (!pages.layout) {
    const c = pages.columns;
    pages.layout = {
      windows: starts(c.windows),
      hist: starts(c.hist_bins),
      nullHist: c.null_bins && starts(c.null_bins),
      tokens: starts(c.length),
      dfa: c.dfa_n && starts(c.dfa_n),
    };
  }
  return pages.layout;
}

export class Feature {
  /** @param {Sae} sae @param {number} latent @param {number} row @param {Container} pages @param {string} chunkNumber */
  constructor(sae, latent, row, pages, chunkNumber) {
    this.sae = sae;
    this.latent = latent;
    this.row = row;
    this.columns = pages.columns;
    this.layout = layout(pages);
    this.chunkNumber = chunkNumber;
    this.vocab = sae.dataset.vocab;
    /** @type {Example[] | undefined} */
    this.cutWindows = undefined;
    if (pages.columns.latent[row] !== latent)
      throw new ChunkError(pages.name, `its row ${row} is latent ${pages.columns.latent[row]}, not ${latent}`);
  }
  /** @param {string} name */
  value(name) {
    return at(this.columns[name], this.row);
  }
  /** A figure that is never None. @param {string} name */
  figure(name) {
    return this.columns[name][this.row];
  }
  get heading() {
    return this.sae.label(this.latent);
  }
  get density() {
    return this.figure("count") / this.sae.dataset.manifest.corpus.counted;
  }
  /** The row of an [L x k] column. @param {string} name @param {number} [k] @returns {Numbers} */
  list(name, k = 10) {
    return this.columns[name]?.subarray(this.row * k, (this.row + 1) * k) ?? new Uint8Array(0);
  }
  /**
   * Histogram over bins [2^(b/4), 2^((b+1)/4)): {first, counts}; `kind` "hist" or "null".
   * @param {"hist" | "null"} [kind]
   */
  histogram(kind = "hist") {
    const counts = kind === "hist" ? this.columns.hist : this.columns.null_hist;
    const from = (kind === "hist" ? this.layout.hist : this.layout.nullHist)?.[this.row];
    if (!counts || from === undefined) return null;
    return {
      first: this.columns[`${kind}_first`][this.row],
      counts: counts.subarray(from, from + this.columns[`${kind}_bins`][this.row]),
    };
  }
  /** The histogram of its activations. */
  get activations() {
    return this.histogram() ?? { first: 0, counts: new Uint32Array(0) };
  }
  get windows() {
    return (this.cutWindows ??= Array.from(
      { length: this.columns.windows[this.row] },
      (_, i) => new Example(this, this.layout.windows[this.row] + i, i),
    ));
  }
  /** What the SAE misses a token of the chunk's pool: 0..15, 255 where it is not applied. */
  async misses() {
    return this.sae.has(`m-${this.chunkNumber}`) ? (await this.sae.chunk(`m-${this.chunkNumber}`)).columns.miss : null;
  }
}

export class Example {
  /** @param {Feature} feature @param {number} w row among the windows of the chunk @param {number} number among the latent's */
  constructor(feature, w, number) {
    const c = feature.columns;
    this.feature = feature;
    this.w = w;
    this.number = number;
    this.group = c.group[w];
    this.context = c.context[w];
    this.document = at(c.document, w);
    this.start = c.start[w];
    this.peak = c.peak[w];
    this.act = c.act[w];
    this.repeat = c.repeat[w] === 1;
    this.poolStart = c.offset[w];
    /** @type {TokenGroup[] | undefined} */
    this.cut = undefined;
    /** @type {{ back: number, head: number, value: number }[] | undefined} */
    this.cutSources = undefined;
    const length = c.length[w],
      along = feature.layout.tokens[w];
    this.tokens = c.pool.subarray(this.poolStart, this.poolStart + length);
    this.stored = c.acts.subarray(along, along + length);
    this.storedEffects = c.effects?.subarray(along, along + length);
    this.scale = c.scale[feature.row] / 255;
    this.effectScale = c.effect_scale ? c.effect_scale[feature.row] / 127 : 0;
  }
  /** @param {number} i */
  activation(i) {
    return i === this.peak && this.stored[i] > 0 ? this.act : this.stored[i] * this.scale;
  }
  /** @param {number} i */
  effect(i) {
    return this.storedEffects ? this.storedEffects[i] * this.effectScale : 0;
  }
  get text() {
    return decoder.decode(joinBytes(Array.from(this.tokens, (t) => this.feature.vocab.bytes(t))));
  }
  get groups() {
    return (this.cut ??= tokenGroups(this.tokens, this.feature.vocab));
  }
  /** The next-token distribution at the peak without the latent, if it was computed. */
  get explained() {
    const c = this.feature.columns;
    const x = c.x_window ? c.x_window.indexOf(this.w) : -1;
    if (x < 0) return null;
    /** @type {(token: string, delta: string) => [number, number][]} */
    const three = (token, delta) =>
      [0, 1, 2].flatMap((k) => {
        const found = at(c[token], 3 * x + k);
        return found === null ? [] : [[found, at(c[delta], 3 * x + k) ?? Number.NaN]];
      });
    return {
      method: c.x_method[x],
      loss: at(c.x_loss, x),
      kl: at(c.x_kl, x),
      next: at(c.x_next, x),
      p: at(c.x_p, x),
      ablated: at(c.x_p_ablated, x),
      up: three("x_up", "x_up_delta"),
      down: three("x_down", "x_down_delta"),
    };
  }
  /** Sources of the pre-activation at the peak: [{back, head, value}], largest first. */
  get sources() {
    const c = this.feature.columns,
      offsets = this.feature.layout.dfa;
    if (!offsets) return [];
    return (this.cutSources ??= Array.from({ length: offsets[this.w + 1] - offsets[this.w] }, (_, k) => ({
      back: c.dfa_back[offsets[this.w] + k],
      head: c.dfa_head[offsets[this.w] + k],
      value: c.dfa[offsets[this.w] + k],
    })).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)));
  }
  /**
   * What the tokens [from, to) contribute, 0 where they are not among the sources.
   * @param {number} from
   * @param {number} to
   */
  sourceOf(from, to) {
    /** @param {{ back: number }} source */
    const inside = ({ back }) => this.peak - back >= from && this.peak - back < to;
    return this.sources.reduce((sum, source) => sum + (inside(source) ? source.value : 0), 0);
  }
  get largestSource() {
    return Math.abs(this.sources[0]?.value ?? 0) || 1;
  }
  /** The pre-activation at the peak less those sources. */
  get rest() {
    return this.sources.reduce((left, { value }) => left - value, this.act);
  }
}

/**
 * Character groups of local tokens; a special token always stands alone.
 * @param {Numbers} tokens
 * @param {Vocab} vocab
 */
export function tokenGroups(tokens, vocab) {
  return characterGroups(
    Array.from(tokens, (t) => vocab.bytes(t)),
    (i) => vocab.special(tokens[i]),
  );
}

/** @type {Record<string, number>} */
export const FLAG = { page: 1, silent: 2, dense: 4, duplicate: 8, dead: 16 };
