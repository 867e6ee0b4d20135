// Elements are made here and nowhere else. Text enters as text nodes, never as markup; the only URLs are fragments and blobs.

/** @import { Child, DrawnOf, ElementOf, Props } from "./types.d.ts" */

const SVG = "http://www.w3.org/2000/svg";

/** @template {HTMLElement | SVGElement} T @param {T} node @param {Props | null | undefined} props @param {Child[]} children */
function fill(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || (value === false && !key.startsWith("aria-"))) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key === "style") for (const [name, v] of Object.entries(value)) node.style.setProperty(name, v);
    else if (key === "value") Object.assign(node, { value });
    else if (key === "href" && !/^(#|blob:)/.test(String(value)))
      throw new Error(`a link to ${value} is not of this page`);
    else if (/^(on|src)/i.test(key)) throw new Error(`attribute ${key} is not for this page`);
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : String(value));
  }
  append(node, children);
  return node;
}

/** @template {Element} T @param {T} node @param {readonly Child[]} children */
function append(node, children) {
  for (const child of /** @type {any[]} */ (children).flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

/**
 * el("a.button", {href: "#f=1"}, "text", node, [more]): an HTML element; functions among the properties are listeners.
 * @template {string} Name
 * @param {Name} name
 * @param {Props | null} [props]
 * @param {Child[]} children
 * @returns {ElementOf<Name>}
 */
export function el(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  return /** @type {ElementOf<Name>} */ (fill(node, props, children));
}

/**
 * The same for SVG.
 * @template {string} Name
 * @param {Name} name
 * @param {Props | null} [props]
 * @param {Child[]} children
 * @returns {DrawnOf<Name>}
 */
export function svg(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElementNS(SVG, tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  return /** @type {DrawnOf<Name>} */ (fill(node, props, children));
}

/**
 * A picture that the page's data hold, of base64 of PNG.
 * @param {string} png
 * @param {string} alt
 * @param {string} [kind]
 */
export function picture(png, alt, kind = "") {
  if (!/^[A-Za-z0-9+/]*=*$/.test(png)) throw new Error("a picture is not base64");
  const image = el(kind ? `img.picture.${kind}` : "img.picture", { alt });
  image.src = `data:image/png;base64,${png}`;
  return image;
}

/** @param {Child} label @param {(event: MouseEvent) => void} action @param {Props} [props] */
export function button(label, action, props = {}) {
  return el("button.button", { type: "button", click: action, ...props }, label);
}

/** The element of this identifier, undefined where there is none. @param {string} id */
export const maybeById = (id) => document.getElementById(id) ?? undefined;

/** The element of this identifier, one that the page always has. @param {string} id @returns {HTMLElement} */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`the page has no #${id}`);
  return node;
}

/** The element around an event's target, or it itself, that fits a selector. @param {Event} event @param {string} selector */
export function nearest(event, selector) {
  const found = event.target instanceof Element ? event.target.closest(selector) : null;
  return /** @type {HTMLElement | null} */ (found);
}

/** The value of the field that an event is of. @param {Event} event */
export const fieldValue = (event) => /** @type {HTMLInputElement} */ (event.target).value;

/** All elements under a root that fit a selector. @param {ParentNode} root @param {string} selector @returns {HTMLElement[]} */
export const all = (root, selector) =>
  [...root.querySelectorAll(selector)].map((node) => /** @type {HTMLElement} */ (node));

/** The first element under a root that fits a selector. @param {ParentNode} root @param {string} selector */
export const first = (root, selector) => /** @type {HTMLElement | null} */ (root.querySelector(selector));

/** New children for old ones. @param {Element} node @param {Child[]} children */
export function replace(node, ...children) {
  node.replaceChildren();
  append(node, children);
}

let identifiers = 0;

/** @param {string} stem */
export const freshId = (stem) => `${stem}-${++identifiers}`;
