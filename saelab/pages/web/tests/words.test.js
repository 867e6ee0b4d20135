import "./page.js";
import assert from "node:assert/strict";
import { test } from "node:test";
import { ramp, step } from "../scripts/colour.js";
import { differing } from "../scripts/differing.js";
import { el, svg } from "../scripts/dom.js";
import { csv } from "../scripts/export.js";
import { parseLatent, sameLatent } from "../scripts/latents.js";
import { count, density, number, percent, plural, signed } from "../scripts/numbers.js";
import { actions, go, hashOf, here, mark, parseHash, route, startRoute } from "../scripts/route.js";
import { characterGroups, chip, textNodes } from "../scripts/text.js";

test("numbers as people read them", () => {
  const wanted = {
    0: "0",
    1: "1.00",
    12.345: "12.3",
    123.4: "123",
    4560.2: "4,560",
    0.00123: "0.00123",
    1234567: "1.2e6",
  };
  for (const [x, words] of Object.entries(wanted)) assert.equal(number(Number(x)), words);
  assert.deepEqual([number(-12.345), number(123_456), number(999_999)], ["−12.3", "123,456", "999,999"]);
  assert.deepEqual([number(0.00001234), number(-0.00001234)], ["1.2e−5", "−1.2e−5"]);
  assert.deepEqual(
    [null, undefined, Number.NaN, Infinity, -Infinity].map((x) => number(x)),
    ["–", "–", "–", "∞", "−∞"],
  );
  assert.deepEqual(
    ["n/a", "−∞", "1e3 tokens"].map((x) => number(x)),
    ["n/a", "−∞", "1e3 tokens"],
  );
  assert.deepEqual([signed(2), signed(-2), signed(0)], ["+2.00", "−2.00", "0"]);
  assert.deepEqual([percent(0.1234), percent(null)], ["12.3%", "–"]);
  assert.deepEqual([density(0), density(0.25), density(1 / 40_000)], ["0", "25%", "1 in 40,000"]);
  assert.deepEqual([count(1234567), count(null)], ["1,234,567", "–"]);
  assert.deepEqual(
    [plural(1, "token"), plural(2_000, "token"), plural(0, "entry", "entries")],
    ["1 token", "2,000 tokens", "0 entries"],
  );
});

test("addresses keep what they say, and leave out what says nothing", () => {
  const hash = hashOf({ f: "12@B", q: 'tok:" the&#"', t: 0, tab: "", ex: undefined, p: null });
  assert.deepEqual(Object.fromEntries(parseHash(hash)), { f: "12@B", q: 'tok:" the&#"', t: "0" });
});

test("one goes to a place, changes it, marks it, and follows its links", () => {
  const places = [];
  startRoute((params) => places.push(Object.fromEntries(params)));
  go("#f=1&tab=near");
  assert.equal(here({ tab: "", f: 2 }), "#f=2");
  mark({ ex: 3 });
  assert.deepEqual([places.at(-1), route.params.get("ex")], [{ f: "1", tab: "near" }, "3"]); // marked, and nobody told
  const link = el("a", { href: "#p=0" }, el("b", null, "x"));
  document.body.append(link);
  link.firstChild.click();
  assert.deepEqual(places.at(-1), { p: "0" });
  assert.equal(location.hash, "#p=0");
  assert.deepEqual(actions, {});
});

test("a latent's address says its SAE where it is not the first", () => {
  assert.deepEqual(parseLatent("12@B"), { latent: 12, letter: "B" });
  assert.deepEqual(parseLatent("12"), { latent: 12, letter: "A" });
  for (const wrong of ["", "-1", "1e9", "12@C", "1234567890", " 1", null]) assert.equal(parseLatent(wrong), null);
  assert.deepEqual(
    ["12", "7@B"].map((text) => sameLatent(parseLatent(text))),
    ["12", "7@B"],
  );
});

test("text enters as text, markup and entities included", () => {
  const hostile = ["<img src=x onerror=alert(1)>", "</script><script>", "&lt;b&gt;", "<!--"];
  for (const string of hostile) {
    const node = el("p", null, textNodes(string), string);
    assert.equal(node.textContent, string + string);
    assert.equal(node.children.length, 0);
  }
});

test("invisible characters stand in sight, and copying gives the text as it was", () => {
  const string = "a\u202eb\nc\u200bd\x00\ud800 \u{1f468}\u200d\u{1f469}";
  const node = el("p", null, textNodes(string));
  assert.equal(node.textContent, string);
  const seen = [...node.children].map((child) => child.dataset.c);
  assert.deepEqual(seen, ["U+202E", "↵", "U+200B", "␀", "U+D800"]); // the joiner of an emoji is part of it
});

