// Chunks: from a script element or a file of the bundle to checked, inflated, typed columns. docs/dashboard-format.md.

/** @import { Columns, Container, Manifest, Numbers } from "./types.d.ts" */

import { decoder } from "./text.js";

const bundle = document.documentElement.dataset.form === "bundle";
const trusted = globalThis.trustedTypes?.createPolicy("saelab", {
  createScriptURL(url) {
    if (/^data\/[a-z0-9-]+\.js$/.test(url)) return url;
    throw new TypeError(`${url} is not a chunk of this bundle`);
  },
});

export class ChunkError extends Error {
  /** @param {string} name @param {string} what @param {string} [hint] */
  constructor(name, what, hint) {
    super(`chunk ${name}: ${what}`);
    this.hint = hint || "The file may be cut off or changed since it was written. The rest of the page works on.";
  }
}

/** @type {Map<string, (text: string) => void>} */
const arriving = new Map(); // name -> resolve, of scripts on their way
globalThis.__sl = (name, text) => arriving.get(name)?.(text);

/** @param {string} name @returns {Promise<string>} */
function fromFile(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const url = `data/${name}.js`;
    /** @type {<T>(settle: (value: T) => void, value: T) => void} */
    const done = (settle, value) => {
      arriving.delete(name);
      script.remove();
      settle(value);
    };
    arriving.set(name, (text) => done(resolve, text));
    script.onerror = () =>
      done(
        reject,
        new ChunkError(
          name,
          `${url} is not there`,
          "The folder must be kept whole: index.html beside data/. Opened inside an archive, unpack it first.",
        ),
      );
    script.onload = () => arriving.has(name) && done(reject, new ChunkError(name, `${url} does not hold it`));
    script.src = trusted ? trusted.createScriptURL(url) : url;
    document.head.append(script);
  });
}

/** The text of an inline chunk; waits while the page is still being read. @param {string} name */
async function fromPage(name) {
  for (;;) {
    const node = document.querySelector(`script#${CSS.escape(name)}[type="text/plain"]`);
    const whole = document.readyState !== "loading";
    if (node && (whole || node.nextSibling)) return node.textContent ?? "";
    if (whole) throw new ChunkError(name, "it is not in this file");
    await new Promise((resolve) => setTimeout(resolve, 8));
  }
}

const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/** @param {string} name @param {string} string @returns {Uint8Array<ArrayBuffer>} */
export function fromBase64(name, string) {
  try {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(string);
    return Uint8Array.from(atob(string), (c) => c.charCodeAt(0));
  } catch {
    const at = [...string].findIndex((c) => !BASE64.includes(c) && c !== "=");
    throw new ChunkError(name, at < 0 ? "its base64 is cut off" : `its base64 is broken at character ${at}`);
  }
}

/** @param {string} name @param {Uint8Array<ArrayBuffer>} bytes */
export async function inflate(name, bytes) {
  try {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (error) {
    throw new ChunkError(name, `it does not inflate (${/** @type {Error} */ (error).message})`);
  }
}

/**
 * The inflated bytes of a chunk, after its SHA-256 agreed with the manifest's.
 * @param {string} name
 * @param {[sha256: string, ...number[]]} [expected]
 */
async function chunkBytes(name, expected) {
  const member = fromBase64(name, await (bundle ? fromFile(name) : fromPage(name)));
  if (expected && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", member));
    const hex = Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
    if (hex !== expected[0])
      throw new ChunkError(
        name,
        `its SHA-256 is ${hex.slice(0, 12)}…, the manifest says ${String(expected[0]).slice(0, 12)}…`,
      );
  }
  return inflate(name, member);
}

/** What a chunk of JSON holds. @param {string} name */
export async function loadJson(name) {
  const bytes = await chunkBytes(name);
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new ChunkError(name, /** @type {Error} */ (error).message);
  }
}

/** @returns {Promise<Manifest>} */
export async function loadManifest() {
  const manifest = await loadJson("manifest");
  if (manifest.format !== "saelab-dashboard" || manifest.version !== 1) {
    throw new ChunkError(
      "manifest",
      `format ${manifest.format}, version ${manifest.version}; this page reads saelab-dashboard, version 1`,
      "Page and data come from different versions of saelab: build the dashboard again.",
    );
  }
  return manifest;
}

