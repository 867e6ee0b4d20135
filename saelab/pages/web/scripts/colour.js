// Colours of numbers: one ramp of rising contrast with the paper, in OKLab, with an ink that reads on every step.

/** @typedef {number[]} Triple red, green and blue, or what OKLab has instead */

import { clamp } from "./numbers.js";

/** @type {Record<string, [light: string[], dark: string[]]>} */
export const PALETTES = {
  // [light theme, dark theme], each from the paper up. Cividis after Nuñez et al. 2018.
  orange: [
    ["#fdf6ea", "#fbd9a8", "#f3a64e", "#d9700f", "#a64508"],
    ["#2a2118", "#5a3a15", "#9a5c12", "#e08b25", "#ffd08a"],
  ],
  cividis: [
    ["#fdf8d8", "#e3cc67", "#a69d75", "#575d6d", "#00224e"],
    ["#12233d", "#35456c", "#7c7b78", "#bcad6c", "#fee838"],
  ],
  grey: [
    ["#f2f1ef", "#d3d1cd", "#a5a29d", "#6b6863", "#2b2926"],
    ["#232529", "#414449", "#6f7277", "#a9abae", "#efeeec"],
  ],
};

export const STEPS = 10;

/** @param {number} c */
const toLinear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);

/** @param {number} c */
const toGamma = (c) => (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055);

/** @param {string} hex @returns {Triple} */
const parseHex = (hex) => [1, 3, 5].map((i) => toLinear(parseInt(hex.slice(i, i + 2), 16) / 255));

/** OKLab of linear sRGB, and back (Ottosson 2020). @param {Triple} rgb @returns {Triple} */
function toOklab([r, g, b]) {
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

/** @param {Triple} lab @returns {Triple} */
function fromOklab([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((c) => clamp(c, 0, 1));
}

/** @param {Triple} rgb */
const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;

/** @param {number} a @param {number} b */
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);

/**
 * `n` colours along a palette: [{rgb: [0..255], css, ink}], ink the better of near-black and near-white.
 * @param {string} name
 * @param {boolean} dark
 * @param {number} n
 */
export function ramp(name, dark, n) {
  const stops = PALETTES[name][dark ? 1 : 0].map((hex) => toOklab(parseHex(hex)));
  return Array.from({ length: n }, (_, i) => {
    const at = (n === 1 ? 1 : i / (n - 1)) * (stops.length - 1);
    const k = Math.min(Math.floor(at), stops.length - 2);
    const linear = fromOklab(stops[k].map((v, j) => v + (stops[k + 1][j] - v) * (at - k)));
    const rgb = linear.map((c) => Math.round(255 * toGamma(c)));
    const y = luminance(linear);
    return { rgb, css: `rgb(${rgb.join(" ")})`, ink: contrast(y, 0.002) >= contrast(y, 0.97) ? "#0c0b0a" : "#fdfcfa" };
  });
}

/** The step 1..10 of a share 0..1 of the scale's end; 0 for nothing. @param {number} share */
export const step = (share) => (share > 0 ? clamp(Math.ceil(share * STEPS), 1, STEPS) : 0);
