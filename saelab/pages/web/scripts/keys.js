// Keys of the whole page. Pages offer actions by name; what a page lacks, its key does not do.

import { hoverCard } from "./card.js";
import { byId, nearest } from "./dom.js";
import { say } from "./parts.js";
import { prefer, preferences } from "./preferences.js";
import { actions, go, here } from "./route.js";
import { nextPalette, nextTheme, openHelp } from "./view.js";

/** @type {string | null} */
let typed = null; // digits after g

/** @type {Record<string, string | (() => void)>} */
const SHORTCUTS = {
  "/": () => byId("search").focus(),
  "?": openHelp,
  t: nextTheme,
  p: nextPalette,
  m: () => prefer({ mono: !preferences.mono }),
  l: () => prefer({ logY: !preferences.logY }),
  i: () => go(here({ f: "", p: "", view: "", tab: "", ex: "", t: "" })),
  j: "next",
  k: "previous",
  "]": "nextGroup",
  "[": "previousGroup",
  x: "pin",
  n: "note",
  c: "compare",
  e: "export",
  r: "errors",
  s: "sources",
};

export function startKeys() {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const field = nearest(event, "input, textarea, select");
    if (event.key === "Escape") {
      if (hoverCard.pinned) hoverCard.hide(true);
      else if (field) field.blur();
      typed = null;
      return;
    }
    if (field || nearest(event, "dialog")) return;
    if (typed !== null) {
      if (/^\d$/.test(event.key)) {
        typed += event.key;
        say(`Go to ${typed}`);
      } else if (event.key === "Enter" && typed) {
        go(here({ f: typed, p: "", view: "" }));
        typed = null;
      } else typed = null;
      event.preventDefault();
      return;
    }
    if (event.key === "g") {
      typed = "";
      say("Go to latent: digits, then Enter");
      return;
    }
    const shortcut = SHORTCUTS[event.key];
    const action = typeof shortcut === "string" ? actions[shortcut] : shortcut;
    if (!action) return;
    event.preventDefault();
    action();
  });
}
