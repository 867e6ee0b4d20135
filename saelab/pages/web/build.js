// node build.js writes dist/, the files that saelab's pages are made of; node build.js --check says whether dist/ is of these sources.

import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const page = fileURLToPath(new URL(".", import.meta.url));
const dist = join(page, "dist");
const { metafile, outputFiles } = await build({
  absWorkingDir: page,
  entryPoints: [
    "scripts/dashboard.js",
    "scripts/circuit.js",
    "scripts/sweep.js",
    "scripts/hspace-directions.js",
    "scripts/hspace-latents.js",
    "scripts/scores.js",
    "styles/page.css",
  ],
  entryNames: "[name]",
  outdir: dist,
  write: false,
  metafile: true,
  bundle: true,
  minify: true,
  format: "iife",
  charset: "utf8",
});

/** @param {string} message */
function fail(message) {
  console.error(message);
  process.exitCode = 1;
}

if (process.argv.includes("--check")) {
  const made = outputFiles.map(({ path }) => basename(path)).sort();
  const stale = [];
  for (const { path, text } of outputFiles)
    if ((await readFile(path, "utf8").catch(() => "")) !== text) stale.push(basename(path));
  const strange = (await readdir(dist)).filter((name) => !made.includes(name));
  if (stale.length || strange.length)
    fail(`dist/ is not of these sources (${[...stale, ...strange].join(", ")}): run \`make web\` and commit it`);
  for (const folder of ["scripts", "styles"])
    for (const name of await readdir(join(page, folder)))
      if (!name.endsWith(".d.ts") && !metafile.inputs[`${folder}/${name}`])
        fail(`${folder}/${name} is in no page: import it, or delete it`);
} else {
  await mkdir(dist, { recursive: true });
  for (const { path, contents } of outputFiles) await writeFile(path, contents);
}
