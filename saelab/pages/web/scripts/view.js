// The dialogs of the page itself: help, settings of the view, notes in and out.

import { PALETTES } from "./colour.js";
import { choice, openDialog } from "./dialogs.js";
import { button, el } from "./dom.js";
import { downloadJson, pickJson } from "./export.js";
import { notes, notesJson, saveNotes, takeNotes } from "./notes.js";
import { plural } from "./numbers.js";
import { say } from "./parts.js";
import { isDark, paletteName, prefer, preferences } from "./preferences.js";
import { actions } from "./route.js";

/** @type {[keys: string, meaning: string][]} */
const KEYS = [
  ["/", "search"],
  ["j k", "next, previous latent in the current order"],
  ["g 123 ↵", "go to latent 123"],
  ["[ ]", "previous, next group of examples"],
  ["← → ↑ ↓", "move over tokens, rows, bars, tabs"],
  ["↵", "open a row, pin a token's card, pick a bar"],
  ["x", "pin the latent"],
  ["n", "write a note"],
  ["c", "compare with another latent"],
  ["l", "logarithmic or linear counts"],
  ["r", "colour by what the SAE misses"],
  ["s", "colour by the sources of the peak (attention)"],
  ["e", "export"],
  ["i", "index"],
  ["t", "light or dark"],
  ["p", "next palette"],
  ["m", "proportional or fixed-width tokens"],
  ["?", "this help"],
  ["Esc", "close, unpin, leave a field"],
];

export function openHelp() {
  /** @type {[query: string, meaning: string][]} */
  const search = [
    ["123", "the latent with this number"],
    ["word", "labels and notes with it, and that token"],
    ['tok:" the"', "latents that fire on this token, or write it"],
    ['text:"…"', "examples with this text (Enter)"],
    ["re:/…/", "labels by regular expression"],
    ["~123", "latents near 123, by decoder"],
  ];
  /** @param {(readonly [string, string])[]} list */
  const rows = (list) =>
    el(
      "dl.keys",
      null,
      list.map(([key, meaning]) =>
        el(
          "div",
          null,
          el(
            "dt",
            null,
            key.split(" ").map((k) => [el("kbd", null, k), " "]),
          ),
          el("dd", null, meaning),
        ),
      ),
    );
  openDialog(
    "Keys and search",
    el("h3", null, "Keys"),
    rows(KEYS),
    el("h3", null, "Search"),
    el(
      "dl.keys",
      null,
      search.map(([key, meaning]) => el("div", null, el("dt", null, el("kbd", null, key)), el("dd", null, meaning))),
    ),
    el("h3", null, "Privacy"),
    el(
      "p.muted",
      null,
      "This page cannot reach any network: its security policy forbids every connection. Notes stay in this browser until you export them.",
    ),
  );
}

export function openView() {
  openDialog(
    "View",
    el(
      "div.settings",
      null,
      choice(
        "Theme",
        preferences.theme,
        [
          ["", "as the system"],
          ["light", "light"],
          ["dark", "dark"],
        ],
        (theme) => prefer({ theme }),
      ),
      choice(
        "Contrast",
        preferences.contrast,
        [
          ["", "as the system"],
          ["more", "high"],
          ["less", "usual"],
        ],
        (contrast) => prefer({ contrast }),
      ),
      choice(
        "Activation colours",
        preferences.palette,
        [
          ["orange", "orange"],
          ["cividis", "cividis"],
          ["grey", "grey"],
        ],
        (palette) => prefer({ palette }),
      ),
      choice(
        "Tokens",
        preferences.mono ? "on" : "",
        [
          ["", "proportional"],
          ["on", "fixed width"],
        ],
        (mono) => prefer({ mono: mono === "on" }),
      ),
      choice(
        "Counts",
        preferences.logY ? "on" : "",
        [
          ["on", "logarithmic"],
          ["", "linear"],
        ],
        (log) => prefer({ logY: log === "on" }),
      ),
    ),
    el("h3", null, "Notes, labels and pins"),
    el(
      "p.muted",
      null,
      `${plural(notes.labels.size, "label")}, ${plural(notes.notes.size, "note")}, ${plural(notes.pins.size, "pin")}. `,
      notes.lasting
        ? "Kept in this browser only."
        : "This browser keeps nothing for this page: export before you close it.",
    ),
    el(
      "div.row",
      null,
      button("Export as JSON", () => downloadJson("notes.json", notesJson())),
      button("Import JSON", () =>
        pickJson((json) => {
          const taken = takeNotes(json);
          saveNotes();
          say(`Took ${plural(taken, "entry", "entries")}`);
          actions.repaint?.();
        }),
      ),
    ),
  );
}

export const nextTheme = () => prefer({ theme: isDark() ? "light" : "dark" });

export const nextPalette = () => {
  const names = Object.keys(PALETTES);
  prefer({ palette: names[(names.indexOf(paletteName()) + 1) % names.length] });
  say(`Activation colours: ${preferences.palette}`);
};