/** binary16 to numbers, by table, where the browser has no Float16Array. @param {ArrayBuffer} bytes */
export function halves(bytes) {
  if (globalThis.Float16Array) return Float32Array.from(new Float16Array(bytes));
  return Float32Array.from(new Uint16Array(bytes), (h) => {
    const sign = h & 0x8000 ? -1 : 1,
      exponent = (h >> 10) & 31,
      fraction = h & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}

/** @type {Record<string, new (buffer: ArrayBuffer) => Numbers & ArrayLike<number>>} */
const TYPED = {
  u8: Uint8Array,
  i8: Int8Array,
  u16: Uint16Array,
  i16: Int16Array,
  u32: Uint32Array,
  i32: Int32Array,
  f32: Float32Array,
  f64: Float64Array,
};
/** @type {Record<string, number>} */
const SIZE = { u8: 1, i8: 1, u16: 2, i16: 2, f16: 2, u32: 4, i32: 4, f32: 4, f64: 8, utf8: 1 };

/**
 * {kind, header, columns}: columns by name as typed arrays (scaled ones as Float64Array), text as strings.
 * @param {string} name
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Container}
 */
export function parseContainer(name, bytes) {
  try {
    return readContainer(name, bytes);
  } catch (error) {
    throw error instanceof ChunkError
      ? error
      : new ChunkError(name, `its header does not describe it (${/** @type {Error} */ (error).message})`);
  }
}

/** @param {string} name @param {Uint8Array<ArrayBuffer>} bytes @returns {Container} */
function readContainer(name, bytes) {
  if (bytes.length < 8 || String.fromCharCode(...bytes.subarray(0, 4)) !== "SLD1") {
    throw new ChunkError(name, "it does not begin with SLD1");
  }
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(4, true);
  const header = JSON.parse(decoder.decode(bytes.subarray(8, 8 + length)));
  /** @type {Columns} */
  const columns = Object.create(null);
  let at = 8 + length;
  for (const { name: column, type, length: n, scale } of header.columns) {
    at += (8 - (at % 8)) % 8;
    const end = at + n * SIZE[type];
    if (!(n >= 0) || !(end <= bytes.length)) {
      throw new ChunkError(name, `column ${column} ends at byte ${end} of ${bytes.length}`);
    }
    const buffer = bytes.buffer.slice(bytes.byteOffset + at, bytes.byteOffset + end);
    Object.assign(columns, { [column]: readColumn(type, buffer, scale) });
    at = end;
  }
  if (at !== bytes.length) throw new ChunkError(name, `${bytes.length - at} bytes stand after its last column`);
  return { name, kind: header.kind, header, columns };
}

/** @param {string} type @param {ArrayBuffer} buffer @param {number} [scale] @returns {Numbers | string} */
function readColumn(type, buffer, scale) {
  if (type === "utf8") return decoder.decode(buffer);
  const values = type === "f16" ? halves(buffer) : new TYPED[type](buffer);
  return scale === undefined ? values : Float64Array.from(values, (v) => v * scale);
}

/** The strings of a text column pair. @param {string} string @param {Numbers} lengths */
export function cutTexts(string, lengths) {
  let at = 0;
  return Array.from(lengths, (n) => string.slice(at, (at += n)));
}

/** @type {Map<string, Promise<Container>>} */
const chunkCache = new Map(); // in order of use; pages and what the SAE misses are let go, the rest stays
const KEPT = 24;

/**
 * The columns of a chunk, from memory if it was used lately.
 * @param {Manifest} manifest
 * @param {string} name
 * @returns {Promise<Container>}
 */
export function chunk(manifest, name) {
  let promise = chunkCache.get(name);
  if (!promise) {
    const expected = Object.hasOwn(manifest.chunks, name) ? manifest.chunks[name] : null;
    promise = expected
      ? chunkBytes(name, expected).then((bytes) => parseContainer(name, bytes))
      : Promise.reject(new ChunkError(name, "the manifest does not list it"));
    promise.catch(() => chunkCache.delete(name)); // a later try reads it anew
  } else chunkCache.delete(name);
  chunkCache.set(name, promise);
  const pages = [...chunkCache.keys()].filter((key) => /(^|-)[fm]-\d+$/.test(key));
  for (const old of pages.slice(0, Math.max(0, pages.length - KEPT))) chunkCache.delete(old);
  return promise;
}
/** @param {Manifest} manifest @param {string} name */
export const hasChunk = (manifest, name) => Object.hasOwn(manifest.chunks, name);
