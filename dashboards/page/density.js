// The map of the index: how often a latent fires against how strongly at most, both logarithmic. Dragging selects.

const MAP = { columns: 72, rows: 40 };

/** {node, paint(rows)}: `onBrush([dLow, dHigh], [mLow, mHigh])` with nulls when cleared. */
function densityMap(sae, onBrush) {
  const counted = sae.dataset.manifest.corpus.counted;
  const { count: counts, max } = sae.index;
  let top = 0,
    bottom = Infinity;
  for (let i = 0; i < sae.size; i++)
    if (counts[i]) {
      top = Math.max(top, max[i]);
      bottom = Math.min(bottom, max[i] || Infinity);
    }
  if (!(top > 0) || !Number.isFinite(top)) top = 1;
  bottom = Math.max(Math.min(bottom, top / 2), top / 1e4);
  const x0 = Math.log(1 / counted),
    x1 = 0,
    y0 = Math.log(bottom),
    y1 = Math.log(top * 1.02);
  const xShare = (latent) => (Math.log(counts[latent] / counted) - x0) / (x1 - x0 || 1);
  const yShare = (latent) => clamp((Math.log(max[latent]) - y0) / (y1 - y0 || 1), 0, 1);
  const cell = new Uint16Array(sae.size).fill(0xffff);
  for (let i = 0; i < sae.size; i++) {
    if (counts[i])
      cell[i] =
        clamp(Math.floor(xShare(i) * MAP.columns), 0, MAP.columns - 1) +
        MAP.columns * clamp(Math.floor(yShare(i) * MAP.rows), 0, MAP.rows - 1);
  }
  const canvas = el("canvas", {
    width: MAP.columns * 10,
    height: MAP.rows * 10,
    role: "img",
    "aria-label": "Latents by density and largest activation; drag to select a region, or type bounds below",
  });
  const brush = el("div.brush", { hidden: true });
  const figure = el(
    "div.chart",
    null,
    el("div.ylabel", null, `largest activation, ${number(bottom, 2)} to ${number(top, 2)} ↑`),
    el("div", null, canvas, brush),
    el(
      "div.xlabels",
      null,
      el("span", null, `1 in ${count(counted)}`),
      el("span", null, "density →"),
      el("span", null, "every token"),
    ),
  );
  brush.parentNode.style.position = "relative";

  function paint(rows) {
    const shown = new Uint32Array(MAP.columns * MAP.rows),
      all = new Uint32Array(MAP.columns * MAP.rows);
    for (let i = 0; i < cell.length; i++) if (cell[i] !== 0xffff) all[cell[i]]++;
    for (let i = 0; i < rows.length; i++) if (cell[rows[i]] !== 0xffff) shown[cell[rows[i]]]++;
    const most = Math.log1p(all.reduce((a, b) => Math.max(a, b), 1));
    const colours = currentRamp(32);
    const style = getComputedStyle(document.documentElement);
    const context = canvas.getContext("2d");
    context.fillStyle = style.getPropertyValue("--sunk");
    context.fillStyle = isDark() ? "#101115" : "#f3f1ec";
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (let c = 0; c < all.length; c++) {
      if (!all[c]) continue;
      const [x, y] = [(c % MAP.columns) * 10, (MAP.rows - 1 - Math.floor(c / MAP.columns)) * 10];
      context.fillStyle = shown[c]
        ? colours[clamp(6 + Math.round((Math.log1p(shown[c]) / most) * 25), 6, 31)].css
        : isDark()
          ? "#2b2e35"
          : "#dedad2";
      context.fillRect(x, y, 9, 9);
    }
  }
  const unX = (share) => Math.exp(x0 + share * (x1 - x0)),
    unY = (share) => Math.exp(y0 + share * (y1 - y0));
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [clamp((event.clientX - box.left) / box.width, 0, 1), clamp((event.clientY - box.top) / box.height, 0, 1)];
  };
  let from = null;
  const frame = (a, b) => {
    brush.hidden = false;
    for (const [name, value] of [
      ["left", Math.min(a[0], b[0])],
      ["top", Math.min(a[1], b[1])],
      ["width", Math.abs(a[0] - b[0])],
      ["height", Math.abs(a[1] - b[1])],
    ])
      brush.style[name] = `${100 * value}%`;
  };
  canvas.addEventListener("pointerdown", (event) => {
    from = place(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (from) frame(from, place(event));
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = place(event);
    const small = Math.abs(from[0] - to[0]) < 0.01 && Math.abs(from[1] - to[1]) < 0.01;
    if (small) {
      brush.hidden = true;
      onBrush(null, null);
    } else
      onBrush(
        [unX(Math.min(from[0], to[0])), unX(Math.max(from[0], to[0]))],
        [unY(1 - Math.max(from[1], to[1])), unY(1 - Math.min(from[1], to[1]))],
      );
    from = null;
  });
  /** Draws the frame of bounds that came from the URL or the fields. */
  function bounds([dLow, dHigh], [mLow, mHigh]) {
    if (dLow <= 0 && dHigh === Infinity && mLow <= 0 && mHigh === Infinity) {
      brush.hidden = true;
      return;
    }
    const x = (v) => clamp((Math.log(v) - x0) / (x1 - x0 || 1), 0, 1),
      y = (v) => clamp((Math.log(v) - y0) / (y1 - y0 || 1), 0, 1);
    frame(
      [dLow > 0 ? x(dLow) : 0, 1 - (mHigh < Infinity ? y(mHigh) : 1)],
      [dHigh < Infinity ? x(dHigh) : 1, 1 - (mLow > 0 ? y(mLow) : 0)],
    );
  }
  return { node: figure, paint, bounds };
}
