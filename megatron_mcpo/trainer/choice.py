"""Choose the prompts that a step learns from, of those that are under way. Pure arithmetic.

Prompts have numbers in the order in which they are drawn; B of them belong to a step: numbers 0 .. B-1 to step 1, and
so on. With a slack of 0 every step learns from its own. With more it may learn from later ones whose responses are
finished, and leave some of its own to the next `slack` steps.
"""

from collections.abc import Collection, Sequence


def step_of(number: int, *, prompts: int) -> int:
    """Return the step that a prompt belongs to; prompts: B."""
    return number // prompts + 1


def choose(
    waiting: Sequence[int], finished: Collection[int], *, step: int, prompts: int, slack: int
) -> list[int] | None:
    """Return the numbers of the prompts that a step learns from; None if it must wait for more.

    These are the first that are finished, provided that no prompt, of this step or a later one, is then learned from
    more than `slack` steps after its own. The result depends on what is finished, not on the order in which it was.

    Args:
        waiting: prompts under way and finished, ascending
        finished: of those
        step: the step, after which every step before it has had B prompts
        prompts: B
        slack: the most steps that a prompt may be late
    """
    chosen = [number for number in waiting if number in finished][:prompts]
    if len(chosen) < prompts:
        return None
    last = step_of(waiting[-1], prompts=prompts) + slack
    for late in range(step, last + 1):
        first_in_time = (late - slack) * prompts  # those before it must be learned from in step `late` or earlier
        must = sum(number < first_in_time for number in waiting) - (late - step) * prompts
        if sum(number < first_in_time for number in chosen) < must:
            return None
    return chosen
