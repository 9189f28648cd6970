import subprocess
import sys

import pytest

from vesicle.errors import VesicleError
from vesicle.tasks.base import Task
from vesicle.tasks.registry import TASKS, find_task, task_names


@pytest.mark.parametrize("name", TASKS)
def test_a_task_knows_its_own_name_and_is_whole(name):
    task = find_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.default_split in task.splits
    assert task.metrics
    assert task.title
    assert task.folder


def test_names_are_in_order_and_the_registry_is_cheap():
    assert task_names()[:2] == ["squad", "race"]
    code = (
        "import sys, vesicle.tasks.registry; "
        "print({'vesicle.tasks.squad', 'datasets', 'transformers', 'sacrebleu'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sqaud", r"unknown task 'sqaud'; did you mean squad\? allowed: squad, race"),
        ("SQuAD", r"did you mean squad\?"),
        ("wikitext-2", r"did you mean wikitext2 or wikitext103\?"),
        ("xyzzy", r"unknown task 'xyzzy'; allowed: squad"),
    ],
)
def test_an_unknown_task_gets_near_matches(name, message):
    with pytest.raises(VesicleError, match=message) as raised:
        find_task(name)
    assert "\n" not in str(raised.value)
