// What the reports share: the bar at the top, the data, what stands where they cannot be read, the filter.

/** @import { Child } from "./types.d.ts" */

import { loadJson } from "./chunks.js";
import { openDialog } from "./dialogs.js";
import { all, button, byId, el, fieldValue, maybeById, replace } from "./dom.js";
import { errorCard } from "./parts.js";
import { pictureButtons } from "./pictures.js";
import { isDark, loadPreferences, prefer } from "./preferences.js";

/** Fills the bar: what the page is, where its name leads, what stands beside it. @param {string} name @param {string} href @param {Child[]} more */
export function bar(name, href, ...more) {
  replace(byId("bar"), el("a.brand", { href, id: "brand" }, name), more);
}

/** Says that a place of the page is shown. */
export function arrived() {
  const root = document.documentElement;
  root.dataset.shown = String(Number(root.dataset.shown ?? 0) + 1);
}

/**
 * A report: its bar, and its data painted by `paint`, which gives what stands at the foot; or what is wrong with them.
 * @param {string} name
 * @param {(data: any) => Child} paint
 * @param {Child[]} tools
 */
export async function startReport(name, paint, ...tools) {
  loadPreferences();
  const theme = button("Light or dark", () => prefer({ theme: isDark() ? "light" : "dark" }), {
    class: "button plain",
  });
  const charts = () => openDialog("Export", pictureButtons() ?? el("p.empty", null, "There is no chart on this page."));
  bar(name, "#", el("span.spring"), tools, button("Charts", charts, { class: "button plain" }), theme);
  try {
    replace(byId("provenance"), paint(await loadJson("data")));
    maybeById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  } catch (error) {
    replace(byId("main"), errorCard("This page could not be read", error));
  }
  if (!document.documentElement.dataset.shown) arrived();
}

/**
 * A field that hides the sections of a page whose `data-name` has not what stands in it.
 * @param {string} label
 * @param {HTMLElement} root
 */
export function filter(label, root) {
  const found = el("output.muted", null);
  const input = el("input", {
    type: "search",
    autocomplete: "off",
    spellcheck: "false",
    input: (event) => {
      const wanted = fieldValue(event).toLowerCase();
      const sections = all(root, "[data-name]");
      for (const section of sections) section.hidden = !section.dataset.name?.toLowerCase().includes(wanted);
      replace(found, wanted ? `${sections.filter((section) => !section.hidden).length} of ${sections.length}` : "");
    },
  });
  return el("label.field", null, label, input, found);
}
