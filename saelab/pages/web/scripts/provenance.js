// What the page was made from: at the foot of every page.

/** @import { Effects, SaeInfo } from "./types.d.ts" */
/** @import { Dataset } from "./feature-data.js" */

import { el } from "./dom.js";
import { count, number, plural } from "./numbers.js";
import { pairs } from "./parts.js";
import { textNodes } from "./text.js";

/** @param {string} digest */
const short = (digest) => el("span", { title: digest }, `${String(digest).slice(0, 12)}…`);
/** @param {string | null | undefined} value */
const plain = (value) => el("span.text", null, textNodes(String(value ?? "–").slice(0, 300)));

/** @param {Dataset} dataset */
export function provenance(dataset) {
  const { manifest } = dataset;
  const { model, corpus } = manifest;
  /** @param {SaeInfo} info */
  const evaluated = (info) =>
    info.evaluation
      ? Object.entries(info.evaluation)
          .filter(([, v]) => Number.isFinite(v))
          .map(([k, v]) => `${k.replaceAll("_", " ")} ${number(v)}`)
          .join(", ")
      : "not evaluated";
  /** @param {Effects} effects */
  const effects = ({ mode, rank_correlation: rho, n }) =>
    mode + (rho == null ? "" : `; rank correlation with full ablation ${number(rho)} over ${plural(n, "pair")}`);
  const versions = Object.entries(manifest.versions).map(([name, version]) => `${name} ${version}`);
  return el(
    "div",
    null,
    pairs("facts", [
      ["model", [plain(model.name), " ", short(model.digest)]],
      ["corpus", [plain(corpus.name), " ", short(corpus.digest)]],
      [
        "split and tokens",
        `${corpus.split}, seed ${corpus.seed}; ${count(corpus.tokens)} read in ${plural(corpus.contexts, "context")} of ${corpus.context_length}, ${count(corpus.counted)} counted`,
      ],
      [
        "left out",
        `first ${plural(corpus.skip_positions, "position")}, special tokens${corpus.norm_limit == null ? "" : `, norms above ${number(corpus.norm_limit)}`}`,
      ],
      ["versions", plain(versions.join(", "))],
    ]),
    dataset.saes.map(({ info, name, letter }) =>
      pairs("facts", [
        [manifest.saes.length > 1 ? `SAE ${letter}` : "SAE", [plain(name), " ", short(info.digest)]],
        [
          "architecture, site",
          [plain(info.architecture), ", ", plain(info.site), `, ${count(info.d_in)} to ${count(info.d_sae)}`],
        ],
        ["evaluation", evaluated(info)],
        ["effects", info.effects && effects(info.effects)],
        [
          "other seeds",
          info.seeds &&
            `${plural(info.seeds.others, "SAE")}; found again: decoder cosine at least ${number(info.seeds.threshold)}`,
        ],
        ["null", info.null && [plain(info.null.name), `, L0 ${number(info.null.l0)}`]],
      ]),
    ),
  );
}
