// What a text has that another has not.

/** @import { Child } from "./types.d.ts" */

import { el } from "./dom.js";
import { textNodes } from "./text.js";

const MOST = 600; // words compared

/** @param {string} text */
const words = (text) => text.match(/\s+|[^\s]+/gu) ?? [];

/**
 * The text `after` with the words marked that `before` has not, in order (longest common subsequence of the first words).
 * @param {string} before
 * @param {string} after
 */
export function differing(before, after) {
  const a = words(before).slice(0, MOST);
  const all = words(after);
  const b = all.slice(0, MOST);
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  /** @type {Child[]} */
  const out = [];
  for (let i = 0, j = 0; j < b.length; ) {
    if (i < a.length && a[i] === b[j]) {
      out.push(textNodes(b[j]));
      i++;
      j++;
    } else if (i < a.length && length[i + 1][j] >= length[i][j + 1]) i++;
    else out.push(el("mark", null, textNodes(b[j++])));
  }
  const rest = all.slice(MOST).join("");
  if (rest) out.push(el("span.muted", { title: "not compared" }, textNodes(rest)));
  return out;
}
