"""The recipes of lab/EXTEND.md, each applied to a copy of the repository: its test, its command."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--n_layer 1 --n_embd 16 --base_steps 2 --base_batch 4 --steps 2 --batch_size 4 --K 3 "
        "--eval_size 4 --eval_every 2 --device cpu").split()
PAGE = (ROOT / "lab/EXTEND.md").read_text(encoding="utf-8")
RECIPES = re.split(r"^## ", PAGE, flags=re.M)[1:]
BLOCK = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.M | re.S)


def apply(diff: str, home: Path) -> None:
    """In the file that follows @@, replace the lines without `+` by the lines without `-`."""
    for part in diff.split("@@ ")[1:]:
        name, *lines = part.splitlines(keepends=True)
        path = home / name.strip()
        old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name.strip()} holds this {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def shorten(words: list[str]) -> list[str]:
    """Flags that make a command short, except those that it gives or varies itself."""
    kept = {}
    for word in TINY:
        if word.startswith("--"):
            name = word
        kept.setdefault(name, []).append(word)
    return [word for name, group in kept.items() if name not in words for word in group]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: text.splitlines()[0])
def test_a_recipe_works_as_it_is_written(tmp_path, recipe):
    home = tmp_path / "repository"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".git", "out", "datasets", "assets"))
    for language, name, body in BLOCK.findall(recipe):
        if language == "diff":
            apply(body, home)
        else:
            (home / name).write_text(body, encoding="utf-8")

    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=home, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    assert "1 passed" in python("-m", "pytest", "-q", "tests/test_mine.py")
    words = shlex.split(re.search("See it: `python (.*?)`", recipe).group(1))
    python(*words, *shorten(words))


def test_the_page_has_six_short_recipes():
    assert len(RECIPES) == 6 and len(PAGE.splitlines()) <= 120
