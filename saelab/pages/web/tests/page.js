// A document for scripts that make elements: import this before them.

import { Window } from "happy-dom";

export const page = new Window({ url: "http://localhost/" });
for (const name of ["document", "Element", "history", "localStorage", "location", "Node"])
  Object.defineProperty(globalThis, name, { value: page[name], configurable: true });
globalThis.addEventListener = page.addEventListener.bind(page);
