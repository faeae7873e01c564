import subprocess
import sys
from importlib.util import find_spec

import pytest

from normkit.errors import InputError
from normkit.rl.judges import JUDGES, judge_class


@pytest.mark.parametrize("name", ["llm", "openai"])
def test_judges_by_name(name):
    assert judge_class(name).__name__ == JUDGES[name][1]
    assert callable(judge_class(name).judge)


def test_every_registered_judge_has_its_module():
    for name, (module, _) in JUDGES.items():
        assert find_spec(module) is not None, name


def test_an_unknown_judge_is_refused_with_the_known_names():
    with pytest.raises(InputError, match="embedding, llm, openai, got 'oracle'"):
        judge_class("oracle")


def test_the_registry_needs_no_extra():
    code = (
        "import sys\n"
        "blocked = ('httpx', 'tenacity', 'transformers', 'sklearn')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import normkit.rl, normkit.rl.judges, normkit.rl.judges.llm, normkit.rl.users.llm\n"
        "from normkit.rl.judges.openai import OpenAIJudge\n"
        "try:\n"
        "    OpenAIJudge('http://host', 'm')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "normkit[rl]" in done.stdout
