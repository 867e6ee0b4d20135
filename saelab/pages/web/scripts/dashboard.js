// Start: read the manifest, open the data, show the page that the URL names.

/** @import { Shown } from "./types.d.ts" */

import { hoverCard } from "./card.js";
import { ChunkError, loadManifest } from "./chunks.js";
import { comparePage } from "./compare-page.js";
import { button, byId, el, replace } from "./dom.js";
import { Dataset } from "./feature-data.js";
import { featurePage } from "./feature-page.js";
import { indexPage } from "./index-page.js";
import { startKeys } from "./keys.js";
import { latentHash } from "./latents.js";
import { openNotes } from "./notes.js";
import { errorCard } from "./parts.js";
import { loadPreferences, prefer } from "./preferences.js";
import { promptPage } from "./prompt-page.js";
import { provenance } from "./provenance.js";
import { bar } from "./report.js";
import { actions, again, go, here, route, startRoute } from "./route.js";
import { sentencePage } from "./sentence-page.js";
import { textNodes } from "./text.js";
import { openHelp, openView } from "./view.js";

/** The bar: a search, the pages, what one may set. */
function dashboardBar() {
  const says = "Search latents: number, word, tok:, text:, re:, ~number";
  const placeholder = 'Search: 123, word, tok:" the", text:"…", ~123';
  bar(
    "saelab",
    "#",
    el(
      "div.search",
      { role: "search" },
      el("input", {
        id: "search",
        type: "search",
        autocomplete: "off",
        spellcheck: "false",
        "aria-label": says,
        placeholder,
      }),
      el("kbd", { "aria-hidden": "true" }, "/"),
    ),
    el("nav", { "aria-label": "Pages", id: "nav-pages" }),
    button("View", openView, { class: "button plain", id: "view" }),
    button("?", openHelp, { class: "button plain", id: "help", "aria-label": "Keys and search help" }),
  );
}

const searchField = () => /** @type {HTMLInputElement} */ (byId("search"));

/** What the page that is shown does with changed parameters, if it can without being left. @type {Shown["refresh"]} */
let refresh;
let turn = 0; // each arrival; what finishes late of an earlier one is dropped

/** @param {Dataset} dataset @param {URLSearchParams} params */
function nav(dataset, params) {
  const view = params.has("p")
    ? "prompts"
    : params.get("view") === "sentence"
      ? "sentence"
      : params.get("view") === "compare" || (params.get("f") ?? "").includes(",")
        ? "compare"
        : "index";
  const to = { f: "", p: "", view: "", tab: "", ex: "", t: "", metric: "", strip: "", text: "" };
  /** @param {string} key @param {string} words @param {string} hash */
  const link = (key, words, hash) =>
    el("a.button.plain", { href: hash, "aria-current": key === view ? "page" : undefined }, words);
  replace(
    byId("nav-pages"),
    link("index", "Index", here(to)),
    dataset.manifest.prompts.length > 0 && link("prompts", "Prompts", here({ ...to, p: 0 })),
    link("sentence", "Sentence", here({ ...to, view: "sentence" })),
    link("compare", "Compare", here({ ...to, view: "compare" })),
  );
  const search = searchField();
  if (document.activeElement !== search) search.value = params.get("q") ?? "";
}

/** @param {Dataset} dataset @param {URLSearchParams} params */
function show(dataset, params) {
  const mine = ++turn;
  const current = () => mine === turn;
  const main = byId("main");
  main.removeAttribute("aria-busy");
  for (const key of Object.keys(actions)) delete actions[key];
  hoverCard.hide(true);
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  nav(dataset, params);
  const f = params.get("f");
  const page = params.has("p")
    ? promptPage
    : f?.includes(",") || params.get("view") === "compare"
      ? comparePage
      : f !== null && f !== ""
        ? featurePage
        : params.get("view") === "sentence"
          ? sentencePage
          : indexPage;
  page(main, dataset, params, current)
    .then((shown) => {
      if (!current() || !shown) return;
      refresh = shown.refresh;
      document.title = `${shown.title} · ${dataset.manifest.title}`;
      document.documentElement.dataset.shown = String(mine);
      if (mine > 1 && !main.contains(document.activeElement) && document.activeElement !== byId("search"))
        main.focus({ preventScroll: true });
      if (mine > 1 && !params.get("t")) scrollTo(0, 0);
    })
    .catch((error) => {
      if (!current()) return;
      replace(
        main,
        errorCard("This page could not be read", error, again),
        el("p", null, el("a", { href: "#" }, "Back to the index")),
      );
      document.documentElement.dataset.shown = String(mine);
    });
}

function startSearch() {
  const field = searchField();
  let waiting = 0;
  /** @param {boolean} [now] */
  const apply = (now) => {
    const q = field.value;
    clearTimeout(waiting);
    if (now && /^#?\d+$/.test(q.trim())) {
      go(here({ f: q.trim().replace("#", ""), q: "", p: "", view: "", ex: "", t: "" }));
      return;
    }
    if (refresh && !route.params.has("f") && !route.params.has("p") && !route.params.has("view")) refresh({ q });
    else if (now) go(here({ q, f: "", p: "", view: "", ex: "", t: "", tab: "" }));
  };
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    if (!field.value.startsWith("text:")) waiting = setTimeout(apply, 160);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") apply(true);
  });
}

async function start() {
  loadPreferences();
  dashboardBar();
  for (const feature of ["color-scheme: dark", "contrast: more"])
    matchMedia(`(prefers-${feature})`).addEventListener("change", () => prefer({}));
  addEventListener("scroll", () => hoverCard.hide(), { passive: true });
  try {
    const manifest = await loadManifest();
    replace(byId("brand"), textNodes(manifest.title));
    const dataset = await new Dataset(manifest).open();
    openNotes(manifest.saes.map((info) => String(info.digest).slice(0, 16)).join("-"));
    replace(byId("provenance"), provenance(dataset));
    startKeys();
    startSearch();
    const [sae, ...others] = dataset.saes;
    const alone = !others.length && sae.pageLatents.length === 1; // there is little to choose in its index
    startRoute(
      (params) => {
        refresh = undefined;
        show(dataset, params);
      },
      alone ? latentHash(sae, sae.pageLatents[0]) : "",
    );
  } catch (error) {
    replace(
      byId("main"),
      errorCard(
        "This dashboard could not be read",
        error instanceof ChunkError
          ? error
          : Object.assign(/** @type {Error} */ (error), {
              hint: "The page needs its data, in this file or in the folder data/ beside it.",
            }),
      ),
    );
    document.documentElement.dataset.shown = "0";
  }
}

start();
