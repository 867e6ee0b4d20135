"""State of one call is never another's: threads and tasks that record, intervene, splice, steer and generate at once."""

import asyncio
import contextvars
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from saelab import steering
from saelab.base.errors import InterventionError
from saelab.models.hooks import open_interventions
from saelab.models.sites import intervene, record
from tests.toy_steering import doubles, sae_of

SITE, LATE = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
PROMPTS = ["The state of the union", "My", "peace and bread", "In 1862 the war went on", "a b", "Work!"]


@pytest.fixture(scope="module")
def lm():
    return doubles()[0]


def push(strength=8.0, **more):
    return steering.add(torch.linspace(-1, 1, 32), strength=strength, unit="activation", site=SITE, **more)


def text(lm, prompt):
    return lm.generate(prompt, 4, temperature=0)


def test_threads_under_one_steering_each_get_the_text_they_get_alone(lm):
    scope = steering.Scope(generated=False, positions=[-1, 2])
    with lm.steer(push(scope=scope)) as alone:
        expected = [text(lm, prompt) for prompt in PROMPTS]
    with lm.steer(push(scope=scope)) as together, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: text(lm, prompt), PROMPTS)) == expected
    assert len(together.generations) == len(PROMPTS) and all(stack == [together] for _, stack in together.generations)
    counted = ["calls", "positions", "changed"]
    assert together.to_pandas()[counted].equals(alone.to_pandas()[counted])
    assert expected != [text(lm, prompt) for prompt in PROMPTS]


def test_each_thread_has_its_own_interventions(lm):
    kinds = {
        "steered": lambda: lm.steer(push()),
        "otherwise": lambda: lm.steer(push(-8.0)),
        "intervened": lambda: lm.intervene(LATE, lambda x, where: x * (where.positions % 2)[..., None]),
        "spliced": lambda: lm.splice(sae_of(lm)),
    }

    def texts(kind):
        if kind == "plain":
            assert open_interventions(lm.runner) == 0 and lm.receipts == []
            return [text(lm, prompt) for prompt in PROMPTS[:3]]
        with kinds[kind]():
            assert open_interventions(lm.runner) == 1
            return [text(lm, prompt) for prompt in PROMPTS[:3]]

    order = [*kinds, "plain", "steered", "plain"]
    expected = [texts(kind) for kind in order]
    assert len({str(found) for found in expected}) == 5
    ready = threading.Barrier(len(order))

    def at_once(kind):
        ready.wait(10)
        return texts(kind)

    with ThreadPoolExecutor(len(order)) as pool:
        assert list(pool.map(at_once, order)) == expected


def test_recording_reads_the_callers_own_pass(lm):
    expected = [lm.record(prompt, [SITE, LATE]) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: lm.record(prompt, [SITE, LATE]), PROMPTS))
    for mine, alone in zip(found, expected, strict=True):
        assert torch.equal(mine[SITE], alone[SITE]) and torch.equal(mine[LATE], alone[LATE])


def test_a_transcoders_rows_are_those_of_the_threads_own_pass(lm):
    sae = sae_of(lm)
    sae.metadata.update(site=SITE, target_site=LATE)

    with lm.splice(sae), ThreadPoolExecutor(4) as pool:
        expected = [lm.logits(prompt) for prompt in PROMPTS]
        found = list(pool.map(lm.logits, PROMPTS))
    assert all(torch.equal(mine, alone) for mine, alone in zip(found, expected, strict=True))


NET = nn.Sequential(nn.Identity(), nn.Identity())
ONE = torch.ones(1)


def in_a_thread(fn):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result(timeout=10)


def run():
    return NET(ONE).item()


def added(a, where):
    return a + 1


def test_the_main_threads_reach_threads_that_start_within_and_no_older_ones():
    with ThreadPoolExecutor(1) as older, ThreadPoolExecutor(1) as unused:
        assert older.submit(run).result() == 1
        with intervene(NET, "0", added):
            assert run() == 2 and in_a_thread(run) == 2
            assert unused.submit(run).result() == 2  # its thread starts here
            assert older.submit(run).result() == 1
            assert older.submit(contextvars.copy_context().run, run).result() == 2  # unless it is told
            assert open_interventions(NET) == in_a_thread(lambda: open_interventions(NET)) == 1
            assert older.submit(lambda: record(NET, "0", ONE)).result().item() == 1
        assert unused.submit(run).result() == run() == 1


def test_what_another_thread_opens_stays_in_it():
    def inside():
        with intervene(NET, "0", added):
            mine = run()
            opened.set()
            assert go_on.wait(10)
            return mine, run()

    opened, go_on = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(inside)
        assert opened.wait(10)
        assert run() == 1 and in_a_thread(run) == 1 and open_interventions(NET) == 0
        go_on.set()
        assert other.result() == (2, 2)


def test_a_thread_nests_its_own_within_the_main_threads():
    def inside():
        with intervene(NET, "1", lambda a, where: a * 10):
            return run()

    with intervene(NET, "0", added):
        assert in_a_thread(inside) == 20 and run() == 2


def test_tasks_of_one_thread_are_told_apart():
    async def changed():
        with intervene(NET, "0", added):
            opened.set()
            await finished.wait()
            return run(), await asyncio.to_thread(run)

    async def plain():
        await opened.wait()
        found = run(), await asyncio.to_thread(run)
        finished.set()
        return found

    async def both():
        return await asyncio.gather(changed(), plain())

    opened, finished = asyncio.Event(), asyncio.Event()
    assert asyncio.run(both()) == [(2, 2), (1, 1)]


def test_contexts_that_open_and_close_leave_the_passes_of_other_threads_alone():
    def churn(_):
        found = []
        for _ in range(60):
            with intervene(NET, "0", added), intervene(NET, "1.input", lambda a, where: a * 10):
                found.append(run())
            found.append(record(NET, "1.input", ONE).item())
        return found

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(churn, range(4))) == [[20, 1] * 60] * 4
    finally:
        sys.setswitchinterval(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in NET.modules())


def test_a_submodule_run_by_another_thread_is_nobodys_error():
    def inside():
        return NET[0](ONE).item()

    with ThreadPoolExecutor(1) as older:
        older.submit(run).result()
        with intervene(NET, "0", added):
            assert older.submit(inside).result() == 1


def test_a_thread_that_steering_does_not_reach_is_told_how_to(lm):
    with ThreadPoolExecutor(1) as older:
        plain = older.submit(text, lm, "abc").result()
        with pytest.raises(InterventionError, match="copy_context"), lm.steer(push()):
            assert older.submit(text, lm, "abc").result() == plain
        with lm.steer(push()):
            assert older.submit(contextvars.copy_context().run, text, lm, "abc").result() == text(lm, "abc") != plain
