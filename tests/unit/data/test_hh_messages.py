"""The script beside the example rows that turns HH-RLHF into messages, run as a user runs it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "recipes" / "llm" / "files" / "hh_messages.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_pairs_become_messages_and_others_are_counted(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is in the\n\ntwo paragraphs?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} First.\n\nSecond.", "rejected": f"{start} No."},
        {"chosen": f"{start} The same.", "rejected": f"{start} The same."},
        {"chosen": f"{start} Said.", "rejected": f"{start}"},
        {"chosen": f"{start} Said.", "rejected": "\n\nHuman: Hi\n\nAssistant: Said."},
    ]
    file = tmp_path / "hh.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    done = run(tmp_path / "out.jsonl", file)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out.jsonl'}: 1 pairs; 3 left out\n")
    (pair,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    common = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is in the\n\ntwo paragraphs?"},
    ]
    assert pair == {
        "chosen": [*common, {"role": "assistant", "content": "First.\n\nSecond."}],
        "rejected": [*common, {"role": "assistant", "content": "No."}],
    }


def test_without_files_it_says_how_it_is_called(tmp_path: Path) -> None:
    done = run(tmp_path / "out.jsonl")
    assert done.returncode != 0
    assert done.stderr.startswith("usage: ")
