// Labels, notes and pins of the reader: kept in this browser only, out and in as JSON. Preferences beside them.

const safely = (action, otherwise) => {
  try {
    return action();
  } catch {
    return otherwise;
  }
};
const stored = (key, otherwise) => safely(() => JSON.parse(localStorage.getItem(key)) ?? otherwise, otherwise);
const keep = (key, value) => safely(() => (localStorage.setItem(key, JSON.stringify(value)), true), false);

const preferences = { theme: "", palette: "orange", contrast: "", mono: false, logY: true };
const PREFERENCES = "saelab:preferences";

function loadPreferences() {
  const saved = stored(PREFERENCES, {});
  for (const key of Object.keys(preferences))
    if (typeof saved[key] === typeof preferences[key]) preferences[key] = saved[key];
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
function prefer(changes) {
  Object.assign(preferences, changes);
  keep(PREFERENCES, preferences);
  applyPreferences();
  actions.repaint?.();
}

// Keyed by "A:123": the SAE and the latent. Maps, so that no key is special.
const notes = { labels: new Map(), notes: new Map(), pins: new Set(), key: "", lasting: true };

function openNotes(identity) {
  notes.key = `saelab:notes:${identity}`;
  takeNotes(stored(notes.key, {}));
  notes.lasting = keep(notes.key, notesJson());
}
const text = (x) => (typeof x === "string" ? x.slice(0, 100000) : "");
const KEY = /^[A-Z]:\d{1,9}$/;

/** Reads what notesJson wrote; what is not of that shape is passed over. Returns how many entries it took. */
function takeNotes(json) {
  let taken = 0;
  for (const kind of ["labels", "notes"]) {
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
function notesJson() {
  return {
    format: "saelab-notes",
    version: 1,
    dataset: notes.key.replace(/^saelab:notes:/, ""),
    labels: Object.fromEntries(notes.labels),
    notes: Object.fromEntries(notes.notes),
    pins: [...notes.pins],
  };
}
function saveNotes() {
  notes.lasting = keep(notes.key, notesJson());
  if (!notes.lasting) say("This browser keeps nothing for this page: export your notes before you close it");
}
function setNote(kind, key, value) {
  if (value) notes[kind].set(key, value);
  else notes[kind].delete(key);
  saveNotes();
}
function togglePin(key) {
  if (!notes.pins.delete(key)) notes.pins.add(key);
  saveNotes();
  return notes.pins.has(key);
}
