import "./page.js";
import assert from "node:assert/strict";
import { test } from "node:test";
import { curve, histogram, meter } from "../scripts/charts.js";
import { layout } from "../scripts/circuit-layout.js";
import { densityScale } from "../scripts/density-scale.js";
import { indexColumns } from "../scripts/index-columns.js";
import { ROW, Scroll, TALLEST } from "../scripts/scroll.js";

const close = (found, wanted) => assert.ok(Math.abs(found - wanted) < 1e-9, `${found}, not ${wanted}`);

test("a latent stands on the map by the logarithms of its density and of its largest activation", () => {
  const scale = densityScale([1, 100, 0, 10_000], [0.5, 2, 99, 8], 10_000);
  assert.deepEqual([scale.bottom, scale.top], [0.5, 8]); // a silent latent has no place
  close(scale.x(1 / 10_000), 0);
  close(scale.x(100 / 10_000), 0.5);
  close(scale.x(1), 1);
  close(scale.y(0.5), 0);
  close(scale.y(8 * 1.02), 1);
  close(scale.y(2), Math.log(4) / Math.log(16 * 1.02));
  assert.deepEqual([scale.y(1e-9), scale.y(1e9)], [0, 1]);
  for (const share of [0, 0.3, 1]) {
    close(scale.x(scale.density(share)), share);
    close(scale.y(scale.largest(share)), share);
  }
});

test("the map of nothing, of one latent and of one token has finite axes", () => {
  for (const [counts, max, counted] of [
    [[0, 0], [0, 0], 10],
    [[3], [2], 10],
    [[1], [2], 1],
    [[5], [Infinity], 10],
  ]) {
    const scale = densityScale(counts, max, counted);
    for (const value of [scale.x(1 / counted), scale.y(1), scale.density(0.5), scale.largest(0.5)])
      assert.ok(Number.isFinite(value), `${counts} ${max} ${counted}: ${value}`);
  }
});

/** [x, top, width] of each bar of one kind, read from its path; a bar stands on `height`. */
function bars(figure, kind, height) {
  const d = figure.querySelector(`path.${kind}`).getAttribute("d");
  return [...d.matchAll(/M([\d.]+) (\d+)V([\d.]+)h([\d.]+)V\d+z/g)].map(([, x, foot, top, width]) => {
    assert.equal(Number(foot), height);
    return [x, top, width].map(Number);
  });
}

test("bars are as high as their counts, the highest to four pixels below the top", () => {
  const figure = histogram({ label: "x", counts: [0, 25, 50, 100], describe: String, height: 84 });
  assert.deepEqual(bars(figure, "bars", 84), [
    [85, 64, 84],
    [170, 44, 84],
    [255, 4, 84],
  ]); // of 340 px in four, a pixel between; heights 20, 40, 80
});

test("bars of logarithmic counts, a small one that still shows, and an outline higher than all", () => {
  const [one, largest] = bars(histogram({ label: "x", counts: [1, 99], log: true, describe: String }), "bars", 84);
  close(largest[1], 4);
  close(one[1], Number((84 - (Math.log(2) / Math.log(100)) * 80).toFixed(2)));
  const [least] = bars(histogram({ label: "x", counts: [1, 100_000], describe: String }), "bars", 84);
  assert.equal(least[1], 82.5);
  const outlined = histogram({ label: "x", counts: [1, 1], none: [2, 4], describe: String });
  assert.deepEqual(bars(outlined, "bars", 84), [
    [0, 64, 169],
    [170, 64, 169],
  ]);
  assert.equal(outlined.querySelector("path.null").getAttribute("d"), "M0 44.00H170.00V4.00H340.00");
});

test("bars are walked with keys, read out and picked", () => {
  const picked = [];
  const options = {
    label: "x",
    counts: [1, 2, 3],
    describe: (i) => `bar ${i}`,
    pick: (i) => picked.push(i),
    hint: "look",
  };
  const figure = histogram(options);
  const press = (key) => figure.dispatchEvent(new figure.ownerDocument.defaultView.KeyboardEvent("keydown", { key }));
  const readout = () => figure.querySelector(".readout").textContent;
  assert.equal(readout(), "look");
  for (const [key, wanted] of [
    ["ArrowRight", 0],
    ["ArrowRight", 1],
    ["End", 2],
    ["ArrowRight", 2],
    ["Home", 0],
  ]) {
    press(key);
    assert.equal(readout(), `bar ${wanted}`);
    assert.equal(figure.getAttribute("aria-valuenow"), String(wanted));
  }
  press("Enter");
  assert.deepEqual(picked, [0]);
});

