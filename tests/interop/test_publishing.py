"""Publishing to a stand-in of the hub on this machine."""

import dataclasses
from collections.abc import Iterator

import huggingface_hub
import pytest
import yaml

import saelab
from saelab import SAE, CheckpointError, ConfigError, publish
from tests.interop.hub import Hub
from tests.interop.kinds import made

SITE = "blocks.0.hook_resid_post"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def report() -> saelab.Report:
    plain = {field.name: 0.5 for field in dataclasses.fields(saelab.Report)}
    counts = {"tokens": 8192, "sparsity_tokens": 200_000, "site": SITE, "split": "heldout", "selection": "plain"}
    return saelab.Report(**(plain | counts | {"delta_ce": 0.12, "delta_ce_se": 0.01}))


def test_a_folder_and_a_card_are_sent(hub, report, tmp_path):
    sae = made("TopK")
    sae.metadata |= {"model": "smollm2-135m", "corpus": "so_tu|", "trained_tokens": 500_000}
    sent = sae.push_to_hub("me/saes", report)
    assert hub.private == {"me/saes": True} and sent.url == f"{hub.url}/me/saes/commit/{'0' * 40}"
    files = hub.files["me/saes"]
    assert sent.files == {name: len(content) for name, content in sorted(files.items())}
    assert sae.path is None and "TopK(k=5, d_sae=48)" in hub.messages[0]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert SAE.load(tmp_path / SITE).metadata == sae.metadata
    card = files["README.md"].decode()
    assert card == sent.card
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "saelens", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["saelab", "sparse-autoencoder", "mechanistic-interpretability"],
    }  # fmt: skip
    assert "| 0.12 | 0.1004 to 0.1396 |" in card and "on 8,192 tokens of the heldout split" in card
    assert f'saelab.load_sae("me/saes", "{SITE}")' in card and f'SAE.from_pretrained("me/saes", "{SITE}")' in card
    assert "| corpus | so\\_tu\\| |" in card and "| tokens | 500,000 |" in card


def test_a_dry_run_asks_nobody(report):
    seen = publish(made("ReLU"), "me/saes", report, dry_run=True, license="mit")  # no hub there, and offline
    assert seen.url is None and "dry run" in repr(seen) and f"{SITE}/cfg.json" in repr(seen)
    assert seen.to_pandas().file.tolist()[0] == "README.md" and "license: mit" in seen.card
    with pytest.raises(CheckpointError, match=r"me/saes on the hub \(HF_HUB_OFFLINE is set\)"):
        publish(made("ReLU"), "me/saes")


def test_a_second_sae_leaves_the_rest_of_the_card(hub, report):
    publish(made("TopK"), "me/saes")
    files = hub.files["me/saes"]
    files["README.md"] = files["README.md"].replace(b"# saes\n", b"# saes\n\nWords of mine.\n") + b"\nThe end.\n"
    publish(made("ReLU", 1), "me/saes")
    publish(made("TopK"), "me/saes", report)
    card = files["README.md"].decode()
    assert card.count("Words of mine.") == card.count("The end.") == 1
    assert card.count("## `blocks.0.hook_resid_post`") == card.count("## `blocks.1.hook_resid_post`") == 1
    assert card.count("Not evaluated.") == 1 and card.index("explained variance") < card.index("The end.")
    assert {name.split("/")[0] for name in files} == {"README.md", SITE, "blocks.1.hook_resid_post"}


def test_a_public_repository_has_to_be_meant(hub):
    publish(made("TopK"), "me/open", private=False)
    hub.files.clear()
    with pytest.raises(ConfigError, match="me/open is public: say private=False"):
        publish(made("TopK"), "me/open")
    assert not hub.files
    publish(made("TopK"), "me/open", private=False)
    assert hub.files


def test_who_may_not_write_is_told(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(CheckpointError, match="hf auth login"):
        publish(made("TopK"), "me/saes")


def test_a_dashboard_goes_beside_it(hub, tmp_path):
    (tmp_path / "page.html").write_text("<p>one file</p>")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.js").write_text("x")
    names = publish(made("TopK"), "me/saes", dashboard=tmp_path / "page.html", folder="topk").files
    assert names["topk/dashboard/page.html"] == 15 and "topk/dashboard/data/manifest.js" not in names
    (tmp_path / "index.html").write_text("bundle")
    names = publish(made("TopK"), "me/saes", dashboard=tmp_path, dry_run=True).files
    assert {f"{SITE}/dashboard/index.html", f"{SITE}/dashboard/data/manifest.js"} < set(names)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"repo": "a/b/c"}, "no name of a repository"),
        ({"folder": "../up"}, "folder is '../up'"),
        ({"folder": "/"}, "folder is '/'"),
        ({"report": {"l0": 3}}, "report is dict"),
        ({"dashboard": "nowhere.html"}, "no page nowhere.html"),
    ],
)
def test_what_cannot_be_sent_is_named(arguments, match):
    with pytest.raises(ConfigError, match=match):
        publish(**({"sae": made("TopK"), "repo": "me/saes", "dry_run": True} | arguments))


def test_saelens_gets_no_line_for_what_it_cannot_read():
    for kind, library in (
        ("TopK transcoder", "saelab"),
        ("Gated transcoder", "saelab"),
        ("ReLU transcoder", "saelens"),
    ):
        card = publish(made(kind), "saes", dry_run=True).card
        assert yaml.safe_load(card.split("---")[1])["library_name"] == library
        assert ("from sae_lens import SAE" in card) is (library == "saelens")
