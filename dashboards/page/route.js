// Where one is, as the fragment of the URL: #f=123&tab=random&q=…. Everything a person can share is in it.

// What the page that is shown can do, by name: next, previous, nextGroup, previousGroup, pin, note, compare, export, errors,
// sources, repaint. Keys call them; each new page fills it anew.
const actions = {};

const route = { params: new URLSearchParams(), listeners: [] };

const parseHash = (hash) => new URLSearchParams(hash.replace(/^#/, ""));

/** The fragment for these parameters; undefined and "" are left out. */
function hashOf(params) {
  const kept = Object.entries(params).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return "#" + new URLSearchParams(kept.map(([k, v]) => [k, String(v)])).toString();
}

/** Go somewhere. In a sandboxed frame there may be no history: the page then keeps the place to itself. */
function go(hash, replacing = false) {
  const target = hash.startsWith("#") ? hash : `#${hash}`;
  clearTimeout(mark.timer);
  try {
    if (replacing) history.replaceState(null, "", target);
    else history.pushState(null, "", target);
  } catch {
    /* about:srcdoc */
  }
  arrive(target);
}

function arrive(hash) {
  route.params = parseHash(hash);
  for (const listener of route.listeners) listener(route.params);
}

/** The present place with some parameters changed. */
const here = (changes) => hashOf({ ...Object.fromEntries(route.params), ...changes });

/** Remember something of the present view in its URL without leaving it or telling anybody. */
function mark(changes) {
  route.params = parseHash(here(changes));
  clearTimeout(mark.timer); // browsers slow a page down that writes its URL at every key
  mark.timer = setTimeout(writeHash, 120);
}

function writeHash() {
  clearTimeout(mark.timer);
  try {
    history.replaceState(null, "", here({}));
  } catch {
    /* about:srcdoc */
  }
}

/** The present page once more, from its data. */
const again = () => arrive(here({}));

function startRoute(listener) {
  route.listeners.push(listener);
  addEventListener("popstate", () => arrive(location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || event.defaultPrevented || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    if (link.classList.contains("skip")) byId("main").focus();
    else go(link.getAttribute("href"));
  });
  arrive(location.hash);
}
