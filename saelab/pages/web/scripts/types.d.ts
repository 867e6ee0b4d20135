// What the scripts hand to each other. The data's own names are those of docs/dashboard-format.md.

/** What an element may hold: nodes, text, lists of them; what is absent or false is left out. */
export type Child = Node | string | number | false | null | undefined | readonly Child[];

type Attribute = string | number | boolean | null | undefined;
/** Attributes of an element; functions are listeners, `data` its data set, `style` its custom properties and sizes. */
export interface Props {
  data?: Record<string, Attribute>;
  style?: Record<string, string>;
  // biome-ignore lint/suspicious/noExplicitAny: what a listener takes goes by its event's name
  [name: string]: Attribute | Record<string, Attribute> | ((event: any) => void);
}
type Tag<Name extends string> = Name extends `${infer T}.${string}` ? T : Name;
export type ElementOf<Name extends string> =
  Tag<Name> extends keyof HTMLElementTagNameMap ? HTMLElementTagNameMap[Tag<Name>] : HTMLElement;
export type DrawnOf<Name extends string> =
  Tag<Name> extends keyof SVGElementTagNameMap ? SVGElementTagNameMap[Tag<Name>] : SVGElement;

/** [key, words] of what one may choose. */
export type Choice = readonly string[];

/** What the typed arrays of columns have in common. */
export interface Numbers extends ArrayLike<number>, Iterable<number> {
  subarray(from: number, to?: number): Numbers;
  indexOf(value: number): number;
  keys(): IterableIterator<number>;
}
/** Columns by name; `text` is the one of strings. Those that the format marks "if ..." may be missing. */
export type Columns = Record<string, Numbers> & { text: string };
export interface Container {
  name: string;
  kind: string;
  header: { sources?: string[] };
  columns: Columns;
}

export interface Group {
  name: string;
  kind: string;
}
export interface SaeInfo {
  prefix: string;
  name: string;
  digest: string;
  architecture: string;
  site: string;
  d_in: number;
  d_sae: number;
  pages: number;
  per_chunk: number;
  heads: number | null;
  l0: number;
  explained_variance: number;
  dead: number;
  silent: number;
  dense: number;
  duplicates: number;
  evaluation: Record<string, number | string | null> | null;
  effects: Effects | null;
  seeds: { others: number; threshold: number } | null;
  null: { name: string; l0: number } | null;
  matches: string | null;
}
export interface Effects {
  mode: string;
  rank_correlation: number | null;
  n: number;
}
export interface Manifest {
  format: string;
  version: number;
  title: string;
  versions: Record<string, string>;
  model: { name: string; digest: string };
  corpus: {
    name: string;
    digest: string;
    split: string;
    seed: number;
    contexts: number;
    context_length: number;
    tokens: number;
    counted: number;
    skip_positions: number;
    norm_limit: number | null;
  };
  saes: SaeInfo[];
  groups: Group[];
  prompts: { chunk: string; text: string; prefix: string }[];
  coactivation: { contexts: number };
  chunks: Record<string, [sha256: string, bytes: number, inflated: number]>;
}

/** A latent as it stands in an address: "12", or "12@B" of the second SAE. */
export interface Place {
  latent: number;
  letter: string;
}
/** What a page says once it is shown; `refresh` takes changed parameters without leaving it. */
export interface Shown {
  title: string;
  refresh?: (changes: Changes) => void;
}
/** Parameters of an address to change: "" or undefined takes one out. */
export type Changes = Record<string, string | number | null | undefined>;

/** Tokens that make whole characters together. */
export interface TokenGroup {
  from: number;
  to: number;
  text: string;
}
/** What colours the tokens of an example, what underlines them, the end of the scale. */
export interface Mode {
  missed?: Numbers | null;
  misses?: boolean;
  sources?: boolean;
  effects: number;
  top: number;
}

/** A node of a circuit, and an edge from a child to what it goes into. `saelab.analysis.circuit` writes them. */
export interface CircuitNode {
  id: number;
  name: string;
  label: string | null;
  kind: string;
  of: string | null;
  block: number;
  position: number | null;
  latent: number | null;
  activation: number | null;
  contribution: number;
  expanded: boolean;
  members: number;
  kept_mass: number | null;
  depth: number;
}
export interface Edge {
  child: number;
  parent: number;
  head: number | null;
  contribution: number;
}
export interface Circuit {
  format: string;
  version: number;
  model: string;
  tokens: string[];
  saes: { site: string; kind: string; block: number; cfg: string; page: string | null }[];
  settings: { depth: number; keep: number; most: number; share: number };
  sums: { root: number; kept: number; rest: number; error: number; bias: number };
  nodes: CircuitNode[];
  edges: Edge[];
  /** Made here: the root's size, the edges that go out of each node and into it, the nodes from the largest down. */
  scale: number;
  out: Edge[][];
  in: Edge[][];
  order: CircuitNode[];
}

declare global {
  var __sl: (name: string, text: string) => void;
  var trustedTypes:
    | {
        createPolicy(
          name: string,
          rules: { createScriptURL(url: string): string },
        ): { createScriptURL(url: string): string };
      }
    | undefined;
}
