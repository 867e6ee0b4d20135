// Where the nodes of a circuit stand: positions of the text from left to right, layers from the bottom up.

/** @import { Circuit, CircuitNode } from "./types.d.ts" */

const CELL = 30; // pixels between neighbours in one place
const ACROSS = 5; // nodes side by side, at most, before a place grows upwards
const TIGHTEST = 0.5; // of the room that nodes want: beyond that the graph scrolls

/**
 * Later in the model is higher: what was written to the stream, the stream before a block, its attention, its MLP.
 * @param {CircuitNode} node
 */
function level(node) {
  if (node.kind === "embedding") return -1;
  if (node.kind === "residual" || (node.kind === "error" && node.of === "residual")) return 4 * node.block;
  if (node.kind === "mlp") return 4 * node.block + 2;
  return 4 * node.block + 1;
}
/** @param {CircuitNode} node */
function levelName(node) {
  /** @type {Record<string, string>} */
  const names = { embedding: "embedding", residual: `stream before ${node.block}`, mlp: `MLP ${node.block}` };
  const kind = node.kind === "error" && node.of === "residual" ? "residual" : node.kind;
  return names[kind] ?? `attention ${node.block}`;
}

/** @typedef {{ row: number, column: number, nodes: CircuitNode[] }} Cell */

/**
 * A remainder or a bias stands with what it is a part of, one step below its parent.
 * @param {Circuit} circuit
 * @returns {{ level: number, name: string, column: number }[]}
 */
function placed(circuit) {
  const parent = new Map();
  for (const edge of circuit.edges) if (!parent.has(edge.child)) parent.set(edge.child, edge.parent);
  return circuit.nodes.map((node) => {
    const loose = node.kind === "rest" || node.kind === "bias" || (node.kind === "error" && node.position === null);
    const from = loose ? circuit.nodes[parent.get(node.id) ?? 0] : node;
    return {
      level: loose ? level(from) - 0.5 : level(node),
      name: loose ? `all else of ${levelName(from)}` : levelName(node),
      column: loose ? -1 : (node.position ?? -1),
    };
  });
}

/**
 * {at: Map(id -> [x, y]), rows: [{y, name}], columns: [{x, width, position}], width, height} of the nodes shown: as wide as
 * `wide`, places growing upwards and nodes standing closer where there are many.
 * @param {Circuit} circuit
 * @param {CircuitNode[]} shown
 * @param {number} wide
 */
export function layout(circuit, shown, wide) {
  const places = placed(circuit);
  /** @type {Map<string, Cell>} */
  const cells = new Map();
  for (const node of shown) {
    const { level: row, column } = places[node.id];
    const key = `${row},${column}`;
    const cell = cells.get(key) ?? { row, column, nodes: [] };
    cells.set(key, cell);
    cell.nodes.push(node);
  }
  const all = [...cells.values()];
  // What has no place in the text stands at the right.
  /** @param {number} column */
  const order = (column) => (column < 0 ? Infinity : column);
  const positions = [...new Set(all.map((cell) => cell.column))].sort((a, b) => order(a) - order(b));
  /** @param {number} across */
  const columnsOf = (across) =>
    positions.map((position) => {
      const most = Math.max(...all.filter((cell) => cell.column === position).map((cell) => cell.nodes.length));
      return { position, width: Math.min(most, across) * CELL + 10, x: 0 };
    });
  /** @param {{ width: number }[]} columns */
  const room = (columns) => columns.reduce((sum, column) => sum + column.width, 0);
  let across = ACROSS;
  while (across > 1 && room(columnsOf(across)) > wide) across--;
  const columns = columnsOf(across);
  const stretch = Math.max(TIGHTEST, wide / (room(columns) || 1));
  const step = CELL * Math.min(1, stretch);
  /** @param {Cell} cell */
  const lines = (cell) => Math.ceil(cell.nodes.length / across);
  const rows = [...new Set(all.map((cell) => cell.row))]
    .sort((a, b) => b - a)
    .map((row) => {
      const mine = all.filter((cell) => cell.row === row);
      return { row, name: places[mine[0].nodes[0].id].name, height: Math.max(...mine.map(lines)) * CELL + 18, y: 0 };
    });
  let x = 0;
  for (const column of columns) {
    column.width *= stretch;
    column.x = x;
    x += column.width;
  }
  let y = 0;
  for (const row of rows) {
    row.y = y;
    y += row.height;
  }
  /** @type {Map<number, readonly [x: number, y: number]>} */
  const at = new Map();
  for (const cell of all) {
    const column = columns.find((c) => c.position === cell.column);
    const row = rows.find((r) => r.row === cell.row);
    if (!column || !row) continue;
    const tall = lines(cell);
    cell.nodes.forEach((node, i) => {
      const line = Math.floor(i / across);
      const beside = Math.min(across, cell.nodes.length - line * across);
      at.set(node.id, [
        column.x + column.width / 2 + ((i % across) - (beside - 1) / 2) * step,
        row.y + row.height / 2 + (line - (tall - 1) / 2) * CELL,
      ]);
    });
  }
  return { at, rows, columns, width: x, height: y };
}
