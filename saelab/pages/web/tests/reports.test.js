import "./page.js";
import assert from "node:assert/strict";
import { test } from "node:test";
import { picture } from "../scripts/dom.js";
import { figures, matrix } from "../scripts/parts.js";
import { filter } from "../scripts/report.js";
import { standing, verdict } from "../scripts/sweep-verdict.js";

const row = {
  latent: 7,
  operation: "add",
  p: 1 / 21,
  directions: 20,
  matched_effect: 0.5,
  matched_kl: 1,
  matched_random: 0.125,
  note: "",
};

test("a latent stands above, in or at the foot of the random band by its rank alone", () => {
  assert.equal(standing(row), "above");
  assert.equal(standing({ ...row, p: 2 / 21 }), "inside");
  assert.equal(standing({ ...row, p: 1, matched_effect: -1 }), "low");
  assert.equal(standing({ ...row, p: 1, matched_effect: 0, matched_random: 0 }), "inside"); // all the same
  assert.equal(standing({ ...row, p: null }), "unknown");
});

test("what a sweep says of a latent has the figures that it is said by", () => {
  assert.deepEqual(verdict(row, "rise_text"), [
    "Latent 7, add: above the random band",
    ". rise_text is +0.500 at 1.00 nats, of random directions +0.125 on average (p = 0.0476 among 20).",
  ]);
  assert.deepEqual(verdict({ ...row, p: null, note: "3 random directions: p needs 20" }, "rise_text"), [
    "Latent 7, add: not ranked",
    ", 3 random directions: p needs 20.",
  ]);
});

test("figures stand at the right, text is text and nothing a dash", () => {
  const made = figures(
    ["name", "x"],
    [
      ["<b>", 20],
      ["−∞", 0.125],
      ["", null],
    ],
    "label",
  );
  const cells = [...made.querySelectorAll("tbody tr")].map((tr) => [...tr.children].map((td) => td.textContent));
  assert.deepEqual(cells, [
    ["<b>", "20"],
    ["−∞", "0.125"],
    ["", "–"],
  ]);
  assert.deepEqual(
    [...made.querySelectorAll("th")].map((th) => th.className),
    ["", "num"],
  );
});

test("a matrix is tinted by shares of its largest figure, or of a tenth", () => {
  const shares = (values) =>
    [...matrix("", ["a"], ["x", "y"], [values], String).querySelectorAll("td")].map((td) => [
      td.className,
      td.style.getPropertyValue("--share"),
    ]);
  assert.deepEqual(shares([0.5, -0.25]), [
    ["plus", "1"],
    ["minus", "0.5"],
  ]);
  assert.deepEqual(shares([0.05, null]), [
    ["plus", "0.5"],
    ["plus", "0"],
  ]);
});

test("a picture is of base64, and of nothing else", () => {
  assert.equal(picture("iVBOR+/9=", "alt", "large").src, "data:image/png;base64,iVBOR+/9=");
  assert.throws(() => picture('x" onerror="', "alt"), /not base64/);
  assert.throws(() => picture("javascript:1", "alt"), /not base64/);
});

test("a filter hides what has not its words, and counts", () => {
  document.body.innerHTML = '<div><section data-name="pca 0"></section><section data-name="Towards 1"></section></div>';
  const field = filter("Only", document.body);
  const input = field.querySelector("input");
  const hidden = () => [...document.querySelectorAll("section")].map((section) => section.hidden);
  for (const [words, wanted, said] of [
    ["towards", [true, false], "1 of 2"],
    ["zzz", [true, true], "0 of 2"],
    ["", [false, false], ""],
  ]) {
    input.value = words;
    input.dispatchEvent(new input.ownerDocument.defaultView.Event("input"));
    assert.deepEqual([hidden(), field.querySelector("output").textContent], [wanted, said]);
  }
});
