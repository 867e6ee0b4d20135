import assert from "node:assert/strict";
import { test } from "node:test";
import { page } from "./page.js";

test("the slider shows its column of pictures in large, and says its strength", async () => {
  const cell = (at, row) => `<td data-at="${at}" data-strength="${at - 1}.0"><img src="data:${row}${at}"></td>`;
  const rows = ["a", "b"].map((row) => `<tr>${[0, 1, 2].map((at) => cell(at, row)).join("")}</tr>`).join("");
  document.body.innerHTML = `<section class="direction"><div class="slider" hidden><input type="range" max="2" value="1"><output></output>
    </div><img class="large"><img class="large"><table class="pictures">${rows}</table></section><section class="direction"></section>`;
  await import("../scripts/gallery.js");
  const [slider, output, holder] = ["input", "output", ".slider"].map((selector) => document.querySelector(selector));
  const large = () => [...document.querySelectorAll("img.large")].map((image) => image.src);
  const now = () => [...document.querySelectorAll("td.now")].map((td) => td.dataset.at);
  assert.deepEqual(
    [holder.hidden, output.textContent, large(), now()],
    [false, "0.0", ["data:a1", "data:b1"], ["1", "1"]],
  );
  slider.value = "2";
  slider.dispatchEvent(new page.Event("input"));
  assert.deepEqual([output.textContent, large(), now()], ["1.0", ["data:a2", "data:b2"], ["2", "2"]]);
});
