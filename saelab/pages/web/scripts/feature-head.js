// The head of a latent: its number, label, badges and what one can do with it. Its note.

/** @import { Columns } from "./types.d.ts" */
/** @import { Feature, Sae } from "./feature-data.js" */

import { askCompare } from "./compare-ask.js";
import { openDialog } from "./dialogs.js";
import { button, byId, el, replace } from "./dom.js";
import { copy, copyLink } from "./export.js";
import { exportFeatures } from "./feature-export.js";
import { badges } from "./latents.js";
import { notes, setNote, togglePin } from "./notes.js";
import { number } from "./numbers.js";
import { panel } from "./parts.js";
import { actions } from "./route.js";
import { textNodes } from "./text.js";

/**
 * @param {Sae} sae
 * @param {number} latent
 * @param {Feature | null} feature
 * @param {Columns | undefined} more
 * @param {(by: number) => void} stepTo
 * @param {string} position
 */
export function featureHead(sae, latent, feature, more, stepTo, position) {
  const key = sae.key(latent);
  const given = sae.labels.get(latent);
  const title = el("span.text", null, textNodes(sae.label(latent)));
  const edit = () => {
    const input = el("input", {
      type: "text",
      value: sae.label(latent),
      "aria-label": `Label of latent ${latent}`,
      maxlength: 1000,
    });
    const dialog = openDialog(
      `Label of #${latent}`,
      input,
      el(
        "div.row",
        null,
        button("Save", () => {
          setNote("labels", key, input.value.trim());
          replace(title, textNodes(sae.label(latent)));
          dialog.close();
        }),
        notes.labels.has(key) &&
          button("Back to the label it came with", () => {
            setNote("labels", key, "");
            replace(title, textNodes(sae.label(latent)));
            dialog.close();
          }),
      ),
    );
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") dialog.querySelector("button")?.click();
    });
    input.focus();
  };
  const star = button(notes.pins.has(key) ? "★ Pinned" : "☆ Pin", () => pin(), { "aria-pressed": notes.pins.has(key) });
  const pin = () => {
    const on = togglePin(key);
    star.setAttribute("aria-pressed", String(on));
    star.textContent = on ? "★ Pinned" : "☆ Pin";
  };
  const python = `# ${sae.info.site}\nsae.show(${latent})\nfrom saelab import steering\nwith lm.steer(steering.add(sae, ${latent}, strength=4.0, unit="max_activation")):\n    print(lm.generate("The", max_new_tokens=40))\n`;
  Object.assign(actions, { pin, compare: () => askCompare(sae, latent), note: () => byId("note")?.focus() });
  return el(
    "div.page-head",
    null,
    el(
      "h1",
      null,
      el("span.num", null, `#${latent}`),
      sae.letter !== "A" && el("span.badge", null, `SAE ${sae.letter}`),
      title,
    ),
    given &&
      !notes.labels.has(key) &&
      el(
        "span.badge",
        null,
        el("span.text", null, textNodes(given.source.slice(0, 60))),
        given.score !== null && ` ${number(given.score, 2)}`,
      ),
    badges(sae, latent, more),
    el(
      "div.actions",
      null,
      el("span.muted.num", null, position),
      button("‹", () => stepTo(-1), { "aria-label": "Previous latent (k)", title: "previous (k)" }),
      button("›", () => stepTo(1), { "aria-label": "Next latent (j)", title: "next (j)" }),
      star,
      button("Label", edit),
      button("Compare", () => askCompare(sae, latent)),
      button("Link", () => copyLink()),
      button("Python", () => copy(python, "Python")),
      feature && button("Export", () => exportFeatures(feature)),
    ),
  );
}

/** @param {Sae} sae @param {number} latent */
export function notesPanel(sae, latent) {
  const area = el("textarea", {
    id: "note",
    rows: 3,
    "aria-label": `Note on latent ${latent}`,
    value: notes.notes.get(sae.key(latent)) ?? "",
    placeholder: "Kept in this browser. View → Export takes notes out.",
    change: () => setNote("notes", sae.key(latent), area.value),
  });
  return panel("Note", null, area);
}
