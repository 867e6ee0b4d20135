"""What edits do, measured and shown: hand-computed figures, the table, pages in a browser, latents of h, the command line."""

import pytest
import torch

import saelab
from saelab import cli, hspace
from saelab.base.errors import ConfigError, DataError
from saelab.hspace.dictionaries import activation_maps, latent_codes
from saelab.hspace.effect_measures import Judged, changes, judge
from saelab.hspace.pictures import picture
from tests.browser import Watched, browser  # noqa: F401
from tests.toy_hspace import unet

HOSTILE = '<img src=x onerror="window.__pwned=1">&"'


def classifier(x):
    """Three classes by brightness in thirds of the rows."""
    return 4 * torch.stack([x[:, :, :3].mean((1, 2, 3)), x[:, :, 3:5].mean((1, 2, 3)), x[:, :, 5:].mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def denoiser():
    return saelab.load_denoiser(unet())


@pytest.fixture(scope="module")
def trajectory(denoiser):
    return hspace.sample(denoiser, n=12, steps=4, eta=1.0, seed=0, progress=False)


@pytest.fixture(scope="module")
def found(denoiser, trajectory):
    return hspace.effects(
        denoiser, trajectory, hspace.pca(trajectory, 2), [-1.0, 0.0, 1.0], classifier=classifier, classes=["a", HOSTILE, "c"],
        targets={"pca 0": 1}, draws=2, data=torch.randn(5, 1, 8, 8), kept=3, progress=False,
    )  # fmt: skip


def test_figures_by_hand():
    before = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).view(2, 1, 1, 2)
    after = torch.tensor([[0.0, 0.0], [2.0, 2.0]]).view(2, 1, 1, 2)
    was = Judged(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), before.flatten(1))
    now = Judged(torch.tensor([[0.5, 0.5], [0.75, 0.25]]), after.flatten(1))
    row = changes(before, after, was, now, data=torch.tensor([[0.0, 1.0]]))
    assert row["flip_rate"] == 0.5 and row["confidence"] == 0.625
    assert row["change_0"] == pytest.approx(0.125) and row["p_1"] == pytest.approx(0.375)
    assert row["rms"] == pytest.approx(2**0.5 / 2)  # 0 and sqrt(4 / 2)
    assert row["identity"] == pytest.approx((0 + 2) / 2 / 2)  # the two samples are 2 apart
    assert row["nearest"] == pytest.approx((1 + 5**0.5) / (1 + 5**0.5))


def test_effects_are_those_of_the_edit(denoiser, trajectory, found):
    table = found.to_pandas()
    assert len(table) == 2 * (2 * (1 + 2 * 2) + 1)
    row = table[(table.direction == "pca 0") & (table.kind == "edit") & (table.strength == 1.0)].iloc[0]
    direction = hspace.pca(trajectory, 2)[0]
    after = hspace.edit(denoiser, trajectory, direction, 1.0).samples
    p = judge(classifier, after).probabilities.mean(0) - judge(classifier, trajectory.samples).probabilities.mean(0)
    assert [row[f"change_{k}"] for k in range(3)] == pytest.approx(p.tolist(), abs=1e-6)
    assert row.change_target == row.change_1 and row.p_target == row.p_1
    assert row.off_target == pytest.approx((abs(p[0]) + abs(p[2])).item() / 2, abs=1e-6)
    assert row.off_target_signed == pytest.approx((p[0] + p[2]).item() / 2, abs=1e-6)
    strengths, images = found.images["pca 0"]
    assert (
        strengths == [-1.0, 0.0, 1.0]
        and torch.equal(images[2], after[:3])
        and torch.equal(images[1], trajectory.samples[:3])
    )


def test_nothing_changes_at_strength_0(found):
    zero = found.table[found.table.strength == 0]
    assert (zero[["rms", "flip_rate", "identity", "off_target"]] == 0).all(axis=None) and (zero.kind == "edit").all()


def test_matrix_and_ratios(found):
    matrix = found.matrix(1.0)
    assert list(matrix.columns) == ["a", HOSTILE, "c"] and list(matrix.index) == ["pca 0", "pca 1"]
    assert matrix.sum(axis=1).abs().max() < 1e-6  # probabilities move, their sum does not
    ratios = found.against_random("rms").set_index(["direction", "strength"])
    row = ratios.loc[("pca 1", 1.0)]
    assert row.ratio_isotropic == pytest.approx(row.edit / row.isotropic)
    with pytest.raises(ConfigError, match="strength 7 was not measured"):
        found.matrix(7.0)


def test_monotonicity_is_spearmans(denoiser, trajectory):
    labels = torch.arange(12) % 2
    direction = hspace.mean_difference(trajectory, labels, positive=1)
    table = hspace.effects(denoiser, trajectory, direction, [0.0, 0.5, 1.0], classifier=classifier, controls=())
    row = table.monotonicity().iloc[0]
    p = table.table.sort_values("strength").p_target
    assert row.target == "1" and row.p_least == p.iloc[0] and row.p_greatest == p.iloc[-1]
    assert row.spearman == pytest.approx(p.corr(table.table.strength, method="spearman"))


