"""Prompts and experiments of indirect object identification."""

import dataclasses

import pytest
import torch

import saelab
from saelab.analysis.attention import ioi
from tests import toy_attention


@pytest.fixture(scope="module")
def lm():
    return toy_attention.reader()


@pytest.fixture(scope="module")
def prompts(lm):
    return ioi.prompts(lm, n=20, seed=0)


@pytest.fixture(scope="module")
def sae():
    """A random SAE of block 0's attention output before its projection."""
    sae = saelab.SAE(saelab.TopK(k=4, d_sae=32), 24, metadata={"site": "blocks.0.attn.hook_z"}, seed=1)
    with torch.no_grad():
        sae.decoder_bias.normal_(std=0.01)
    return sae


def words(lm, prompts, row):
    return [lm.token_text(int(i)) for i in prompts.tokens.ids[row][: int(prompts.end[row]) + 1]]


def test_each_prompt_has_two_names_and_one_of_them_again(lm, prompts):
    for row in range(len(prompts)):
        ids = prompts.tokens.ids[row]
        indirect, subject = int(prompts.indirect[row]), int(prompts.subject[row])
        assert indirect != subject
        assert (ids == subject).nonzero().flatten().tolist() == [int(prompts.s1[row]), int(prompts.s2[row])]
        (first,) = (ids == indirect).nonzero().flatten().tolist()
        assert (first < prompts.s1[row]) == bool(prompts.abba[row])
        assert int(prompts.tokens.mask[row].sum()) == int(prompts.end[row]) + 1
        assert words(lm, prompts, row)[-1] == "to"
    assert prompts.abba.sum() == len(prompts) // 2


def test_pieces_are_the_text(lm, prompts):
    for row, text in enumerate(prompts.texts):
        expected = lm.tokenize(text).ids[0]
        assert torch.equal(prompts.tokens.ids[row][: len(expected)], expected)


def test_alongside_changes_one_word(lm, prompts):
    other = prompts.alongside(lm)
    assert [
        a == b or (a, b) == ("and", "alongside")
        for a, b in zip(words(lm, prompts, 0), words(lm, other, 0), strict=True)
    ]
    assert [text.replace(" and", " alongside") for text in prompts.texts] == other.texts


def test_other_names_keep_and_and_the_order(lm, prompts):
    other = prompts.with_other_names(lm, seed=3)
    assert torch.equal(other.abba, prompts.abba)
    for row in range(len(prompts)):
        mine = {int(prompts.indirect[row]), int(prompts.subject[row])}
        assert not mine & set(other.tokens.ids[row].tolist())
        assert "and" in words(lm, other, row) and len(words(lm, other, row)) > len(words(lm, prompts, row))
    assert other.texts == prompts.with_other_names(lm, seed=3).texts != prompts.with_other_names(lm, seed=4).texts


def test_the_seed_makes_the_prompts(lm):
    assert (
        ioi.prompts(lm, n=5, seed=1).texts == ioi.prompts(lm, n=5, seed=1).texts != ioi.prompts(lm, n=5, seed=2).texts
    )


def test_a_tokenizer_without_names_is_refused(tiny_llama):
    with pytest.raises(saelab.ConfigError, match="0 of 36 names are one token"):
        ioi.prompts(tiny_llama)


def test_logit_differences_are_those_of_each_prompt_alone(lm, prompts):
    found = ioi.task(lm, prompts).logit_difference
    for row, text in enumerate(prompts.texts):
        logits = lm.logits(text)[0, -1]
        expected = logits[prompts.indirect[row]] - logits[prompts.subject[row]]
        assert found[row] == pytest.approx(float(expected), abs=1e-5)


def test_a_model_that_does_not_do_the_task_is_a_result_and_its_experiments_an_error(lm, prompts, sae):
    found = ioi.task(lm, prompts)
    assert not found.does_it and "does not do it" in repr(found)
    for experiment in (
        lambda: ioi.noising(lm, prompts, [0]),
        lambda: ioi.zero_by_block(lm, prompts),
        lambda: ioi.ablate_latents(lm, sae, prompts),
    ):
        with pytest.raises(saelab.DataError, match="does not do it"):
            experiment()


def test_ablation_is_the_splice_with_that_latent_left_out(lm, prompts, sae):
    few = prompts[:4]
    table = ioi.ablate_latents(lm, sae, few, must_work=False, progress=False)
    clean = ioi.task(lm, few).logit_difference
    assert set(table.prompt) == set(range(4)) and (table.part == "error").sum() == 4
    assert table.change.abs().min() > 0
    for row in table[table.part == "latent"].itertuples():
        mine = few[torch.tensor([row.prompt])]
        s2 = int(mine.s2[0])

        def without(codes, latent=row.latent, s2=s2):
            # position 0 is skipped: row s2 - 1 is S2
            return codes.where(~((codes.rows() == s2 - 1) & (codes.indices == latent)))

        with lm.splice(sae, error_term=True, edit=without):
            expected = float(ioi.logit_difference(lm, mine)[0])
        assert row.logit_difference == pytest.approx(expected, abs=1e-5)
        assert row.change == pytest.approx(expected - float(clean[row.prompt]), abs=1e-5)


