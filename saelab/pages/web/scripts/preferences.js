// How the reader wants the page to look: kept in this browser, handed to the style sheet.

import { PALETTES, ramp, STEPS } from "./colour.js";
import { actions } from "./route.js";

/** @template T @param {() => T} action @param {T} otherwise */
const safely = (action, otherwise) => {
  try {
    return action();
  } catch {
    return otherwise;
  }
};

/** What this browser keeps under a key. @param {string} key @param {any} otherwise */
export const stored = (key, otherwise) =>
  safely(() => JSON.parse(localStorage.getItem(key) ?? "null") ?? otherwise, otherwise);

/** @param {string} key @param {unknown} value */
export const keep = (key, value) =>
  safely(() => {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  }, false);

export const preferences = { theme: "", palette: "orange", contrast: "", mono: false, logY: true };

const PREFERENCES = "saelab:preferences";

export function loadPreferences() {
  const saved = stored(PREFERENCES, {});
  for (const [key, value] of Object.entries(preferences))
    if (typeof saved[key] === typeof value) Object.assign(preferences, { [key]: saved[key] });
  applyPreferences();
}

function applyPreferences() {
  const root = document.documentElement;
  const contrast = preferences.contrast || (matchMedia("(prefers-contrast: more)").matches ? "more" : "");
  for (const [name, value] of [
    ["theme", preferences.theme],
    ["contrast", contrast],
    ["mono", preferences.mono ? "on" : ""],
  ]) {
    if (value) root.dataset[name] = value;
    else delete root.dataset[name];
  }
  paintRamp();
}

/** @param {Partial<typeof preferences>} changes */
export function prefer(changes) {
  Object.assign(preferences, changes);
  keep(PREFERENCES, preferences);
  applyPreferences();
  actions.repaint?.();
}

export const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

export const paletteName = () => (Object.hasOwn(PALETTES, preferences.palette) ? preferences.palette : "orange");

/** @param {number} n */
export const currentRamp = (n) => ramp(paletteName(), isDark(), n);

/** Hands the ramp to the style sheet. */
function paintRamp() {
  // The first colour is the paper itself: steps begin beyond it.
  currentRamp(STEPS + 1)
    .slice(1)
    .forEach(({ css, ink }, i) => {
      document.documentElement.style.setProperty(`--a${i + 1}`, css);
      document.documentElement.style.setProperty(`--i${i + 1}`, ink);
    });
}