test("a chip shows the space it begins with, nothing, bytes, and cuts what is long", () => {
  assert.deepEqual(
    [chip(" the").textContent, chip(" the").firstChild.dataset.c, chip("").textContent],
    [" the", "␣", "∅"],
  );
  assert.equal(chip("\ufffd", [0xe6, 0x97]).firstChild.dataset.c, "E6 97");
  assert.equal(chip("x".repeat(999)).textContent.length, 401);
});

test("tokens that share a character come together, others do not", () => {
  const bytes = (...list) => list.map((token) => Uint8Array.from(token));
  const groups = (tokens, alone) => characterGroups(tokens, alone).map(({ from, to, text }) => [from, to, text]);
  const [first, second, third] = new TextEncoder().encode("日");
  assert.deepEqual(groups(bytes([first], [second, third], [0x61])), [
    [0, 2, "日"],
    [2, 3, "a"],
  ]);
  assert.deepEqual(groups(bytes([first], [second], [third], [0x61])), [
    [0, 3, "日"],
    [3, 4, "a"],
  ]);
  assert.deepEqual(groups(bytes([0xf0], [0x9f, 0x98], [0x80])), [[0, 3, "😀"]]);
  assert.deepEqual(groups(bytes([first], [0x61])), [
    [0, 1, "\ufffd"],
    [1, 2, "a"],
  ]); // a start that nothing goes on with
  assert.deepEqual(groups(bytes([first], [second], [third]), (i) => i === 1).length, 3); // a special token stands alone
});

test("no element takes a listener, a source or a link from elsewhere as an attribute", () => {
  for (const props of [{ onclick: "x()" }, { ONERROR: "x()" }, { src: "x.png" }, { srcdoc: "x" }])
    assert.throws(() => el("a", props));
  for (const href of ["javascript:alert(1)", "https://example.org", " #x", "data:text/html,x"])
    assert.throws(() => el("a", { href }));
  assert.equal(el("a", { href: "#f=1" }).getAttribute("href"), "#f=1");
});

test("elements have their classes, data, listeners and children; what is absent is left out", () => {
  let clicks = 0;
  const node = el(
    "div.a.b",
    { data: { k: 1 }, hidden: true, title: null, "aria-pressed": false, click: () => clicks++ },
    [["x", null], false, 0],
  );
  node.click();
  assert.deepEqual([node.className, node.dataset.k, clicks, node.textContent], ["a b", "1", 1, "x0"]);
  assert.deepEqual(node.getAttributeNames().sort(), ["aria-pressed", "class", "data-k", "hidden"]);
  assert.equal(svg("path.line", { d: "M0 0" }).namespaceURI, "http://www.w3.org/2000/svg");
});

test("CSV is quoted where it must be, and nothing in it runs in a spreadsheet", () => {
  for (const formula of ["=1", "+1", "-1", "@x", "\t=1", "\r=1"]) assert.match(csv(["a"], [[formula]]), /\r\n"?'/);
  const rows = [
    ["=1+1", 'say "x"', -3, null],
    ["@SUM(A1)", "a,b\nc", 0.5, undefined],
  ];
  assert.equal(
    csv(["a", "b", "c", "d"], rows),
    `\ufeffa,b,c,d\r\n'=1+1,"say ""x""",-3,\r\n'@SUM(A1),"a,b\nc",0.5,\r\n`,
  );
});

test("the steered text has the words underlined that the unsteered one has not, in order", () => {
  const marked = (before, after) => el("p", null, differing(before, after)).innerHTML;
  assert.equal(marked("the cat sat", "the big cat sat"), "the <mark>big</mark><mark> </mark>cat sat");
  assert.equal(marked("", "a"), "<mark>a</mark>");
  assert.equal(marked("a <b>", "a <b>"), "a &lt;b&gt;");
});

test("every step of every palette has an ink with a contrast of 4.5 to 1, and steps begin beyond nothing", () => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => rgb.reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * linear(c / 255), 0);
  const hex = (ink) => [1, 3, 5].map((i) => Number.parseInt(ink.slice(i, i + 2), 16));
  for (const name of ["orange", "cividis", "grey"])
    for (const dark of [false, true]) {
      const steps = ramp(name, dark, 11);
      const shades = steps.map(({ rgb }) => luminance(rgb));
      assert.deepEqual(
        shades,
        [...shades].sort((a, b) => (dark ? a - b : b - a)),
      );
      for (const { rgb, ink } of steps.slice(1)) {
        const [low, high] = [luminance(rgb), luminance(hex(ink))].sort((a, b) => a - b);
        assert.ok((high + 0.05) / (low + 0.05) >= 4.5, `${name} ${rgb}`);
      }
    }
  assert.deepEqual([0, 1e-9, 0.1, 0.11, 1, 9].map(step), [0, 1, 1, 2, 10, 10]);
});
