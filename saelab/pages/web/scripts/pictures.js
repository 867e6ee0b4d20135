// Charts of the page as files: SVG with the styles that it has on the page, and PNG of that.

import { all, button, byId, el } from "./dom.js";
import { download } from "./download.js";

const SVG = "http://www.w3.org/2000/svg";
const SCALE = 2; // pixels of a PNG a unit of the drawing
const STYLES = [
  "fill",
  "stroke",
  "stroke-width",
  "stroke-dasharray",
  "opacity",
  "font-family",
  "font-size",
  "text-anchor",
];

/** The charts that are shown, with their names. @returns {[name: string, drawing: Element][]} */
const charts = () =>
  all(byId("main"), ".chart svg[aria-label], .chart canvas[aria-label], svg.graph[aria-label]")
    .filter((drawing) => drawing.getBoundingClientRect().width > 0)
    .map((drawing) => [(drawing.getAttribute("aria-label") ?? "").split(/[,;:]/)[0].slice(0, 60), drawing]);

/** An SVG that needs no style sheet. @param {Element} drawing */
export function standalone(drawing) {
  const { width, height } = drawing.getBoundingClientRect();
  const out = document.createElementNS(SVG, "svg");
  out.setAttribute("xmlns", SVG);
  out.setAttribute("width", String(Math.round(width)));
  out.setAttribute("height", String(Math.round(height)));
  const paper = document.createElementNS(SVG, "rect");
  for (const side of ["width", "height"]) paper.setAttribute(side, "100%");
  paper.setAttribute("fill", getComputedStyle(document.body).backgroundColor);
  out.append(paper);
  if (drawing instanceof HTMLCanvasElement) {
    const image = document.createElementNS(SVG, "image");
    for (const side of ["width", "height"]) image.setAttribute(side, "100%");
    image.setAttribute("preserveAspectRatio", "none");
    image.setAttribute("href", drawing.toDataURL());
    out.append(image);
    return out;
  }
  const copy = /** @type {Element} */ (drawing.cloneNode(true));
  const [from, to] = [drawing, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  for (const [i, node] of from.entries()) {
    const computed = getComputedStyle(node);
    for (const name of STYLES) to[i].setAttribute(name, computed.getPropertyValue(name));
    to[i].removeAttribute("class");
  }
  for (const side of ["width", "height"]) copy.setAttribute(side, "100%");
  out.append(copy);
  return out;
}

/** @param {string} name @param {Element} drawing */
function saveSvg(name, drawing) {
  download(`${name}.svg`, new XMLSerializer().serializeToString(standalone(drawing)), "image/svg+xml");
}

/** @param {string} name @param {Element} drawing */
async function savePng(name, drawing) {
  const made = standalone(drawing);
  const image = new Image();
  image.src = `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(made))}`;
  await image.decode();
  const canvas = el("canvas", {
    width: SCALE * Number(made.getAttribute("width")),
    height: SCALE * Number(made.getAttribute("height")),
  });
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve));
  if (blob) download(`${name}.png`, blob, "image/png");
}

/** What an export dialog offers of the charts on the page; null where there are none. */
export function pictureButtons() {
  const found = charts();
  if (!found.length) return null;
  return el(
    "div.pictures-out",
    null,
    el("h3", null, "Charts on this page"),
    found.map(([name, drawing]) =>
      el(
        "div.row",
        null,
        button("PNG", () => savePng(name, drawing), { "aria-label": `PNG of ${name}` }),
        button("SVG", () => saveSvg(name, drawing), { "aria-label": `SVG of ${name}` }),
        el("span", null, name),
      ),
    ),
  );
}
