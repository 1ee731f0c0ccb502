"""mutate.py's list fits the code: each line that it changes stands once, each test file that it names is there."""

import mutate


def test_every_mutation_is_one_line_that_stands_once_and_its_tests_exist():
    assert list(mutate.problems()) == []
    assert len(mutate.MUTATIONS) >= 80 and len(set(mutate.MUTATIONS)) == len(mutate.MUTATIONS)
