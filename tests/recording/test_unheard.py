"""What no guard hears of is listened for while programs live, and not longer."""

from __future__ import annotations

import gc
import pickle

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import lateinit
from lateinit._program import Program
from lateinit._recording import unheard
from lateinit._recording.watched import Watched


def test_it_is_in_force_while_one_of_the_programs_lives() -> None:
    heard: list[str] = []

    def begin() -> bool:
        heard.append("begin")
        return True

    watched = Watched(begin, lambda: heard.append("end"))
    programs = [Program(), Program()]
    for program in (*programs, programs[0]):
        watched.add(program)
    assert heard == ["begin", "begin"]
    del program, programs[0]
    gc.collect()
    assert heard == ["begin", "begin"]
    programs.clear()
    gc.collect()
    assert heard == ["begin", "begin", "end"]


def test_it_begins_again_with_a_program_that_there_was_nothing_to_hear_of() -> None:
    answers = [False, True]
    watched, program = Watched(lambda: answers.pop(0), lambda: None), Program()
    for _ in range(3):
        watched.add(program)
    assert answers == []


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
