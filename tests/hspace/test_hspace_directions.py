"""Directions on planted trajectories where the answer is known: PCA, class means, boundaries, projection, files."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.base.errors import ConfigError, DataError, FormatError
from saelab.hspace.directions import Direction, Directions, nearest
from saelab.hspace.effect_measures import random_direction
from saelab.hspace.principal import pca
from saelab.hspace.supervised import boundary, mean_difference, shift
from tests.toy_hspace import SHAPE, TIMESTEPS, orthonormal, planted


def flat(directions) -> torch.Tensor:
    return directions.vectors.flatten(2)  # [K, S, D]


def wandering(n: int = 400, seed: int = 0):
    """Two components whose variances cross on the way, so that their order by variance swaps at the last step."""
    generator = torch.Generator().manual_seed(seed)
    e = orthonormal(2)
    codes = torch.randn(n, 2, generator=generator)
    codes = codes - codes.mean(0)
    codes = (
        codes @ torch.linalg.inv(torch.linalg.cholesky(codes.T @ codes / (n - 1))).T
    )  # exactly uncorrelated, of variance 1
    sizes = torch.tensor([[4.0, 2.0], [3.0, 2.5], [1.0, 3.0]])  # [S, 2]
    return planted(torch.einsum("nk,sk,kchw->nschw", codes, sizes, e) + 5.0), e, sizes


def test_pca_follows_a_component_through_a_crossing():
    trajectory, e, sizes = wandering()
    found = pca(trajectory, 2)
    for k in range(2):
        cosines = (flat(found)[k] @ e[k].flatten()).abs()
        assert cosines.min() > 1 - 1e-5
        torch.testing.assert_close(found.scales[k], sizes[:, k], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.explained.sum(0), torch.ones(3))
    assert found.details["alignment"].min() > 1 - 1e-5  # the signs agree from step to step too


def test_pca_unaligned_is_ordered_by_variance_with_signs_of_the_first_step():
    trajectory, _, sizes = wandering()
    found = pca(trajectory, 2, align=False)
    torch.testing.assert_close(found.scales.T, sizes.sort(dim=1, descending=True).values, rtol=1e-4, atol=0)
    assert ((flat(found)[:, 1:] * flat(found)[:, :1]).sum(2) > -1e-5).all()
    assert abs(float(found.details["alignment"][0, 2])) < 1e-4  # where they cross


def test_pca_equals_the_dense_decomposition():
    h = torch.randn(30, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = pca(planted(h), 4, align=False)
    for s in range(3):
        X = (h[:, s].flatten(1) - h[:, s].flatten(1).mean(0)).double()
        _, S, V = torch.linalg.svd(X, full_matrices=False)
        torch.testing.assert_close(found.scales[:, s].double(), S[:4] / 29**0.5, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            (flat(found)[:, s].double() * V[:4]).sum(1).abs(), torch.ones(4).double(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(found.explained[:, s].double(), (S**2 / (S**2).sum())[:4], rtol=1e-5, atol=0)


def test_joint_pca_is_one_component_over_all_steps():
    trajectory, e, sizes = wandering()
    found = pca(trajectory, 1, joint=True)
    # the first component has sizes 4, 3, 1 over the steps and the second 2, 2.5, 3: together sqrt(26) against sqrt(19.25)
    torch.testing.assert_close(found.scales[0], sizes[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.explained, torch.tensor([[26 / 45.25]]))
    assert (flat(found)[0] @ e[0].flatten()).abs().min() > 1 - 1e-5


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(1, 12), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_pca_of_samples_that_stream_is_that_of_all_at_once(parts, seed):
    n = sum(parts)
    h = torch.randn(n, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    whole = planted(h, TIMESTEPS[:2])
    k = min(3, n - 1)  # 4 k components carried are all 12: exact
    cut = [whole[end - size : end] for size, end in zip(parts, torch.tensor(parts).cumsum(0).tolist(), strict=True)]
    one, streamed = pca(whole, k, joint=False), pca(iter(cut), k)
    torch.testing.assert_close(streamed.scales, one.scales, rtol=1e-3, atol=1e-4)


def test_pca_of_many_samples_that_stream_is_close():
    trajectory, e, _ = wandering(600)
    noisy = planted(trajectory.h + 0.5 * torch.randn(trajectory.h.shape, generator=torch.Generator().manual_seed(3)))
    streamed = pca((noisy[i : i + 50] for i in range(0, 600, 50)), 1)
    assert (flat(streamed)[0] * flat(pca(noisy, 1))[0]).sum(1).min() > 0.999


def test_pca_errors():
    h = torch.randn(5, 3, *SHAPE)
    with pytest.raises(ConfigError, match="5 components of 5 samples.*there are 4"):
        pca(planted(h), 5)
    with pytest.raises(DataError, match="no h"):
        pca(dataclasses.replace(planted(h), h=None), 1)
    with pytest.raises(DataError, match="not finite"):
        pca(planted(h.clone().fill_(float("nan"))), 1)
    with pytest.raises(DataError, match="other timesteps"):
        pca([planted(h), planted(h, TIMESTEPS - 1)], 1)
    with pytest.raises(DataError, match="different denoisers"):
        pca([planted(h), planted(h, denoiser="other")], 1)
    with pytest.raises(DataError, match="empty"):
        pca([], 1)


def classes(n: int = 60, seed: int = 0):
    """Three classes along two directions, noise in the rest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.stack([torch.zeros(SHAPE), *orthonormal(2)]) * torch.tensor([0.0, 3.0, 1.0]).view(3, 1, 1, 1)
    noise = 0.01 * torch.randn(n, 3, *SHAPE, generator=generator)
    return (
        planted(centres[labels][:, None] * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1, 1) + noise),
        labels,
        centres,
    )


