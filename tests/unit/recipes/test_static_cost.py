"""The static check starts fast and imports nothing heavy."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "numpy", "peft", "pyarrow", "tokenizers", "jinja2")
PROGRAM = """
import json, sys, time
from recipes.loading.load import load_recipe
load_recipe(sys.argv[1])
print(json.dumps([sorted(sys.modules), time.process_time()]))
"""


def test_checking_the_quickstart_is_light() -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "recipes" / "quickstart.yaml")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    modules, cpu_seconds = json.loads(output)
    assert not set(HEAVY) & set(modules)
    assert cpu_seconds < 1.5
