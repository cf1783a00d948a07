"""Whose prompt goes next: shares by weight, no debts and no savings, priorities within a key."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.router.clients import FairQueue, Flow

Queue = FairQueue[tuple[str, int, int]]  # name of the flow, priority, number
SIZES = st.integers(1, 5000)


def pop(queue: Queue) -> tuple[str, int, int]:
    return queue.pop(queue.by_turn()[0])


def popped(queue: Queue) -> list[str]:
    names = []
    while queue.by_turn():
        names.append(pop(queue)[0])
    return names


def flooded(num_items: int, num_tokens: int) -> tuple[Queue, Flow[tuple[str, int, int]]]:
    queue, flow = Queue(), Flow[tuple[str, int, int]]()
    for number in range(num_items):
        queue.push(flow, ("a", 0, number), num_tokens)
    return queue, flow


@given(given=SIZES, first=SIZES, num_popped=st.integers(0, 30))
def test_a_key_that_comes_later_goes_next(given: int, first: int, num_popped: int) -> None:
    queue, _ = flooded(40, given)
    for _ in range(num_popped):
        pop(queue)
    late = Flow[tuple[str, int, int]]()
    queue.push(late, ("b", 0, 0), first)
    queue.push(late, ("b", 0, 1), first)
    # While nothing was popped, both are equal, and the one that came first goes first.
    assert "b" in popped(queue)[: 2 if num_popped == 0 else 1]


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=2, max_size=4),
    sizes=st.lists(SIZES, min_size=1, max_size=8),
)
def test_waiting_keys_share_by_weight(weights: list[float], sizes: list[int]) -> None:
    queue, flows = Queue(), {str(i): Flow[tuple[str, int, int]](w) for i, w in enumerate(weights)}
    had = dict.fromkeys(flows, 0.0)
    for name, flow in flows.items():
        for number in range(200):
            queue.push(flow, (name, 0, number), sizes[(number + int(name)) % len(sizes)])
    while all(flow.waiting for flow in flows.values()):
        name, _, number = pop(queue)
        had[name] += sizes[(number + int(name)) % len(sizes)] / weights[int(name)]
        # One prompt of each at most, since a prompt is not cut.
        assert max(had.values()) - min(had.values()) <= max(sizes) / min(weights)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-3, 3), SIZES, st.booleans()), max_size=60
    )
)
def test_each_item_comes_once_and_in_the_order_of_its_key(
    steps: list[tuple[str, int, int, bool]],
) -> None:
    queue, flows = Queue(), {name: Flow[tuple[str, int, int]]() for name in "abc"}
    waiting: list[tuple[str, int, int]] = []
    for number, (name, priority, num_tokens, pops) in enumerate(steps):
        queue.push(flows[name], item := (name, priority, number), num_tokens, priority)
        waiting.append(item)
        if pops:
            item = pop(queue)
            assert item == min(each for each in waiting if each[0] == item[0])
            waiting.remove(item)
    for item in waiting[::2]:
        queue.remove(flows[item[0]], item)
    left = []
    while queue.by_turn():
        left.append(pop(queue))
    assert sorted(left) == sorted(waiting[1::2])
    assert all(a[0] != b[0] or a < b for a, b in pairwise(sorted(left, key=lambda each: each[0])))


def test_what_a_key_had_while_nobody_waited_is_forgotten() -> None:
    queue, alone = flooded(3, 1000)
    assert popped(queue) == ["a"] * 3
    queue.answered(alone, 100_000)
    other = Flow[tuple[str, int, int]]()
    for number in range(2):
        queue.push(alone, ("a", 0, number), 1000)
        queue.push(other, ("b", 0, number), 1000)
    assert popped(queue) == ["b", "a", "b", "a"]


def test_answers_count_while_others_wait() -> None:
    queue, writer = flooded(4, 10)
    other = Flow[tuple[str, int, int]]()
    for number in range(4):
        queue.push(other, ("b", 0, number), 10)
    assert pop(queue)[0] == "a"
    queue.answered(writer, 25)
    assert popped(queue) == ["b", "b", "b", "b", "a", "a", "a"]
