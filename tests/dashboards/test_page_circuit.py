"""The page of a circuit: clean under the policy, hostile strings as they are, reachable by keys, linked to dashboards."""

from pathlib import Path

import pytest
import torch

import saelab
from saelab.analysis.circuits import recursive_dfa
from saelab.analysis.circuits.circuit_page import page as circuit_page
from saelab.pages.packing import packed
from tests import tiny
from tests.browser import Watched, browser  # noqa: F401
from tests.synthetic_dashboard import HOSTILE
from tests.toy_attribution import attention_sae, residual_sae

SITE = "blocks.3.attn.hook_z"


@pytest.fixture(scope="module")
def circuit():
    """A traced graph whose tokens, labels, model and sites are hostile strings."""
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    sae, saes = attention_sae(lm, 3), [attention_sae(lm, 1), residual_sae(lm, 3)]
    n = len(HOSTILE)
    traced = recursive_dfa.trace(sae, lm, ids(n + 1), 3, n, saes=saes, most=60, keep=0.97, share=0).to_dict()
    traced["tokens"] = ["the first", *HOSTILE]
    traced["model"] = HOSTILE[0]
    for i, node in enumerate(traced["nodes"]):
        if node["latent"] is not None:
            node["label"] = HOSTILE[i % len(HOSTILE)]
    traced["saes"][0]["cfg"] = HOSTILE[1]
    return traced


def ids(n):
    return (torch.arange(n) * 7 % 250)[None]


@pytest.fixture(scope="module")
def page(circuit, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a b#c%20ü") / "circuit.html"
    path.write_text(circuit_page(circuit, {SITE: "z 3.html"}), encoding="utf-8", newline="\n")
    return path


def test_hostile_strings_are_shown_and_do_nothing(browser, page, circuit):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page)
        strip = watched.text(".strip")
        assert all(string in strip for string in HOSTILE)
        watched.page.locator("input[type=range]").fill("0")
        rows, axis = watched.text(".nodes"), watched.text(".axis")
        shown = {node["position"] for node in circuit["nodes"] if node["position"]}
        assert len(shown) > 5
        for position in shown:
            string = circuit["tokens"][position][:400]
            assert string in rows and string in axis
        assert HOSTILE[0] in watched.text("footer") and HOSTILE[1] in watched.text("footer")
        assert HOSTILE[0] in watched.text("h1")
        for node in circuit["nodes"][:12]:
            if node["id"]:
                watched.go(f"#n={node['id']}")
            assert node["label"] in watched.text("aside")
        assert watched.verdict() == []


def test_the_graph_says_what_the_table_says(browser, page, circuit):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page)
        watched.page.locator("input[type=range]").fill("0")
        marks = watched.page.locator("g.node")
        assert marks.count() == len(circuit["nodes"]) == watched.page.locator(".nodes tbody tr").count()
        assert watched.page.locator("path.edge").count() == len(circuit["edges"])
        big = max(circuit["nodes"][1:], key=lambda node: abs(node["contribution"]))
        mark = watched.page.locator(f"g.node[data-node='{big['id']}']")
        assert big["name"] in mark.get_attribute("aria-label")
        mark.hover()
        assert big["name"] in watched.text("#hover") and watched.page.locator("#hover").is_visible()
        before = watched.shown
        mark.click()
        watched.settled(before)
        assert big["name"] in watched.text("aside h2") and mark.get_attribute("aria-pressed") == "true"
        assert f"#n={big['id']}" in watched.page.url
        assert watched.page.locator("tr[aria-current=true]").get_attribute("data-row") == str(big["id"])
        # later in the model is higher, and every edge leads upwards
        levels = watched.page.evaluate("""() => Object.fromEntries([...document.querySelectorAll("g.node")].map(
            (n) => [n.dataset.node, n.getBoundingClientRect().top]))""")
        kinds = {"attention", "residual", "mlp", "embedding"}
        named = {node["id"]: node for node in circuit["nodes"] if node["kind"] in kinds}
        for edge in circuit["edges"]:
            if edge["child"] in named:
                assert levels[str(edge["child"])] > levels[str(edge["parent"])]
        assert watched.verdict() == []


def test_by_keys(browser, page, circuit):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page)
        watched.page.locator("g.node[tabindex='0']").focus()
        assert watched.page.locator("g.node[tabindex='0']").count() == 1  # one stop of the tab key
        seen = []
        for key in ("ArrowDown", "ArrowUp", "ArrowDown", "ArrowRight", "Home"):
            watched.page.keyboard.press(key)
            watched.page.wait_for_timeout(30)
            seen.append(watched.page.evaluate("Number(document.activeElement.dataset.node)"))
        strongest = max((e for e in circuit["edges"] if e["parent"] == 0), key=lambda e: abs(e["contribution"]))
        assert seen[0] == strongest["child"] and seen[1] == 0 and seen[4] == 0
        assert watched.verdict() == []


