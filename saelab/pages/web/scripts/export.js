// Out of the page: CSV, JSON, charts, clipboard.

import { openDialog } from "./dialogs.js";
import { button, el } from "./dom.js";
import { download } from "./download.js";
import { say } from "./parts.js";
import { pictureButtons } from "./pictures.js";
import { writeHash } from "./route.js";

/**
 * RFC 4180 with a byte-order mark. A cell that a spreadsheet would run as a formula begins with an apostrophe (OWASP).
 * @param {readonly string[]} header
 * @param {readonly unknown[][]} rows
 */
export function csv(header, rows) {
  /** @param {unknown} value */
  const cell = (value) => {
    const string = value === null || value === undefined ? "" : String(value);
    const safe = typeof value === "string" && /^[=+\-@\t\r\n]/.test(string) ? `'${string}` : string;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return `\ufeff${[header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}

/** @param {string} name @param {readonly string[]} header @param {unknown[][]} rows */
export const downloadCsv = (name, header, rows) => download(name, csv(header, rows), "text/csv;charset=utf-8");
/** @param {string} name @param {unknown} value */
export const downloadJson = (name, value) =>
  download(
    name,
    JSON.stringify(
      value,
      (_, v) => {
        if (typeof v === "number" && !Number.isFinite(v)) return String(v);
        return ArrayBuffer.isView(v) ? Array.from(/** @type {Uint8Array} */ (v)) : v;
      },
      1,
    ),
    "application/json",
  );

/** @param {string} string @param {string} what */
export async function copy(string, what) {
  try {
    await navigator.clipboard.writeText(string);
    say(`Copied ${what}`);
  } catch {
    const area = el("textarea", { "aria-label": what, readonly: true, rows: 4 });
    area.value = string;
    openDialog(`Copy ${what}`, area);
    area.select();
  }
}

export function copyLink() {
  writeHash();
  copy(location.href, "the link");
}

/** Asks for a JSON file and hands over what is in it. @param {(value: unknown) => void} onValue */
export function pickJson(onValue) {
  const input = el("input", { type: "file", accept: ".json,application/json", "aria-label": "JSON file" });
  input.addEventListener("change", async () => {
    try {
      onValue(JSON.parse((await input.files?.[0]?.text()) ?? ""));
    } catch (error) {
      say(`Not a JSON file of notes: ${/** @type {Error} */ (error).message}`);
    }
  });
  input.click();
}

/**
 * Asks for CSV or JSON. `rows` under `header`; `json()` where there is more to say than the rows.
 * @param {string} name
 * @param {readonly string[]} header
 * @param {() => unknown[][]} rows
 * @param {() => unknown} [json]
 */
export function openExport(
  name,
  header,
  rows,
  json = () => rows().map((row) => Object.fromEntries(header.map((key, i) => [key, row[i]]))),
) {
  const dialog = openDialog(
    "Export",
    el(
      "p.muted",
      null,
      "Text is written as it is, in UTF-8. In CSV, cells that a spreadsheet would run as a formula begin with an apostrophe.",
    ),
    el(
      "div.row",
      null,
      button("CSV", () => {
        downloadCsv(`${name}.csv`, header, rows());
        dialog.close();
      }),
      button("JSON", () => {
        downloadJson(`${name}.json`, json());
        dialog.close();
      }),
    ),
    pictureButtons(),
  );
}