def test_mean_difference_is_that_of_the_class_means():
    trajectory, labels, centres = classes()
    found = mean_difference(trajectory, labels, positive=1)
    expected = centres[1] - (centres[0] + centres[2]) / 2
    torch.testing.assert_close(found[0].scale, expected.norm() * torch.tensor([1.0, 2.0, 4.0]), rtol=2e-2, atol=0)
    assert (flat(found)[0] @ expected.flatten() / expected.norm()).min() > 0.999
    against = mean_difference(trajectory, labels, positive=1, negative=2)
    other = (centres[1] - centres[2]).flatten()
    assert (flat(against)[0] @ other / other.norm()).min() > 0.999
    assert against[0].name == "towards 1 from 2" and int(against.details["negatives"]) == 20


def test_negatives_weigh_by_class_not_by_number():
    trajectory, labels, centres = classes(90)
    rare = torch.cat([torch.arange(90)[labels != 2], torch.arange(90)[labels == 2][:5]])
    h = trajectory.h[rare]
    found = mean_difference(planted(h), labels[rare], positive=1)
    expected = (centres[1] - (centres[0] + centres[2]) / 2).flatten()
    assert (flat(found)[0] @ expected / expected.norm()).min() > 0.999


def test_extremes_contrast_the_highest_with_the_lowest_scores():
    trajectory, labels, _ = classes()
    scores = torch.nn.functional.one_hot(labels, 3).double() + 0.01 * torch.rand(60, 3, dtype=torch.float64)
    found = mean_difference(trajectory, scores, positive=1, extremes=5)
    best = scores[:, 1].argsort(descending=True)
    expected = trajectory.h[best[:5]].mean(0) - trajectory.h[best[-5:]].mean(0)
    torch.testing.assert_close(found[0].delta(TIMESTEPS), expected)


def test_mean_difference_errors():
    trajectory, labels, _ = classes()
    with pytest.raises(DataError, match="no samples.*{0: 20, 1: 20, 2: 20}"):
        mean_difference(trajectory, labels, positive=7)
    with pytest.raises(DataError, match="3 labels for 60"):
        mean_difference(trajectory, labels[:3], positive=1)
    with pytest.raises(ConfigError, match="against itself"):
        mean_difference(trajectory, labels, positive=1, negative=1)
    with pytest.raises(ConfigError, match="class numbers"):
        mean_difference(trajectory, labels.float(), positive=1)
    with pytest.raises(ConfigError, match="extremes=40 of 60"):
        mean_difference(trajectory, torch.rand(60, 3), positive=1, extremes=40)


@pytest.fixture(scope="module")
def separable():
    """Two classes told apart along one direction at the second step alone."""
    generator = torch.Generator().manual_seed(0)
    labels, e = torch.arange(200) % 2, orthonormal(1)[0]
    h = torch.randn(200, 3, *SHAPE, generator=generator)
    h[:, 1] += 5 * (labels * 2 - 1)[:, None, None, None] * e
    x = torch.randn(200, 4, 1, 4, 4, generator=generator)
    return planted(h, x=x), labels, e


@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_boundary_finds_the_mixing_step_and_the_normal(separable, kind):
    trajectory, labels, e = separable
    found = boundary(trajectory, labels, kind=kind)
    assert found.timesteps.tolist() == [500]
    assert float(flat(found)[0, 0] @ e.flatten()) > 0.9
    assert float(found.details["accuracy"]) > 0.97 and float(found.details["accuracy_x"]) < 0.7
    accuracies = found.details["accuracies"][0]
    assert int(accuracies.argmax()) == 1 and accuracies[[0, 2]].max() < 0.7


