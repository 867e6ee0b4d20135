// Labels, notes and pins of the reader: kept in this browser only, out and in as JSON.

import { say } from "./parts.js";
import { keep, stored } from "./preferences.js";

/** @import { Sae } from "./feature-data.js" */
/** @typedef {"labels" | "notes"} Kind */
/**
 * @typedef {object} Notes
 * @property {Map<string, string>} labels
 * @property {Map<string, string>} notes
 * @property {Set<string>} pins
 * @property {string} key
 * @property {boolean} lasting
 */

// Keyed by "A:123": the SAE and the latent. Maps, so that no key is special.
/** @type {Notes} */
export const notes = { labels: new Map(), notes: new Map(), pins: new Set(), key: "", lasting: true };

/** @param {string} identity */
export function openNotes(identity) {
  notes.key = `saelab:notes:${identity}`;
  takeNotes(stored(notes.key, {}));
  notes.lasting = keep(notes.key, notesJson());
}

const KINDS = /** @type {const} */ (["labels", "notes"]);

/** @param {unknown} x */
const text = (x) => (typeof x === "string" ? x.slice(0, 100000) : "");

const KEY = /^[A-Z]:\d{1,9}$/;

/**
 * Reads what notesJson wrote; what is not of that shape is passed over. Returns how many entries it took.
 * @param {any} json
 */
export function takeNotes(json) {
  let taken = 0;
  for (const kind of KINDS) {
    for (const [key, value] of Object.entries(json?.[kind] ?? {})) {
      if (KEY.test(key) && text(value)) {
        notes[kind].set(key, text(value));
        taken++;
      }
    }
  }
  for (const key of Array.isArray(json?.pins) ? json.pins : [])
    if (KEY.test(key)) {
      notes.pins.add(key);
      taken++;
    }
  return taken;
}

export function notesJson() {
  return {
    format: "saelab-notes",
    version: 1,
    dataset: notes.key.replace(/^saelab:notes:/, ""),
    labels: Object.fromEntries(notes.labels),
    notes: Object.fromEntries(notes.notes),
    pins: [...notes.pins],
  };
}

export function saveNotes() {
  notes.lasting = keep(notes.key, notesJson());
  if (!notes.lasting) say("This browser keeps nothing for this page: export your notes before you close it");
}

/** @param {Kind} kind @param {string} key @param {string} value */
export function setNote(kind, key, value) {
  if (value) notes[kind].set(key, value);
  else notes[kind].delete(key);
  saveNotes();
}

/** @param {string} key */
export function togglePin(key) {
  if (!notes.pins.delete(key)) notes.pins.add(key);
  saveNotes();
  return notes.pins.has(key);
}

/** Latents of this SAE among the reader's keys. @param {Sae} sae @param {Iterable<string>} keys */
export const latentsOf = (sae, keys) =>
  [...keys]
    .filter((key) => key.startsWith(`${sae.letter}:`))
    .map((key) => Number(key.slice(2)))
    .filter((l) => l < sae.size);
