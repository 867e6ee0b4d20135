// The one hover card. What it says of a token comes from the view that drew it, by event delegation.

/** @import { Child } from "./types.d.ts" */

import { all, byId, el, first, nearest, replace } from "./dom.js";
import { clamp } from "./numbers.js";

/**
 * @typedef {object} HoverCard
 * @property {HTMLElement | null} node
 * @property {boolean} pinned
 * @property {Element | null} owner the element that the card is of
 * @property {(anchor: Element, content: Child) => void} show
 * @property {(unpin?: boolean) => void} hide
 * @property {(on: boolean) => void} pin
 */
/** @type {HoverCard} */
export const hoverCard = {
  node: null,
  pinned: false,
  owner: null,
  show(anchor, content) {
    if (this.pinned) return;
    this.node ??= el("div.hover", { id: "hover-card", role: "tooltip", hidden: true });
    byId("main").append(this.node); // inside a landmark; a new page takes it away
    this.owner?.removeAttribute("aria-describedby");
    this.owner = anchor;
    anchor.setAttribute("aria-describedby", "hover-card");
    replace(this.node, content);
    this.node.hidden = false;
    const box = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.node;
    this.node.style.left = `${clamp(box.left, 8, Math.max(8, innerWidth - width - 8))}px`;
    const below = box.bottom + 6;
    this.node.style.top = `${below + height < innerHeight ? below : Math.max(8, box.top - height - 6)}px`;
  },
  hide(unpin = false) {
    if (this.pinned && !unpin) return;
    this.pin(false);
    this.owner?.removeAttribute("aria-describedby");
    this.owner = null;
    if (this.node) this.node.hidden = true;
  },
  pin(on) {
    this.pinned = on;
    this.node?.classList.toggle("pinned", on);
  },
};

/**
 * Lets the tokens under `root` show cards and be walked with arrow keys. `describe(token element)` gives a card's
 * content.
 * @param {HTMLElement} root
 * @param {(token: HTMLElement, focused: boolean) => Child} describe
 */
export function tokenCards(root, describe) {
  const tokens = () => all(root, ".t").filter((t) => t.offsetParent);
  /** @param {HTMLElement} t @param {boolean} [focused] */
  const show = (t, focused = false) => {
    const content = describe(t, focused);
    if (content) hoverCard.show(t, content);
  };
  root.addEventListener("pointerover", (event) => {
    const t = nearest(event, ".t");
    if (t) show(t);
  });
  root.addEventListener("pointerout", (event) => {
    if (nearest(event, ".t")) hoverCard.hide();
  });
  root.addEventListener("focusin", (event) => {
    const t = nearest(event, ".t");
    if (t) show(t, true);
  });
  root.addEventListener("focusout", () => hoverCard.hide());
  root.addEventListener("click", (event) => {
    const t = nearest(event, ".t");
    if (t) {
      const again = hoverCard.pinned && hoverCard.owner === t;
      hoverCard.hide(true);
      rove(root, t);
      if (!again) {
        show(t);
        hoverCard.pin(true);
      }
    } else if (!nearest(event, "a, button")) hoverCard.hide(true);
  });
  root.addEventListener("keydown", (event) => {
    const t = nearest(event, ".t");
    if (!t) return;
    const all = tokens();
    const here = all.indexOf(t);
    let next = here + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0);
    if (event.key === "Home") next = 0;
    else if (event.key === "End") next = all.length - 1;
    else if (event.key === "ArrowDown" || event.key === "ArrowUp")
      next = neighbour(all, here, event.key === "ArrowDown" ? 1 : -1);
    else if (event.key === "Enter" || event.key === " ") {
      hoverCard.pin(!hoverCard.pinned);
      if (!hoverCard.pinned) show(t);
      event.preventDefault();
      return;
    }
    if (next === here || !all[next]) return;
    event.preventDefault();
    hoverCard.hide(true);
    rove(root, all[next]);
    all[next].focus();
  });
  rove(root, first(root, ".t.peak") ?? first(root, ".t"));
}

/** The one token of `root` that Tab reaches. @param {HTMLElement} root @param {HTMLElement | null} [token] */
export function rove(root, token) {
  root.querySelector(".t[tabindex='0']")?.setAttribute("tabindex", "-1");
  token?.setAttribute("tabindex", "0");
}

/**
 * The token of the next row whose place is nearest.
 * @param {HTMLElement[]} all
 * @param {number} here
 * @param {number} direction
 */
function neighbour(all, here, direction) {
  const row = all[here].closest(".row-of-tokens");
  const left = all[here].getBoundingClientRect().left;
  let i = here;
  while (all[i] && all[i].closest(".row-of-tokens") === row) i += direction;
  if (!all[i]) return here;
  const next = all[i].closest(".row-of-tokens");
  let best = i;
  for (; all[i] && all[i].closest(".row-of-tokens") === next; i += direction) {
    if (Math.abs(all[i].getBoundingClientRect().left - left) < Math.abs(all[best].getBoundingClientRect().left - left))
      best = i;
  }
  return best;
}