test("a curve goes from its smallest x at the left to its largest y at the top; a meter is as wide as its share", () => {
  const points = [
    [0, 0],
    [1, 1],
    [2, 4],
    [3, Number.NaN],
  ];
  const drawn = curve({ label: "x", series: [{ name: "x", points }], height: 110 });
  assert.equal(drawn.querySelector("path.curve").getAttribute("d"), "M36.0 104.0L183.0 79.5L330.0 6.0");
  const other = { name: "y", points: [[1, -1]] };
  const banded = curve({
    label: "x",
    series: [{ name: "x", points }, other],
    band: [
      [0, -1, 9],
      [2, 0, 3],
    ],
    height: 110,
  });
  assert.equal(banded.querySelector("path.band").getAttribute("d"), "M36.0 104.0L330.0 94.2L330.0 64.8L36.0 6.0z");
  assert.equal(banded.querySelector("path.curve.s1").getAttribute("d"), "M183.0 104.0");
  assert.equal(banded.querySelector("path.axis").getAttribute("d"), "M36 94.2H334");
  assert.equal(curve({ label: "x", series: [{ name: "x", points: [] }] }), null);
  const little = [
    [0.139, -0.00566],
    [0.493, 6.04e-5],
  ];
  const small = curve({ label: "x", series: [{ name: "x", points: little }] });
  for (const text of small.querySelectorAll("text")) {
    // six of 340 a character: none is cut at a side
    const [at, wide] = [Number(text.getAttribute("x")), 6 * text.textContent.length];
    const right = text.getAttribute("text-anchor") === "end" ? at : at + wide / 2;
    assert.ok(right - wide >= 0 && right <= 340, text.textContent);
  }
  assert.equal(meter(0.25).firstChild.style.width, "25.0%");
  assert.equal(meter(7).firstChild.style.width, "100.0%");
});

test("a table of few rows scrolls to the pixel", () => {
  const scroll = new Scroll(
    () => 100,
    () => 320,
  );
  assert.deepEqual([scroll.whole, scroll.height, scroll.reach, scroll.shown], [3200, 3200, 2880, [0, 11]]);
  scroll.moved(50);
  assert.equal(scroll.place, 50);
  scroll.moved(2880);
  assert.deepEqual([scroll.place, scroll.shown], [2880, [90, 10]]);
  scroll.reveal(99);
  assert.equal(scroll.place, 2880);
  scroll.reveal(10);
  assert.equal(scroll.place, 10 * ROW);
  scroll.reveal(20);
  assert.equal(scroll.place, 21 * ROW - 320);
});

test("a table of a million rows reaches each of them although the spacer is shorter", () => {
  const scroll = new Scroll(
    () => 1_000_000,
    () => 320,
  );
  assert.deepEqual([scroll.whole, scroll.height], [32_000_000, TALLEST]);
  scroll.moved(TALLEST - 320); // by far: its share of the way
  assert.deepEqual(scroll.shown, [999_990, 10]);
  scroll.moved(0);
  scroll.moved(40); // by little: to the pixel
  assert.equal(scroll.place, 40);
  scroll.reveal(500_000);
  assert.ok(scroll.shown[0] <= 500_000 && 500_000 < scroll.shown[0] + scroll.shown[1]);
  assert.ok(Math.abs(scroll.share - TALLEST / 2) < 320);
});

test("a table without rows is nowhere", () => {
  const scroll = new Scroll(
    () => 0,
    () => 320,
  );
  scroll.moved(100);
  scroll.reveal(0);
  assert.deepEqual([scroll.place, scroll.share, scroll.shown], [0, 0, [0, 0]]);
});

test("nodes of a circuit stand by token from left to right and by layer from the bottom up", () => {
  const node = (id, kind, block, position) => ({ id, kind, of: null, block, position });
  const nodes = [
    node(0, "attention", 1, 3),
    node(1, "embedding", 0, 1),
    node(2, "mlp", 0, 3),
    node(3, "bias", 0, null),
  ];
  const edges = [1, 2, 3].map((child) => ({ child, parent: 0 }));
  const { at, columns, rows, width } = layout({ nodes, edges }, nodes, 600);
  const [x, y] = [0, 1].map((axis) => nodes.map(({ id }) => at.get(id)[axis]));
  assert.ok(x[1] < x[0] && x[0] === x[2] && x[2] < x[3], `${x}`); // what has no token stands at the right
  assert.ok(y[0] < y[3] && y[3] < y[2] && y[2] < y[1], `${y}`); // a bias just below what it is a part of
  assert.deepEqual(
    columns.map(({ position }) => position),
    [1, 3, -1],
  );
  assert.deepEqual(
    rows.map(({ name }) => name),
    ["attention 1", "all else of attention 1", "MLP 0", "embedding"],
  );
  close(width, 600);
});

test("a crowded circuit is as wide as its frame, its nodes closer and above each other", () => {
  const nodes = Array.from({ length: 36 }, (_, id) => ({ id, kind: "mlp", of: null, block: 0, position: id % 12 }));
  for (const wide of [900, 500, 250]) {
    const { at, width, columns } = layout({ nodes, edges: [] }, nodes, wide);
    close(width, wide);
    for (const { id, position } of nodes) {
      const column = columns.find((one) => one.position === position);
      assert.ok(at.get(id)[0] > column.x && at.get(id)[0] < column.x + column.width);
    }
    assert.equal(new Set(nodes.map(({ id }) => at.get(id).join())).size, 36); // none on another
  }
  assert.equal(layout({ nodes, edges: [] }, nodes, 100).width, 12 * 20); // no closer than that: it scrolls
});

test("the columns of an index with labels have room beside the maps of a page 1,200 wide", () => {
  const sae = {
    index: { focus: [] },
    info: {},
    dataset: { saes: [], manifest: {} },
    labels: { size: 1 },
    has: () => true,
  };
  globalThis.matchMedia = () => ({ matches: false });
  const columns = indexColumns(sae, { rows: new Uint32Array(), more: undefined });
  assert.ok(columns.some(({ key }) => key === "label") && columns.some(({ key }) => key === "near_cos"));
  const least = columns.reduce((sum, { width }) => sum + Number.parseFloat(width.replace("minmax(", "")) + 0.8, 0);
  assert.ok(least * 16 <= 755, `${least} rem`);
});