def test_a_step_that_is_given_is_not_searched(separable):
    trajectory, labels, _ = separable
    found = boundary(trajectory, labels, step=-1)
    assert found.timesteps.tolist() == [200] and "accuracies" not in found.details


def test_a_step_that_is_found_is_as_if_it_were_given(separable):
    trajectory, labels, _ = separable
    found, given = boundary(trajectory, labels), boundary(trajectory, labels, step=1)
    assert torch.equal(found.vectors, given.vectors)
    assert found.details["accuracy"] == given.details["accuracy"]


@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_random_labels_are_told_apart_by_chance_whatever_the_search(kind):
    """What chooses the step is not what is reported: of twenty useless steps the best looks good to whoever chose it."""
    accuracies, best = [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(60, 20, *SHAPE, generator=generator)
        labels = torch.arange(60)[torch.randperm(60, generator=generator)] % 2
        found = boundary(planted(h, torch.arange(20).flip(0)), labels, kind=kind, seed=seed)
        accuracies.append(float(found.details["accuracy"]))
        best.append(float(found.details["accuracies"].max()))
    mean = sum(accuracies) / 30  # its standard error is .021: 18 samples held out, 30 seeds
    assert abs(mean - 0.5) < 0.065 and sum(best) / 30 > 0.65


def test_four_samples_of_a_class_are_enough_to_search(separable):
    trajectory, labels, _ = separable
    few = planted(trajectory.h[:8], x=trajectory.x[:8])
    assert boundary(few, labels[:8]).details["accuracies"].shape == (1, 3)


def test_a_reference_rules_out_steps_off_the_shell(separable):
    trajectory, labels, _ = separable
    x = trajectory.x.clone()
    x[:, 1] *= 1.5  # inverted latents that are too long at the best step
    inverted = planted(trajectory.h, x=x)
    found = boundary(inverted, labels, reference=trajectory)
    assert found.timesteps.tolist() != [500]
    torch.testing.assert_close(found.details["norm_ratio"], torch.tensor([[1.0, 1.5, 1.0]]))
    with pytest.raises(DataError, match="50.0% off"):
        boundary(planted(trajectory.h, x=1.5 * trajectory.x), labels, reference=trajectory)


def test_shift_brings_every_sample_to_the_distance(separable):
    trajectory, labels, _ = separable
    direction = boundary(trajectory, labels, step=1)[0]
    strength = shift(direction, trajectory, 2.5)
    moved = trajectory.h[:, 1] + strength[:, None, None, None] * direction.delta(direction.timesteps)[0]
    distances = moved.flatten(1) @ direction.vector.flatten() + direction.details["intercept"].float()
    torch.testing.assert_close(distances, torch.full((200,), 2.5), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="3 timesteps"):
        shift(pca(trajectory, 1)[0], trajectory, 1.0)
    with pytest.raises(ConfigError, match="no timestep 500"):
        shift(direction, planted(trajectory.h, TIMESTEPS + 3), 1.0)


def test_boundary_errors(separable):
    trajectory, labels, _ = separable
    with pytest.raises(DataError, match="two classes"):
        boundary(trajectory, torch.arange(200) % 3)
    with pytest.raises(ConfigError, match="no boundary 'tree'"):
        boundary(trajectory, labels, kind="tree")
    with pytest.raises(ConfigError, match="no step 3"):
        boundary(trajectory, labels, step=3)


# projection


def test_project_out_is_orthogonal_and_equals_the_formula():
    h = torch.randn(40, 3, *SHAPE, generator=torch.Generator().manual_seed(2))
    made = pca(planted(h), 4, align=False)
    tilted = mean_difference(planted(h), torch.arange(40) % 4, 0)
    left = tilted.project_out(made)
    v = left[0].delta(TIMESTEPS).flatten().double()
    V = torch.stack([other.delta(TIMESTEPS).flatten() for other in made], dim=1).double()
    assert ((V.T @ v) / V.norm(dim=0) / v.norm()).abs().max() < 1e-5
    v0 = tilted[0].delta(TIMESTEPS).flatten().double()
    torch.testing.assert_close(v, v0 - V @ torch.linalg.solve(V.T @ V, V.T @ v0), rtol=1e-4, atol=1e-6)


def test_projectors_do_not_depend_on_order_or_repetition():
    h = torch.randn(40, 3, *SHAPE)
    a, b, v = (mean_difference(planted(h), torch.arange(40) % 5, k)[0] for k in range(3))
    one = mean_difference(planted(h), torch.arange(40) % 5, 2).project_out([a, b])
    other = mean_difference(planted(h), torch.arange(40) % 5, 2).project_out([b, a, a])
    torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-4, atol=1e-5)
    assert one[0].name == "towards 2 without towards 0, towards 1"


