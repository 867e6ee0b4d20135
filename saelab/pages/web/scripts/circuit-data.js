// The circuit of the page, and what is said of its nodes.

/** @import { Circuit, CircuitNode } from "./types.d.ts" */

import { count, signed } from "./numbers.js";

const HARMLESS = new Set(["file:", "http:", "https:"]);

export const circuit = /** @type {Circuit} */ ({});

/** @param {Circuit} data */
export function take(data) {
  Object.assign(circuit, data);
  circuit.scale = Math.abs(circuit.sums.root) || 1;
  circuit.out = circuit.nodes.map(() => []);
  circuit.in = circuit.nodes.map(() => []);
  for (const edge of circuit.edges) {
    circuit.out[edge.child].push(edge);
    circuit.in[edge.parent].push(edge);
  }
  circuit.order = [...circuit.nodes].sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution));
}

/** @param {CircuitNode} node */
export const share = (node) => node.contribution / circuit.sums.root;

/** @param {number} x */
export const sign = (x) => (x < 0 ? "minus" : "plus");

/** @param {CircuitNode} node */
export const members = (node) => (node.members > 1 ? ` (${count(node.members)} terms)` : "");

/** @param {CircuitNode} node */
export const token = (node) => (node.position === null ? "" : circuit.tokens[node.position]);

/** What a screen reader says of a node. @param {CircuitNode} node */
export const spoken = (node) =>
  `${node.name}${members(node)}${node.label ? `, ${node.label}` : ""}` +
  `${node.position === null ? "" : `, token ${node.position} ${token(node)}`}, ${signed(node.contribution)}`;

/**
 * The address of a latent's page in the dashboard of its SAE; null where there is none, or the address is of another
 * kind.
 * @param {CircuitNode} node
 */
export function dashboardOf(node) {
  const base = circuit.saes.find((sae) => sae.kind === node.kind && sae.block === node.block)?.page;
  if (!base) return null;
  try {
    const url = new URL(base, location.href);
    url.hash = `f=${node.latent}`;
    return HARMLESS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
