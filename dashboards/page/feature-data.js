// The data set as objects: Dataset, Sae (A or B), and Feature, one latent's page with what belongs to it cut out of its chunk.

const NONE = { Uint8Array: 0xff, Uint16Array: 0xffff, Uint32Array: 0xffffffff };
/** Element i of a column, null where it is None. */
function at(column, i) {
  const value = column?.[i];
  return value === undefined || value === NONE[column.constructor.name] || Number.isNaN(value) ? null : value;
}

/** Where each of consecutive runs of these lengths starts, and the end of the last. */
function starts(lengths) {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
}

class Vocab {
  constructor({ columns }) {
    this.ids = columns.id;
    this.flags = columns.flags;
    this.counts = columns.count;
    this.bytesOfAll = columns.bytes;
    this.offsets = starts(columns.length);
    this.strings = new Map();
  }
  get size() {
    return this.ids.length;
  }
  bytes(token) {
    return this.bytesOfAll.subarray(this.offsets[token], this.offsets[token + 1]);
  }
  string(token) {
    let string = this.strings.get(token);
    if (string === undefined) this.strings.set(token, (string = decoder.decode(this.bytes(token))));
    return string;
  }
  /** A token to look at: text, or the bytes of one that is only part of a character. */
  chip(token) {
    const part = (this.flags[token] & 2) === 2 && this.string(token).includes("\ufffd");
    return chip(this.string(token), part ? Array.from(this.bytes(token).subarray(0, 8)) : null);
  }
  special(token) {
    return (this.flags[token] & 1) === 1;
  }
  missing(token) {
    return (this.flags[token] & 4) === 4;
  }
}

class Sae {
  constructor(dataset, info, letter) {
    Object.assign(this, { dataset, info, letter, prefix: info.prefix, size: info.d_sae });
  }
  chunk(name) {
    return chunk(this.dataset.manifest, this.prefix + name);
  }
  has(name) {
    return hasChunk(this.dataset.manifest, this.prefix + name);
  }
  /** What to call the SAE: its name, or what it is where it has none but its letter. */
  get name() {
    const { name, architecture } = this.info;
    return !name || name === this.letter ? `${architecture}, ${count(this.size)} latents` : name;
  }
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
    this.labels = new Map();
    if (labels) {
      const { latent, length, text: all, source, score } = labels.columns;
      cutTexts(all, length).forEach((string, i) =>
        this.labels.set(latent[i], {
          text: string,
          source: labels.header.sources?.[source?.[i]] ?? "",
          score: at(score, i),
        }),
      );
    }
    return this;
  }
  async openMore() {
    if (!this.more && this.has("idx-1")) this.more = (await this.chunk("idx-1")).columns;
    return this.more;
  }
  /** What a latent is called: the reader's label before the one that came with the data. */
  label(latent) {
    return notes.labels.get(this.key(latent)) ?? this.labels.get(latent)?.text ?? "";
  }
  density(latent) {
    return this.index.count[latent] / this.dataset.manifest.corpus.counted;
  }
  hasPage(latent) {
    return (this.index.flags[latent] & 1) === 1;
  }
  /** Rank of a latent among those with a page, -1 if it has none. */
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
  chunkOf(rank) {
    return String(Math.floor(rank / this.info.per_chunk)).padStart(5, "0");
  }
  async feature(latent) {
    const rank = this.rank(latent);
    if (rank < 0) return null;
    const number = this.chunkOf(rank);
    return new Feature(this, latent, rank % this.info.per_chunk, await this.chunk(`f-${number}`), number);
  }
}

class Dataset {
  constructor(manifest) {
    this.manifest = manifest;
    this.saes = manifest.saes.map((info, i) => new Sae(this, info, "AB"[i]));
  }
  async open() {
    [this.vocab] = await Promise.all([chunk(this.manifest, "vocab").then((c) => new Vocab(c)), this.saes[0].open()]);
    return this;
  }
  /** The SAE of a letter, opened. */
  async sae(letter) {
    const sae = this.saes.find((s) => s.letter === letter) ?? this.saes[0];
    return sae.index ? sae : sae.open();
  }
}

