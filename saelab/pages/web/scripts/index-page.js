// The index: figures of the SAE, the map, and a table of all its latents.

/** @import { Changes, Shown } from "./types.d.ts" */
/** @import { Dataset, Sae } from "./feature-data.js" */

import { defaultShow, parseRange, rangeText, SHOWS, showCounts, sortOf } from "./columns.js";
import { densityMap } from "./density.js";
import { directionMap, PLANES, parseRegion, regionText } from "./direction-map.js";
import { all, button, el, replace } from "./dom.js";
import { openExport } from "./export.js";
import { virtualGrid } from "./grid.js";
import { currentOrder, indexColumns, LATENT, latentRows, order, saeCards } from "./index-columns.js";
import { latentHash } from "./latents.js";
import { count, plural } from "./numbers.js";
import { errorCard, panel, say, tabs } from "./parts.js";
import { actions, go, here, mark, route } from "./route.js";
import { textNodes } from "./text.js";

/**
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function indexPage(main, dataset, params, current) {
  const sae = await dataset.sae(params.get("sae") ?? "A");
  const selected = await currentOrder(sae, params);
  if (!current()) return;
  const view = { rows: selected.rows, more: sae.more };
  const counts = showCounts(sae);
  const shown = params.get("show") || (params.get("q") ? "all" : defaultShow(sae));
  const total = el("span.count", { role: "status" });
  const grid = virtualGrid({
    label: "Latents",
    columns: indexColumns(sae, view).map((column) => ({ ...column, cell: (row) => column.cell(view.rows[row]) })),
    count: () => view.rows.length,
    sorted: () => (order.ordered ? ["", false] : sortOf(sae, route.params)),
    onSort: (key) => {
      const [now, down] = sortOf(sae, route.params);
      refresh({ s: (key === now ? !down : key !== "id" && key !== "label" && key !== "pin") ? `-${key}` : key });
    },
    onOpen: (row) =>
      sae.hasPage(view.rows[row])
        ? go(latentHash(sae, view.rows[row], { tab: "" }))
        : say(`No page was made for latent ${view.rows[row]}`),
  });
  const map = densityMap(sae, (d, m) => refresh({ d: d ? rangeText(...d) : "", m: m ? rangeText(...m) : "" }));
  /** @type {ReturnType<typeof directionMap>[]} */
  const planes = [];
  const directions = sae.has("map") ? panel("Decoder directions", null, el("p.muted", null, "…")) : null;
  const chooser = el("div.facets", { role: "group", "aria-label": "Which latents" });
  for (const [key, words] of SHOWS) {
    if (!counts[key] && key !== shown && key !== "pinned") continue;
    chooser.append(
      button(`${words} ${count(counts[key])}`, () => refresh({ show: key }), {
        "aria-pressed": key === shown,
        data: { show: key },
      }),
    );
  }
  /** @param {string} name @param {number} side @param {string} words */
  const field = (name, side, words) =>
    el("input", {
      type: "text",
      inputmode: "decimal",
      "aria-label": words,
      placeholder: side ? "to" : "from",
      data: { name, side },
      change: () => {
        /** @param {string} n @param {number} i */
        const read = (n, i) => fields.find((f) => f.dataset.name === n && Number(f.dataset.side) === i)?.value.trim();
        refresh({
          d: rangeText(...parseRange(`${read("d", 0)}..${read("d", 1)}`)),
          m: rangeText(...parseRange(`${read("m", 0)}..${read("m", 1)}`)),
        });
      },
    });
  const fields = [
    field("d", 0, "Density from"),
    field("d", 1, "Density to"),
    field("m", 0, "Largest activation from"),
    field("m", 1, "Largest activation to"),
  ];

  /** New rows for new parameters, without leaving the page. @param {Changes} changes */
  async function refresh(changes) {
    mark(changes);
    const next = await currentOrder(sae, route.params);
    if (!current()) return;
    view.rows = next.rows;
    const now = route.params.get("show") || (route.params.get("q") ? "all" : defaultShow(sae));
    for (const choice of all(chooser, "button"))
      choice.setAttribute("aria-pressed", String(choice.dataset.show === now));
    paint();
  }
  function paint() {
    const [d, m] = [parseRange(route.params.get("d")), parseRange(route.params.get("m"))];
    fields.forEach((f) => {
      const v = (f.dataset.name === "d" ? d : m)[Number(f.dataset.side)];
      f.value = v > 0 && v < Infinity ? String(v) : "";
    });
    total.textContent = `${plural(view.rows.length, "latent")}${order.message ? ` · ${order.message}` : ""}`;
    for (const plane of planes) {
      plane.paint(view.rows);
      plane.bounds(parseRegion(route.params.get("at")));
    }
    map.paint(view.rows);
    map.bounds(d, m);
    grid.renew();
  }
  const exportRows = () => openExport("index", LATENT, () => latentRows(sae, view.more, view.rows));
  Object.assign(actions, {
    export: exportRows,
    next: () => {
      grid.view.focus();
      grid.select(grid.selected() + 1);
    },
    previous: () => {
      grid.view.focus();
      grid.select(grid.selected() - 1);
    },
  });
  replace(
    main,
    el(
      "div.page-head",
      null,
      el("h1", null, el("span.text", null, textNodes(sae.name))),
      el("span.muted.text", null, [
        sae.name.startsWith(sae.info.architecture) ? "" : `${sae.info.architecture} · `,
        sae.info.site,
      ]),
      el(
        "div.actions",
        null,
        dataset.saes.length > 1 &&
          dataset.saes.map((other) =>
            el(
              "a.button",
              {
                href: here({ sae: other.letter === "A" ? "" : other.letter, show: "", d: "", m: "", at: "" }),
                "aria-current": other === sae ? "page" : undefined,
              },
              `SAE ${other.letter}`,
            ),
          ),
        button("Export", exportRows),
      ),
    ),
    saeCards(sae),
    el(
      "div.overview",
      null,
      el("section", { "aria-label": "Latents" }, chooser, grid.node, el("p.facets", null, total), focusWords(sae)),
      panel(
        "How often against how strongly",
        null,
        map.node,
        el(
          "div.facets",
          null,
          el("span.range", null, "density", fields[0], fields[1]),
          el("span.range", null, "largest", fields[2], fields[3]),
          button("Clear", () => refresh({ d: "", m: "", at: "" })),
        ),
        el(
          "p.note",
          null,
          "Drag on a map to keep a region. Colour: how many latents, logarithmic; grey: filtered out.",
        ),
        directions,
      ),
    ),
  );
  paint();
  actions.repaint = paint;
  if (directions)
    sae
      .chunk("map")
      .then(({ columns }) => {
        if (!current()) return;
        for (const plane of Object.keys(PLANES))
          if (columns[`${plane}_x`])
            planes.push(
              directionMap(sae, columns, plane, (region) => refresh({ at: region ? regionText(region) : "" })),
            );
        directions.lastChild?.remove();
        const body = el("div", { id: "plane", role: "tabpanel" });
        const names = Object.entries(PLANES).slice(0, planes.length);
        /** @param {string} key */
        const show = (key) => replace(body, planes[names.findIndex(([name]) => name === key)].node);
        const shown = parseRegion(route.params.get("at"))?.plane ?? names[names.length - 1][0];
        directions.append(tabs("Planes", names, shown, "plane", show, true), body);
        show(shown);
        paint();
      })
      .catch((error) => current() && replace(directions, errorCard("The map of directions could not be read", error)));
  if (!view.more) {
    main.setAttribute("aria-busy", "true");
    sae
      .openMore()
      .then((more) => {
        view.more = more;
        if (current()) grid.paint();
      })
      .catch((error) => current() && main.prepend(errorCard("Some columns could not be read", error)))
      .finally(() => current() && main.removeAttribute("aria-busy"));
  }
  return { title: "Index", refresh };
}

/** What the column says by which the table is sorted at first. @param {Sae} sae */
const focusWords = (sae) =>
  sae.index.focus &&
  el(
    "p.note",
    null,
    "Fires on: the tokens on which a latent fires for the largest share of their reads times its mean there. Focus: that " +
      "figure of the first token, as a share of the latent's maximum. Rows whose number is grey have no page.",
  );
