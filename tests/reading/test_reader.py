"""The reader: which rows there are, where they are, and which of them an autoencoder is for."""

import pytest
import torch

import saelab
from saelab.base.errors import ConfigError
from saelab.models.purpose import Purpose
from saelab.reading import reader as module
from saelab.reading.reader import ContextReader
from tests import toy_harvest
from tests.toy_harvest import SEPARATOR, ToyCorpus, ToyModel


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(module, "run_recording", toy_harvest.run_recording)
    return ToyModel()


def test_rows_are_the_ordinary_tokens_past_the_skipped_positions_in_order(toy):
    contexts = ToyCorpus().contexts(toy, 8)
    expected = [(c, p) for c in range(20) for p in range(2, 8) if int(contexts.ids[c, p]) != SEPARATOR]
    found = []
    for rows in ContextReader(toy, contexts, ["early", "late"], skip_positions=2, batch_size=3).rows():
        at = rows.contexts.long(), rows.positions.long()
        found += list(zip(rows.contexts.tolist(), rows.positions.tolist(), strict=True))
        assert torch.equal(rows.tokens, contexts.ids[at]) and torch.equal(rows.documents, contexts.documents[at])
        for name, width in toy_harvest.WIDTHS.items():
            assert torch.equal(rows.x[name], toy.activation(contexts.ids.long(), width)[at])
            assert not rows.x[name].is_inference() and rows.x[name].dtype == torch.float32
        assert {rows.tokens.dtype, rows.positions.dtype, rows.documents.dtype, rows.contexts.dtype} == {torch.int32}
        assert rows.gradients is None and len(rows) == len(rows.tokens)
    assert found == expected and rows.cursor == 20


def test_a_stream_from_the_middle_yields_the_same_rows(toy):
    contexts = ToyCorpus().contexts(toy, 8)
    order = torch.randperm(20)
    reader = ContextReader(toy, contexts, ["early"], batch_size=3, order=order)
    whole = list(reader.rows())
    rest = list(reader.rows(start=whole[2].cursor))
    assert [rows.cursor for rows in rest] == [12, 15, 18, 20]
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.x["early"], b.x["early"]) and torch.equal(a.contexts, b.contexts)
    assert not list(reader.rows(start=20))
    with pytest.raises(ConfigError, match="start=4 lies between two batches of 3"):
        reader.rows(start=4)


def test_coded_rows_are_those_within_the_norm_limit_past_the_skipped_positions_with_their_codes(toy):
    contexts = ToyCorpus().contexts(toy, 8)
    metadata = {"site": "late", "skip_positions": 3}
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=6, metadata=metadata, seed=0)
    sae.state.norm_limit.fill_(1.7)
    purpose = Purpose.of(sae)
    reader = ContextReader.of(purpose, toy, contexts, tokens=33, batch_size=2)
    ordinary, found, fired = 0, [], []
    for c in range(5):  # the first whole contexts with 33 tokens
        x = toy.activation(contexts.ids[c].long(), 6)
        for p in range(3, 8):
            if int(contexts.ids[c, p]) != SEPARATOR:
                ordinary += 1
                if float(x[p].norm()) <= 1.7:
                    found.append((c, p))
                    fired.append(sae.encode(x[p : p + 1])[0])
    assert 0 < len(found) < ordinary
    parts = list(reader.coded(purpose))
    rows = [pair for rows, _ in parts for pair in zip(rows.contexts.tolist(), rows.positions.tolist(), strict=True)]
    assert rows == found
    assert torch.allclose(torch.cat([codes.to_dense() for _, codes in parts]), torch.stack(fired))
    for rows, codes in parts:
        assert torch.equal(
            rows.x["late"], toy.activation(contexts.ids.long(), 6)[rows.contexts.long(), rows.positions.long()]
        )
        assert len(codes) == len(rows) and not codes.values.requires_grad and rows.gradients is None


def test_the_rows_available_are_those_that_are_read(toy):
    contexts = ToyCorpus().contexts(toy, 8)
    for gradients in (False, True):
        reader = ContextReader(toy, contexts, ["early"], skip_positions=2, gradients=gradients)
        assert reader.available() == sum(len(rows) for rows in reader.rows()) > 0
