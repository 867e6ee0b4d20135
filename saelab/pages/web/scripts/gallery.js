// Directions in h-space: a slider shows one column of its table of pictures in large; without a script the whole table is there
// all the same.

import { all, first } from "./dom.js";

/** @param {HTMLElement} section */
function start(section) {
  const slider = section.querySelector("input");
  const output = section.querySelector("output");
  const holder = first(section, ".slider");
  if (!slider || !output || !holder) return;
  const cells = all(section, "table.pictures td");
  const large = all(section, "img.large");
  const show = () => {
    for (const cell of cells) cell.classList.toggle("now", cell.dataset.at === slider.value);
    const now = cells.filter((cell) => cell.dataset.at === slider.value);
    now.forEach((cell, i) => {
      const shown = cell.querySelector("img");
      if (large[i] && shown) large[i].setAttribute("src", shown.src);
    });
    output.textContent = now[0].dataset.strength ?? "";
  };
  slider.addEventListener("input", show);
  holder.hidden = false;
  show();
}

for (const section of all(document, "section.direction")) start(section);