def test_latents_link_to_their_dashboard_and_nothing_else_does(browser, page, circuit):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page)
        link = watched.page.locator("aside a.button")
        assert link.evaluate("(a) => a.href").endswith("/z%203.html#f=3")
        other = next(node for node in circuit["nodes"] if node["kind"] == "residual")
        watched.go(f"#n={other['id']}")
        assert link.count() == 0
        assert watched.verdict() == []


@pytest.mark.parametrize("address", ["javascript:alert(1)", " java\nscript:x", "data:text/html,x", "vbscript:x"])
def test_addresses_that_are_no_page(browser, circuit, address, tmp_path):  # noqa: F811
    with pytest.raises(saelab.ConfigError, match="no address of a page"):
        circuit_page(circuit, {SITE: address})
    page = circuit_page(circuit, {SITE: "z.html"})
    forged = {**circuit, "saes": [{**sae, "page": address} for sae in circuit["saes"]]}
    assert encoded(circuit, "z.html") in page
    path = tmp_path / "forged.html"  # made by other means than ours
    path.write_text(page.replace(encoded(circuit, "z.html"), encoded(forged, address)), encoding="utf-8")
    with Watched(browser) as watched:
        watched.open(path)
        assert watched.page.locator("g.node").count() and watched.page.locator("aside a.button").count() == 0
        assert watched.verdict() == []


def encoded(circuit, address):
    saes = [{**sae, "page": address if sae["site"] == SITE else sae.get("page")} for sae in circuit["saes"]]
    return packed({**circuit, "saes": saes})


def test_a_site_that_is_not_there(circuit):
    with pytest.raises(saelab.ConfigError, match=r"blocks\.9\.attn\.hook_z.*blocks\.1"):
        circuit_page(circuit, {"blocks.9.attn.hook_z": "x.html"})


@pytest.mark.parametrize("look", [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"forced_colors": "active"}],
                         ids=["light", "dark", "forced"])  # fmt: skip
def test_axe_finds_nothing(browser, page, look):  # noqa: F811
    with Watched(browser, **look) as watched:
        watched.open(page)
        assert watched.axe() == []
        watched.page.locator("g.node[tabindex='0']").focus()
        assert watched.axe() == []
        assert watched.verdict() == []


@pytest.mark.parametrize("width", [360, 720, 1280])
def test_the_graph_fits_its_frame_and_tokens_are_whole(browser, tmp_path, width):  # noqa: F811
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    traced = recursive_dfa.trace(attention_sae(lm, 3), lm, ids(12), 3, saes=[attention_sae(lm, 1)]).to_dict()
    traced["tokens"] = [f" representatives{i}" for i in range(12)]
    (tmp_path / "c.html").write_text(circuit_page(traced, {}), encoding="utf-8")
    cut = "(all) => all.filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1).length"
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(tmp_path / "c.html")
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.page.locator(".circuit .scroll").evaluate("(e) => e.scrollWidth - e.clientWidth") <= 1
        for chips in (".axis .chip", ".nodes .chip", ".links .chip"):
            found = watched.page.locator(chips)
            assert found.count() and found.evaluate_all(cut) == 0, chips


@pytest.mark.parametrize("width", [360, 720])
def test_nothing_runs_out_of_a_narrow_page(browser, page, width):  # noqa: F811
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(page)
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_file_that_was_cut_says_so(browser, page, tmp_path):  # noqa: F811
    text = page.read_text(encoding="utf-8")
    cut = tmp_path / "cut.html"
    cut.write_text(text[: text.rindex('id="data">') + 400], encoding="utf-8")
    with Watched(browser) as watched:
        watched.open(cut)
        assert "could not be read" in watched.text()


def test_to_html_writes_a_whole_file(tmp_path):
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    traced = recursive_dfa.trace(attention_sae(lm, 3), lm, ids(9), 3)
    traced.to_html(tmp_path / "c.html", {SITE: "https://example.org/z.html"})
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert text.endswith("</html>\n") and "default-src 'none'" in text
    with pytest.raises(saelab.ConfigError):
        traced.to_html(tmp_path / "c.html", {SITE: "javascript:1"})
    assert (tmp_path / "c.html").read_text(encoding="utf-8") == text and len(list(tmp_path.iterdir())) == 1
