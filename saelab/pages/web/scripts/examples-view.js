// The examples of a latent: tabs of groups, what colours the tokens, the lists.

/** @import { Choice, Effects, Mode, Numbers } from "./types.d.ts" */
/** @import { Example, Feature } from "./feature-data.js" */

import { hoverCard, rove, tokenCards } from "./card.js";
import { button, el, first, replace } from "./dom.js";
import { exampleList, kindOf, LEFT_OUT, leftOutLegend, rampLegend, tokenCard } from "./examples.js";
import { number, plural } from "./numbers.js";
import { errorCard, tabs, tinted } from "./parts.js";
import { mark } from "./route.js";

/**
 * {node, aim, turn, toggleMisses, paint, start}; the tab, the example and the token are in the URL.
 * @param {Feature} feature
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 */
export function examplesView(feature, params, current) {
  const { groups: described } = feature.sae.dataset.manifest;
  const body = el("div.examples", { id: "examples", role: "tabpanel", tabindex: -1 });
  const present = GROUP_TABS.filter(([kind]) => feature.windows.some((w) => kindOf(w) === kind));
  const kinds = present.map(([kind]) => kind);
  const asked = params.get("tab") ?? "";
  let tab = kinds.includes(asked) ? asked : kinds[0];
  /** @type {Numbers | null} */
  let missed = null; // what the SAE misses a token, once it is read
  let misses = false; // whether it colours the tokens
  let sources = params.get("by") === "source" && Boolean(feature.layout.dfa); // whether the sources of the peak do
  /** @type {[low: number, high: number] | null} */
  let aimed = null; // [low, high) of a bar that was picked
  let perRow = params.get("scale") === "row";
  const remember = () => mark({ by: misses ? "miss" : sources ? "source" : "", scale: perRow ? "row" : "" });
  const legend = el("div.legend");
  /** @param {string} words @param {string} title @param {() => void} action */
  const pressable = (words, title, action) => button(words, action, { "aria-pressed": "false", title });
  const missButton = pressable("What the SAE misses", "colour tokens by |x − x̂|² / |x|² (r)", () =>
    view.toggleMisses(),
  );
  const sourceButton = pressable(
    "Sources",
    "colour tokens by what they give to the pre-activation at the peak (s)",
    () => view.toggleSources(),
  );
  const scaleTitle = "end of the colour scale: this latent's maximum, or each example's";
  const scaleButton = pressable("Scale by row", scaleTitle, () => {
    perRow = !perRow;
    remember();
    paint();
  });
  const bar = kinds.length ? tabs("Examples", present, tab, "examples", (key) => show(key)) : null;

  /** @param {string} key */
  function show(key) {
    tab = key;
    aimed = null;
    mark({ tab: key === kinds[0] ? "" : key, ex: "", t: "" });
    paint();
  }
  /** @param {Example} window @returns {Mode} */
  function modeOf(window) {
    const largest = perRow
      ? Math.max(window.act, ...Array.from(window.tokens, (_, i) => window.activation(i)))
      : feature.figure("max");
    const effects = window.storedEffects && !misses && !sources ? window.effectScale * 127 : 0;
    return { missed, misses, sources, effects, top: largest || 1 };
  }
  /** @param {Example[]} windows */
  const list = (windows) => exampleList(windows, modeOf);

  /** @param {[low: number, high: number]} range */
  function aimedList([low, high]) {
    /** @param {Example} w */
    const inside = (w) => w.act >= low && w.act < high && !["random", "near"].includes(kindOf(w));
    const windows = feature.windows.filter(inside);
    return el(
      "div.group.aim",
      null,
      el("h3", null, `Examples with a peak of ${number(low)} to ${number(high)}`),
      list(windows),
      !windows.length && el("p.empty", null, "None of the examples kept has its peak here."),
      el(
        "p",
        null,
        button("Back to all groups", () => view.aim(null)),
      ),
    );
  }
  function tabLists() {
    const windows = feature.windows.filter((w) => kindOf(w) === tab);
    if (!windows.length) return el("p.empty", null, "There are no examples: the latent never fired on these tokens.");
    const groups = [...new Set(windows.map((w) => w.group))];
    /** @param {number} g */
    const heading = (g) => groups.length > 1 && el("h3", null, described[g].name);
    const near =
      "The latent stayed silent here: these are the pre-activations, in brackets, that came closest to firing.";
    return [
      groups.map((g) => el("div.group", null, heading(g), list(windows.filter((w) => w.group === g)))),
      tab === "near" && el("p.muted", null, near),
    ];
  }
  /** @param {string | null | undefined} ex @param {string | null | undefined} t */
  const locate = (ex, t) => first(body, `.example[data-w="${Number(ex)}"] .t[data-i="${Number(t)}"]`);
  function paint() {
    hoverCard.hide(true);
    const held = /** @type {HTMLElement} */ (document.activeElement ?? document.body);
    const [ex, t] = body.contains(held)
      ? [/** @type {HTMLElement | null} */ (held.closest(".example"))?.dataset.w, held.dataset.i]
      : [];
    replace(body, aimed ? aimedList(aimed) : tabLists());
    body.classList.toggle("sourced", sources);
    missButton.setAttribute("aria-pressed", String(misses));
    sourceButton.setAttribute("aria-pressed", String(sources));
    scaleButton.setAttribute("aria-pressed", String(perRow));
    const plainly = !misses && !sources;
    replace(
      legend,
      rampWords(),
      plainly && feature.columns.effects && effectWords(feature.sae.info.effects),
      body.querySelector(".left-out") && leftOutLegend(),
    );
    rove(body, first(body, ".t.peak"));
    look(locate(ex, t));
  }
  /** @param {HTMLElement | null} token */
  function look(token) {
    if (!token) return;
    rove(body, token);
    token.focus();
  }
  const rampWords = () =>
    misses
      ? rampLegend("share of the activation missed", "0", "1")
      : sources
        ? [
            rampLegend("share of the row's largest source", "0", "1"),
            el("span", null, tinted(1, "▲"), " raises · ", tinted(-1, "▽"), " lowers the pre-activation at the peak"),
          ]
        : rampLegend("activation", "0", perRow ? "the row's largest" : number(feature.figure("max")));

  const view = {
    node: el(
      "div",
      null,
      bar,
      el("div.toolbar", null, legend, el("div.facets", null, missButton, sourceButton, scaleButton)),
      body,
    ),
    paint,
    /** @param {[low: number, high: number] | null} range */
    aim(range) {
      aimed = range;
      paint();
    },
    /** @param {number} by */
    turn(by) {
      if (!kinds.length) return;
      show(kinds[(kinds.indexOf(tab) + by + kinds.length) % kinds.length]);
      bar?.choose(tab);
    },
    async toggleMisses() {
      body.setAttribute("aria-busy", "true");
      try {
        missed ??= await feature.misses();
        misses = !misses;
        if (!current()) return;
        sources = false;
        remember();
        paint();
      } catch (error) {
        if (current()) body.prepend(errorCard("What the SAE misses could not be read", error));
      } finally {
        body.removeAttribute("aria-busy");
      }
    },
    toggleSources() {
      if (sourceButton.hidden) return;
      misses = false;
      sources = !sources;
      remember();
      paint();
    },
    start() {
      paint();
      missButton.hidden = !feature.sae.has(`m-${feature.chunkNumber}`);
      sourceButton.hidden = !feature.layout.dfa;
      bar?.choose(tab);
      tokenCards(body, (token, focused) => {
        const row = /** @type {HTMLElement} */ (token.closest(".example"));
        const window = feature.windows[Number(row.dataset.w)];
        if (focused) mark({ ex: window.number, t: token.dataset.i });
        return tokenCard(window, Number(token.dataset.i), Number(token.dataset.n), missed);
      });
      if (params.has("ex") && params.has("t")) look(locate(params.get("ex"), params.get("t")));
      if (params.get("by") === "miss") view.toggleMisses();
      else
        feature
          .misses()
          .then((found) => {
            missed = found;
            if (current() && found && Array.from(found).includes(LEFT_OUT)) paint();
          })
          .catch(() => {}); // the button says what is wrong with it
    },
  };
  return view;
}

/** @param {Effects | null} effects */
function effectWords(effects) {
  const rho = effects?.rank_correlation;
  const title =
    rho == null ? "" : `rank correlation with full ablation ${number(rho)} over ${plural(effects?.n ?? 0, "pair")}`;
  const how = rho == null ? " (first order)" : ` (first order; ρ ${number(rho, 2)} with full ablation)`;
  return el(
    "span",
    { title },
    el("span.t.up", null, "loss rises"),
    " · ",
    el("span.t.down", null, "falls"),
    " without it",
    how,
  );
}

/** @type {Choice[]} */
const GROUP_TABS = [
  ["top", "Top"],
  ["interval", "Intervals"],
  ["quantile", "Quantiles"],
  ["random", "Random"],
  ["near", "Near misses"],
];
