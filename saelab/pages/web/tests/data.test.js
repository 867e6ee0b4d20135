import "./page.js";
import assert from "node:assert/strict";
import { test } from "node:test";
import { gzipSync } from "node:zlib";
import { ChunkError, cutTexts, fromBase64, halves, inflate, parseContainer } from "../scripts/chunks.js";
import { parseRange, radixSort, rangeText, selectRows, sortOf } from "../scripts/columns.js";
import { parseRegion, regionText } from "../scripts/direction-map.js";
import { at, Dataset, starts, Vocab } from "../scripts/feature-data.js";
import { notes, takeNotes } from "../scripts/notes.js";
import { search } from "../scripts/search.js";
import { longestTokens } from "../scripts/sentence-page.js";

/** A container as docs/dashboard-format.md describes it: columns of [name, type, bytes, length, scale]. */
function container(columns, kind = "toy") {
  const described = columns.map(([name, type, , length, scale]) => ({ name, type, length, scale }));
  const header = new TextEncoder().encode(JSON.stringify({ kind, columns: described }));
  const parts = [0x53, 0x4c, 0x44, 0x31, header.length, 0, 0, 0, ...header];
  for (const [, , bytes] of columns) {
    while (parts.length % 8) parts.push(0);
    parts.push(...bytes);
  }
  return Uint8Array.from(parts);
}
const bytesOf = (typed) => new Uint8Array(typed.buffer);
const broken = (error) => error instanceof ChunkError && error.message.startsWith("chunk x: ");

test("columns come out of a container as they went in", () => {
  const text = new TextEncoder().encode("a😀é");
  const read = parseContainer(
    "x",
    container([
      ["one", "u16", bytesOf(Uint16Array.of(1, 65535)), 2],
      ["two", "f32", bytesOf(Float32Array.of(0.5, Number.NaN)), 2],
      ["scaled", "u8", [3, 0], 2, 0.25],
      ["text", "utf8", text, text.length],
      ["__proto__", "i8", [255], 1],
    ]),
  );
  assert.equal(read.kind, "toy");
  assert.deepEqual([...read.columns.one], [1, 65535]);
  assert.deepEqual([...read.columns.two], [0.5, Number.NaN]);
  assert.deepEqual([...read.columns.scaled], [0.75, 0]);
  assert.deepEqual([...Object.getOwnPropertyDescriptor(read.columns, "__proto__").value], [-1]); // no name is special
  assert.deepEqual(cutTexts(read.columns.text, [1, 2, 0, 1]), ["a", "😀", "", "é"]); // lengths in UTF-16 units
  assert.deepEqual(
    [at(read.columns.one, 0), at(read.columns.one, 1), at(read.columns.two, 1), at(undefined, 0)],
    [1, null, null, null],
  );
});

test("a damaged container is said", () => {
  const whole = container([["one", "u16", [1, 0, 2, 0], 2]]);
  const spoiled = [
    whole.slice(0, 3),
    Uint8Array.from(whole, (b, i) => (i ? b : 0)),
    whole.slice(0, -1),
    Uint8Array.from([...whole, 0]),
    container([["one", "u16", [], -1]]),
    container([["one", "complex", [1], 1]]),
  ];
  for (const bytes of spoiled) assert.throws(() => parseContainer("x", bytes), broken);
});

test("base64 and gzip come back, and what is neither is said", async () => {
  const bytes = Uint8Array.from({ length: 300 }, (_, i) => i % 256);
  const member = new Uint8Array(gzipSync(bytes));
  assert.deepEqual(await inflate("x", fromBase64("x", Buffer.from(member).toString("base64"))), bytes);
  await assert.rejects(inflate("x", member.slice(0, 40)), broken);
  assert.throws(() => fromBase64("x", "AB*D"), /broken at character 2/);
  assert.throws(() => fromBase64("x", "A"), /cut off/);
});

test("binary16 by table", () => {
  const bits = [0x0000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0xfc00, 0x7e00, 0x3555];
  const wanted = [0, 1, -2, 65504, 2 ** -24, Infinity, -Infinity, Number.NaN, 0.333251953125];
  assert.deepEqual([...halves(Uint16Array.from(bits).buffer)], wanted);
});

test("rows sort by value, stable, with NaN last both ways", () => {
  const order = (values, down) => [...radixSort(values, Uint32Array.from(values.keys()), down)];
  const values = Float32Array.of(0.5, -1, Number.NaN, 3, 0.5, -Infinity);
  assert.deepEqual(order(values, false), [5, 1, 0, 4, 3, 2]);
  assert.deepEqual(order(values, true), [3, 0, 4, 1, 5, 2]);
  assert.deepEqual(order(Uint32Array.of(70_000, 3, 70_000, 0xffffffff), true), [3, 0, 2, 1]);
});

test("ranges and sorts of an address", () => {
  assert.deepEqual([parseRange("1e-5..0.01"), parseRange("..3"), parseRange("2.."), parseRange("x..y"), parseRange(null)],
    [[1e-5, 0.01], [0, 3], [2, Infinity], [0, Infinity], [0, Infinity]]); // biome-ignore format: one a place
  assert.deepEqual([rangeText(1e-5, 0.01), rangeText(0, 3), rangeText(0, Infinity)], ["0.00001..0.01", "..3", ""]);
  assert.deepEqual(
    [{ count: [] }, { count: [], focus: [] }].flatMap((index) =>
      ["s=-max", ""].map((s) => sortOf({ index }, new URLSearchParams(s))),
    ),
    [
      ["max", true],
      ["density", true],
      ["max", true],
      ["focus", true],
    ],
  );
});

