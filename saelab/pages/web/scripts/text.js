// Token bytes to text that a person can read and copy verbatim.

/** @import { TokenGroup } from "./types.d.ts" */

import { el } from "./dom.js";

// Controls, format characters (bidi overrides, zero-width spaces, tags), lone surrogates, line and paragraph separators.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\u2028\u2029\u115f\u1160\u3164\uffa0]/u;
const HIDDEN_RUN = new RegExp(HIDDEN.source, "gu");
/** @type {Record<string, string>} */
const STAND_IN = { "\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡" };
const JOINER = "\u200d";

/** @param {string} char */
function hiddenNode(char) {
  const code = char.codePointAt(0) ?? 0;
  const glyph = STAND_IN[char] || (code < 0x20 ? String.fromCodePoint(0x2400 + code) : "");
  const name = glyph || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  return el(glyph ? "span.c" : "span.c.code", { data: { c: name } }, char);
}

/**
 * Text nodes for a string: the string itself, its invisible characters each in a span with a visible stand-in.
 * @param {string} string
 * @returns {Node[]}
 */
export function textNodes(string) {
  if (!HIDDEN.test(string)) return [document.createTextNode(string)];
  /** @type {Node[]} */
  const nodes = [];
  let from = 0;
  for (const match of string.matchAll(HIDDEN_RUN)) {
    // A joiner after a pictograph is part of one emoji.
    if (
      match[0] === JOINER &&
      /\p{Extended_Pictographic}\ufe0f?$/u.test(string.slice(Math.max(0, match.index - 4), match.index))
    )
      continue;
    if (match.index > from) nodes.push(document.createTextNode(string.slice(from, match.index)));
    nodes.push(hiddenNode(match[0]));
    from = match.index + match[0].length;
  }
  if (from < string.length) nodes.push(document.createTextNode(string.slice(from)));
  return nodes;
}

export const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

/**
 * How many bytes the last character of `bytes` still lacks: 0 when it ends on a whole character.
 * @param {Uint8Array} bytes
 */
function lacking(bytes) {
  for (let back = 1; back <= Math.min(4, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte < 0x80) return 0;
    if (byte >= 0xc0) {
      const size = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2;
      return Math.max(0, size - back);
    }
  }
  return 0;
}
/** @param {Uint8Array} bytes */
const continues = (bytes) => bytes.length > 0 && (bytes[0] & 0xc0) === 0x80;

/** @param {Uint8Array[]} list */
export function joinBytes(list) {
  const all = new Uint8Array(list.reduce((n, bytes) => n + bytes.length, 0));
  let at = 0;
  for (const bytes of list) {
    all.set(bytes, at);
    at += bytes.length;
  }
  return all;
}

/**
 * Runs of tokens that make whole characters: byte-fallback tokens that share one character go together. `tokens` are
 * token bytes, `alone(i)` says which never join; returns [{from, to, text}] with `to` exclusive.
 * @param {Uint8Array[]} tokens
 * @param {(i: number) => boolean} [alone]
 */
export function characterGroups(tokens, alone = () => false) {
  /** @type {TokenGroup[]} */
  const groups = [];
  for (let from = 0; from < tokens.length; ) {
    let to = from + 1;
    let bytes = tokens[from];
    while (to < tokens.length && !alone(from) && !alone(to) && lacking(bytes) > 0 && continues(tokens[to]))
      bytes = joinBytes([bytes, tokens[to++]]);
    groups.push({ from, to, text: decoder.decode(bytes) });
    from = to;
  }
  return groups;
}

/**
 * A token as a small chip; the space it may begin with is shown, long ones are cut by the style sheet. `bytes` stand
 * for what is no text.
 * @param {string} string
 * @param {number[] | null} [bytes]
 */
export function chip(string, bytes = null) {
  const title = string.length > 12 ? string.slice(0, 400) : undefined;
  if (bytes) {
    const hex = bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
    return el(
      "span.chip",
      { title: "bytes that are no character by themselves" },
      el("span.c.code", { data: { c: hex } }, string),
    );
  }
  if (string === "") return el("span.chip", null, "∅");
  const space = string.startsWith(" ");
  const rest = string.slice(space ? 1 : 0, 400);
  return el(
    "span.chip",
    { title },
    space && el("span.c", { data: { c: "␣" } }, " "),
    textNodes(rest),
    string.length > 400 && "…",
  );
}