def test_ablating_the_error_leaves_the_reconstruction(lm, prompts, sae):
    few = prompts[:3]
    table = ioi.ablate_latents(lm, sae, few, must_work=False, progress=False)
    rows, s2 = torch.arange(3), few.s2

    def reconstruct(x, where):
        y = x.clone()
        y[rows, s2] = sae(x[rows, s2])
        return y

    with lm.intervene("blocks.0.attn.hook_z", reconstruct):
        expected = ioi.logit_difference(lm, few)
    found = table[table.part == "error"].logit_difference.to_numpy()
    assert found == pytest.approx(expected.numpy(), abs=1e-5)


def test_by_latent_adds_up(lm, prompts, sae):
    table = ioi.ablate_latents(lm, sae, prompts, must_work=False, progress=False)
    found = ioi.by_latent(table, len(prompts))
    assert found.total.sum() * len(prompts) == pytest.approx(table.change.sum())
    assert found.live.max() <= len(prompts) and found.total.abs().is_monotonic_decreasing


def test_a_position_the_sae_is_not_for_has_no_rows(lm, prompts):
    strict = saelab.SAE(saelab.TopK(k=4, d_sae=32), 24, metadata={"site": "blocks.0.attn.hook_z"})
    strict.state.norm_limit.fill_(1e-9)
    table = ioi.ablate_latents(lm, strict, prompts, must_work=False, progress=False)
    assert not len(table) and {"prompt", "latent", "change"} <= set(table.columns)


def test_noising_puts_in_what_the_others_have(lm, prompts):
    table = ioi.noising(lm, prompts, [0, 1], seed=5, must_work=False)
    assert list(table.index) == ["clean", "other names", "alongside", "zero", "zero everywhere"]
    others = prompts.with_other_names(lm, 5)
    sites = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]

    def putting(value, position):
        def edit(x, where):
            return torch.cat([x[:, :position], value[None, None], x[:, position + 1 :]], dim=1)

        return edit

    found = []
    for row in range(len(prompts)):
        mine, other = prompts[row : row + 1], others[row : row + 1]
        values = {site: x[0, other.s2[0]] for site, x in lm.record(other.tokens, sites).items()}
        first, second = (lm.intervene(site, putting(values[site], int(mine.s2[0]))) for site in sites)
        with first, second:
            found.append(float(ioi.logit_difference(lm, mine)[0]))
    assert table.logit_difference["other names"] == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_normalisations(lm, prompts):
    table = ioi.noising(lm, prompts, [0], must_work=False)
    ld = table.logit_difference
    assert table.ratio["clean"] == table.normalised["clean"] == table.normalised_everywhere["clean"] == 1
    assert table.normalised["zero"] == 0 and table.normalised_everywhere["zero everywhere"] == 0
    assert table.ratio["alongside"] == pytest.approx(ld["alongside"] / ld["clean"])
    expected = (ld["alongside"] - ld["zero"]) / (ld["clean"] - ld["zero"])
    assert table.normalised["alongside"] == pytest.approx(expected)


def test_what_changes_nothing_is_not_normalised(lm, prompts):
    table = ioi.noising(lm, prompts, [1], must_work=False)  # the last block at S2 is never read at the end
    assert table.logit_difference["zero"] == table.logit_difference["clean"] and table.normalised.isna().all()
    assert table.normalised_everywhere.notna().all()


def test_zero_by_block_is_the_noising_with_zeros(lm, prompts):
    by_block = ioi.zero_by_block(lm, prompts, must_work=False)
    assert list(by_block.index) == [0, 1]
    table = ioi.noising(lm, prompts, [0], must_work=False)
    assert by_block.change[1] == 0
    assert by_block.logit_difference[0] == pytest.approx(table.logit_difference["zero"], abs=1e-6)


def test_unknown_blocks_are_refused(lm, prompts):
    with pytest.raises(saelab.ConfigError, match="give some of 0 to 1"):
        ioi.noising(lm, prompts, [2], must_work=False)


def test_the_bundled_model_does_it(smollm2):
    found = ioi.task(smollm2, ioi.prompts(smollm2, n=8, seed=0))
    assert found.does_it and found.mean > 1


def test_rows_keep_everything(prompts):
    some = prompts[torch.tensor([3, 1])]
    assert some.texts == [prompts.texts[3], prompts.texts[1]]
    fields = [field.name for field in dataclasses.fields(prompts) if field.name not in ("tokens", "names", "sentences")]
    assert all(torch.equal(getattr(some, name), getattr(prompts, name)[[3, 1]]) for name in fields)