/** A data set of four latents and three tokens; latents 0 to 2 have a page. */
function dataset() {
  const info = { prefix: "", name: "toy", d_sae: 4, pages: 3, per_chunk: 64 };
  const made = new Dataset({ saes: [info], chunks: {}, corpus: { counted: 100 } });
  const words = [" the", "The", "cat"];
  const encoded = words.map((word) => new TextEncoder().encode(word));
  const columns = {
    id: [7, 8, 9],
    flags: [0, 0, 0],
    count: [1, 1, 1],
    length: encoded.map((b) => b.length),
    bytes: Uint8Array.from(encoded.flatMap((b) => [...b])),
  };
  made.vocab = new Vocab({ columns });
  const [sae] = made.saes;
  sae.index = {
    count: Uint32Array.of(5, 50, 1, 0),
    max: Float32Array.of(1, 2, 3, 0),
    flags: Uint8Array.of(1, 5, 1, 18),
    tok0: Uint16Array.of(0, 2, 65535, 65535),
    tok1: Uint16Array.of(1, 65535, 65535, 65535),
    tok2: new Uint16Array(4).fill(65535),
  };
  sae.pageLatents = Uint32Array.of(0, 1, 2);
  sae.labels.set(2, { text: "Cats and dogs", source: "", score: null });
  return sae;
}

test("a search finds by number, word, token, pattern and note", async () => {
  const sae = dataset();
  const found = async (query) => (await search(sae, query)).only && [...(await search(sae, query)).only];
  notes.notes.set("A:3", "a note on cats");
  assert.deepEqual(await found("  "), null);
  assert.deepEqual([await found("2"), await found("#3"), await found("99")], [[2], [3], []]);
  assert.deepEqual(await found("cat"), [2, 3, 1]); // is so called; has a note; fires on the token
  assert.deepEqual(await found('"cat"'), [2, 3]); // quoted: words only
  assert.deepEqual([await found("tok:the"), await found('tok:"The"'), await found('tok:"the"')], [[0], [0], []]);
  assert.deepEqual(await found("tok:at"), [1]); // a part of the token
  Object.assign(sae.index, { tok0: Uint16Array.of(0, 1, 0, 0), focus: Float32Array.of(0.2, 0, 0.9, 0.1) });
  assert.deepEqual(await found('tok:" the"'), [2, 0, 3]); // of those that it leads, the most focused first
  assert.deepEqual(await found('tok:"The"'), [1, 0]); // then those where it is second
  assert.deepEqual([await found("re:/^cats/"), await found("re:/(/")], [[2], []]);
  assert.match((await search(sae, "99")).message, /the last is 3/);
  notes.notes.clear();
});

test("rows are those that the address asks for, in its order", async () => {
  const sae = dataset();
  const rows = async (query) => [...(await selectRows(sae, new URLSearchParams(query))).rows];
  assert.deepEqual(await rows(""), [1, 0, 2]); // with a page, by density
  assert.deepEqual(await rows("show=all&s=id"), [0, 1, 2, 3]);
  assert.deepEqual(await rows("s=-max"), [2, 1, 0]);
  assert.deepEqual(
    [await rows("show=dead"), await rows("show=dense"), await rows("show=__proto__&s=id")],
    [[3], [1], [0, 1, 2, 3]],
  );
  assert.deepEqual([await rows("d=0.02..0.2"), await rows("m=2..")], [[0], [1, 2]]);
  notes.pins.add("A:2").add("B:0");
  assert.deepEqual(await rows("show=pinned"), [2]);
  notes.pins.clear();
});

test("latents know their pages, and bytes their tokens", () => {
  const sae = dataset();
  assert.deepEqual([sae.rank(2), sae.rank(3), sae.chunkOf(130), sae.density(1)], [2, -1, "00002", 0.5]);
  assert.deepEqual(
    [0, 1, 2].map((token) => sae.dataset.vocab.string(token)),
    [" the", "The", "cat"],
  );
  assert.deepEqual([...starts([2, 0, 3])], [0, 2, 2, 5]);
});

test("foreign notes: what is not of their shape is passed over", () => {
  const foreign = JSON.parse(
    '{"labels": {"A:1": "x", "__proto__": {"y": 1}, "B:2": 5}, "notes": null, "pins": ["A:1", "<b>", 7]}',
  );
  assert.equal(takeNotes(foreign), 2);
  assert.deepEqual([[...notes.labels], [...notes.pins], {}.y], [[["A:1", "x"]], ["A:1"], undefined]);
  for (const wrong of [null, 5, "x", []]) assert.equal(takeNotes(wrong), 0);
});

test("a sentence is cut into the longest tokens that a page knows", () => {
  const { vocab } = dataset().dataset;
  const cut = (text) => longestTokens(text, vocab).map(({ text: piece, token }) => [piece, token]);
  assert.deepEqual(cut("The cat the"), [
    ["The", 1],
    [" ", null],
    ["cat", 2],
    [" the", 0],
  ]);
  assert.deepEqual(cut("😀"), [["😀", null]]);
});

test("a region of the map of directions goes into the address and out of it", () => {
  const region = { plane: "pca", low: [-0.5, 0], high: [0.25, 1] };
  assert.deepEqual(parseRegion(regionText(region)), region);
  assert.deepEqual([parseRegion("pca:1,2,3"), parseRegion("__proto__:1,2,3,4"), parseRegion(null)], [null, null, null]);
});
