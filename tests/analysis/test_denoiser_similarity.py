"""CKA, CKNNA and mutual nearest neighbours against sums written out, themselves, turned and unrelated representations."""

import pytest
import torch

from saelab.analysis.denoisers import similarity
from saelab.base.errors import ConfigError, DataError

A = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.cat([A[:, :3] + 0.5 * torch.randn(24, 3, dtype=torch.float64), torch.randn(24, 5, dtype=torch.float64)], 1)
MEASURES = [similarity.cka, similarity.cknna, similarity.mutual_knn]


def test_hsic_is_its_u_statistic():
    """The mean over all i, j, q, r that differ of K_ij (L_ij + L_qr - 2 L_iq)."""
    K, L = A[:6] @ A[:6].T, B[:6] @ B[:6].T
    terms = [
        K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
        for i in range(6) for j in range(6) for q in range(6) for r in range(6) if len({i, j, q, r}) == 4
    ]  # fmt: skip
    assert similarity.hsic(K, L) == pytest.approx(float(sum(terms) / len(terms)))


@pytest.mark.parametrize("measure", MEASURES)
def test_one_with_itself_and_after_a_rotation_or_scaling(measure):
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert measure(A, A) == pytest.approx(1)
    assert measure(A @ turn * 3, A) == pytest.approx(1)
    assert measure(A, B) == pytest.approx(measure(B, A), rel=0.2) and measure(A, B) < 0.95


def test_neighbours_by_brute_force():
    def near(x, i):
        x = torch.nn.functional.normalize(x, dim=1)
        return set(sorted((j for j in range(24) if j != i), key=lambda j: -float(x[i] @ x[j]))[:5])

    common = [near(A, i) & near(B, i) for i in range(24)]
    assert similarity.mutual_knn(A, B, k=5) == pytest.approx(sum(map(len, common)) / 120)

    def kept(x, sets):
        x = torch.nn.functional.normalize(x, dim=1)
        return torch.stack([torch.stack([x[i] @ x[j] * (j in sets[i]) for j in range(24)]) for i in range(24)])

    own_A, own_B = ([near(x, i) for i in range(24)] for x in (A, B))
    top = similarity.hsic(kept(A, common), kept(B, common))
    parts = [similarity.hsic(kept(x, own), kept(x, own)) for x, own in ((A, own_A), (B, own_B))]
    assert similarity.cknna(A, B, k=5) == pytest.approx(top / (parts[0] * parts[1]) ** 0.5)


def test_all_neighbours_are_cka():
    rows = [torch.nn.functional.normalize(x, dim=1) for x in (A, B)]
    assert similarity.cknna(A, B, k=23) == pytest.approx(similarity.cka(*rows))


def test_unrelated_ones_are_zero_in_the_mean():
    """The biased estimate would be far from 0 here: more dimensions than samples."""
    found = torch.tensor([similarity.cka(torch.randn(16, 40), torch.randn(16, 40)) for _ in range(200)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5
    table = similarity.alignment(torch.randn(40, 5), torch.randn(40, 2, 3), k=5, permutations=60).set_index("measure")
    assert ((table.null_low <= table.value) & (table.value <= table.null_high)).all() and (table.p > 0.02).all()
    assert table.loc["mutual_knn", "null_low"] < 5 / 39 < table.loc["mutual_knn", "null_high"]
    related = similarity.alignment(A, B, k=5, permutations=60).set_index("measure")
    assert related.loc["cka", "p"] == 1 / 61 and related.loc["cka", "null_high"] < related.loc["cka", "value"]


def test_refusals():
    with pytest.raises(DataError, match="24 and 23 samples"):
        similarity.cka(A, B[1:])
    with pytest.raises(ConfigError, match="from 2 to 23"):
        similarity.cknna(A, B, k=24)
