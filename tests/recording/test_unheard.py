"""What no guard hears of is listened for while programs live, and not longer."""

from __future__ import annotations

import gc
import pickle
import threading

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import lateinit
from lateinit._program import Program
from lateinit._recording import unheard
from lateinit._recording.watched import Watched
from lateinit._torch import surroundings


def test_it_is_in_force_while_one_of_the_programs_lives() -> None:
    heard: list[str] = []

    def begin() -> bool:
        heard.append("begin")
        return True

    watched = Watched(begin, lambda: heard.append("end"))
    programs = [Program(), Program()]
    for program in (*programs, programs[0]):
        watched.add(program)
    assert set(heard) == {"begin"}
    del program, programs[0]
    gc.collect()
    assert set(heard) == {"begin"}
    programs.clear()
    gc.collect()
    assert heard.index("end") == len(heard) - 1


def test_it_begins_again_with_a_program_that_there_was_nothing_to_hear_of() -> None:
    answers: list[bool] = []

    def begin() -> bool:
        answers.append(len(answers) > 0)
        return answers[-1]

    watched, program = Watched(begin, lambda: None), Program()
    watched.add(program)
    assert answers == [False]
    watched.add(program)
    begun = len(answers)
    watched.add(program)
    assert begun == len(answers) > 1


def test_it_stays_in_force_for_a_program_that_comes_while_it_ends() -> None:
    heard, programs = [], [Program()]

    def begin() -> bool:
        heard.append("begin")
        return True

    def end() -> None:
        heard.append("end")
        if len(programs) == 0:
            programs.append(Program())
            watched.add(programs[0])

    watched = Watched(begin, end)
    watched.add(programs[0])
    programs.clear()
    gc.collect()
    assert heard[-1] == "begin"


def test_the_garbage_collector_waits_for_no_turn_of_another_thread() -> None:
    """Whoever has one may wait for one that the collecting thread has."""
    kept = [lateinit.deferred_init(nn.Linear, 2, 3), lateinit.deferred_init(torch.arange, 9.0)]
    kept += [lateinit.deferred_init(lateinit.nn.LazyLinear, 3), lateinit.deferred_init(nn.ReLU)]

    def collect() -> None:
        kept.clear()
        gc.collect()

    collecting = threading.Thread(target=collect, daemon=True)
    # Other tests have left some of their own taken.
    taken = [lock for lock in surroundings._turns if lock.acquire(blocking=False)]
    try:
        assert taken
        collecting.start()
        collecting.join(timeout=60)
        assert not collecting.is_alive()
    finally:
        for lock in taken:
            lock.release()


def held() -> tuple[object, ...]:
    cls = torch.jit.ScriptModule
    return cls.save, cls.save_to_buffer, len(_global_optimizer_pre_hooks)


def test_listening_begins_once_and_leaves_torch_as_it_was() -> None:
    gc.collect()
    unheard._listening.end()  # programs of other tests may live
    before = held()
    for _ in range(2):
        assert unheard._listening.begin()
        for mine, own in zip(held(), before, strict=True):
            assert mine == own + 1 if isinstance(own, int) else mine is not own
    for _ in range(2):
        unheard._listening.end()
        assert held() == before
    unheard._listening.begin()


def test_a_block_and_an_unpickled_model_have_it_begin() -> None:
    data = pickle.dumps(lateinit.deferred_init(nn.Linear, 2, 2))
    gc.collect()
    unheard._listening.end()
    model = pickle.loads(data)
    assert unheard._before_step in _global_optimizer_pre_hooks.values()
    unheard._listening.end()
    other = lateinit.deferred_init(nn.Linear, 2, 2)
    assert unheard._before_step in _global_optimizer_pre_hooks.values()
    assert lateinit.is_deferred([model, other])
