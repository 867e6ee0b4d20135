// Where one is, as the fragment of the URL: #f=123&tab=random&q=…. Everything a person can share is in it.

/** @import { Changes } from "./types.d.ts" */

import { byId, nearest } from "./dom.js";

// What the page that is shown can do, by name: next, previous, nextGroup, previousGroup, pin, note, compare, export, errors,
// sources, repaint. Keys call them; each new page fills it anew.
/** @type {Record<string, () => unknown>} */
export const actions = {};

/** @type {{ params: URLSearchParams, listeners: ((params: URLSearchParams) => void)[] }} */
export const route = { params: new URLSearchParams(), listeners: [] };

/** @param {string} hash */
export const parseHash = (hash) => new URLSearchParams(hash.replace(/^#/, ""));

/** The fragment for these parameters; undefined and "" are left out. @param {Changes} params */
export function hashOf(params) {
  const kept = Object.entries(params).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return `#${new URLSearchParams(kept.map(([k, v]) => [k, String(v)]))}`;
}

let writing = 0; // the timer of the next write of the address

/**
 * Go somewhere. In a sandboxed frame there may be no history: the page then keeps the place to itself.
 * @param {string} hash
 * @param {boolean} [replacing]
 */
export function go(hash, replacing = false) {
  const target = hash.startsWith("#") ? hash : `#${hash}`;
  clearTimeout(writing);
  try {
    if (replacing) history.replaceState(null, "", target);
    else history.pushState(null, "", target);
  } catch {
    /* about:srcdoc */
  }
  arrive(target);
}

/** @param {string} hash */
function arrive(hash) {
  route.params = parseHash(hash);
  for (const listener of route.listeners) listener(route.params);
}

/** The present place with some parameters changed. @param {Changes} changes */
export const here = (changes) => hashOf({ ...Object.fromEntries(route.params), ...changes });

/** Remember something of the present view in its URL without leaving it or telling anybody. @param {Changes} changes */
export function mark(changes) {
  route.params = parseHash(here(changes));
  clearTimeout(writing); // browsers slow a page down that writes its URL at every key
  writing = setTimeout(writeHash, 120);
}

export function writeHash() {
  clearTimeout(writing);
  try {
    history.replaceState(null, "", here({}));
  } catch {
    /* about:srcdoc */
  }
}

/** The present page once more, from its data. */
export const again = () => arrive(here({}));

/** @param {(params: URLSearchParams) => void} listener @param {string} [first] where one begins whose address names no place */
export function startRoute(listener, first = "") {
  route.listeners.push(listener);
  addEventListener("popstate", () => arrive(location.hash));
  document.addEventListener("click", (event) => {
    const link = nearest(event, "a[href^='#']");
    if (!link || event.defaultPrevented || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    if (link.classList.contains("skip")) byId("main").focus();
    else go(link.getAttribute("href") ?? "");
  });
  arrive(location.hash || first);
}