def test_effects_errors(denoiser, trajectory):
    one = hspace.pca(trajectory, 1)
    with pytest.raises(ConfigError, match="same name"):
        hspace.effects(denoiser, trajectory, [one[0], one[0]], [1.0], classifier=classifier)
    with pytest.raises(ConfigError, match="2 names of classes and 3 logits"):
        hspace.effects(denoiser, trajectory, one, [1.0], classifier=classifier, classes=["a", "b"])
    with pytest.raises(ConfigError, match="classifier"):
        hspace.effects(denoiser, trajectory, one, [1.0])


def test_plotly_figures(found):
    figure = found.plot()
    assert [trace.name for trace in figure.data][:3] == ["pca 0", "pca 0, isotropic", "pca 0, covariance"]
    assert list(figure.data[0].x) == [-1.0, 0.0, 1.0] and list(figure.data[1].x) == [-1.0, 0.0, 1.0]
    sheet = found.gallery("pca 1").data[0].z
    assert sheet.shape == (3 * 9 - 1, 3 * 9 - 1)
    strengths, images = found.images["pca 1"]
    expected = images[2, 1, 0].clamp(-1, 1)  # second row, third column
    torch.testing.assert_close(torch.tensor(sheet[9:17, 18:26]), expected)
    with pytest.raises(ConfigError, match="no direction 'other'"):
        found.gallery("other")


# latents of h


@pytest.fixture(scope="module")
def sae(trajectory):
    sizes = {"tokens": 2_000, "batch_size": 64, "progress": False}
    return hspace.train_latents(trajectory, saelab.TopK(k=3, d_sae=32), **sizes).sae


def test_rows_have_unit_size_at_every_step(trajectory):
    rows, scales = hspace.latent_rows(trajectory)
    each = rows.view(12, 4, 16, 16)  # samples, steps, places, channels
    torch.testing.assert_close(each.square().mean((0, 2, 3)), torch.ones(4))
    place = each[5, 2, 4 * 1 + 3]
    torch.testing.assert_close(place * scales[2], trajectory.h[5, 2, :, 1, 3])


def test_maps_are_the_codes_of_each_place(trajectory, sae):
    codes = latent_codes(sae, trajectory)
    rows, _ = hspace.latent_rows(trajectory)
    dense = sae.encode(rows).view(12, 4, 4, 4, 32)
    latent = int(dense.sum((0, 1, 2, 3)).argmax())
    torch.testing.assert_close(activation_maps(codes, [latent], [12, 4, 4, 4])[0], dense[..., latent])


def test_latent_directions_write_the_decoder_row_at_every_place(trajectory, sae):
    latent = int(sae.latent_stats.max.argmax())
    direction = hspace.latent_directions(sae, [latent])[0]
    delta = direction.delta(trajectory.timesteps)
    expected = sae.W_dec[latent] * sae.latent_stats.max[latent] * hspace.latent_rows(trajectory)[1][2]
    torch.testing.assert_close(delta[2, :, 3, 0], expected.detach())
    torch.testing.assert_close(direction.vector.flatten(1).norm(dim=1), torch.ones(4))


def test_a_saved_sae_knows_its_denoiser(trajectory, sae, tmp_path):
    sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    torch.testing.assert_close(hspace.latent_directions(again, [1]).vectors, hspace.latent_directions(sae, [1]).vectors)


def test_latents_of_something_else_are_refused(denoiser, trajectory, sae):
    with pytest.raises(ConfigError, match="train_latents"):
        hspace.latent_directions(saelab.SAE(saelab.TopK(k=2, d_sae=8), d_in=16), [0])
    with pytest.raises(ConfigError, match="no latent 32"):
        hspace.latent_directions(sae, [32])
    with pytest.raises(ConfigError, match="not trained on timesteps"):
        latent_codes(sae, hspace.sample(denoiser, 1, steps=3))
    other = saelab.load_denoiser(unet(block_out_channels=(16, 16)))
    with pytest.raises(ConfigError, match="another denoiser"):
        latent_codes(sae, hspace.sample(other, 1, steps=4))
    with pytest.raises(DataError, match="predicted x0"):
        hspace.show_latents(sae, hspace.sample(denoiser, 1, steps=4, record=("h",)), "page.html")


# pages