def test_a_single_vector_is_spread_over_the_steps_of_the_others():
    single = Directions(orthonormal(1)[:, None], torch.ones(1, 1), None, "mid_block", "planted", "by hand")
    over = pca(planted(torch.randn(40, 3, *SHAPE)), 2)
    left = single.project_out(over)
    assert left.timesteps.tolist() == TIMESTEPS.tolist() and left.vectors.shape == (1, 3, *SHAPE)
    inner = (left[0].delta(TIMESTEPS) * over[0].delta(TIMESTEPS)).sum()
    assert abs(float(inner)) < 1e-5 * float(over.scales[0].norm())


def test_nothing_left_is_an_error():
    made = pca(planted(torch.randn(20, 3, *SHAPE)), 2)
    with pytest.raises(ConfigError, match="'pca 0' lies in the span"):
        made[:1].project_out(made)


# matching of steps, files, errors


def test_other_step_counts_match_by_nearest_timestep():
    h = torch.randn(20, 3, *SHAPE)
    one = pca(planted(h), 1)[0]
    asked = torch.tensor([999, 650, 640, 351, 0])
    assert nearest(TIMESTEPS, asked).tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(one.delta(asked), one.delta(TIMESTEPS)[[0, 0, 1, 1, 2]])


def test_saved_directions_come_back(tmp_path):
    made = pca(planted(torch.randn(20, 3, *SHAPE)), 2)
    made.save(tmp_path / "pca.safetensors")
    again = Directions.load(tmp_path / "pca.safetensors")
    for name in ("vectors", "scales", "timesteps", "explained"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    assert (again.names, again.site, again.denoiser, again.method) == (made.names, "mid_block", "planted", "pca")
    assert torch.equal(again.details["alignment"], made.details["alignment"])
    single = Directions(orthonormal(1)[:, None], torch.ones(1, 1), None, "mid_block", "planted", "by hand")
    single.save(tmp_path / "one.safetensors")
    assert Directions.load(tmp_path / "one.safetensors").timesteps is None


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    for name in ("other", "cut", "missing"):
        with pytest.raises(FormatError, match=name):
            Directions.load(tmp_path / f"{name}.safetensors")


def test_directions_of_another_denoiser_or_shape_are_refused():
    made = pca(planted(torch.randn(20, 3, *SHAPE)), 1)
    made.check("planted", SHAPE)
    with pytest.raises(ConfigError, match="another denoiser"):
        made.check("other", SHAPE)
    with pytest.raises(ConfigError, match=r"\[3, 2, 2\].*\[3, 4, 4\]"):
        made[0].check("planted", (3, 4, 4))
    with pytest.raises(ConfigError, match="another denoiser"):
        made.project_out(pca(planted(torch.randn(20, 3, *SHAPE), denoiser="other"), 1))


def test_directions_are_a_sequence():
    made = pca(planted(torch.randn(20, 3, *SHAPE)), 3)
    assert [one.name for one in made] == ["pca 0", "pca 1", "pca 2"] and made[-1].name == "pca 2"
    assert made[1:].names == ("pca 1", "pca 2") and torch.equal(made[1:].explained, made.explained[1:])
    with pytest.raises(IndexError):
        made[3]
    table = made.to_pandas()
    assert list(table.columns) == ["name", "scale", "explained", "alignment"] and len(table) == 3


# controls


@pytest.mark.parametrize("kind", ["isotropic", "covariance"])
def test_random_directions_are_as_long_and_unlike(kind):
    trajectory, e, _ = wandering()
    like = pca(trajectory, 1)[0]
    drawn = random_direction(like, trajectory, kind, seed=4)
    torch.testing.assert_close(drawn.delta(TIMESTEPS).flatten(1).norm(dim=1), like.scale)
    assert not torch.allclose(drawn.vector, random_direction(like, trajectory, kind, seed=5).vector)
    outside = drawn.vector.flatten(1) @ (torch.eye(12) - e.flatten(1).T @ e.flatten(1))
    assert (outside.norm(dim=1) < 1e-3).all() == (kind == "covariance")  # h varies in the plane of e alone


def test_random_directions_need_their_trajectory():
    like = Direction(orthonormal(1), torch.ones(1), None, "mid_block", "planted")
    with pytest.raises(ConfigError, match="needs the trajectory"):
        random_direction(like, None, "covariance")
    with pytest.raises(ConfigError, match="no control 'other'"):
        random_direction(like, None, "other")
