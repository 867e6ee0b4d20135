"""Where decoder directions are laid out: by their principal components, and so that neighbours stay together."""

import numpy as np
import pytest
import torch

from saelab.dashboards.collecting import direction_map


def groups(n: int = 3, each: int = 20, d: int = 16) -> torch.Tensor:
    """Directions around `n` orthogonal ones, of different lengths."""
    noise = torch.randn(n * each, d, generator=torch.Generator().manual_seed(0))
    return (torch.eye(d)[:n].repeat_interleave(each, 0) + 0.05 * noise) * torch.linspace(0.5, 2, n * each)[:, None]


def test_the_principal_plane_is_that_of_a_decomposition():
    unit = torch.nn.functional.normalize(groups().double(), dim=1)
    left, sizes, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    wanted = (left * sizes)[:, :2].numpy()
    found = direction_map.principal_plane(groups())
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-8)


def test_neighbours_stay_together():
    pytest.importorskip("sklearn")
    plane = direction_map.planes(groups())["neighbours"]
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (apart.argmin(1) // 20 == np.arange(60) // 20).all()
    assert np.abs(plane).max() == 1
    np.testing.assert_array_equal(plane, direction_map.planes(groups())["neighbours"])  # the same bits


def test_few_directions_have_a_principal_plane_only():
    assert list(direction_map.planes(groups(1, 4))) == ["pca"]
    assert direction_map.principal_plane(groups(1, 1)).shape == (1, 2)