def test_the_page_of_directions(browser, found, tmp_path):  # noqa: F811
    found.to_html(tmp_path / "page.html", title=HOSTILE)
    with Watched(browser) as watched:
        watched.open(tmp_path / "page.html")
        page = watched.page
        assert page.locator("h1").text_content() == HOSTILE == page.title()
        assert page.locator("[data-name]").count() == 2
        first = page.locator("[data-name]").first
        assert first.locator("table.pictures img").count() == 3 * 3
        large = first.locator("img.large")
        for at, strength in ((2, "1"), (0, "−1"), (1, "0")):
            first.locator("input[type=range]").fill(str(at))
            assert first.locator("output").text_content() == strength
            sources = large.evaluate_all("(all) => all.map((image) => image.src)")
            cells = first.locator(f"td[data-at='{at}'] img").evaluate_all("(all) => all.map((image) => image.src)")
            kind, control = found.control_images["pca 0"]
            beside = control[-1.0 if not at else 1.0] if at != 1 else found.images["pca 0"][1][1]
            assert kind == "covariance" and "random, covariance-matched direction" in first.text_content()
            wanted = ["data:image/png;base64," + picture(image) for image in beside]
            assert sources == cells + wanted and (cells == wanted) == (at == 1)
        assert watched.verdict() == []


def test_without_controls_a_direction_stands_alone(browser, denoiser, trajectory, tmp_path):  # noqa: F811
    found = hspace.effects(denoiser, trajectory, hspace.pca(trajectory, 1), [1.0], classifier=classifier, controls=(),
                           progress=False)  # fmt: skip
    found.to_html(tmp_path / "page.html")
    with Watched(browser) as watched:
        watched.open(tmp_path / "page.html")
        assert watched.page.locator(".strip-of-pictures").count() == 1 and found.control_images == {}
        assert watched.verdict() == []


def test_the_page_of_latents(browser, trajectory, sae, tmp_path):  # noqa: F811
    hspace.show_latents(sae, trajectory, tmp_path / "page.html", 5, classifier=classifier, classes=["a", HOSTILE, "c"],
                        examples=3, title=HOSTILE)  # fmt: skip
    codes = latent_codes(sae, trajectory)
    with Watched(browser) as watched:
        watched.open(tmp_path / "page.html")
        page = watched.page
        assert page.locator("[data-name]").count() == 5
        link = page.locator("table a").first
        latent = int(link.text_content())
        assert int(codes.indices.bincount().argmax()) == latent  # the most frequent first
        section = page.locator(f"#latent-{latent}")
        maps = activation_maps(codes, [latent], [12, 4, 4, 4])[0]
        bars = section.locator("path.bars").get_attribute("d")
        assert bars.count("M") == int((maps.mean((0, 2, 3)) > 0).sum())  # one a step
        best = int(maps.amax((1, 2, 3)).argmax())
        t = int(trajectory.timesteps[int(maps[best].amax((1, 2)).argmax())])
        assert f"sample {best} at t = {t}" in section.locator("figure img").first.get_attribute("alt")
        assert watched.verdict() == []


# the command line


def test_the_command_line(tmp_path, monkeypatch, capsys, denoiser):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(denoiser), "classifier", lambda self: classifier)
    unet().save_pretrained("unet")
    common = ["--denoiser", "unet"]
    assert cli.main(["hspace", "sample", *common, "--n", "12", "--steps", "3", "--out", "t.safetensors"]) == 0
    assert (
        cli.main(["hspace", "directions", "t.safetensors", *common, "--components", "2", "--out", "d.safetensors"]) == 0
    )
    assert "pca 1" in capsys.readouterr().out
    edit = [
        "edit",
        "t.safetensors",
        *common,
        "--directions",
        "d.safetensors",
        "--strength",
        "1",
        "--out",
        "e.safetensors",
    ]
    assert cli.main(["hspace", *edit]) == 0
    before, after = hspace.Trajectory.load("t.safetensors"), hspace.Trajectory.load("e.safetensors")
    direct = hspace.edit(saelab.load_denoiser("unet"), before, hspace.Directions.load("d.safetensors")[0], 1.0)
    assert torch.equal(after.samples, direct.samples)
    report = [
        "report",
        "t.safetensors",
        *common,
        "--directions",
        "d.safetensors",
        "--strength",
        "0",
        "1",
        "--out",
        "r.html",
    ]
    assert cli.main(["hspace", *report]) == 0
    assert 'data-page="hspace-directions"' in (tmp_path / "r.html").read_text()
    for method in ("joint-pca", "jacobian"):
        made = [
            "directions",
            "t.safetensors",
            *common,
            "--method",
            method,
            "--components",
            "1",
            "--out",
            f"{method}.st",
        ]
        assert cli.main(["hspace", *made]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["smaple"], "did you mean sample?"),
        (["edit"], "needs TRAJECTORY, --directions"),
        (["directions", "t.safetensors", "--method", "pac"], "did you mean pca?"),
        (["directions", "t.safetensors", "--method", "mean-difference"], "needs --positive"),
        (["edit", "t.safetensors"], "needs --directions"),
    ],
)
def test_command_line_errors(arguments, message, tmp_path, monkeypatch, capsys, trajectory):
    monkeypatch.chdir(tmp_path)
    unet().save_pretrained("unet")
    trajectory.save("t.safetensors")
    assert cli.main(["hspace", *arguments, "--denoiser", "unet"]) == 2
    assert message in capsys.readouterr().err
