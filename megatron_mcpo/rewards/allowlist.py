"""List the reasoning-gym generators that may be trained on: data alone, so that a check takes milliseconds.

A generator is allowed when its scorer (`score_answer`, over the whole class hierarchy)
  - never hands the model's text to `eval`, `exec` or sympy's parser, which is `eval` with builtins;
  - gives the item's own answer full marks after the item has been through JSON;
  - depends on the item alone, not on the options that the item was generated with;
  - returns a number for hostile text (tests/unit/test_rewards.py) instead of raising, and never full marks: coin_flip,
    game_of_life_halting and complex_arithmetic are refused because some nonsense passes them.
The tests check the first rule for all, the others for the generators of the quick start.
"""

import difflib

from megatron_mcpo.config.config import Config

_ALLOWED = """
ab acre advanced_geometry aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher
calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits count_primes course_schedule cryptarithm
decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification futoshiki gcd
group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm
leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
modulo_grid needle_haystack number_filtering number_format number_sequence palindrome_generation
palindrome_partitioning path_star pool_matrix power_function products quantum_lock ransom_note rectangle_count
rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path simple_equations simple_geometry sokoban
spell_backward string_manipulation string_splitting string_synthesis sudoku survo syllogism tower_of_hanoi tsumego
word_sequence_reversal word_sorting zebra_puzzles
"""
_EVALUATES_ANSWERS = """
binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24 simple_integration
spiral_matrix string_insertion
"""

ALLOWED = frozenset(_ALLOWED.split())

EVALUATES_ANSWERS = frozenset(_EVALUATES_ANSWERS.split())
"""Generators that are refused with a special reason: their scorers execute the model's text."""


def problems(config: Config) -> list[str]:
    """Return one line (key, value, rule, fix) for every source whose generator is not allowed."""
    found = []
    for domain in config.domain:
        for index, source in enumerate(domain.sources):
            if source.generator is not None and source.generator not in ALLOWED:
                where = f"domain {domain.name!r}: sources[{index}].generator = {source.generator!r}"
                found.append(f"{where}: {_reason(source.generator)}; {_fix(source.generator)}")
    return found


def _reason(generator: str) -> str:
    if generator in EVALUATES_ANSWERS:
        return "its scorer executes the model's text as code"
    return "not one of the reasoning-gym datasets that may be trained on"


def _fix(generator: str) -> str:
    near = difflib.get_close_matches(generator, ALLOWED, n=1)
    if near and generator not in EVALUATES_ANSWERS:
        return f"did you mean {near[0]!r}?"
    return "choose another, such as 'chain_sum' (all names: megatron_mcpo/rewards/allowlist.py)"