/** Offsets that all features of a chunk share, computed once. */
function layout(chunkOfPages) {
  if (!chunkOfPages.layout) {
    const c = chunkOfPages.columns;
    chunkOfPages.layout = {
      windows: starts(c.windows),
      hist: starts(c.hist_bins),
      nullHist: c.null_bins && starts(c.null_bins),
      tokens: starts(c.length),
      dfa: c.dfa_n && starts(c.dfa_n),
    };
  }
  return chunkOfPages.layout;
}

class Feature {
  constructor(sae, latent, row, pages, number) {
    Object.assign(this, {
      sae,
      latent,
      row,
      columns: pages.columns,
      layout: layout(pages),
      chunkNumber: number,
      vocab: sae.dataset.vocab,
    });
    if (pages.columns.latent[row] !== latent)
      throw new ChunkError(pages.name, `its row ${row} is latent ${pages.columns.latent[row]}, not ${latent}`);
  }
  value(name) {
    return at(this.columns[name], this.row);
  }
  get heading() {
    return this.sae.label(this.latent);
  }
  get density() {
    return this.value("count") / this.sae.dataset.manifest.corpus.counted;
  }
  /** The row of an [L x k] column. */
  list(name, k = 10) {
    return this.columns[name]?.subarray(this.row * k, (this.row + 1) * k) ?? [];
  }
  /** Histogram over bins [2^(b/4), 2^((b+1)/4)): {first, counts}; `kind` "hist" or "null". */
  histogram(kind = "hist") {
    const [first, bins, values, offsets] =
      kind === "hist"
        ? ["hist_first", "hist_bins", "hist", this.layout.hist]
        : ["null_first", "null_bins", "null_hist", this.layout.nullHist];
    if (!this.columns[values]) return null;
    return {
      first: this.columns[first][this.row],
      counts: this.columns[values].subarray(offsets[this.row], offsets[this.row] + this.columns[bins][this.row]),
    };
  }
  get windows() {
    return (this.cutWindows ??= Array.from(
      { length: this.columns.windows[this.row] },
      (_, i) => new Window(this, this.layout.windows[this.row] + i, i),
    ));
  }
  /** What the SAE misses a token of the chunk's pool: 0..15, 255 where it is not applied. */
  async misses() {
    return this.sae.has(`m-${this.chunkNumber}`) ? (await this.sae.chunk(`m-${this.chunkNumber}`)).columns.miss : null;
  }
}

class Window {
  constructor(feature, w, number) {
    const c = feature.columns;
    Object.assign(this, {
      feature,
      w,
      number,
      group: c.group[w],
      context: c.context[w],
      document: at(c.document, w),
      start: c.start[w],
      peak: c.peak[w],
      act: c.act[w],
      repeat: c.repeat[w] === 1,
      poolStart: c.offset[w],
    });
    const length = c.length[w],
      along = feature.layout.tokens[w];
    this.tokens = c.pool.subarray(this.poolStart, this.poolStart + length);
    this.stored = c.acts.subarray(along, along + length);
    this.storedEffects = c.effects?.subarray(along, along + length);
    this.scale = c.scale[feature.row] / 255;
    this.effectScale = c.effect_scale ? c.effect_scale[feature.row] / 127 : 0;
  }
  activation(i) {
    return i === this.peak && this.stored[i] > 0 ? this.act : this.stored[i] * this.scale;
  }
  effect(i) {
    return this.storedEffects ? this.storedEffects[i] * this.effectScale : null;
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
    const three = (token, delta) =>
      [0, 1, 2].map((k) => [at(c[token], 3 * x + k), at(c[delta], 3 * x + k)]).filter(([t]) => t !== null);
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
  /** What the tokens [from, to) contribute, 0 where they are not among the sources. */
  sourceOf(from, to) {
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

/** Character groups of local tokens; a special token always stands alone. */
function tokenGroups(tokens, vocab) {
  return characterGroups(
    Array.from(tokens, (t) => vocab.bytes(t)),
    (i) => vocab.special(tokens[i]),
  );
}
