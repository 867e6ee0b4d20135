// A file for the person who looks at the page.

import { el } from "./dom.js";
import { say } from "./parts.js";

/** @param {string} name @param {string | Blob} content @param {string} type */
export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name.replace(/[^\w.-]+/g, "-").slice(0, 100) });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  say(`Saved ${name}`);
}
