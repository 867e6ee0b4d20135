// A virtual table: any number of rows, as many nodes as fit on the screen. Browsers cap an element's height (17.9M px in
// Firefox), so the spacer stops at a height that every browser takes and a far jump maps its share of the way to a row.

const ROW = 32;
const GAP = 0.8; // rem, between columns
const TALLEST = 8_000_000;

/** columns: [{key, title, width, right?, sort?: "-key"|"key", cell(row) -> node|string}]; count(): rows; onSort(key); onOpen(row). */
function virtualGrid({ label, columns, count, sorted, onSort, onOpen }) {
  const head = el("div.head", { role: "row", "aria-rowindex": 1 });
  const rows = el("div", { role: "rowgroup" });
  const view = el(
    "div.view",
    { role: "grid", tabindex: 0, "aria-label": label, "aria-colcount": columns.length },
    el("div", { role: "rowgroup" }, head),
    el("div.spacer", { role: "presentation" }),
  );
  const [, spacer] = view.children;
  const grid = el("div.grid", null, view);
  grid.style.setProperty("--columns", columns.map((c) => c.width).join(" "));
  // The rows are grids of their own: they line up as long as each has room for the narrowest of all columns.
  const least = columns.reduce((sum, { width }) => sum + parseFloat(width.replace("minmax(", "")) + GAP, 0);
  grid.style.setProperty("--least", `${least}rem`);
  const sticky = el("div.window", { role: "presentation" }, rows);
  spacer.append(sticky);
  let virtual = 0; // pixels from the first row
  let last = 0;
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
  const headHeight = () => head.offsetHeight;
  const seen = () => Math.max(ROW, view.clientHeight - headHeight());
  const whole = () => count() * ROW;
  const span = () => Math.max(0, Math.min(whole(), TALLEST) - seen());
  const reach = () => Math.max(0, whole() - seen());
  const canonical = () => (reach() ? (virtual / reach()) * span() : 0);

  function paint() {
    const first = Math.floor(virtual / ROW);
    const shown = Math.min(count() - first, Math.ceil(seen() / ROW) + 1);
    replace(
      rows,
      Array.from({ length: Math.max(0, shown) }, (_, k) => {
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
    rows.style.transform = `translateY(${-(virtual % ROW)}px)`;
    if (count() && byId(`row-${selected}`)) view.setAttribute("aria-activedescendant", `row-${selected}`);
    else view.removeAttribute("aria-activedescendant");
  }
  function scrolled() {
    const top = view.scrollTop;
    const far = Math.abs(top - last) > seen() || whole() <= TALLEST;
    virtual = clamp(far ? (span() ? (top / span()) * reach() : 0) : virtual + top - last, 0, reach());
    last = top;
    paint();
    clearTimeout(settling);
    settling = setTimeout(settle, 150);
  }
  function settle() {
    last = Math.round(canonical());
    if (Math.abs(view.scrollTop - last) > 1) view.scrollTop = last;
    last = view.scrollTop;
  }
  function show(index) {
    const at = index * ROW;
    if (at < virtual) virtual = at;
    else if (at + ROW > virtual + seen()) virtual = at + ROW - seen();
    virtual = clamp(virtual, 0, reach());
    settle();
    paint();
  }
  function select(index) {
    selected = clamp(index, 0, Math.max(0, count() - 1));
    show(selected);
  }
  /** The rows are others now, or their order is. */
  function renew(keepPlace = false) {
    if (!keepPlace) {
      virtual = 0;
      selected = 0;
    }
    spacer.style.height = `${Math.min(whole(), TALLEST)}px`;
    sticky.style.height = `${Math.min(seen(), whole())}px`;
    sticky.style.top = `${headHeight()}px`;
    view.setAttribute("aria-rowcount", count() + 1);
    const [key, down] = sorted();
    columns.forEach((column, i) => {
      const cell = head.children[i];
      if (column.key === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
      if (column.sort) cell.firstChild.textContent = column.title + (column.key === key ? (down ? " ↓" : " ↑") : "");
    });
    virtual = clamp(virtual, 0, reach());
    settle();
    paint();
  }
  view.addEventListener("scroll", scrolled, { passive: true });
  view.addEventListener("keydown", (event) => {
    if (event.target !== view || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(seen() / ROW) - 1);
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
    const row = event.target.closest(".row");
    if (!row) return;
    selected = Number(row.id.slice(4));
    for (const other of rows.children) other.setAttribute("aria-selected", other === row);
  });
  new ResizeObserver(() => grid.isConnected && renew(true)).observe(view);
  return { node: grid, view, renew, paint, select, selected: () => selected };
}
