// Numbers as people read them.

/**
 * Three significant digits, without noise: 0.00123, 12.3, 4,560. What is text stays what it is.
 * @param {number | string | null | undefined} x
 * @param {number} [digits]
 */
export function number(x, digits = 3) {
  if (typeof x === "string") return x;
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-4)
    return x
      .toExponential(Math.max(0, digits - 2))
      .replaceAll("-", "−")
      .replace("e+", "e");
  if (size >= 1000) return Math.round(x).toLocaleString("en-US").replace("-", "−");
  const places = clamp(digits - 1 - Math.floor(Math.log10(size)), 0, 6);
  return x.toFixed(places).replace("-", "−");
}
/** A number that may be a whole one: then it is not rounded. @param {number | string | null | undefined} x */
export const figure = (x) => (Number.isSafeInteger(x) ? count(Number(x)).replace("-", "−") : number(x));
/** @param {number | null | undefined} n */
export const count = (n) => (n === undefined || n === null ? "–" : Number(n).toLocaleString("en-US"));
/** @param {number | null} x @param {number} [digits] */
export const signed = (x, digits = 3) => ((x ?? 0) > 0 ? "+" : "") + number(x, digits);
/** @param {number | string | null | undefined} x @param {number} [digits] */
export const percent = (x, digits = 3) =>
  typeof x !== "number" || Number.isNaN(x) ? number(x) : `${number(100 * x, digits)}%`;
/** Densities run over five decades: percent where one reads it, one in n below. @param {number} x */
export const density = (x) => (x === 0 ? "0" : x >= 1e-4 ? percent(x, 2) : `1 in ${count(Math.round(1 / x))}`);
/** @param {number} n @param {string} one @param {string} [many] */
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** @param {number} x @param {number} low @param {number} high */
export const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
