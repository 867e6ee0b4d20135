// Asks which latent to compare with.

/** @import { Sae } from "./feature-data.js" */

import { openDialog } from "./dialogs.js";
import { button, el } from "./dom.js";
import { parseLatent, sameLatent } from "./latents.js";
import { notes } from "./notes.js";
import { say } from "./parts.js";
import { go, here } from "./route.js";

/** @param {Sae} sae @param {number} latent */
export function askCompare(sae, latent) {
  const input = el("input", {
    type: "text",
    "aria-label": "The other latent",
    placeholder: sae.dataset.saes.length > 1 ? "number, or number@B" : "number",
  });
  const pinned = [...notes.pins]
    .map((key) => key.split(":"))
    .filter(([letter, l]) => letter !== sae.letter || Number(l) !== latent)
    .slice(0, 12);
  /** @param {string} other */
  const target = (other) =>
    here({ f: `${sameLatent({ latent, letter: sae.letter })},${other}`, p: "", view: "", ex: "", t: "" });
  const dialog = openDialog(
    `Compare #${latent} with`,
    input,
    pinned.length > 0 &&
      el(
        "p.muted",
        null,
        "Pinned: ",
        pinned.map(([letter, l]) => [
          button(letter === "A" ? `#${l}` : `#${l}@${letter}`, () => {
            dialog.close();
            go(target(sameLatent({ latent: Number(l), letter })));
          }),
          " ",
        ]),
      ),
    el(
      "div.row",
      null,
      button("Compare", () => submit()),
    ),
  );
  const submit = () => {
    const other = parseLatent(input.value.trim().replace(/^#/, ""));
    if (!other) {
      say("Give the number of a latent");
      return;
    }
    dialog.close();
    go(target(sameLatent(other)));
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      submit();
    }
  });
  input.focus();
}
