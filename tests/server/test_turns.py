"""Turns: one at a time, first come first served, whatever the threads do."""

import threading
import time

from fedward.server.turns import Turns


def test_the_first_has_the_turn_until_it_leaves():
    turns = Turns()
    assert turns.wait("a", 0)
    assert turns.wait("a", 0)  # still
    assert not turns.wait("b", 0)
    turns.leave("a")
    assert turns.wait("b", 0)


def test_who_comes_back_stands_behind_those_who_wait():
    turns = Turns()
    assert turns.wait("a", 0)
    assert not turns.wait("b", 0)
    assert not turns.wait("c", 0)
    turns.leave("a")
    assert not turns.wait("a", 0)
    turns.leave("b")  # gave up its place without a turn
    assert turns.wait("c", 0)
    assert not turns.wait("a", 0)


def test_to_leave_without_a_turn_changes_nothing():
    turns = Turns()
    turns.leave("a")
    assert turns.wait("b", 0)


def test_threads_never_overlap_and_all_get_the_same_share():
    turns, inside, order = Turns(), set[str](), list[str]()

    def work(name: str) -> None:
        for _ in range(20):
            while not turns.wait(name, 5):
                pass
            assert not inside
            inside.add(name)
            time.sleep(0.0005)
            order.append(name)
            inside.remove(name)
            turns.leave(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(order) == 60
    assert all(len(set(order[at : at + 3])) == 3 for at in range(6, 54, 3))
