import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import ConfigError, SparseCodes
from saelab.base import codes as codes_module


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_dense_and_back(n, f, seed):
    matrix = torch.randn(n, f, generator=torch.Generator().manual_seed(seed)).relu()
    codes = SparseCodes.from_dense(matrix)
    assert torch.equal(codes.to_dense(), matrix)
    assert codes.l0 == pytest.approx(float((matrix > 0).sum()) / n)
    order, offsets = codes.by_latent()
    for latent in range(f):
        entries = order[offsets[latent] : offsets[latent + 1]]
        assert codes.rows()[entries].tolist() == (matrix[:, latent] > 0).nonzero().squeeze(1).tolist()


def test_from_rows_drops_what_is_not_positive():
    codes = SparseCodes.from_rows(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([[0, 3], [1, 2]]), 4)
    assert codes.values.tolist() == [1.0, 2.0]
    assert codes.indices.tolist() == [0, 2]
    assert codes.offsets.tolist() == [0, 1, 2]
    assert codes.row(1)[1].tolist() == [2]


def test_dense_codes_that_would_not_fit_are_refused_with_their_size(monkeypatch):
    monkeypatch.setattr(codes_module, "DENSE_LIMIT", 100)
    with pytest.raises(ConfigError, match="160 bytes"):
        SparseCodes.from_dense(torch.ones(4, 10)).to_dense()


def test_empty_batch():
    codes = SparseCodes.from_rows(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), 5)
    assert len(codes) == 0
    assert codes.to_dense().shape == (0, 5)


def test_rows_without_room_for_an_entry_are_empty_tokens():
    codes = SparseCodes.from_rows(torch.empty(3, 0), torch.empty(3, 0, dtype=torch.int64), 5)
    assert len(codes) == 3 and codes.offsets.tolist() == [0, 0, 0, 0] and codes.to_dense().shape == (3, 5)
