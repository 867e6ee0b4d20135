// A virtual table: any number of rows, as many nodes as fit on the screen.

/** @import { Child } from "./types.d.ts" */

import { el, maybeById, nearest, replace } from "./dom.js";
import { clamp } from "./numbers.js";
import { ROW, Scroll } from "./scroll.js";

const GAP = 0.8; // rem, between columns

/**
 * @typedef {object} Column
 * @property {string} key
 * @property {string} title
 * @property {string} width in rem: "4rem", "minmax(4rem, 1fr)"
 * @property {boolean} [right]
 * @property {boolean} [sort] whether its head sorts
 * @property {(row: number) => Child} cell
 *
 * @typedef {object} Grid
 * @property {string} label
 * @property {Column[]} columns
 * @property {() => number} count
 * @property {() => [key: string, descending: boolean]} sorted
 * @property {(key: string) => void} onSort
 * @property {(row: number) => void} onOpen
 */

/** @param {Grid} options */
export function virtualGrid({ label, columns, count, sorted, onSort, onOpen }) {
  const head = el("div.head", { role: "row", "aria-rowindex": 1 });
  const rows = el("div", { role: "rowgroup" });
  const spacer = el("div.spacer", { role: "presentation" });
  const view = el(
    "div.view",
    { role: "grid", tabindex: 0, "aria-label": label, "aria-colcount": columns.length },
    el("div", { role: "rowgroup" }, head),
    spacer,
  );
  const grid = el("div.grid", null, view);
  grid.style.setProperty("--columns", columns.map((c) => c.width).join(" "));
  // The rows are grids of their own: they line up as long as each has room for the narrowest of all columns.
  const least = columns.reduce((sum, { width }) => sum + parseFloat(width.replace("minmax(", "")) + GAP, 0);
  grid.style.setProperty("--least", `${least}rem`);
  const sticky = el("div.window", { role: "presentation" }, rows);
  spacer.append(sticky);
  const headHeight = () => head.offsetHeight;
  const scroll = new Scroll(count, () => Math.max(ROW, view.clientHeight - headHeight()));
  let selected = 0;
  let settling = 0;

  for (const column of columns) {
    const cell = el("div", { role: "columnheader" });
    if (column.right) cell.classList.add("right");
    cell.append(
      column.sort
        ? el("button", { type: "button", tabindex: -1, click: () => onSort(column.key) }, column.title)
        : column.title,
    );
    head.append(cell);
  }
  function paint() {
    const [first, shown] = scroll.shown;
    replace(
      rows,
      Array.from({ length: shown }, (_, k) => {
        const index = first + k;
        const row = el("div.row", {
          role: "row",
          id: `row-${index}`,
          "aria-rowindex": index + 2,
          "aria-selected": index === selected,
        });
        for (const column of columns)
          row.append(el(column.right ? "div.right" : "div", { role: "gridcell" }, column.cell(index)));
        return row;
      }),
    );
    rows.style.transform = `translateY(${-(scroll.place % ROW)}px)`;
    if (count() && maybeById(`row-${selected}`)) view.setAttribute("aria-activedescendant", `row-${selected}`);
    else view.removeAttribute("aria-activedescendant");
  }
  function scrolled() {
    scroll.moved(view.scrollTop);
    paint();
    clearTimeout(settling);
    settling = setTimeout(settle, 150);
  }
  function settle() {
    if (Math.abs(view.scrollTop - scroll.share) > 1) view.scrollTop = scroll.share;
    scroll.top = view.scrollTop;
  }
  /** @param {number} index */
  function show(index) {
    scroll.reveal(index);
    settle();
    paint();
  }
  /** @param {number} index */
  function select(index) {
    selected = clamp(index, 0, Math.max(0, count() - 1));
    show(selected);
  }
  /** The rows are others now, or their order is. @param {boolean} [keepPlace] */
  function renew(keepPlace = false) {
    if (!keepPlace) {
      scroll.place = 0;
      selected = 0;
    }
    spacer.style.height = `${scroll.height}px`;
    sticky.style.height = `${Math.min(scroll.seen(), scroll.whole)}px`;
    sticky.style.top = `${headHeight()}px`;
    view.setAttribute("aria-rowcount", String(count() + 1));
    const [key, down] = sorted();
    columns.forEach((column, i) => {
      const cell = head.children[i];
      if (column.key === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
      if (column.sort && cell.firstChild)
        cell.firstChild.textContent = column.title + (column.key === key ? (down ? " ↓" : " ↑") : "");
    });
    scroll.place = clamp(scroll.place, 0, scroll.reach);
    settle();
    paint();
  }
  view.addEventListener("scroll", scrolled, { passive: true });
  view.addEventListener("keydown", (event) => {
    if (event.target !== view || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(scroll.seen() / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (move) select(Number.isFinite(move) ? selected + move : move > 0 ? count() - 1 : 0);
    else if (event.key === "Enter" && count()) onOpen(selected);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  rows.addEventListener("click", (event) => {
    const row = nearest(event, ".row");
    if (!row) return;
    selected = Number(row.id.slice(4));
    for (const other of rows.children) other.setAttribute("aria-selected", String(other === row));
  });
  new ResizeObserver(() => grid.isConnected && renew(true)).observe(view);
  return { node: grid, view, renew, paint, select, selected: () => selected };
}
